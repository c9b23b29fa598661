//! TensorFlow Lite models in LiteRT, with XNNPACK. Owns the library's objects and their lifetimes: nothing of the library is seen
//! outside.
//!
//! LiteRT numbers inputs and outputs by the model's first signature, the rest of the runner by the graph; names join them.
//! A model with open dimensions gets its buffers when the first inputs have come, and new ones when shapes change.

use std::{
    ffi::{CString, c_int, c_void},
    path::Path,
    ptr, slice,
    sync::OnceLock,
};

use bytes::Bytes;
use mesh_models::Signature;
use proto_msgs::{DType, ErrorCode, Failure};

use super::{Engine, LoadOptions};
use crate::{
    runtimes,
    tensor::{AlignedBytes, Tensor, element_count},
};

mod reshape;
mod said;
mod sys;

use said::Said;
use sys::{Api, Handle, Status};

/// The signature that is run; models with several are run by their first.
const SIGNATURE: usize = 0;

/// What the runtime and its version are called.
const RUNTIME: &str = "LiteRT 2 with XNNPACK";

/// One model, compiled for the CPU.
pub(super) struct LiteRt {
    // In the order in which they must go: what is compiled reads the model, the model reads the bytes.
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
    /// `ENGINE_UNAVAILABLE` if the library cannot be used, `MODEL_UNSUPPORTED` naming the operators that it does not know,
    /// `MODEL_INVALID` for everything else it refuses.
    pub(super) fn load(
        library: &Path,
        bytes: Vec<u8>,
        signature: &Signature,
        options: LoadOptions,
    ) -> Result<Self, Failure> {
        if let Some(text) = signature.inputs.iter().chain(&signature.outputs).find(|t| t.dtype == Some(DType::Bytes)) {
            let text = format!("'{}' holds strings, which LiteRT cannot be given", text.name);
            return Err(Failure::new(ErrorCode::ModelUnsupported, text));
        }
        let api = opened(library)?;
        let bytes = reshape::with_constant_shapes(&bytes, signature).unwrap_or(bytes);
        let said = Said::listen();
        let environment = environment(api).map_err(|error| runtimes::unusable(library, error))?;
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
        // Variables live as long as what was compiled; there is no call that only clears them.
        let again = self.compiled.again(&self.environment, &self.model, self.options);
        self.compiled = again
            .map_err(|error| Failure::new(ErrorCode::RunFailed, format!("LiteRT cannot reset the model: {error}")))?;
        self.used = false;
        Ok(())
    }
}

/// A model that can run, with buffers for the shapes it ran with last.
struct Compiled {
    api: &'static Api,
    handle: Owned,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Shapes of the inputs for which the buffers are; empty when there are none yet.
    shapes: Vec<Vec<i64>>,
    /// Whether a run with these shapes is known to write every output.
    proven: bool,
}

/// An input or output: where it stands in the signature and what the file says of it.
struct Port {
    index: usize,
    spec: mesh_models::TensorSpec,
    element: c_int,
    shape: Vec<i64>,
    buffer: Option<Owned>,
}

impl Compiled {
    fn new(
        api: &'static Api,
        environment: &Owned,
        model: &Owned,
        signature: &Signature,
        options: LoadOptions,
    ) -> Result<Self, String> {
        let handle = compile(api, environment, model, options)?;
        let first = get(|out| unsafe { (api.signature)(model.handle, SIGNATURE, out) })?;
        let mut compiled = Self {
            api,
            handle,
            inputs: ports(api, first, &signature.inputs, api.input_count, api.input)?,
            outputs: ports(api, first, &signature.outputs, api.output_count, api.output)?,
            shapes: Vec::new(),
            proven: false,
        };
        let fixed: Option<Vec<_>> = signature.inputs.iter().map(|input| input.shape.clone()).collect();
        if let Some(shapes) = fixed.filter(|shapes| shapes.iter().flatten().all(|dimension| *dimension >= 0)) {
            compiled.prepare(environment, shapes)?;
        }
        Ok(compiled)
    }

    /// The same model with fresh state.
    fn again(&self, environment: &Owned, model: &Owned, options: LoadOptions) -> Result<Self, String> {
        let fresh = |ports: &[Port]| ports.iter().map(Port::without_buffer).collect();
        let mut compiled = Self {
            api: self.api,
            handle: compile(self.api, environment, model, options)?,
            inputs: fresh(&self.inputs),
            outputs: fresh(&self.outputs),
            shapes: Vec::new(),
            proven: false,
        };
        if !self.shapes.is_empty() {
            compiled.prepare(environment, self.shapes.clone())?;
        }
        Ok(compiled)
    }

    /// Makes the buffers for inputs of these shapes.
    fn prepare(&mut self, environment: &Owned, shapes: Vec<Vec<i64>>) -> Result<(), String> {
        let api = self.api;
        self.shapes = Vec::new();
        self.proven = false;
        for (port, shape) in self.inputs.iter_mut().zip(&shapes) {
            let open = port.spec.shape.as_ref().is_none_or(|spec| spec.iter().any(|dimension| *dimension < 0));
            if open {
                let dimensions: Option<Vec<c_int>> = shape.iter().map(|d| c_int::try_from(*d).ok()).collect();
                let dimensions = dimensions.ok_or("a dimension is too large")?;
                let (at, count) = (dimensions.as_ptr(), dimensions.len());
                // SAFETY: `at` points to `count` integers.
                check(unsafe { (api.resize_input)(self.handle.handle, SIGNATURE, port.index, at, count) })?;
            }
            port.shape.clone_from(shape);
        }
        let mut layouts = vec![sys::Layout::default(); self.outputs.len()];
        let (at, count) = (layouts.as_mut_ptr(), layouts.len());
        // SAFETY: `at` points to `count` layouts, one for each output of the signature.
        check(unsafe { (api.output_layouts)(self.handle.handle, SIGNATURE, count, at, true) })?;
        for port in &mut self.outputs {
            port.shape = layouts[port.index].shape();
        }
        let compiled = self.handle.handle;
        for port in &mut self.inputs {
            port.make_buffer(api, environment, compiled, api.input_requirements)?;
        }
        for port in &mut self.outputs {
            port.make_buffer(api, environment, compiled, api.output_requirements)?;
        }
        self.shapes = shapes;
        Ok(())
    }

    fn run(&mut self, environment: &Owned, inputs: &[Tensor], stateful: bool) -> Result<Vec<Tensor>, Failure> {
        let failed = |error| Failure::new(ErrorCode::RunFailed, format!("LiteRT failed: {error}"));
        if !self.shapes.iter().eq(inputs.iter().map(|input| &input.shape)) {
            let shapes = inputs.iter().map(|input| input.shape.clone()).collect();
            self.prepare(environment, shapes).map_err(failed)?;
        }
        for (port, input) in self.inputs.iter().zip(inputs) {
            port.write(self.api, &input.data).map_err(failed)?;
        }
        if self.proven {
            self.run_once().map_err(failed)?;
        } else {
            self.run_and_prove(stateful)?;
        }
        self.outputs.iter().map(|port| port.read(self.api)).collect::<Result<_, _>>().map_err(failed)
    }

    /// Runs and looks whether every output was written. An output whose shape is only known during the run has no place in
    /// our buffers: the library then leaves them as they are and reports success.
    fn run_and_prove(&mut self, stateful: bool) -> Result<(), Failure> {
        let failed = |error| Failure::new(ErrorCode::RunFailed, format!("LiteRT failed: {error}"));
        for mark in [0xa5, 0x5a] {
            self.outputs.iter().try_for_each(|port| port.fill(self.api, mark)).map_err(failed)?;
            self.run_once().map_err(failed)?;
            let mut untouched = None;
            for port in &self.outputs {
                let data = port.read(self.api).map_err(failed)?.data;
                if !data.is_empty() && data.iter().all(|byte| *byte == mark) {
                    untouched = Some((port, data.len()));
                }
            }
            let Some((port, len)) = untouched else { break };
            if len >= MARK_BYTES_SURE || mark == 0x5a {
                let text = format!("output '{}' takes its shape during the run: LiteRT cannot give it", port.spec.name);
                return Err(Failure::new(ErrorCode::ModelUnsupported, text));
            }
            if stateful {
                // A second look would be a second step of the model.
                break;
            }
        }
        self.proven = true;
        Ok(())
    }

    fn run_once(&mut self) -> Result<(), String> {
        let mut inputs = in_signature_order(&self.inputs);
        let mut outputs = in_signature_order(&self.outputs);
        let (input_count, output_count) = (inputs.len(), outputs.len());
        let (inputs, outputs) = (inputs.as_mut_ptr(), outputs.as_mut_ptr());
        // SAFETY: as many buffers as the signature has inputs and outputs, each made for its place and still ours.
        check(unsafe { (self.api.run)(self.handle.handle, SIGNATURE, input_count, inputs, output_count, outputs) })
    }
}

/// So many marked bytes are no coincidence.
const MARK_BYTES_SURE: usize = 16;

impl Port {
    fn without_buffer(&self) -> Self {
        Self {
            index: self.index,
            spec: self.spec.clone(),
            element: self.element,
            shape: self.shape.clone(),
            buffer: None,
        }
    }

    fn make_buffer(
        &mut self,
        api: &'static Api,
        environment: &Owned,
        compiled: Handle,
        requirements: unsafe extern "C" fn(Handle, usize, usize, *mut Handle) -> Status,
    ) -> Result<(), String> {
        // The old one first: both at once would be twice the memory.
        self.buffer = None;
        let layout = sys::Layout::dense(&self.shape).ok_or("a tensor has more than 8 dimensions or a huge one")?;
        let kind = sys::TensorType { element: self.element, layout };
        let needs = get(|out| unsafe { requirements(compiled, SIGNATURE, self.index, out) })?;
        // SAFETY: all handles are live, `kind` outlives the call.
        let buffer = get(|out| unsafe { (api.create_buffer)(environment.handle, &raw const kind, needs, out) })?;
        self.buffer = Some(Owned { handle: buffer, destroy: api.destroy_buffer });
        Ok(())
    }

    fn write(&self, api: &'static Api, data: &[u8]) -> Result<(), String> {
        self.locked(api, sys::LOCK_WRITE, data.len(), |memory| {
            // SAFETY: `locked` gives `data.len()` bytes that nobody else uses.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr(), memory, data.len()) };
        })
    }

    /// Writes `mark` into every byte that the output has.
    fn fill(&self, api: &'static Api, mark: u8) -> Result<(), String> {
        let len = self.len_bytes()?;
        self.locked(api, sys::LOCK_WRITE, len, |memory| {
            // SAFETY: `locked` gives `len` bytes that nobody else uses.
            unsafe { ptr::write_bytes(memory, mark, len) };
        })
    }

    fn len_bytes(&self) -> Result<usize, String> {
        let dtype = self.spec.dtype.expect("tensors without a type are refused before loading");
        let elements = element_count(&self.shape).ok_or("an output has no shape")?;
        let element_bytes = dtype.size_bytes().ok_or("an output holds strings")?;
        elements.checked_mul(element_bytes).ok_or_else(|| "an output is too large".to_owned())
    }

    fn read(&self, api: &'static Api) -> Result<Tensor, String> {
        let dtype = self.spec.dtype.expect("tensors without a type are refused before loading");
        let len = self.len_bytes()?;
        let data = self.locked(api, sys::LOCK_READ, len, |memory| {
            // SAFETY: `locked` gives `len` bytes that the runtime has filled.
            AlignedBytes::copied(unsafe { slice::from_raw_parts(memory, len) })
        })?;
        Ok(Tensor { dtype, shape: self.shape.clone(), data: Bytes::from(data) })
    }

    /// Calls `use_memory` with the buffer's memory, which has at least `len` bytes.
    fn locked<T>(
        &self,
        api: &'static Api,
        mode: c_int,
        len: usize,
        use_memory: impl FnOnce(*mut u8) -> T,
    ) -> Result<T, String> {
        let buffer = self.buffer.as_ref().expect("buffers are prepared before a run").handle;
        let mut size = 0_usize;
        // SAFETY: the buffer is live and `size` is written.
        check(unsafe { (api.buffer_size)(buffer, &raw mut size) })?;
        if size < len {
            return Err(format!("'{}' has {size} bytes in the runtime instead of {len}", self.spec.name));
        }
        let memory = get(|out| unsafe { (api.lock)(buffer, out, mode) })?;
        let result = use_memory(memory.cast());
        // SAFETY: locked above.
        check(unsafe { (api.unlock)(buffer) })?;
        Ok(result)
    }
}

/// The ports' buffers where the signature has them.
fn in_signature_order(ports: &[Port]) -> Vec<Handle> {
    let mut buffers = vec![ptr::null_mut(); ports.len()];
    for port in ports {
        buffers[port.index] = port.buffer.as_ref().expect("buffers are prepared before a run").handle;
    }
    buffers
}

/// The library, which a process opens once.
fn opened(library: &Path) -> Result<&'static Api, Failure> {
    static API: OnceLock<Api> = OnceLock::new();
    if let Some(api) = API.get() {
        return Ok(api);
    }
    let api = Api::open(library).map_err(|error| runtimes::unusable(library, error))?;
    Ok(API.get_or_init(|| api))
}

fn environment(api: &'static Api) -> Result<Owned, String> {
    // Silence but for errors: at start the library tells of every accelerator that this machine does not have.
    let options = [sys::EnvironmentOption::log_severity_min(3)];
    let handle = get(|out| unsafe { (api.create_environment)(1, options.as_ptr(), out) })?;
    Ok(Owned { handle, destroy: api.destroy_environment })
}

/// The model in `bytes`, which must live as long as what this returns.
fn model(api: &'static Api, environment: &Owned, bytes: &[u8]) -> Result<Owned, String> {
    let (at, len) = (bytes.as_ptr().cast::<c_void>(), bytes.len());
    let handle = get(|out| unsafe { (api.create_model)(environment.handle, at, len, out) })?;
    Ok(Owned { handle, destroy: api.destroy_model })
}

fn compile(api: &'static Api, environment: &Owned, model: &Owned, options: LoadOptions) -> Result<Owned, String> {
    let settings = Owned { handle: get(|out| unsafe { (api.create_options)(out) })?, destroy: api.destroy_options };
    // SAFETY: the options are live.
    check(unsafe { (api.set_accelerators)(settings.handle, sys::ACCELERATOR_CPU) })?;
    add_settings(api, &settings, c"xnnpack", &format!("num_threads = {}\n", options.threads))?;
    // Errors are told on stderr, from where `Said` takes them.
    add_settings(api, &settings, c"runtime_options_string", "error_reporter_mode = 1\n")?;
    let handle = get(|out| unsafe { (api.compile)(environment.handle, model.handle, settings.handle, out) })?;
    Ok(Owned { handle, destroy: api.destroy_compiled })
}

/// Adds settings that the library reads as TOML under `name`.
fn add_settings(api: &'static Api, settings: &Owned, name: &std::ffi::CStr, toml: &str) -> Result<(), String> {
    unsafe extern "C" fn free(text: *mut c_void) {
        // SAFETY: made by `into_raw` below and freed once, by the library.
        drop(unsafe { CString::from_raw(text.cast()) });
    }
    let text = CString::new(toml).expect("settings hold no zero byte").into_raw();
    // SAFETY: `name` lives forever, `text` until the library calls `free`.
    let opaque = get(|out| unsafe { (api.create_opaque)(name.as_ptr(), text.cast(), Some(free), out) })?;
    // SAFETY: both are live; the settings own `opaque` from here on.
    check(unsafe { (api.add_opaque)(settings.handle, opaque) })
}

/// What the signature numbers, in the order of `specs`.
fn ports(
    api: &'static Api,
    signature: Handle,
    specs: &[mesh_models::TensorSpec],
    count: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    tensor: unsafe extern "C" fn(Handle, usize, *mut Handle) -> Status,
) -> Result<Vec<Port>, String> {
    let mut known = Vec::new();
    for index in 0..count_of(signature, count)? {
        // SAFETY: the signature is live and has that many.
        let handle = get(|out| unsafe { tensor(signature, index, out) })?;
        let mut name = ptr::null();
        // SAFETY: the tensor is live; its name lives as long as the model.
        check(unsafe { (api.tensor_name)(handle, &raw mut name) })?;
        let mut kind = sys::TensorType::default();
        // SAFETY: the tensor is live, `kind` is written.
        check(unsafe { (api.tensor_type)(handle, &raw mut kind) })?;
        // SAFETY: as above.
        known.push((unsafe { sys::text(name) }, kind.element));
    }
    if known.len() != specs.len() {
        return Err(format!("its first signature has {} tensors where the graph has {}", known.len(), specs.len()));
    }
    specs
        .iter()
        .map(|spec| {
            let index = known.iter().position(|(name, _)| *name == spec.name);
            let index = index.ok_or_else(|| format!("its first signature has no '{}'", spec.name))?;
            Ok(Port { index, spec: spec.clone(), element: known[index].1, shape: Vec::new(), buffer: None })
        })
        .collect()
}

/// The failure for a model that would not compile: with custom operators they are the reason, else what the library said.
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

/// Names of the operators that the model's makers defined themselves, each once.
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
    for index in 0..count_of(model.handle, api.subgraph_count)? {
        // SAFETY: the model is live and has that many subgraphs.
        let subgraph = get(|out| unsafe { (api.subgraph)(model.handle, index, out) })?;
        for index in 0..count_of(subgraph, api.op_count)? {
            // SAFETY: the subgraph is live and has that many operators.
            let op = get(|out| unsafe { (api.op)(subgraph, index, out) })?;
            all.push(of(op)?);
        }
    }
    Ok(all)
}

/// An object of the library that is ours to destroy.
struct Owned {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle),
}

// SAFETY: the library ties its objects to no thread, and each is used by one thread at a time.
unsafe impl Send for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created by the library and destroyed once, after everything that was made from it.
        unsafe { (self.destroy)(self.handle) }
    }
}

/// The object that a call writes.
fn get(call: impl FnOnce(*mut Handle) -> Status) -> Result<Handle, String> {
    let mut handle = ptr::null_mut();
    check(call(&raw mut handle))?;
    if handle.is_null() {
        return Err("it returned nothing".to_owned());
    }
    Ok(handle)
}

fn count_of(of: Handle, count: unsafe extern "C" fn(Handle, *mut usize) -> Status) -> Result<usize, String> {
    let mut number = 0;
    // SAFETY: `of` is live and `number` is written.
    check(unsafe { count(of, &raw mut number) }).map(|()| number)
}

fn check(status: Status) -> Result<(), String> {
    if status == 0 {
        return Ok(());
    }
    Err(sys::status_text(status))
}
