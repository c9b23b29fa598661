//! Removes folders into which a model could write: folders in folders in folders, far deeper than a stack, and such as
//! nobody may enter.
//!
//! Owns nothing. Never follows a link.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;

/// Removes a folder of this user with all that is in it, however deep. Nobody else may change it meanwhile. If a link is
/// there instead, only that goes.
///
/// A folder's own folders are moved to the top before it is removed: no path gets long, and nothing recurses.
pub(crate) fn clear(top: &Path) -> io::Result<()> {
    let found = top.symlink_metadata()?;
    if !found.is_dir() {
        return fs::remove_file(top);
    }
    if found.uid() != geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
    }
    let (mut folders, mut names) = (Vec::new(), 0_u64);
    empty(top, &mut |folder| {
        folders.push(folder);
        Ok(())
    })?;
    while let Some(folder) = folders.pop() {
        empty(&folder, &mut |inner| {
            let place = free_name(top, &mut names);
            fs::rename(inner, &place)?;
            folders.push(place);
            Ok(())
        })?;
        fs::remove_dir(&folder)?;
    }
    fs::remove_dir(top)
}

/// Removes the files of a folder, and hands over its folders.
fn empty(folder: &Path, hand_over: &mut dyn FnMut(PathBuf) -> io::Result<()>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            // A model may have shut it. If it is another user's, what comes next says so.
            let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o700));
            hand_over(path)?;
        } else {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn free_name(top: &Path, names: &mut u64) -> PathBuf {
    loop {
        *names += 1;
        let place = top.join(format!("~{names}"));
        if place.symlink_metadata().is_err() {
            return place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_removed_however_deep_a_model_has_dug() {
        let home = tempfile::tempdir().expect("a folder");
        let top = home.path().join("top");
        let (inner, outer) = (top.join("inner"), top.join("outer"));
        fs::create_dir_all(&inner).expect("made");
        // From the inside to the outside: no path gets long.
        for _ in 0..20_000 {
            fs::create_dir(&outer).expect("made");
            fs::rename(&inner, outer.join("inner")).expect("moved");
            fs::rename(&outer, &inner).expect("moved");
        }
        // A stack on which two hundred calls have no room.
        let clearing = std::thread::Builder::new().stack_size(64 << 10).spawn(move || clear(&top).map(|()| top));
        let top = clearing.expect("a thread").join().expect("no panic").expect("removed");
        assert!(!top.exists());
    }

    #[test]
    fn what_a_model_has_shut_or_linked_is_removed_and_nothing_else() {
        let home = tempfile::tempdir().expect("a folder");
        let (top, spared) = (home.path().join("top"), home.path().join("spared"));
        fs::create_dir_all(top.join("shut/inside/deep")).expect("made");
        fs::create_dir(&spared).expect("made");
        fs::write(spared.join("file"), "here").expect("written");
        fs::write(top.join("shut/~1"), "a name that is taken").expect("written");
        fs::write(top.join("~1"), "a name that is taken").expect("written");
        std::os::unix::fs::symlink(&spared, top.join("shut/link")).expect("linked");
        for path in ["shut/inside", "shut"] {
            fs::set_permissions(top.join(path), fs::Permissions::from_mode(0o000)).expect("shut");
        }
        clear(&top).expect("removed");
        assert!(!top.exists());
        // Somebody has put a link in its place.
        std::os::unix::fs::symlink(&spared, &top).expect("linked");
        clear(&top).expect("removed");
        assert!(top.symlink_metadata().is_err());
        assert_eq!(fs::read_to_string(spared.join("file")).expect("it is there"), "here");
    }
}
