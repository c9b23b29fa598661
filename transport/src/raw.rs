//! One libzmq message part. The `zmq` crate's own type copies what is sent, loses it when a queue is full, and
//! allocates for every look at its metadata. This one does none of that.
//!
//! Owns all `unsafe` around messages. Never: sockets' lives, meanings.

use std::{
    ffi::{CStr, c_int, c_void},
    ptr, slice,
};

use bytes::Bytes;

/// Longest part that is copied (`malloc` and `memcpy` are cheaper than counting references). Longer parts change hands.
const COPY_BYTES_MAX: usize = 4096;

/// Name of the metadata that the door-keeper's answer sets.
const USER_ID: &CStr = c"User-Id";

/// `errno` as libzmq sets it.
pub(crate) type Errno = c_int;

/// One part of a message, owned.
pub(crate) struct Part(zmq_sys::zmq_msg_t);

// SAFETY: a zmq_msg_t may be used by any thread, one at a time; its shared contents are counted atomically.
unsafe impl Send for Part {}

impl Part {
    /// An empty part to receive into.
    pub(crate) fn new() -> Self {
        let mut part = Self(zmq_sys::zmq_msg_t::default());
        // SAFETY: init writes a valid empty message over any bytes; it cannot fail.
        unsafe { zmq_sys::zmq_msg_init(&mut part.0) };
        part
    }

    /// A part with a copy of `bytes`; `None` if there is no memory for it.
    pub(crate) fn copy_of(bytes: &[u8]) -> Option<Self> {
        let mut part = Self(zmq_sys::zmq_msg_t::default());
        // SAFETY: on success the message has room for exactly `bytes.len()` bytes, which does not overlap `bytes`.
        unsafe {
            if zmq_sys::zmq_msg_init_size(&mut part.0, bytes.len()) != 0 {
                // Dropping must find a valid message.
                zmq_sys::zmq_msg_init(&mut part.0);
                return None;
            }
            ptr::copy_nonoverlapping(bytes.as_ptr(), zmq_sys::zmq_msg_data(&mut part.0).cast(), bytes.len());
        }
        Some(part)
    }

    /// A part with these bytes; long ones are shared, not copied. `None` if there is no memory for it.
    pub(crate) fn sharing(bytes: &Bytes) -> Option<Self> {
        if bytes.len() <= COPY_BYTES_MAX {
            return Self::copy_of(bytes);
        }
        let mut part = Self(zmq_sys::zmq_msg_t::default());
        let (data, len) = (bytes.as_ptr().cast_mut().cast::<c_void>(), bytes.len());
        let owner = Box::into_raw(Box::new(bytes.clone()));
        // SAFETY: the boxed `Bytes` keeps `data` alive and unchanged until libzmq calls `release`, once.
        unsafe {
            if zmq_sys::zmq_msg_init_data(&mut part.0, data, len, Some(release), owner.cast()) != 0 {
                drop(Box::from_raw(owner));
                zmq_sys::zmq_msg_init(&mut part.0);
                return None;
            }
        }
        Some(part)
    }

    /// Whether more parts of the same message follow.
    pub(crate) fn more(&self) -> bool {
        // SAFETY: the message is valid.
        unsafe { zmq_sys::zmq_msg_more(&self.0) != 0 }
    }

    /// The door-keeper's note about the sender: its key.
    pub(crate) fn user_id(&self) -> Option<&str> {
        // SAFETY: message and name are valid; the value, if any, is a C string that lives as long as the message.
        unsafe {
            let value = zmq_sys::zmq_msg_gets(&self.0, USER_ID.as_ptr());
            if value.is_null() { None } else { CStr::from_ptr(value).to_str().ok() }
        }
    }

    /// The contents; long ones are not copied.
    pub(crate) fn into_bytes(self) -> Bytes {
        if self.as_ref().len() <= COPY_BYTES_MAX {
            Bytes::copy_from_slice(self.as_ref())
        } else {
            Bytes::from_owner(self)
        }
    }

    /// Receives the next part into this one, without waiting.
    pub(crate) fn recv(&mut self, socket: &mut zmq::Socket) -> Result<(), Errno> {
        // SAFETY: both are valid; whatever the part held is released.
        let received = unsafe { zmq_sys::zmq_msg_recv(&mut self.0, socket.as_mut_ptr(), zmq::DONTWAIT) };
        if received < 0 { Err(errno()) } else { Ok(()) }
    }

    /// Sends the part, without waiting. After an error it is unchanged.
    pub(crate) fn send(&mut self, socket: &mut zmq::Socket, more: bool) -> Result<(), Errno> {
        let flags = if more { zmq::DONTWAIT | zmq::SNDMORE } else { zmq::DONTWAIT };
        // SAFETY: both are valid; on success libzmq has taken the contents and left an empty message.
        let sent = unsafe { zmq_sys::zmq_msg_send(&mut self.0, socket.as_mut_ptr(), flags) };
        if sent < 0 { Err(errno()) } else { Ok(()) }
    }
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        let message = ptr::from_ref(&self.0).cast_mut();
        // SAFETY: data and size belong together and stay while the message is not touched; an empty message may have
        // no data.
        unsafe {
            let len = zmq_sys::zmq_msg_size(message);
            if len == 0 { &[] } else { slice::from_raw_parts(zmq_sys::zmq_msg_data(message).cast::<u8>(), len) }
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: the message is valid in every state this module leaves it in.
        unsafe { zmq_sys::zmq_msg_close(&mut self.0) };
    }
}

unsafe extern "C" fn release(_data: *mut c_void, owner: *mut c_void) {
    // SAFETY: `owner` is the box that `sharing` gave away, and libzmq calls this once.
    drop(unsafe { Box::from_raw(owner.cast::<Bytes>()) });
}

/// Stops the events of a socket: the `zmq` crate can only start them.
pub(crate) fn unwatch(socket: &mut zmq::Socket) {
    // SAFETY: the socket is open; a null address stops the events.
    unsafe { zmq_sys::zmq_socket_monitor(socket.as_mut_ptr(), ptr::null(), 0) };
}

/// The error number of the last failure in this thread.
pub(crate) fn errno() -> Errno {
    // SAFETY: always callable.
    unsafe { zmq_sys::zmq_errno() }
}

/// libzmq's text for this error number.
pub(crate) fn text_of(errno: Errno) -> String {
    // SAFETY: gives a C string with static life for every number.
    unsafe { CStr::from_ptr(zmq_sys::zmq_strerror(errno)) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_part_shares_its_bytes_and_releases_them() {
        let bytes = Bytes::from(vec![7; 100_000]);
        let part = Part::sharing(&bytes).expect("memory");
        assert_eq!(part.as_ref().as_ptr(), bytes.as_ptr());
        assert!(!bytes.is_unique());
        let back = part.into_bytes();
        assert_eq!(back.as_ptr(), bytes.as_ptr());
        drop(back);
        assert!(bytes.is_unique());
    }

    #[test]
    fn a_short_part_is_a_copy() {
        let part = Part::copy_of(b"short").expect("memory");
        assert_eq!(&part.into_bytes()[..], b"short");
        assert_eq!(Part::new().as_ref(), b"");
    }
}
