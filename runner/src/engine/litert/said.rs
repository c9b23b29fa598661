//! LiteRT's output on stderr while it loads a model, or when a run fails. Owns hiding its chatter and finding the
//! reason of a refusal, which the library reports nowhere else.

use std::{
    fs::File,
    io::{Read, Seek},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// Redirects stderr from its creation until it is dropped.
pub(super) struct Said {
    taken: Option<Taken>,
}

struct Taken {
    heard: File,
    stderr: OwnedFd,
}

/// Longest text that is read. It is more than any refusal needs; the rest is cut off.
const HEARD_BYTES_MAX: u64 = 16 * 1024;

impl Said {
    /// Starts to listen. If that is impossible, the output goes to stderr as usual.
    pub(super) fn listen() -> Self {
        Self { taken: Taken::take() }
    }

    /// The library's text when it does `again` what failed with `error`. A first run is not redirected: if it takes the
    /// process down, its last words (for example about memory) must reach the process that started this one.
    pub(super) fn why(error: String, again: impl FnOnce() -> Result<(), String>) -> String {
        let said = Self::listen();
        // The second result does not matter: the first one failed.
        let _ = again();
        said.or(error)
    }

    /// The text on stderr, or `otherwise` if there is none.
    pub(super) fn or(&self, otherwise: String) -> String {
        let heard = self.taken.as_ref().map(Taken::text).unwrap_or_default();
        if heard.is_empty() { otherwise } else { heard }
    }
}

/// The missing operator that a line of LiteRT's names, if it names one.
pub(super) fn missing_operator(line: &str) -> Option<String> {
    let after = |text| line.split_once(text).map(|(_, rest)| rest);
    if let Some(rest) = after("unresolved custom op: ") {
        return Some(rest.split('.').next().unwrap_or(rest).trim().to_owned());
    }
    let rest = after("Didn't find op for builtin opcode '")?;
    Some(rest.replacen('\'', "", 1).split('.').next()?.replace('\'', ""))
}

impl Taken {
    fn take() -> Option<Self> {
        // SAFETY: plain system calls on descriptors that this process owns.
        unsafe {
            let heard = libc::memfd_create(c"litert".as_ptr(), libc::MFD_CLOEXEC);
            if heard < 0 {
                return None;
            }
            let heard = File::from_raw_fd(heard);
            let stderr = libc::fcntl(libc::STDERR_FILENO, libc::F_DUPFD_CLOEXEC, 3);
            if stderr < 0 {
                return None;
            }
            let stderr = OwnedFd::from_raw_fd(stderr);
            (libc::dup2(heard.as_raw_fd(), libc::STDERR_FILENO) >= 0).then_some(Self { heard, stderr })
        }
    }

    fn text(&self) -> String {
        let mut text = Vec::new();
        let mut heard = &self.heard;
        let read = heard.rewind().and_then(|()| heard.take(HEARD_BYTES_MAX).read_to_end(&mut text));
        if read.is_err() {
            return String::new();
        }
        let text = String::from_utf8_lossy(&text);
        let errors = text.lines().filter_map(|line| line.split_once("ERROR: ").map(|(_, error)| error));
        errors.collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // SAFETY: `stderr` is a copy of the original descriptor.
        unsafe { libc::dup2(self.stderr.as_raw_fd(), libc::STDERR_FILENO) };
    }
}
