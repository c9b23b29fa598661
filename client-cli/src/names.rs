//! Names of files and folders that come from users and models: safe, unique, and never in the way of a document.
//!
//! Owns the names. Never touches a file.

use std::collections::BTreeMap;

/// The name of the document in each folder of outputs.
pub(crate) const DOCUMENT: &str = "result.json";

/// The name of a file that is not yet complete.
pub(crate) fn partial(file: &str) -> String {
    format!("{file}.part")
}

/// A safe single file name for any text: no separators, not hidden, not too long.
pub(crate) fn safe_name(name: &str) -> String {
    let plain = |character: char| {
        if character.is_alphanumeric() || matches!(character, '.' | '_' | '-' | ' ') { character } else { '_' }
    };
    let mut safe: String = name.chars().map(plain).collect();
    // File systems allow 255 bytes; this leaves room for a number and an extension.
    safe.truncate(safe.floor_char_boundary(200));
    if safe.starts_with('.') || safe.is_empty() {
        safe.insert(0, '_');
    }
    safe
}

/// Names in use, each with the next number to try for the same name.
pub(crate) type Taken = BTreeMap<String, u32>;

/// The name, with a free number added if it is taken.
pub(crate) fn unique(name: &str, taken: &mut Taken) -> String {
    let Some(first) = taken.get(name).copied() else {
        taken.insert(name.to_owned(), 2);
        return name.to_owned();
    };
    let (mut number, mut free) = (first, format!("{name}-{first}"));
    while taken.contains_key(&free) {
        number += 1;
        free = format!("{name}-{number}");
    }
    taken.insert(name.to_owned(), number + 1);
    taken.insert(free.clone(), 2);
    free
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn namesakes_are_numbered_however_many_they_are() {
        let mut taken = Taken::new();
        let named: Vec<String> = ["a", "a-2", "a", "a", "a-2"].map(|name| unique(name, &mut taken)).into();
        assert_eq!(named, ["a", "a-2", "a-3", "a-4", "a-2-2"]);
        // Frames of a camera. If every frame tried all numbers anew, this would take minutes.
        let many: BTreeSet<String> = (0..100_000).map(|_| unique("frame", &mut taken)).collect();
        assert!(many.len() == 100_000 && many.contains("frame-100000"));
    }

    #[test]
    fn a_name_stays_within_its_folder() {
        assert_eq!(safe_name("../../etc/passwd"), "_.._.._etc_passwd");
        assert_eq!(safe_name("serving_default_x:0"), "serving_default_x_0");
        assert_eq!(safe_name(".."), "_..");
        assert_eq!(safe_name(""), "_");
        assert_eq!(safe_name("a\0b\nc"), "a_b_c");
        assert!(safe_name(&"ä".repeat(500)).len() <= 201);
    }
}
