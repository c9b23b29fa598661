//! The inference libraries: the folders that are searched, in this order, and the texts for one that is missing or does
//! not work.
//!
//! Owns these, and that no library sends anything to its makers. Never opens a library.

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

use proto_msgs::{Arch, ErrorCode, Failure, ModelFormat};

/// Forbids ONNX Runtime its telemetry. The library asks the environment when it is opened. What its interface offers
/// comes later: by then it has an id and a database in the home folder, and it looks up its makers' server.
///
/// # Safety
/// No other thread runs.
pub(crate) unsafe fn forbid_telemetry() {
    // SAFETY: as for this function.
    unsafe { env::set_var("ORT_DISABLE_TELEMETRY", "1") };
}

/// File name of the library for models of a format.
pub(crate) const fn library_name(format: ModelFormat) -> &'static str {
    match format {
        ModelFormat::TfLite => "libLiteRt.so",
        ModelFormat::Onnx => "libonnxruntime.so",
    }
}

/// Path of the library for models of this format.
///
/// # Errors
/// `ENGINE_UNAVAILABLE` with the folders that were searched and the command that fetches the library.
pub(crate) fn find(format: ModelFormat) -> Result<PathBuf, Failure> {
    let folders = folders();
    let mut candidates = folders.iter().map(|folder| folder.join(library_name(format)));
    candidates.find(|path| path.is_file()).ok_or_else(|| {
        let searched: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
        Failure::new(
            ErrorCode::EngineUnavailable,
            format!("{} is in none of {}; {FETCH}", library_name(format), searched.join(", ")),
        )
    })
}

/// The failure for a library that exists but cannot be used.
pub(crate) fn unusable(path: &Path, why: impl fmt::Display) -> Failure {
    let text = format!("cannot use {}: {why}; {FETCH}", path.display());
    Failure::new(ErrorCode::EngineUnavailable, text)
}

/// The failure for a task that demands a GPU, which this library cannot use.
pub(crate) fn no_gpu(path: &Path, why: impl fmt::Display) -> Failure {
    let text = format!(
        "{} cannot compute on a GPU: {why}; submit without --gpu-memory to compute on the processor, or put a library with \
         CUDA in its place at this worker",
        path.display()
    );
    Failure::new(ErrorCode::EngineUnavailable, text)
}

/// The remark for a library that is not where `MESH_RUNTIME_DIR` says.
pub(crate) fn passed_over(library: &Path) -> Option<String> {
    let chosen = chosen_folders().filter(|folders| !folders.iter().any(|folder| library.starts_with(folder)))?;
    let name = library.file_name()?.display();
    Some(format!("MESH_RUNTIME_DIR={} holds no {name}: {} is used", chosen[0].display(), library.display()))
}

const FETCH: &str = "run docker/fetch-runtimes to fetch the libraries for this machine";

fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<_> = chosen_folders().into_iter().flatten().collect();
    let data = match env::var_os("XDG_DATA_HOME").filter(|folder| !folder.is_empty()) {
        Some(data) => Some(PathBuf::from(data)),
        None => env::home_dir().map(|home| home.join(".local/share")),
    };
    folders.extend(data.map(|data| data.join("mesh/runtimes").join(Arch::HERE.name())));
    folders.extend(["/usr/local/lib/mesh", "/usr/lib/mesh"].map(PathBuf::from));
    let own = env::current_exe().ok();
    folders.extend(own.and_then(|program| program.parent().map(Path::to_path_buf)));
    folders
}

/// The folders that `MESH_RUNTIME_DIR` stands for.
fn chosen_folders() -> Option<[PathBuf; 2]> {
    let chosen = PathBuf::from(env::var_os("MESH_RUNTIME_DIR").filter(|folder| !folder.is_empty())?);
    let of_arch = chosen.join(Arch::HERE.name());
    Some([chosen, of_arch])
}
