//! ZeroMQ's wire protocol (ZMTP 3.1, NULL mechanism), read and spoken without libzmq.
//!
//! [`Reader`] turns a passing byte stream into messages, for counting. [`Peer`] is a DEALER on a plain TCP connection,
//! for messages that no honest node would send, and for ten thousand peers that cost one descriptor each.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::Duration,
};

use bytes::Bytes;
use proto_msgs::{Frame, Header};

const GREETING_BYTES: usize = 64;
const FLAG_MORE: u8 = 1;
const FLAG_LONG: u8 = 2;
const FLAG_COMMAND: u8 = 4;

/// Longest part that the tests send.
const PART_BYTES_MAX: u64 = 64 << 20;

/// A message that passed by.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Passed {
    /// Kind number; `None` if it is not a message of the mesh.
    pub kind: Option<u16>,
    /// The first part, for decoding.
    pub head: Bytes,
    /// Bytes of the parts behind the first: a chunk's payload.
    pub payload_bytes: u64,
}

/// Reads one direction of a passing connection.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: Vec<u8>,
    greeted: bool,
    /// The message whose last part has not arrived yet.
    open: Option<Passed>,
}

impl Reader {
    /// Takes the next bytes of the stream and returns the messages that end in them.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Passed> {
        self.buffer.extend_from_slice(bytes);
        let mut passed = Vec::new();
        let mut at = 0;
        if !self.greeted && self.buffer.len() >= GREETING_BYTES {
            self.greeted = true;
            at = GREETING_BYTES;
        }
        while let Some((flags, part)) = self.greeted.then(|| split_part(&self.buffer[at..])).flatten() {
            at += part.end;
            if flags & FLAG_COMMAND != 0 {
                continue;
            }
            let body = &self.buffer[at - (part.end - part.start)..at];
            match &mut self.open {
                Some(message) => message.payload_bytes += body.len() as u64,
                None => {
                    let kind = Header::split(body).map(|(header, _)| header.kind);
                    self.open = Some(Passed { kind, head: Bytes::copy_from_slice(body), payload_bytes: 0 });
                }
            }
            if flags & FLAG_MORE == 0 {
                passed.extend(self.open.take());
            }
        }
        self.buffer.drain(..at);
        passed
    }
}

/// Flags and range of the part at the beginning of `bytes`; `None` if it is incomplete.
fn split_part(bytes: &[u8]) -> Option<(u8, std::ops::Range<usize>)> {
    let flags = *bytes.first()?;
    let (start, length) = if flags & FLAG_LONG != 0 {
        (9, u64::from_be_bytes(bytes.get(1..9)?.try_into().ok()?))
    } else {
        (2, u64::from(*bytes.get(1)?))
    };
    let end = start + usize::try_from(length.min(PART_BYTES_MAX)).ok()?;
    (bytes.len() >= end).then_some((flags, start..end))
}

fn write_part(to: &mut Vec<u8>, flags: u8, body: &[u8]) {
    if let Ok(length) = u8::try_from(body.len()) {
        to.extend([flags, length]);
    } else {
        to.push(flags | FLAG_LONG);
        to.extend((body.len() as u64).to_be_bytes());
    }
    to.extend_from_slice(body);
}

/// A DEALER without libzmq.
#[derive(Debug)]
pub struct Peer {
    stream: TcpStream,
    received: Vec<u8>,
    parts: Vec<Bytes>,
}

impl Peer {
    /// Connects to `address` (`127.0.0.1:5555`, with or without `tcp://`) and shakes hands.
    ///
    /// # Errors
    /// If nobody listens, or the peer speaks another protocol.
    pub fn connect(address: &str) -> io::Result<Self> {
        let mut stream = TcpStream::connect(address.trim_start_matches("tcp://"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(super::PATIENCE))?;
        stream.set_write_timeout(Some(super::PATIENCE))?;
        let mut hello = vec![0_u8; GREETING_BYTES];
        hello[0] = 0xFF;
        hello[9] = 0x7F;
        hello[10..12].copy_from_slice(&[3, 1]);
        hello[12..16].copy_from_slice(b"NULL");
        write_part(&mut hello, FLAG_COMMAND, b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0");
        stream.write_all(&hello)?;
        let mut peer = Self { stream, received: Vec::new(), parts: Vec::new() };
        let mut greeting = [0; GREETING_BYTES];
        peer.stream.read_exact(&mut greeting)?;
        if greeting[..1] != [0xFF] || greeting[12..16] != *b"NULL" {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no ZMTP peer without keys"));
        }
        Ok(peer)
    }

    /// Sends a frame: one part, or two if it has a payload.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn send(&mut self, frame: &Frame) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(frame.size_bytes() + 18);
        if frame.payload.is_empty() {
            write_part(&mut bytes, 0, &frame.head);
        } else {
            write_part(&mut bytes, FLAG_MORE, &frame.head);
            write_part(&mut bytes, 0, &frame.payload);
        }
        self.stream.write_all(&bytes)
    }

    /// Sends raw bytes that are not even ZMTP.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next frame; `None` if none arrives within `limit`. Answers ZeroMQ's pings meanwhile.
    ///
    /// # Errors
    /// If the peer closed the connection.
    pub fn recv(&mut self, limit: Duration) -> io::Result<Option<Frame>> {
        let start = std::time::Instant::now();
        loop {
            if let Some(frame) = self.take_frame()? {
                return Ok(Some(frame));
            }
            let left = limit.saturating_sub(start.elapsed());
            if !self.read_some(left)? && left.is_zero() {
                return Ok(None);
            }
        }
    }

    /// Reads what has arrived, and waits for it at most `limit`; false if nothing came.
    fn read_some(&mut self, limit: Duration) -> io::Result<bool> {
        let mut buffer = [0; 16 * 1024];
        let read = if limit.is_zero() {
            self.stream.set_nonblocking(true)?;
            let read = self.stream.read(&mut buffer);
            self.stream.set_nonblocking(false)?;
            read
        } else {
            self.stream.set_read_timeout(Some(limit))?;
            self.stream.read(&mut buffer)
        };
        match read {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                self.received.extend_from_slice(&buffer[..length]);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn take_frame(&mut self) -> io::Result<Option<Frame>> {
        while let Some((flags, place)) = split_part(&self.received) {
            let body = Bytes::copy_from_slice(&self.received[place.clone()]);
            self.received.drain(..place.end);
            if flags & FLAG_COMMAND != 0 {
                self.answer_ping(&body)?;
                continue;
            }
            self.parts.push(body);
            if flags & FLAG_MORE == 0 {
                let mut parts = std::mem::take(&mut self.parts).into_iter();
                let head = parts.next().unwrap_or_default();
                return Ok(Some(Frame { head, payload: parts.next().unwrap_or_default() }));
            }
        }
        Ok(None)
    }

    fn answer_ping(&mut self, command: &[u8]) -> io::Result<()> {
        // A PING: name, two bytes of time to live, and up to 16 bytes that are returned.
        let Some(context) = command.strip_prefix(b"\x04PING").and_then(|rest| rest.get(2..)) else { return Ok(()) };
        let mut pong = Vec::new();
        write_part(&mut pong, FLAG_COMMAND, &[b"\x04PONG", context].concat());
        self.stream.write_all(&pong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_the_stream_is_cut() {
        let mut stream = vec![0; GREETING_BYTES];
        write_part(&mut stream, FLAG_COMMAND, b"\x05READY");
        let head = Header { version: 1, kind: 401, body_bytes: 0 }.to_bytes();
        write_part(&mut stream, FLAG_MORE, &head);
        write_part(&mut stream, 0, &[7; 300]);
        write_part(&mut stream, 0, b"something else");
        let chunk = Passed { kind: Some(401), head: Bytes::copy_from_slice(&head), payload_bytes: 300 };
        let other = Passed { kind: None, head: Bytes::from_static(b"something else"), payload_bytes: 0 };
        let expected = [chunk, other];
        for piece_bytes in [1, 7, stream.len()] {
            let mut reader = Reader::default();
            let passed: Vec<Passed> = stream.chunks(piece_bytes).flat_map(|piece| reader.feed(piece)).collect();
            assert_eq!(passed, expected, "in pieces of {piece_bytes}");
        }
    }
}
