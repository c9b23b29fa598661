//! Owns keys as files and text: the z85 form, the secret file's mode, the list of authorized keys. Never: what a key's
//! holder may do.
//!
//! A key pair is two files, each a line of 40 z85 characters: `FILE` with the secret key (mode 0600) and `FILE.pub`
//! with the public one.

use std::{
    collections::HashSet,
    ffi::{CStr, CString, c_char, c_int},
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
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
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Group or others can read the secret key.
    #[error("key file {} can be read by others: `chmod 600` it, or make a new key if it may have leaked", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// The text is not a key.
    #[error("{what} is not a key: expected 40 characters of z85")]
    NotAKey {
        /// The file (and line), or the text itself.
        what: String,
    },
    /// The file exists, and `keygen` does not overwrite.
    #[error("key file {} exists already: remove it first if a new key is wanted", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// libzmq was built without CURVE.
    #[error("this build of libzmq has no CURVE: build with transport/zeromq-src as the workspace does")]
    NoCurve,
}

impl KeyPair {
    /// Makes new random keys. The public key begins with a letter or digit, so that it does not look like a comment in
    /// a list (`#`) or a flag on a command line (`-`).
    ///
    /// # Errors
    /// If libzmq has no CURVE.
    pub fn generate() -> Result<Self, KeyError> {
        loop {
            let pair = zmq::CurveKeyPair::new().map_err(|_| KeyError::NoCurve)?;
            let public = PublicKey(pair.public_key);
            if to_text(&public).starts_with(|first: char| first.is_ascii_alphanumeric()) {
                return Ok(Self { public, secret: pair.secret_key });
            }
        }
    }

    /// Reads the secret key in `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is not a key, or can be read by group or others.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let file_error = |source| KeyError::File { path: path.into(), source };
        let mut file = File::open(path).map_err(file_error)?;
        if file.metadata().map_err(file_error)?.mode() & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.into() });
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(file_error)?;
        let not_a_key = || KeyError::NotAKey { what: path.display().to_string() };
        let secret = decode(text.trim()).ok_or_else(not_a_key)?;
        let public = public_of(text.trim()).ok_or_else(not_a_key)?;
        Ok(Self { public, secret })
    }

    /// Writes the secret key to `path` (mode 0600) and the public key to `path.pub`. It never overwrites a file.
    ///
    /// # Errors
    /// If a file exists or cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        create(path, 0o600, &encode(&self.secret))?;
        create(&beside(path), 0o644, &to_text(&self.public))
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.secret
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyPair({:?}, secret)", self.public)
    }
}

/// The key as text: 40 characters of z85.
pub fn to_text(key: &PublicKey) -> String {
    encode(&key.0)
}

/// Parses a key from 40 characters of z85.
///
/// # Errors
/// If the text is not a key.
pub fn parse(text: &str) -> Result<PublicKey, KeyError> {
    decode(text).map(PublicKey).ok_or_else(|| KeyError::NotAKey { what: format!("{:?}", shortened(text)) })
}

/// Reads a public key from the text itself, or from the file that it names (the first word of the first line that is
/// not a comment).
///
/// # Errors
/// If the text is neither a key nor a file with one.
pub fn read_public(text_or_path: &str) -> Result<PublicKey, KeyError> {
    if let Ok(key) = parse(text_or_path) {
        return Ok(key);
    }
    let path = Path::new(text_or_path);
    let text = fs::read_to_string(path).map_err(|source| KeyError::File { path: path.into(), source })?;
    let word = lines_of(&text).next().map(|(_, word)| word);
    word.and_then(|word| parse(word).ok()).ok_or_else(|| KeyError::NotAKey { what: text_or_path.to_owned() })
}

/// A file of public keys, one per line, each with an optional comment behind it. `#` begins a comment line.
#[derive(Debug)]
pub struct AuthorizedKeys {
    path: PathBuf,
    stamp: Stamp,
    keys: HashSet<PublicKey>,
}

/// Identifies one state of a file: inode, size, and seconds and nanoseconds of the last change.
type Stamp = (u64, u64, i64, i64);

impl AuthorizedKeys {
    /// Reads the file.
    ///
    /// # Errors
    /// If the file cannot be read, or a line is not a key.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let (stamp, keys) = read_authorized(path)?;
        Ok(Self { path: path.into(), stamp, keys })
    }

    /// The keys in the file.
    pub fn keys(&self) -> &HashSet<PublicKey> {
        &self.keys
    }

    /// Reads the file again if its size, time or inode changed. Returns true if the set of keys changed. After an error
    /// the old keys stay.
    ///
    /// # Errors
    /// If the file cannot be read, or a line is not a key.
    pub fn reload_if_changed(&mut self) -> Result<bool, KeyError> {
        let now = fs::metadata(&self.path).map_err(|source| KeyError::File { path: self.path.clone(), source })?;
        if stamp_of(&now) == self.stamp {
            return Ok(false);
        }
        let (stamp, keys) = read_authorized(&self.path)?;
        let changed = keys != self.keys;
        (self.stamp, self.keys) = (stamp, keys);
        Ok(changed)
    }
}

fn read_authorized(path: &Path) -> Result<(Stamp, HashSet<PublicKey>), KeyError> {
    let file_error = |source| KeyError::File { path: path.into(), source };
    // The stamp is taken before the file is read, so a change in between is seen next time.
    let stamp = stamp_of(&fs::metadata(path).map_err(file_error)?);
    let text = fs::read_to_string(path).map_err(file_error)?;
    let keys = lines_of(&text).map(|(line, word)| {
        parse(word).map_err(|_| KeyError::NotAKey { what: format!("line {line} of {}", path.display()) })
    });
    Ok((stamp, keys.collect::<Result<_, _>>()?))
}

fn stamp_of(file: &fs::Metadata) -> Stamp {
    (file.ino(), file.len(), file.mtime(), file.mtime_nsec())
}

/// Line number and first word of each line that is neither empty nor a comment.
fn lines_of(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with('#'));
    numbered.filter_map(|(index, line)| Some((index + 1, line.split_whitespace().next()?)))
}

/// `FILE.pub` for `FILE`.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

fn create(path: &Path, mode: u32, line: &str) -> Result<(), KeyError> {
    let file_error = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyError::Exists { path: path.into() },
        _ => KeyError::File { path: path.into(), source },
    };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(file_error)?;
    file.write_all(format!("{line}\n").as_bytes()).map_err(file_error)
}

fn shortened(text: &str) -> String {
    text.chars().take(60).collect()
}

fn encode(key: &[u8; 32]) -> String {
    zmq::z85_encode(key).expect("32 bytes are a multiple of 4")
}

/// Decodes z85. (The `zmq` crate's decoder leaks the text and accepts characters that are not z85's.)
fn decode(text: &str) -> Option<[u8; 32]> {
    let mut c_text = [0; Z85_CHARS + 1];
    c_text[..Z85_CHARS].copy_from_slice(<&[u8; Z85_CHARS]>::try_from(text.as_bytes()).ok()?);
    let mut key = [0; 32];
    // SAFETY: reads a C string of 40 characters, writes 32 bytes.
    let decoded = unsafe { zmq_sys::zmq_z85_decode(key.as_mut_ptr(), c_text.as_ptr().cast()) };
    if decoded.is_null() { None } else { Some(key) }
}

fn public_of(secret_text: &str) -> Option<PublicKey> {
    let secret = CString::new(secret_text).ok()?;
    let mut text = [0; Z85_CHARS + 1];
    // SAFETY: reads a C string of 40 characters, writes 40 characters and a zero.
    let made = unsafe { zmq_curve_public(text.as_mut_ptr(), secret.as_ptr()) };
    let text = text.map(|character| character as u8);
    let text = CStr::from_bytes_until_nul(&text).ok()?.to_str().ok()?;
    if made == 0 { decode(text).map(PublicKey) } else { None }
}

// `zmq-sys` declares this function but does not export it.
unsafe extern "C" {
    fn zmq_curve_public(public_text: *mut c_char, secret_text: *const c_char) -> c_int;
}

/// Characters of a key's text.
const Z85_CHARS: usize = 40;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    #[test]
    fn saved_keys_come_back_and_the_public_file_matches() {
        let folder = folder();
        let path = folder.path().join("node.key");
        let keys = KeyPair::generate().expect("curve");
        keys.save(&path).expect("saved");

        let back = KeyPair::load(&path).expect("loaded");
        assert_eq!((back.public(), back.secret()), (keys.public(), keys.secret()));
        let public_file = folder.path().join("node.key.pub");
        assert_eq!(read_public(public_file.to_str().expect("utf-8")).expect("a key"), keys.public());
        assert_eq!(read_public(&to_text(&keys.public())).expect("a key"), keys.public());
        assert!(matches!(keys.save(&path), Err(KeyError::Exists { .. })));
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused() {
        let folder = folder();
        let path = folder.path().join("node.key");
        KeyPair::generate().expect("curve").save(&path).expect("saved");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod");
        assert!(matches!(KeyPair::load(&path), Err(KeyError::Exposed { .. })));
    }

    #[test]
    fn nonsense_is_no_key() {
        let key = to_text(&KeyPair::generate().expect("curve").public());
        assert!(parse(&key[1..]).is_err());
        assert!(parse(&format!("{key}0")).is_err());
        assert!(parse(&"é".repeat(20)).is_err());
        assert!(parse(&"~".repeat(40)).is_err());
        assert!(parse("").is_err());
    }

    #[test]
    fn authorized_keys_are_read_again_when_they_change() {
        let folder = folder();
        let path = folder.path().join("authorized");
        let [first, second] = [(); 2].map(|()| KeyPair::generate().expect("curve").public());
        fs::write(&path, format!("# the mesh\n{}  worker pi-1\n\n", to_text(&first))).expect("written");
        let mut keys = AuthorizedKeys::load(&path).expect("loaded");
        assert_eq!(keys.keys(), &HashSet::from([first]));
        assert!(!keys.reload_if_changed().expect("readable"));

        fs::write(&path, format!("{}\n{}\n", to_text(&first), to_text(&second))).expect("written");
        assert!(keys.reload_if_changed().expect("readable"));
        assert_eq!(keys.keys(), &HashSet::from([first, second]));

        fs::write(&path, "no key at all\n").expect("written");
        let error = keys.reload_if_changed().expect_err("nonsense").to_string();
        assert!(error.contains("line 1 of"), "{error}");
        assert_eq!(keys.keys().len(), 2, "the old keys stay");
    }
}
