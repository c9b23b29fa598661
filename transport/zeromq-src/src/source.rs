//! libzmq's source code with two changes: a connection ends when its peer sends more parts for one message than a
//! message of the mesh has, and a context has room for more sockets.
//!
//! `ZMQ_MAXMSGSIZE` bounds a part, `ZMQ_RCVHWM` the finished messages that wait. Nothing in libzmq bounds the parts of
//! an unfinished message, so a peer that never sends the last one fills the memory. With the limit, a connection holds
//! at most `ZMQ_RCVHWM` messages and one unfinished one, each of `PARTS_MAX` times `ZMQ_MAXMSGSIZE`. It is kept where
//! the parts of all kinds of connections pass, decrypted, on their way into the socket's queue, so no part is stored
//! before it is counted.
//!
//! libzmq is under the MPL-2.0, which asks that changed files are published: they are its files of 4.3.5 with `EDITS`.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// Parts of a message on the wire: `proto_msgs::Frame` has a head and a payload. A peer that says that a second part is
/// not the last one is cut off.
const PARTS_MAX: usize = 2;

/// Sockets of a context, by default 1,023. A worker has three for each client that it dials, and a client three for each
/// worker; each takes 12 bytes of a table. A limit that can be set later has no door in the `zmq` crate.
const SOCKETS_MAX: usize = 16_383;

/// A change: the file, the text that occurs in it exactly once, what is put behind that text.
struct Edit(&'static str, &'static str, &'static str);

const EDITS: &[Edit] = &[
    Edit(
        "src/session_base.hpp",
        "    bool _incomplete_in;\n",
        "
    //  Parts of the peer's present message that have been passed on.
    int _parts_passed = 0;
",
    ),
    // Commands have been sorted out before. The engine closes the connection after any error but EAGAIN.
    Edit(
        "src/session_base.cpp",
        "        && !msg_->is_cancel ())
        return 0;
",
        "
    const bool more = (msg_->flags () & msg_t::more) != 0;
    if (more && _parts_passed + 1 >= PARTS_MAX) {
        errno = EMSGSIZE;
        return -1;
    }
",
    ),
    Edit(
        "src/session_base.cpp",
        "    if (_pipe && _pipe->write (msg_)) {
        const int rc = msg_->init ();
        errno_assert (rc == 0);
",
        "        _parts_passed = more ? _parts_passed + 1 : 0;
",
    ),
    // The connection has ended, and with it its unfinished message. A dialer's session goes on with the next connection,
    // unless the peer broke the protocol or a limit: then the session ends, and the peer is not dialled again.
    Edit("src/session_base.cpp", "    _pipe->rollback ();\n    _pipe->flush ();\n", "    _parts_passed = 0;\n"),
    Edit(
        "include/zmq.h",
        "#define ZMQ_MAX_SOCKETS_DFLT 1023\n",
        "#undef ZMQ_MAX_SOCKETS_DFLT\n#define ZMQ_MAX_SOCKETS_DFLT SOCKETS_MAX\n",
    ),
];

/// Copies libzmq's source code to the folder `to`, where nothing of an earlier build stays, and changes it there.
pub(crate) fn limited_copy(to: &Path) -> PathBuf {
    let from = carried();
    match fs::remove_dir_all(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("removing {}: {error}", to.display()),
        _ => {}
    }
    for folder in ["include", "src"] {
        let copied = copy_folder(&from.join(folder), &to.join(folder));
        copied.unwrap_or_else(|error| panic!("copying libzmq from {}: {error}", from.display()));
    }
    for Edit(file, anchor, added) in EDITS {
        let path = to.join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()));
        let (before, after) = text.split_once(anchor).unwrap_or_else(|| panic!("{file} has no {anchor:?}"));
        assert!(!after.contains(anchor), "{file} has {anchor:?} twice");
        let added = added.replace("PARTS_MAX", &PARTS_MAX.to_string());
        let added = added.replace("SOCKETS_MAX", &SOCKETS_MAX.to_string());
        fs::write(&path, [before, anchor, &added, after].concat()).expect("OUT_DIR can be written");
    }
    to.to_owned()
}

/// The files to compile. Those for WebSocket need libraries that are not here.
pub(crate) fn compiled(zeromq: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(zeromq.join("src")).expect("it was just copied");
    let paths = entries.map(|entry| entry.expect("it was just copied").path());
    let mut files: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|ending| ending == "cpp"))
        .filter(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ws")))
        .collect();
    files.sort(); // The same library from the same source code, whatever the file system's order.
    files
}

/// The source code that the newer `zeromq-src` carries. Cargo puts packages of one registry side by side; `cargo
/// vendor` leaves the version out of the name.
fn carried() -> PathBuf {
    let caller = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR for build scripts");
    let packages = Path::new(&caller).parent().expect("a package is in a folder");
    let places = ["zeromq-src-0.3.6+4.3.5", "zeromq-src"].map(|package| packages.join(package).join("vendor"));
    let found = places.iter().find(|place| place.join(EDITS[0].0).exists());
    found.unwrap_or_else(|| panic!("libzmq's source code is in none of {places:?}")).clone()
}

/// Copies a folder without the folders in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::write(to.join(entry.file_name()), fs::read(entry.path())?)?;
        }
    }
    Ok(())
}
