//! Owns how the C allocator treats freed messages. libzmq allocates each message with `malloc`, whatever Rust uses.

use proto_msgs::limits::{FRAME_BYTES_MAX, WINDOW_BYTES};

/// Makes the C allocator of this process use freed messages again. By default it gives a chunk's pages back to the
/// kernel at once, and the next chunk pays for new ones: on two cores 6 to 10 % of a large transfer's time. At most a
/// window of freed bytes is kept per arena. For programs that receive blobs; a library leaves this to its program.
pub fn keep_freed_messages() {
    const { assert!(WINDOW_BYTES <= i32::MAX as u32) };
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` sets numbers of the allocator, under its own lock. Values that it refuses change nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 2 * FRAME_BYTES_MAX as i32);
        libc::mallopt(libc::M_TRIM_THRESHOLD, WINDOW_BYTES as i32);
    }
}
