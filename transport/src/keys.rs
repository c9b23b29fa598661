//! Keys as files and text. Owns the z85 form, the secret file's mode, the list of authorized keys. Never: who may do what.
//!
//! A key pair is two files: `FILE` with the secret key (mode 0600) and `FILE.pub` with the public one, each a line of 40
//! z85 characters.

use std::{
    collections::HashSet,
    fmt, io,
    path::{Path, PathBuf},
};

use proto_msgs::PublicKey;

/// A node's own CURVE keys.
#[derive(Clone)]
pub struct KeyPair {
    public: PublicKey,
    secret: [u8; 32],
}

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file cannot be read or written.
    #[error("key file {}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The secret key can be read by others.
    #[error("key file {} can be read by others: `chmod 600` it, or make a new key if it may have leaked", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
    },
    /// The text is no key.
    #[error("{what} is not a key: expected 40 characters of z85")]
    NotAKey {
        /// The file (and line), or the text itself.
        what: String,
    },
    /// The secret key and the public key beside it do not belong together.
    #[error("{} does not belong to the key beside it: write the public key again with `keygen`", path.display())]
    Mismatch {
        /// The `.pub` file.
        path: PathBuf,
    },
    /// `keygen` does not overwrite.
    #[error("key file {} exists already: remove it first if a new key is wanted", path.display())]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// libzmq was built without CURVE.
    #[error("this build of libzmq has no CURVE: build with transport/zeromq-src as the workspace does")]
    NoCurve,
}

impl KeyPair {
    /// New random keys.
    ///
    /// # Errors
    /// If libzmq has no CURVE.
    pub fn generate() -> Result<Self, KeyError> {
        unimplemented!()
    }

    /// Reads the secret key in `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is no key, or can be read by group or others.
    pub fn load(_path: &Path) -> Result<Self, KeyError> {
        unimplemented!()
    }

    /// Writes the secret key to `path` (mode 0600) and the public one to `path.pub`; never over a file that exists.
    ///
    /// # Errors
    /// If a file exists or cannot be written.
    pub fn save(&self, _path: &Path) -> Result<(), KeyError> {
        unimplemented!()
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        self.public
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyPair({:?}, secret)", self.public)
    }
}

/// The key as people write it: 40 characters of z85.
pub fn to_text(_key: &PublicKey) -> String {
    unimplemented!()
}

/// The key in 40 characters of z85.
///
/// # Errors
/// If the text is no key.
pub fn parse(_text: &str) -> Result<PublicKey, KeyError> {
    unimplemented!()
}

/// The key that `text_or_path` is, or that is in the file it names (the first word of the first line that is no comment).
///
/// # Errors
/// If it is neither.
pub fn read_public(_text_or_path: &str) -> Result<PublicKey, KeyError> {
    unimplemented!()
}

/// A file with one public key per line, each with an optional comment behind it; `#` begins a comment line.
#[derive(Debug)]
pub struct AuthorizedKeys {
    path: PathBuf,
}

impl AuthorizedKeys {
    /// Reads the file.
    ///
    /// # Errors
    /// If it cannot be read or a line is no key.
    pub fn load(_path: &Path) -> Result<Self, KeyError> {
        unimplemented!()
    }

    /// The keys in it.
    pub fn keys(&self) -> &HashSet<PublicKey> {
        unimplemented!()
    }

    /// Reads the file again if its size, time or inode changed; true if the keys are others now. After an error the old
    /// keys stay.
    ///
    /// # Errors
    /// If it cannot be read or a line is no key.
    pub fn reload_if_changed(&mut self) -> Result<bool, KeyError> {
        unimplemented!()
    }
}
