//! The part of LiteRT's C API that the runner uses, opened at run time. Owns signatures and layouts as the headers of
//! LiteRT 2.x declare them (`litert/c/*.h`); never decides anything.
//!
//! No existing crate fits: their bindings cannot resize an input or name a tensor. The library is opened, not linked,
//! so that a runner without it can report that.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    path::Path,
    ptr,
};

use libloading::Library;

/// The result of every call; 0 is success.
pub(super) type Status = c_int;

/// An opaque object of the library.
pub(super) type Handle = *mut c_void;

/// A function that the library calls to return memory it was given.
pub(super) type Free = Option<unsafe extern "C" fn(*mut c_void)>;

/// `LiteRtLayout`: rank in the low seven bits of the first word, then dimensions, then strides.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Layout {
    rank: u32,
    dimensions: [i32; Self::RANK_MAX],
    strides: [u32; Self::RANK_MAX],
}

impl Layout {
    const RANK_MAX: usize = 8;

    /// The layout of a dense tensor; `None` if it has more than eight dimensions, or one beyond 31 bits.
    pub(super) fn dense(shape: &[i64]) -> Option<Self> {
        let mut layout = Self { rank: u32::try_from(shape.len()).ok()?, ..Self::default() };
        for (index, dimension) in shape.iter().enumerate() {
            *layout.dimensions.get_mut(index)? = i32::try_from(*dimension).ok()?;
        }
        Some(layout)
    }

    pub(super) fn shape(&self) -> Vec<i64> {
        let rank = (self.rank & 0x7f) as usize;
        self.dimensions.iter().take(rank).map(|dimension| i64::from(*dimension)).collect()
    }
}

/// `LiteRtRankedTensorType`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct TensorType {
    pub(super) element: c_int,
    pub(super) layout: Layout,
}

const _: () = assert!(size_of::<Layout>() == 68 && size_of::<TensorType>() == 72);

/// `LiteRtAny` holding an integer.
#[repr(C)]
struct AnyInteger {
    kind: c_int,
    value: i64,
}

/// `LiteRtEnvOption` with an integer value.
#[repr(C)]
pub(super) struct EnvironmentOption {
    tag: c_int,
    value: AnyInteger,
}

const _: () = assert!(size_of::<EnvironmentOption>() == 24);

impl EnvironmentOption {
    /// The option that limits stderr to messages of this severity and above.
    pub(super) const fn log_severity_min(severity: i64) -> Self {
        Self { tag: 25, value: AnyInteger { kind: 2, value: severity } }
    }
}

/// `kLiteRtHwAcceleratorCpu`: XNNPACK, and the built-in kernels for operators that XNNPACK lacks.
pub(super) const ACCELERATOR_CPU: c_int = 1;
/// `kLiteRtOpCodeTflCustom`.
pub(super) const OP_CUSTOM: c_int = 32;
/// `kLiteRtOpCodeTflVarHandle`: the model keeps state between runs.
pub(super) const OP_VAR_HANDLE: c_int = 142;
/// `kLiteRtTensorBufferLockModeRead` and `…Write`.
pub(super) const LOCK_READ: c_int = 0;
pub(super) const LOCK_WRITE: c_int = 1;

macro_rules! api {
    ($($name:ident = $symbol:literal ($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions of an opened library.
        pub(super) struct Api { $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)* }

        impl Api {
            /// Opens the library and finds every function.
            ///
            /// # Errors
            /// If the file is missing, for another architecture, or not LiteRT 2.
            pub(super) fn open(path: &Path) -> Result<Self, libloading::Error> {
                // SAFETY: LiteRT's initialisers register its kernels and touch no other state.
                let library = unsafe { Library::new(path)? };
                // Never closed: its functions are called until the process ends, and closing it is known to crash.
                let library = Box::leak(Box::new(library));
                // SAFETY: each type repeats the declaration in the headers of LiteRT 2.
                Ok(unsafe { Self { $($name: *library.get(concat!($symbol, "\0"))?,)* } })
            }
        }
    };
}

api! {
    create_environment = "LiteRtCreateEnvironment"(c_int, *const EnvironmentOption, *mut Handle) -> Status;
    destroy_environment = "LiteRtDestroyEnvironment"(Handle);

    create_model = "LiteRtCreateModelFromBuffer"(Handle, *const c_void, usize, *mut Handle) -> Status;
    destroy_model = "LiteRtDestroyModel"(Handle);
    subgraph_count = "LiteRtGetNumModelSubgraphs"(Handle, *mut usize) -> Status;
    subgraph = "LiteRtGetModelSubgraph"(Handle, usize, *mut Handle) -> Status;
    op_count = "LiteRtGetNumSubgraphOps"(Handle, *mut usize) -> Status;
    op = "LiteRtGetSubgraphOp"(Handle, usize, *mut Handle) -> Status;
    op_code = "LiteRtGetOpCode"(Handle, *mut c_int) -> Status;
    custom_code = "LiteRtGetCustomCode"(Handle, *mut *const c_char) -> Status;
    signature = "LiteRtGetModelSignature"(Handle, usize, *mut Handle) -> Status;
    input_count = "LiteRtGetNumSignatureInputs"(Handle, *mut usize) -> Status;
    input = "LiteRtGetSignatureInputTensorByIndex"(Handle, usize, *mut Handle) -> Status;
    output_count = "LiteRtGetNumSignatureOutputs"(Handle, *mut usize) -> Status;
    output = "LiteRtGetSignatureOutputTensorByIndex"(Handle, usize, *mut Handle) -> Status;
    tensor_name = "LiteRtGetTensorName"(Handle, *mut *const c_char) -> Status;
    tensor_type = "LiteRtGetRankedTensorType"(Handle, *mut TensorType) -> Status;

    create_options = "LiteRtCreateOptions"(*mut Handle) -> Status;
    destroy_options = "LiteRtDestroyOptions"(Handle);
    set_accelerators = "LiteRtSetOptionsHardwareAccelerators"(Handle, c_int) -> Status;
    create_opaque = "LiteRtCreateOpaqueOptions"(*const c_char, *mut c_void, Free, *mut Handle) -> Status;
    add_opaque = "LiteRtAddOpaqueOptions"(Handle, Handle) -> Status;

    compile = "LiteRtCreateCompiledModel"(Handle, Handle, Handle, *mut Handle) -> Status;
    destroy_compiled = "LiteRtDestroyCompiledModel"(Handle);
    resize_input = "LiteRtCompiledModelResizeInputTensor"(Handle, usize, usize, *const c_int, usize) -> Status;
    output_layouts = "LiteRtGetCompiledModelOutputTensorLayouts"(Handle, usize, usize, *mut Layout, bool) -> Status;
    input_requirements = "LiteRtGetCompiledModelInputBufferRequirements"(Handle, usize, usize, *mut Handle) -> Status;
    output_requirements = "LiteRtGetCompiledModelOutputBufferRequirements"(Handle, usize, usize, *mut Handle) -> Status;
    run = "LiteRtRunCompiledModel"(Handle, usize, usize, *mut Handle, usize, *mut Handle) -> Status;

    create_buffer = "LiteRtCreateManagedTensorBufferFromRequirements"(
        Handle, *const TensorType, Handle, *mut Handle) -> Status;
    destroy_buffer = "LiteRtDestroyTensorBuffer"(Handle);
    buffer_size = "LiteRtGetTensorBufferSize"(Handle, *mut usize) -> Status;
    lock = "LiteRtLockTensorBuffer"(Handle, *mut *mut c_void, c_int) -> Status;
    unlock = "LiteRtUnlockTensorBuffer"(Handle) -> Status;
}

/// The meaning of a status, in the words of `litert_common.h`. The library exports no function for it.
fn status_text(status: Status) -> String {
    let text = match status {
        1 => "invalid argument",
        2 => "out of memory",
        3 => "runtime failure",
        4 => "an input tensor is missing",
        5 => "unsupported",
        8 => "wrong version",
        501 => "invalid flatbuffer",
        504 => "compilation failed",
        1000 => "an index is out of range",
        4000 => "made for another version of the runtime",
        _ => return format!("error {status}"),
    };
    format!("{text} (status {status})")
}

/// Copies a text that the library owns.
///
/// # Safety
/// `text` is null or points to a string that lives until this returns.
pub(super) unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: promised by the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// An object of the library that this value destroys.
pub(super) struct Owned {
    pub(super) handle: Handle,
    pub(super) destroy: unsafe extern "C" fn(Handle),
}

// SAFETY: the library binds its objects to no thread, and each is used by one thread at a time.
unsafe impl Send for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created by the library and destroyed once, after everything that was made from it.
        unsafe { (self.destroy)(self.handle) }
    }
}

/// The object that a call returns through its pointer.
pub(super) fn get(call: impl FnOnce(*mut Handle) -> Status) -> Result<Handle, String> {
    let mut handle = ptr::null_mut();
    check(call(&raw mut handle))?;
    if handle.is_null() {
        return Err("it returned nothing".to_owned());
    }
    Ok(handle)
}

/// The number that a call returns through its pointer.
pub(super) fn count(of: Handle, call: unsafe extern "C" fn(Handle, *mut usize) -> Status) -> Result<usize, String> {
    let mut number = 0;
    // SAFETY: `of` is live and `number` is written.
    check(unsafe { call(of, &raw mut number) }).map(|()| number)
}

/// Turns a status into a result.
pub(super) fn check(status: Status) -> Result<(), String> {
    if status == 0 {
        return Ok(());
    }
    Err(status_text(status))
}
