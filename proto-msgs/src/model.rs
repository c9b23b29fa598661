//! Names of model formats, architectures, element types and directions, as the wire and the command line spell them.

use std::{fmt, str::FromStr};

use bincode::{Decode, Encode};

use crate::Digest;

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $number:tt, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Decode, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
        #[repr(u8)]
        pub enum $name { $($(#[$vdoc])* $variant = $number,)* }

        impl $name {
            /// Every value, in the order of the wire.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name as scripts and people write it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $name {
            type Err = UnknownName;

            fn from_str(text: &str) -> Result<Self, UnknownName> {
                Self::ALL.iter().copied().find(|value| value.name() == text).ok_or_else(|| UnknownName {
                    what: stringify!($name),
                    got: text.to_owned(),
                    known: Self::ALL.iter().map(|value| value.name()).collect::<Vec<_>>().join(", "),
                })
            }
        }
    };
}

/// A text that is none of the known names.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("unknown {what} '{got}': use one of {known}")]
pub struct UnknownName {
    what: &'static str,
    got: String,
    known: String,
}

named_enum! {
    /// Which side opens the direct connection.
    Direction {
        /// The client connects to the worker's door: the usual case.
        ClientDials = 0, "client-dials";
        /// The worker connects to the client: for workers behind NAT.
        WorkerDials = 1, "worker-dials";
    }
}

named_enum! {
    /// Format of a model file, which decides the runtime that opens it.
    ModelFormat {
        /// A TensorFlow Lite flatbuffer, run by LiteRT.
        TfLite = 0, "tflite";
        /// An ONNX protobuf, run by ONNX Runtime.
        Onnx = 1, "onnx";
    }
}

named_enum! {
    /// Processor architecture, named as container engines name it.
    Arch {
        /// x86-64.
        Amd64 = 0, "amd64";
        /// 64-bit Arm.
        Arm64 = 1, "arm64";
    }
}

impl Arch {
    /// The architecture this program was compiled for.
    pub const HERE: Self = if cfg!(target_arch = "aarch64") { Self::Arm64 } else { Self::Amd64 };
}

named_enum! {
    /// Type of a tensor's elements, named as the Open Inference Protocol v2 names it.
    DType {
        /// One byte, 0 or 1.
        Bool = 0, "BOOL";
        /// Unsigned, 8 bits.
        U8 = 1, "UINT8";
        /// Unsigned, 16 bits.
        U16 = 2, "UINT16";
        /// Unsigned, 32 bits.
        U32 = 3, "UINT32";
        /// Unsigned, 64 bits.
        U64 = 4, "UINT64";
        /// Signed, 8 bits.
        I8 = 5, "INT8";
        /// Signed, 16 bits.
        I16 = 6, "INT16";
        /// Signed, 32 bits.
        I32 = 7, "INT32";
        /// Signed, 64 bits.
        I64 = 8, "INT64";
        /// IEEE 754 half precision.
        F16 = 9, "FP16";
        /// IEEE 754 single precision.
        F32 = 10, "FP32";
        /// IEEE 754 double precision.
        F64 = 11, "FP64";
        /// Brain float.
        BF16 = 12, "BF16";
        /// Strings: each element is a 4-byte little-endian length and its bytes.
        Bytes = 13, "BYTES";
    }
}

impl DType {
    /// Bytes of one element; `None` for strings, which have no fixed size.
    pub const fn size_bytes(self) -> Option<usize> {
        Some(match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::BF16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
            Self::Bytes => return None,
        })
    }
}

/// A model file, named by its content.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, Hash, PartialEq)]
pub struct ModelRef {
    /// BLAKE3 of the file.
    pub digest: Digest,
    /// Length of the file.
    pub size_bytes: u64,
    /// Format of the file.
    pub format: ModelFormat,
}
