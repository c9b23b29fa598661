//! Real models and inputs, which `runner/reference/fetch-models` takes out of packages before the tests run.

use std::path::{Path, PathBuf};

/// The root of this checkout.
pub fn repository() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    path.canonicalize().expect("the tests run in their checkout")
}

/// A file of the cache: `models/nmp.onnx`, `inputs/astronaut.png`.
///
/// # Panics
/// If it was not fetched; the message names the command that does.
pub fn cached(path: &str) -> PathBuf {
    let root =
        std::env::var_os("MESH_TEST_CACHE").map_or_else(|| repository().join("target/test-cache"), PathBuf::from);
    let file = root.join(path);
    assert!(file.exists(), "{} is missing: run ./test, or runner/reference/fetch-models", file.display());
    file
}

/// A cached model by its file name.
pub fn model(name: &str) -> PathBuf {
    cached(&format!("models/{name}"))
}

/// A cached input by its file name.
pub fn input(name: &str) -> PathBuf {
    cached(&format!("inputs/{name}"))
}
