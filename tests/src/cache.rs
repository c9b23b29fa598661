//! Real models and inputs, fetched out of packages by `runner/reference/fetch-models` before the tests run.

use std::path::{Path, PathBuf};

/// This checkout.
pub fn repository() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    path.canonicalize().expect("the tests run in their checkout")
}

/// A file of the cache: `models/nmp.onnx`, `inputs/astronaut.png`.
///
/// # Panics
/// If it was not fetched; the message says how to.
pub fn cached(path: &str) -> PathBuf {
    let root =
        std::env::var_os("MESH_TEST_CACHE").map_or_else(|| repository().join("target/test-cache"), PathBuf::from);
    let file = root.join(path);
    assert!(file.exists(), "{} is missing: run ./test, or runner/reference/fetch-models", file.display());
    file
}

/// A model by its file name.
pub fn model(name: &str) -> PathBuf {
    cached(&format!("models/{name}"))
}

/// An input by its file name.
pub fn input(name: &str) -> PathBuf {
    cached(&format!("inputs/{name}"))
}
