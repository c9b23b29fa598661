//! Owns reading bytes of a file by position, and the check that the position lies inside. Never returns more than was
//! asked for.

use std::io::{self, BufReader, Read, Seek, SeekFrom};

use proto_msgs::ModelFormat;

use crate::SignatureError;

/// Size of the read buffer. Fields lie close together, so one buffer of this size answers most reads.
const BUFFER_BYTES: usize = 8 * 1024;

/// A file of known length.
pub(crate) struct Source<R> {
    reader: BufReader<R>,
    at: u64,
    /// Length of the file.
    pub(crate) len: u64,
}

/// Why a read failed; the format is added later.
pub(crate) enum Fault {
    Io(io::Error),
    Damaged(&'static str),
    TooLarge((&'static str, usize)),
}

impl Fault {
    pub(crate) fn of(self, format: ModelFormat) -> SignatureError {
        match self {
            Self::Io(error) => SignatureError::Read(error),
            Self::Damaged(what) => SignatureError::Damaged { format, what },
            Self::TooLarge((what, limit)) => SignatureError::TooLarge { what, limit },
        }
    }
}

impl<R: Read + Seek> Source<R> {
    pub(crate) fn new(mut file: R) -> io::Result<Self> {
        let len = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        Ok(Self { reader: BufReader::with_capacity(BUFFER_BYTES, file), at: 0, len })
    }

    /// `N` bytes at a position.
    pub(crate) fn array<const N: usize>(&mut self, at: u64) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.fill(at, &mut bytes)?;
        Ok(bytes)
    }

    /// `count` bytes at a position. The caller has bounded `count`.
    pub(crate) fn bytes(&mut self, at: u64, count: usize) -> Result<Vec<u8>, Fault> {
        if at.checked_add(count as u64).is_none_or(|end| end > self.len) {
            return Err(Fault::Damaged("a part lies behind the end of the file"));
        }
        let mut bytes = vec![0; count];
        self.fill(at, &mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        if at.checked_add(bytes.len() as u64).is_none_or(|end| end > self.len) {
            return Err(Fault::Damaged("a part lies behind the end of the file"));
        }
        // Both positions lie inside the file, whose length fits i64 on every system.
        self.reader.seek_relative(at as i64 - self.at as i64).map_err(Fault::Io)?;
        self.at = at;
        self.reader.read_exact(bytes).map_err(Fault::Io)?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}
