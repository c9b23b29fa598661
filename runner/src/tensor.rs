//! A tensor inside the runner: element type, dimensions and bytes. Owns the number of bytes of a shape, and that bytes
//! lie where a runtime can read them without a copy; knows no names.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    ptr::NonNull,
    slice,
};

use bytes::Bytes;
use proto_msgs::DType;

/// One input or output: dense, row-major, little-endian, strings as in the binary tensor extension.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Element type.
    pub(crate) dtype: DType,
    /// Dimensions, none of them open.
    pub(crate) shape: Vec<i64>,
    /// The elements.
    pub(crate) data: Bytes,
}

/// The number of elements of a shape; `None` if a dimension is open or the number exceeds 63 bits.
pub(crate) fn element_count(shape: &[i64]) -> Option<usize> {
    let count = shape
        .iter()
        .try_fold(1_i64, |count, dimension| (*dimension >= 0).then(|| count.checked_mul(*dimension)).flatten())?;
    usize::try_from(count).ok()
}

/// The elements of a string tensor: each is a 4-byte little-endian length and that many bytes. `None` if `data` ends
/// inside an element.
pub(crate) fn strings(mut data: &[u8]) -> Option<Vec<&[u8]>> {
    let mut strings = Vec::new();
    while !data.is_empty() {
        let (length, rest) = data.split_first_chunk::<4>()?;
        let (string, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        strings.push(string);
        data = rest;
    }
    Some(strings)
}

/// Appends one element of a string tensor.
pub(crate) fn push_string(data: &mut Vec<u8>, string: &[u8]) {
    let length = u32::try_from(string.len()).expect("a string of a tensor is shorter than 4 GiB");
    data.extend_from_slice(&length.to_le_bytes());
    data.extend_from_slice(string);
}

/// A byte buffer, zeroed at first, that begins at a multiple of [`ALIGNMENT_BYTES`].
#[derive(Debug)]
pub(crate) struct AlignedBytes {
    start: NonNull<u8>,
    len: usize,
}

/// Enough for the widest vector instructions, and for runtimes that read memory in place.
const ALIGNMENT_BYTES: usize = 64;

impl AlignedBytes {
    pub(crate) fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, len }
    }

    pub(crate) fn copied(from: &[u8]) -> Self {
        let mut bytes = Self::zeroed(from.len());
        bytes.as_mut().copy_from_slice(from);
        bytes
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGNMENT_BYTES).expect("a tensor's size is bounded far below isize::MAX")
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `start` was allocated with at least `len` bytes, all of them initialised.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl AsMut<[u8]> for AlignedBytes {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl From<AlignedBytes> for Bytes {
    fn from(bytes: AlignedBytes) -> Self {
        Self::from_owner(bytes)
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this very layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len)) }
    }
}

// SAFETY: the buffer owns its memory alone, like a `Vec<u8>`.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBytes {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_counts_its_elements_or_says_that_it_cannot() {
        assert_eq!(element_count(&[]), Some(1), "a scalar");
        assert_eq!(element_count(&[2, 3]), Some(6));
        assert_eq!(element_count(&[2, 0]), Some(0));
        assert_eq!(element_count(&[2, -1]), None);
        assert_eq!(element_count(&[1 << 32, 1 << 32]), None);
    }

    #[test]
    fn strings_end_where_their_lengths_say() {
        let mut data = Vec::new();
        push_string(&mut data, b"edge");
        push_string(&mut data, b"");
        assert_eq!(strings(&data), Some(vec![&b"edge"[..], &b""[..]]));
        assert_eq!(strings(&data[..6]), None, "cut in a string");
        assert_eq!(strings(&data[..9]), None, "cut in a length");
    }

    #[test]
    fn copied_bytes_are_aligned_wherever_they_come_from() {
        let source: Vec<u8> = (0..100).collect();
        let bytes = Bytes::from(AlignedBytes::copied(&source[1..]));
        assert_eq!(bytes.as_ptr().align_offset(ALIGNMENT_BYTES), 0);
        assert_eq!(&bytes[..], &source[1..]);
        assert!(Bytes::from(AlignedBytes::zeroed(0)).is_empty());
    }
}
