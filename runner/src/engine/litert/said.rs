//! What LiteRT says on stderr while it loads a model, or why a run fails. Owns that its chatter is not seen and the reason of a
//! refusal is: the library tells it nowhere else.

use std::{
    fs::File,
    io::{Read, Seek},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// Takes stderr from its creation until it is dropped.
pub(super) struct Said {
    taken: Option<Taken>,
}

struct Taken {
    heard: File,
    stderr: OwnedFd,
}

/// More than any refusal; the rest of a longer one is cut off.
const HEARD_BYTES_MAX: u64 = 16 * 1024;

impl Said {
    /// Begins to listen. Where that is impossible, what is said goes to stderr as ever.
    pub(super) fn listen() -> Self {
        Self { taken: Taken::take() }
    }

    /// What the library says when it does `again` what failed with `error`. A run is not listened to before it has failed:
    /// should it take the process down, its last words (no memory, say) must reach whoever started the process.
    pub(super) fn why(error: String, again: impl FnOnce() -> Result<(), String>) -> String {
        let said = Self::listen();
        // Whether it fails again or not, it has failed.
        let _ = again();
        said.or(error)
    }

    /// What was said, or `otherwise` if nothing was.
    pub(super) fn or(&self, otherwise: String) -> String {
        let heard = self.taken.as_ref().map(Taken::text).unwrap_or_default();
        if heard.is_empty() { otherwise } else { heard }
    }
}

/// The operator that a line of LiteRT's names as missing.
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
        // SAFETY: plain system calls on descriptors that are ours.
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
        // SAFETY: `stderr` is the descriptor that stood there before.
        unsafe { libc::dup2(self.stderr.as_raw_fd(), libc::STDERR_FILENO) };
    }
}
