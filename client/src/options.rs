//! How a program joins the mesh. Owns the settings and the files of a client's state folder. Never sends or receives.
//!
//! ```text
//!   state_dir/client-id      who this user is: results of detached tasks go to this id alone
//!   state_dir/spool/         large outputs, see `spool`
//! ```

use std::{
    ffi::OsString,
    fs,
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_transport::{ContextError, DialError, ListenError, address, keys::KeyError};
use proto_msgs::{ClientId, Direction, limits};
use uuid::Uuid;

/// The broker's address by default.
pub const BROKER_DEFAULT: &str = "tcp://127.0.0.1:5555";

/// Settings of a connection to the mesh.
#[derive(Clone, Debug)]
pub struct Options {
    /// The broker's address, `tcp://HOST:PORT`.
    pub broker: String,
    /// The broker's public key (z85), or a file that holds it. Needed with `key_file`.
    pub broker_key: Option<String>,
    /// This node's secret key file. Without one, connections are neither encrypted nor authenticated.
    pub key_file: Option<PathBuf>,
    /// The folder with this client's identity. Two programs with the same folder are the same user. Empty if there is
    /// no default folder; then it must be set.
    pub state_dir: PathBuf,
    /// The only direction to use; `None`: whichever the broker finds reachable.
    pub direction: Option<Direction>,
    /// Whether workers may dial this client.
    pub listen: Listen,
    /// Addresses (`HOST` or `HOST:PORT`) to give to workers instead of the bound one.
    pub advertise: Vec<String>,
    /// Time limit for the broker's first answer in [`Mesh::connect`](crate::Mesh::connect).
    pub connect_within: Duration,
}

/// Whether and where workers may dial the client.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Listen {
    /// On a free port of the interface towards the broker, unless the direction is forced to `ClientDials`. Only
    /// workers that cannot be dialled themselves use it.
    #[default]
    Auto,
    /// At this endpoint (`tcp://0.0.0.0:7000`).
    At(String),
    /// Nowhere.
    Never,
}

impl Default for Options {
    fn default() -> Self {
        Self::new(BROKER_DEFAULT)
    }
}

impl Options {
    /// The default settings for this broker; `tcp://` may be left away.
    pub fn new(broker: impl Into<String>) -> Self {
        Self {
            broker: address::completed(&broker.into()),
            broker_key: None,
            key_file: None,
            state_dir: default_state_dir().unwrap_or_default(),
            direction: None,
            listen: Listen::Auto,
            advertise: Vec::new(),
            // A restarting broker needs a second or two; a wrong address should not cost a minute.
            connect_within: Duration::from_secs(10),
        }
    }
}

/// `$XDG_STATE_HOME/mesh/client`, else `~/.local/state/mesh/client`; `None` if neither is known. Not in `/tmp`: the
/// first user there would own the folder, and with its id all results.
pub fn default_state_dir() -> Option<PathBuf> {
    state_dir_of(|name| std::env::var_os(name))
}

fn state_dir_of(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let folder = |name| variable(name).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let base = folder("XDG_STATE_HOME").or_else(|| Some(folder("HOME")?.join(".local/state")))?;
    Some(base.join("mesh/client"))
}

/// Why a program could not join the mesh.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The broker did not answer, or refused.
    #[error("cannot reach the broker: {0}")]
    Broker(#[source] DialError),
    /// The keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// A key file is given without the broker's key, or the other way round.
    #[error("{0}")]
    HalfKeyed(&'static str),
    /// Sockets are not available.
    #[error(transparent)]
    System(#[from] ContextError),
    /// The listening address cannot be used.
    #[error("workers cannot dial this client: {0}")]
    Listen(#[from] ListenError),
    /// The state folder cannot be used.
    #[error("cannot use state folder {}: {source}", path.display())]
    State {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// No state folder is given, and there is no default.
    #[error(
        "neither HOME nor XDG_STATE_HOME is set, so there is no folder for this client's id: set one of them, or name a folder \
         (mesh-client: --state-dir or MESH_CLIENT_STATE_DIR; in a program: Options::state_dir)"
    )]
    NoHome,
    /// An option has no valid meaning.
    #[error("{0}")]
    Invalid(String),
}

/// The client id in the state folder, created if it is missing. Processes that start at the same time agree on one.
pub(crate) fn client_id(state_dir: &Path) -> Result<ClientId, ConnectError> {
    if state_dir.as_os_str().is_empty() {
        return Err(ConnectError::NoHome);
    }
    let path = state_dir.join("client-id");
    let failed = |source| ConnectError::State { path: path.clone(), source };
    fs::create_dir_all(state_dir).map_err(failed)?;
    if !path.exists() {
        let fresh = state_dir.join(format!("client-id.{}", Uuid::new_v4()));
        write_private(&fresh, &format!("{}\n", Uuid::new_v4())).map_err(failed)?;
        // A hard link does not replace a file that another process has created meanwhile.
        let linked = fs::hard_link(&fresh, &path);
        fs::remove_file(&fresh).map_err(failed)?;
        if let Err(error) = linked
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(failed(error));
        }
    }
    make_private(&path);
    let text = fs::read_to_string(&path).map_err(failed)?;
    text.trim().parse().map_err(|_| failed(io::Error::new(io::ErrorKind::InvalidData, "not a client id: remove it")))
}

/// Writes a new file that only its owner can read: who knows a client's id can take its results.
fn write_private(path: &Path, text: &str) -> io::Result<()> {
    fs::File::options().write(true).create_new(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}

/// Takes an id of an older version from the eyes of others. A file of somebody else stays as it is.
fn make_private(path: &Path) {
    let is_open = fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0);
    if is_open && let Err(error) = fs::set_permissions(path, fs::Permissions::from_mode(0o600)) {
        tracing::warn!(path = %path.display(), %error, "others can read this client's id");
    }
}

/// The endpoints to give to workers: `advertise`, completed with the bound port, else the bound address.
pub(crate) fn advertised(advertise: &[String], bound: &str, towards: Option<IpAddr>) -> Vec<String> {
    let (host, port) = address::parts(bound).unwrap_or((bound, "0"));
    if !advertise.is_empty() {
        return advertise.iter().filter_map(|told| address::advertised(told, port)).collect();
    }
    // "Any address" cannot be dialled: use the one that the broker, and so most likely the workers, can see.
    let is_any = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
    vec![towards.filter(|_| is_any).map_or_else(|| bound.to_owned(), |own| address::of_ip(own, port))]
}

/// Checks that others can dial these addresses, and that messages have room for them: the broker silently drops those
/// with too many.
pub(crate) fn check_advertised(advertise: &[String]) -> Result<(), ConnectError> {
    if advertise.len() > limits::ENDPOINTS_MAX {
        let (given, most) = (advertise.len(), limits::ENDPOINTS_MAX);
        return Err(ConnectError::Invalid(format!("{given} addresses to advertise are too many: name {most} at most")));
    }
    let wrong = |told: &&String| address::advertised(told, "65535").is_none();
    if let Some(told) = advertise.iter().find(wrong) {
        let form = address::ADVERTISED_FORM;
        return Err(ConnectError::Invalid(format!("'{told}' cannot be advertised to workers: {form}")));
    }
    let is_long = |address: &&String| format!("tcp://{address}:65535").len() > limits::NAME_BYTES_MAX;
    advertise
        .iter()
        .find(is_long)
        .map_or(Ok(()), |address| Err(ConnectError::Invalid(format!("an address to advertise is too long: {address}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_stays_who_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("deep/state");

        let first = client_id(&state).unwrap();

        assert_eq!(client_id(&state).unwrap(), first);
        assert_ne!(client_id(dir.path()).unwrap(), first);
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1, "no half-made file is left");
    }

    #[test]
    fn nobody_else_can_read_who_the_client_is() {
        let dir = tempfile::tempdir().unwrap();
        let mode = || fs::metadata(dir.path().join("client-id")).unwrap().permissions().mode() & 0o777;
        let id = client_id(dir.path()).unwrap();
        assert_eq!(mode(), 0o600);
        fs::set_permissions(dir.path().join("client-id"), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!((client_id(dir.path()).unwrap(), mode()), (id, 0o600), "an older version's file, too");
    }

    #[test]
    fn without_a_home_the_client_asks_for_a_folder_and_takes_none_that_others_can_write_to() {
        let of = |variables: &[(&str, &str)]| {
            state_dir_of(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
        };
        assert_eq!(of(&[("HOME", "/home/me")]), Some("/home/me/.local/state/mesh/client".into()));
        assert_eq!(of(&[("HOME", "/home/me"), ("XDG_STATE_HOME", "/state")]), Some("/state/mesh/client".into()));
        assert_eq!([of(&[]), of(&[("HOME", ""), ("XDG_STATE_HOME", "")])], [None, None]);
        let error = client_id(Path::new("")).unwrap_err().to_string();
        assert!(error.contains("HOME") && error.contains("--state-dir"), "{error}");
    }

    #[test]
    fn a_spoilt_id_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("client-id"), "nonsense").unwrap();

        let error = client_id(dir.path()).unwrap_err().to_string();

        assert!(error.contains("client-id") && error.contains("not a client id"), "{error}");
    }

    #[test]
    fn workers_are_told_an_address_that_can_be_dialled() {
        let towards = Some("10.1.2.3".parse().unwrap());
        assert_eq!(advertised(&[], "tcp://127.0.0.1:7", towards), ["tcp://127.0.0.1:7"]);
        assert_eq!(advertised(&[], "tcp://0.0.0.0:7", towards), ["tcp://10.1.2.3:7"]);
        assert_eq!(advertised(&[], "tcp://[::]:7", towards), ["tcp://10.1.2.3:7"]);
        let told = ["me.example".to_owned(), "tcp://other:9".to_owned(), "[fe80::1]".to_owned()];
        assert_eq!(
            advertised(&told, "tcp://0.0.0.0:7", towards),
            ["tcp://me.example:7", "tcp://other:9", "tcp://[fe80::1]:7"]
        );
    }
}
