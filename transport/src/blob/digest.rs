//! BLAKE3 of a large blob on all cores: its tree is cut into equal subtrees, which several threads hash.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use blake3::{
    Hasher,
    hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root},
};
use proto_msgs::Digest;

/// Bytes of a subtree: a power of two, small enough for the cache, large enough that handing it to a thread is cheap.
const SUBTREE_BYTES: u64 = 512 * 1024;

/// Most threads per digest; more would only wait for memory.
const THREADS_MAX: usize = 8;

/// The digest of `size_bytes` bytes, which `read(buffer, offset)` returns.
pub(crate) fn digest<E: Send>(
    size_bytes: u64,
    read: impl Fn(&mut [u8], u64) -> Result<(), E> + Sync,
) -> Result<Digest, E> {
    if size_bytes <= SUBTREE_BYTES {
        let mut bytes = vec![0; size_bytes as usize];
        read(&mut bytes, 0)?;
        return Ok(Digest::of(&bytes));
    }
    let subtrees = size_bytes.div_ceil(SUBTREE_BYTES) as usize;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let hash_some = || -> Result<Vec<(usize, ChainingValue)>, E> {
        let mut buffer = vec![0; SUBTREE_BYTES as usize];
        let mut hashed = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= subtrees {
                return Ok(hashed);
            }
            let offset = index as u64 * SUBTREE_BYTES;
            let piece = &mut buffer[..SUBTREE_BYTES.min(size_bytes - offset) as usize];
            read(piece, offset)?;
            hashed.push((index, Hasher::new().set_input_offset(offset).update(piece).finalize_non_root()));
        }
    };
    let mut leaves = vec![[0; 32]; subtrees];
    let hashed: Vec<_> = thread::scope(|scope| {
        let others: Vec<_> = (1..cores.min(subtrees).min(THREADS_MAX)).map(|_| scope.spawn(hash_some)).collect();
        let own = hash_some();
        let theirs = others.into_iter().map(|thread| thread.join().expect("reading and hashing do not panic"));
        std::iter::once(own).chain(theirs).collect::<Result<_, E>>()
    })?;
    for (index, value) in hashed.into_iter().flatten() {
        leaves[index] = value;
    }
    let (left, right) = leaves.split_at(left_leaves(subtrees));
    Ok(merge_subtrees_root(&merge(left), &merge(right), Mode::Hash).into())
}

/// The chaining value over these leaves, which are not the whole tree.
fn merge(leaves: &[ChainingValue]) -> ChainingValue {
    if let [leaf] = leaves {
        return *leaf;
    }
    let (left, right) = leaves.split_at(left_leaves(leaves.len()));
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

/// BLAKE3's rule: the left side is the largest power of two that leaves at least one leaf for the right.
fn left_leaves(leaves: usize) -> usize {
    leaves.next_power_of_two() / 2
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn many_threads_find_the_digest_that_one_finds() {
        let piece = SUBTREE_BYTES as usize;
        for len in [0, 1, piece - 1, piece, piece + 1, 2 * piece, 3 * piece + 17, 8 * piece, 11 * piece - 1] {
            let bytes: Vec<u8> = (0..len).map(|index| (index * 7 + index / 251) as u8).collect();
            let read = |buffer: &mut [u8], offset: u64| -> Result<(), Infallible> {
                buffer.copy_from_slice(&bytes[offset as usize..offset as usize + buffer.len()]);
                Ok(())
            };
            assert_eq!(digest(len as u64, read), Ok(Digest::of(&bytes)), "{len} bytes");
        }
    }

    #[test]
    fn an_error_in_any_thread_is_the_result() {
        let read = |_: &mut [u8], offset: u64| if offset > 5 * SUBTREE_BYTES { Err("unreadable") } else { Ok(()) };
        assert_eq!(digest(9 * SUBTREE_BYTES, read), Err("unreadable"));
    }
}
