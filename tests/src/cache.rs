//! Real models and inputs, which `runner/reference/fetch-models` takes out of packages before the tests run, and the
//! runtimes' own Python packages.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The root of this checkout.
pub fn repository() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    path.canonicalize().expect("the tests run in their checkout")
}

fn root() -> PathBuf {
    std::env::var_os("MESH_TEST_CACHE").map_or_else(|| repository().join("target/test-cache"), PathBuf::from)
}

/// A file of the cache: `models/nmp.onnx`, `inputs/astronaut.png`.
///
/// # Panics
/// If it was not fetched; the message names the command that does.
pub fn cached(path: &str) -> PathBuf {
    find(path).unwrap_or_else(|missing| panic!("{missing}"))
}

/// A file of the cache, or a text that says which one is missing and what fetches it.
///
/// # Errors
/// If it was not fetched.
pub fn find(path: &str) -> Result<PathBuf, String> {
    let file = root().join(path);
    let missing = || format!("{} is missing: run ./test, or runner/reference/fetch-models", file.display());
    if file.exists() { Ok(file) } else { Err(missing()) }
}

/// A cached model by its file name.
pub fn model(name: &str) -> PathBuf {
    cached(&format!("models/{name}"))
}

/// A cached input by its file name.
pub fn input(name: &str) -> PathBuf {
    cached(&format!("inputs/{name}"))
}

/// The Python of the reference environment, in which the runtimes are packages; `None` if `runner/reference/check` has
/// not made it, or has made it with other versions.
pub fn reference_python() -> Option<PathBuf> {
    let environment = root().join("venv");
    // The copy is written last.
    let made_of = fs::read(environment.join("requirements.txt")).ok()?;
    let wanted = fs::read(repository().join("runner/reference/requirements.txt")).ok()?;
    (made_of == wanted).then(|| environment.join("bin/python"))
}
