//! GPUs that do not exist: a stand-in for the vendor's management library, which workers load in its place.
//!
//! Owns the library, built with the system's C compiler, and the figures that it shows. Never ships, and no model runs on it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::process::binary;

/// What the library shows of one GPU.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Name of the model.
    pub name: &'static str,
    /// Size of its memory, GiB.
    pub total_gib: u64,
    /// Memory in use, GiB.
    pub used_gib: u64,
    /// Time in use, percent.
    pub busy_percent: u32,
    /// Calls that fail: `h` the handle, `n` the name, `m` memory, `u` utilisation, `p` processes.
    pub faults: &'static str,
}

/// A stand-in library and its figures, which may change while workers look.
#[derive(Debug)]
pub struct Gpus {
    folder: TempDir,
}

impl Gpus {
    /// The library without a driver behind it, until the first [`Self::show`].
    pub fn new() -> Self {
        Self::built(&[])
    }

    /// The library of an old driver that knows no call for a GPU's memory.
    pub fn without_memory_call() -> Self {
        Self::built(&["-DWITHOUT_MEMORY"])
    }

    fn built(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(folder.path().join("libnvidia-ml.so.1"));
        compiler.arg(format!("-DFIGURES=\"{}\"", figures(folder.path()).display())).args(options);
        compiler.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/nvml.c"));
        let built = compiler.output().expect("a C compiler, which the mesh itself is built with");
        assert!(built.status.success(), "{compiler:?}: {}", String::from_utf8_lossy(&built.stderr));
        Self { folder }
    }

    /// The folder for the workers' loader path.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A runner that computes on the processor what demands a GPU: these GPUs do not exist.
    pub fn runner(&self) -> String {
        let path = self.folder.path().join("runner");
        let other = "[ \"$it\" = --gpu-required ] && it=--gpu";
        let script = format!(
            "#!/bin/sh\nfor it; do shift; {other}; set -- \"$@\" \"$it\"; done\nexec {} \"$@\"\n",
            binary("mesh-runner").canonicalize().expect("mesh-runner is built").display()
        );
        fs::write(&path, script)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
            .expect("the folder is ours");
        path.display().to_string()
    }

    /// Shows these GPUs from now on.
    pub fn show(&self, gpus: &[Shown]) {
        self.show_using(gpus, &[]);
    }

    /// Shows these GPUs, and processes that use them: index of the GPU, process id, GiB in use.
    pub fn show_using(&self, gpus: &[Shown], processes: &[(usize, u32, u64)]) {
        let gpu = |(index, gpu): (usize, &Shown)| {
            let Shown { name, total_gib, used_gib, busy_percent, faults } = gpu;
            let faults = if faults.is_empty() { "-" } else { faults };
            format!("gpu {index} {} {} {busy_percent} {faults} {name}\n", total_gib << 10, used_gib << 10)
        };
        let process = |(gpu, pid, gib): &(usize, u32, u64)| format!("process {gpu} {pid} {}\n", gib << 10);
        let text: String = gpus.iter().enumerate().map(gpu).chain(processes.iter().map(process)).collect();
        // Renamed into place: a look never sees half of it.
        let draft = self.folder.path().join("draft");
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, figures(self.folder.path())))
            .expect("the folder is ours");
    }
}

impl Default for Gpus {
    fn default() -> Self {
        Self::new()
    }
}

fn figures(folder: &Path) -> PathBuf {
    folder.join("figures")
}
