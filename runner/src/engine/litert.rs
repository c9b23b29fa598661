//! TensorFlow Lite models in LiteRT, with XNNPACK. Owns the library's environment, the model's bytes, and the meaning
//! of a refusal. Nothing of the library is visible outside.

use std::{
    ffi::{c_int, c_void},
    path::Path,
    ptr,
    sync::OnceLock,
};

use mesh_models::Signature;
use proto_msgs::{DType, ErrorCode, Failure};

use super::{Engine, LoadOptions};
use crate::{libraries, tensor::Tensor};

mod compiled;
mod reshape;
mod said;
mod sys;

use compiled::Compiled;
use said::Said;
use sys::{Api, Handle, Owned, check, count, get};

/// Name and version of the runtime.
const RUNTIME: &str = "LiteRT 2 with XNNPACK";

/// One model, compiled for the CPU.
pub(super) struct LiteRt {
    // Dropped in this order: the compiled model reads the model, and the model reads the bytes.
    compiled: Compiled,
    model: Owned,
    environment: Owned,
    _bytes: Vec<u8>,
    options: LoadOptions,
    stateful: bool,
    used: bool,
}

impl LiteRt {
    /// Opens `library` and compiles the model.
    ///
    /// # Errors
    /// `ENGINE_UNAVAILABLE` if the library cannot be used, `MODEL_UNSUPPORTED` with the names of unknown operators,
    /// `MODEL_INVALID` for every other refusal.
    pub(super) fn load(
        library: &Path,
        bytes: Vec<u8>,
        signature: &Signature,
        options: LoadOptions,
    ) -> Result<Self, Failure> {
        let mut tensors = signature.inputs.iter().chain(&signature.outputs);
        if let Some(strings) = tensors.find(|tensor| tensor.dtype == Some(DType::Bytes)) {
            let text = format!("'{}' holds strings, which LiteRT cannot be given", strings.name);
            return Err(Failure::new(ErrorCode::ModelUnsupported, text));
        }
        if options.gpu_required {
            return Err(libraries::no_gpu(library, "TensorFlow Lite models run on the processor only"));
        }
        let api = opened(library)?;
        let bytes = reshape::with_constant_shapes(&bytes, signature).unwrap_or(bytes);
        let said = Said::listen();
        let environment = environment(api).map_err(|error| libraries::unusable(library, error))?;
        let model = model(api, &environment, &bytes).map_err(|error| {
            Failure::new(ErrorCode::ModelInvalid, format!("LiteRT cannot read the model: {}", said.or(error)))
        })?;
        let stateful = op_codes(api, &model)?.contains(&sys::OP_VAR_HANDLE);
        let compiled = Compiled::new(api, &environment, &model, signature, options)
            .map_err(|error| refused(api, &model, &said.or(error)))?;
        drop(said);
        Ok(Self { compiled, model, environment, _bytes: bytes, options, stateful, used: false })
    }
}

impl Engine for LiteRt {
    fn runtime(&self) -> &str {
        RUNTIME
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Failure> {
        self.used = true;
        self.compiled.run(&self.environment, inputs, self.stateful)
    }

    fn reset(&mut self) -> Result<(), Failure> {
        if !self.stateful || !self.used {
            return Ok(());
        }
        // Variables live as long as the compiled model; no call clears only them.
        let again = self.compiled.again(&self.environment, &self.model, self.options);
        self.compiled = again
            .map_err(|error| Failure::new(ErrorCode::RunFailed, format!("LiteRT cannot reset the model: {error}")))?;
        self.used = false;
        Ok(())
    }
}

/// Opens the library.
///
/// # Errors
/// `ENGINE_UNAVAILABLE` if it cannot be used.
pub(super) fn open(library: &Path) -> Result<(), Failure> {
    opened(library).map(|_| ())
}

/// The library, opened once per process.
fn opened(library: &Path) -> Result<&'static Api, Failure> {
    static API: OnceLock<Api> = OnceLock::new();
    if let Some(api) = API.get() {
        return Ok(api);
    }
    let api = Api::open(library).map_err(|error| libraries::unusable(library, error))?;
    Ok(API.get_or_init(|| api))
}

fn environment(api: &'static Api) -> Result<Owned, String> {
    // Errors only: at start the library reports every accelerator that this machine lacks.
    let options = [sys::EnvironmentOption::log_severity_min(3)];
    // SAFETY: the array has one option, and the library copies it.
    let handle = get(|out| unsafe { (api.create_environment)(1, options.as_ptr(), out) })?;
    Ok(Owned { handle, destroy: api.destroy_environment })
}

/// The model in `bytes`, which must outlive the returned object.
fn model(api: &'static Api, environment: &Owned, bytes: &[u8]) -> Result<Owned, String> {
    let (at, len) = (bytes.as_ptr().cast::<c_void>(), bytes.len());
    // SAFETY: `at` points to `len` bytes, and the caller keeps them.
    let handle = get(|out| unsafe { (api.create_model)(environment.handle, at, len, out) })?;
    Ok(Owned { handle, destroy: api.destroy_model })
}

/// The failure of a model that does not compile: the unknown operators, else the library's text.
fn refused(api: &'static Api, model: &Owned, said: &str) -> Failure {
    let missing: Vec<_> = said.lines().filter_map(said::missing_operator).collect();
    let named = match custom_ops(api, model) {
        _ if !missing.is_empty() => missing,
        Ok(custom) => custom,
        Err(_) => Vec::new(),
    };
    if named.is_empty() {
        return Failure::new(ErrorCode::ModelInvalid, format!("LiteRT refuses the model: {said}"));
    }
    Failure::new(ErrorCode::ModelUnsupported, format!("LiteRT does not know the operator {}", named.join(", ")))
}

fn op_codes(api: &'static Api, model: &Owned) -> Result<Vec<c_int>, Failure> {
    let codes = each_op(api, model, |op| {
        let mut code = 0;
        // SAFETY: the operator is live, `code` is written.
        check(unsafe { (api.op_code)(op, &raw mut code) }).map(|()| code)
    });
    codes.map_err(|error| Failure::new(ErrorCode::ModelInvalid, format!("LiteRT cannot read the model: {error}")))
}

/// Names of the custom operators of a model, each once.
fn custom_ops(api: &'static Api, model: &Owned) -> Result<Vec<String>, String> {
    let mut names = each_op(api, model, |op| {
        let (mut code, mut name) = (0, ptr::null());
        // SAFETY: the operator is live, `code` is written.
        check(unsafe { (api.op_code)(op, &raw mut code) })?;
        if code == sys::OP_CUSTOM {
            // SAFETY: the operator is live; its name lives as long as the model.
            check(unsafe { (api.custom_code)(op, &raw mut name) })?;
        }
        // SAFETY: null, or as above.
        Ok(unsafe { sys::text(name) })
    })?;
    names.retain(|name| !name.is_empty());
    names.sort();
    names.dedup();
    Ok(names)
}

fn each_op<T>(
    api: &'static Api,
    model: &Owned,
    mut of: impl FnMut(Handle) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let mut all = Vec::new();
    for index in 0..count(model.handle, api.subgraph_count)? {
        // SAFETY: the model is live and has that many subgraphs.
        let subgraph = get(|out| unsafe { (api.subgraph)(model.handle, index, out) })?;
        for index in 0..count(subgraph, api.op_count)? {
            // SAFETY: the subgraph is live and has that many operators.
            let op = get(|out| unsafe { (api.op)(subgraph, index, out) })?;
            all.push(of(op)?);
        }
    }
    Ok(all)
}
