//! Owns the inputs and outputs of a compiled model as LiteRT has them: their order, shapes and buffers.
//!
//! LiteRT numbers inputs and outputs by the model's first signature, the rest of the runner by the graph; their names
//! link the two. A model with open dimensions gets its buffers with the first inputs, and new ones when shapes change.

use std::{
    ffi::{CStr, CString, c_int, c_void},
    ptr, slice,
};

use bytes::Bytes;
use mesh_models::Signature;
use proto_msgs::{ErrorCode, Failure};

use super::{
    super::LoadOptions,
    said::Said,
    sys::{self, Api, Handle, Owned, Status, check, count, get},
};
use crate::tensor::{AlignedBytes, Tensor, element_count};

/// Index of the signature that is run. Models with several are run by their first.
const SIGNATURE: usize = 0;

/// A compiled model with buffers for the shapes of its last run.
pub(super) struct Compiled {
    api: &'static Api,
    handle: Owned,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Input shapes that the buffers fit; empty if there are no buffers yet.
    shapes: Vec<Vec<i64>>,
    /// Whether a run with these shapes is known to write every output.
    proven: bool,
}

/// An input or output: its place in the signature and its declaration in the file.
struct Port {
    index: usize,
    spec: mesh_models::TensorSpec,
    element: c_int,
    shape: Vec<i64>,
    buffer: Option<Owned>,
}

impl Compiled {
    /// Compiles the model. Without open dimensions it gets its buffers at once.
    ///
    /// # Errors
    /// The library's text.
    pub(super) fn new(
        api: &'static Api,
        environment: &Owned,
        model: &Owned,
        signature: &Signature,
        options: LoadOptions,
    ) -> Result<Self, String> {
        let handle = compile(api, environment, model, options)?;
        // SAFETY: the model is live. Every model has a signature; if the file has none, the library makes one up.
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

    /// Compiles the same model again, with fresh state.
    ///
    /// # Errors
    /// The library's text.
    pub(super) fn again(&self, environment: &Owned, model: &Owned, options: LoadOptions) -> Result<Self, String> {
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

    /// Allocates the buffers for inputs of these shapes.
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

    /// Runs the model.
    ///
    /// # Errors
    /// `RUN_FAILED`, or `MODEL_UNSUPPORTED` if LiteRT cannot return an output.
    pub(super) fn run(
        &mut self,
        environment: &Owned,
        inputs: &[Tensor],
        stateful: bool,
    ) -> Result<Vec<Tensor>, Failure> {
        let failed = |error| Failure::new(ErrorCode::RunFailed, format!("LiteRT failed: {error}"));
        if !self.shapes.iter().eq(inputs.iter().map(|input| &input.shape)) {
            let shapes: Vec<_> = inputs.iter().map(|input| input.shape.clone()).collect();
            let prepared = self.prepare(environment, shapes.clone());
            prepared.map_err(|error| failed(Said::why(error, || self.prepare(environment, shapes))))?;
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

    /// Runs the model and checks that every output was written. An output whose shape is known only during the run has
    /// no place in the buffers: the library refuses it, or leaves the buffers unchanged and reports success.
    fn run_and_prove(&mut self, stateful: bool) -> Result<(), Failure> {
        let failed = |error| Failure::new(ErrorCode::RunFailed, format!("LiteRT failed: {error}"));
        for mark in [0xa5, 0x5a] {
            self.outputs.iter().try_for_each(|port| port.fill(self.api, mark)).map_err(failed)?;
            let ran = self.run_once();
            ran.map_err(|error| match Said::why(error, || self.run_once()) {
                said if said.contains("custom allocation for output") => no_output(None),
                said => failed(said),
            })?;
            let mut untouched = None;
            for port in &self.outputs {
                let data = port.read(self.api).map_err(failed)?.data;
                if !data.is_empty() && data.iter().all(|byte| *byte == mark) {
                    untouched = Some((port, data.len()));
                }
            }
            let Some((port, len)) = untouched else { break };
            if len >= MARK_BYTES_SURE || mark == 0x5a {
                return Err(no_output(Some(port)));
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
        // SAFETY: there are as many buffers as the signature has inputs and outputs, each made for its place and still
        // owned.
        check(unsafe { (self.api.run)(self.handle.handle, SIGNATURE, input_count, inputs, output_count, outputs) })
    }
}

fn no_output(port: Option<&Port>) -> Failure {
    let output = port.map_or("an output".to_owned(), |port| format!("output '{}'", port.spec.name));
    let text = format!("{output} takes its shape during the run: LiteRT cannot give it");
    Failure::new(ErrorCode::ModelUnsupported, text)
}

/// Number of marked bytes that cannot be a coincidence.
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
        // The old buffer is freed first: both at once would need twice the memory.
        self.buffer = None;
        let layout = sys::Layout::dense(&self.shape).ok_or("a tensor has more than 8 dimensions or a huge one")?;
        let kind = sys::TensorType { element: self.element, layout };
        // SAFETY: the compiled model is live and has this input or output.
        let needs = get(|out| unsafe { requirements(compiled, SIGNATURE, self.index, out) })?;
        // SAFETY: all handles are live, `kind` outlives the call.
        let buffer = get(|out| unsafe { (api.create_buffer)(environment.handle, &raw const kind, needs, out) })?;
        self.buffer = Some(Owned { handle: buffer, destroy: api.destroy_buffer });
        Ok(())
    }

    fn write(&self, api: &'static Api, data: &[u8]) -> Result<(), String> {
        self.locked(api, sys::LOCK_WRITE, data.len(), |memory| {
            // SAFETY: `locked` provides `data.len()` bytes that nobody else uses.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr(), memory, data.len()) };
        })
    }

    /// Writes `mark` into every byte of the output.
    fn fill(&self, api: &'static Api, mark: u8) -> Result<(), String> {
        let len = self.len_bytes()?;
        self.locked(api, sys::LOCK_WRITE, len, |memory| {
            // SAFETY: `locked` provides `len` bytes that nobody else uses.
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
            // SAFETY: `locked` provides `len` bytes that the runtime has filled.
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
        // SAFETY: the buffer is live and not locked: no other code of the runner locks one.
        let memory = get(|out| unsafe { (api.lock)(buffer, out, mode) })?;
        let result = use_memory(memory.cast());
        // SAFETY: locked above.
        check(unsafe { (api.unlock)(buffer) })?;
        Ok(result)
    }
}

/// The ports' buffers in the order of the signature.
fn in_signature_order(ports: &[Port]) -> Vec<Handle> {
    let mut buffers = vec![ptr::null_mut(); ports.len()];
    for port in ports {
        buffers[port.index] = port.buffer.as_ref().expect("buffers are prepared before a run").handle;
    }
    buffers
}

fn compile(api: &'static Api, environment: &Owned, model: &Owned, options: LoadOptions) -> Result<Owned, String> {
    // SAFETY: writes a handle.
    let settings = Owned { handle: get(|out| unsafe { (api.create_options)(out) })?, destroy: api.destroy_options };
    // SAFETY: the options are live.
    check(unsafe { (api.set_accelerators)(settings.handle, sys::ACCELERATOR_CPU) })?;
    add_settings(api, &settings, c"xnnpack", &format!("num_threads = {}\n", options.threads))?;
    // Errors go to stderr, where `Said` reads them.
    add_settings(api, &settings, c"runtime_options_string", "error_reporter_mode = 1\n")?;
    // SAFETY: all three are live; the caller keeps the model longer than the compiled one.
    let handle = get(|out| unsafe { (api.compile)(environment.handle, model.handle, settings.handle, out) })?;
    Ok(Owned { handle, destroy: api.destroy_compiled })
}

/// Adds settings under `name`, which the library reads as TOML.
fn add_settings(api: &'static Api, settings: &Owned, name: &CStr, toml: &str) -> Result<(), String> {
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

/// The signature's tensors, in the order of `specs`.
fn ports(
    api: &'static Api,
    signature: Handle,
    specs: &[mesh_models::TensorSpec],
    number: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    tensor: unsafe extern "C" fn(Handle, usize, *mut Handle) -> Status,
) -> Result<Vec<Port>, String> {
    let mut known = Vec::new();
    for index in 0..count(signature, number)? {
        // SAFETY: the signature is live and has this many tensors.
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
    let mut taken = vec![false; known.len()];
    specs
        .iter()
        .map(|spec| {
            let index = known.iter().position(|(name, _)| *name == spec.name);
            let index = index.ok_or_else(|| format!("its first signature has no '{}'", spec.name))?;
            if std::mem::replace(&mut taken[index], true) {
                return Err(format!("'{}' stands twice in its first signature", spec.name));
            }
            Ok(Port { index, spec: spec.clone(), element: known[index].1, shape: Vec::new(), buffer: None })
        })
        .collect()
}
