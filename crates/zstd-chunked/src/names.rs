//! Paths of entries: cleaned, unique, and none of them below something that isn't a folder.

use std::collections::HashMap;

use sha2::{Digest as _, Sha256};

use crate::{EntryType, Error, Result};

const WHAT: &str = "name of an entry";

/// The path of an entry, relative to the layer's root: without `./`, leading, doubled and trailing slashes; empty for the
/// root itself. Refuses `..` and zero bytes.
pub fn clean_path(name: &str) -> Result<String> {
    if name.is_empty() || name.contains('\0') {
        return Err(Error::invalid(WHAT, format!("{name:?} is empty or has a zero byte")));
    }
    let mut path = String::with_capacity(name.len());
    for part in name.split('/') {
        match part {
            "" | "." => continue,
            ".." => {
                return Err(Error::invalid(
                    WHAT,
                    format!("{name:?} has `..`, so it could lead out of the layer"),
                ));
            }
            _ => {}
        }
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(part);
    }
    Ok(path)
}

/// What is known of a path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// A folder because something lies below it; may still get its own entry.
    Implied,
    Dir,
    Other,
}

/// The paths of a layer so far. Holds a digest of each path, so that memory doesn't depend on how long they are.
#[derive(Default)]
pub(crate) struct Names {
    seen: HashMap<[u8; 16], Seen>,
}

impl Names {
    /// Adds an entry by its cleaned path; for a hard link, `target` is the cleaned path of its target.
    pub(crate) fn add(&mut self, path: &str, kind: EntryType, target: Option<&str>) -> Result<()> {
        let wrong = |why: &str| Err(Error::invalid(WHAT, format!("{path:?} {why}")));
        let is_dir = kind == EntryType::Dir;
        if path.is_empty() && !is_dir {
            return wrong("is the root, and not a folder");
        }
        if let Some(target) = target
            && self.seen.get(&key(target)) != Some(&Seen::Other)
        {
            return wrong(&format!("is a hard link to {target:?}, which is no earlier entry with content"));
        }
        for (at, _) in path.match_indices('/') {
            if *self.seen.entry(key(&path[..at])).or_insert(Seen::Implied) == Seen::Other {
                return wrong("lies below an entry that is not a folder");
            }
        }
        let new = if is_dir { Seen::Dir } else { Seen::Other };
        match self.seen.insert(key(path), new) {
            None => Ok(()),
            Some(Seen::Implied) if is_dir => Ok(()),
            Some(Seen::Implied) => wrong("is not a folder, and other entries lie below it"),
            Some(_) => wrong("is there twice"),
        }
    }
}

fn key(path: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(path.as_bytes()).into();
    let mut key = [0; 16];
    key.copy_from_slice(&digest[..16]);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_and_escapes_refused() {
        for (name, path) in
            [("a", "a"), ("./a/", "a"), ("/a//b/./c", "a/b/c"), ("./", ""), ("/", ""), ("..a/b..", "..a/b..")]
        {
            assert_eq!(clean_path(name).unwrap(), path, "{name}");
        }
        for name in ["", "..", "a/../b", "/..", "a/..", "a\0b"] {
            assert!(clean_path(name).is_err(), "{name}");
        }
    }

    #[test]
    fn names_are_unique_and_lie_in_folders() {
        use EntryType::{Dir, Hardlink, Reg, Symlink};
        let mut names = Names::default();
        names.add("a/b/c", Reg, None).unwrap();
        names.add("a/b", Dir, None).unwrap();
        names.add("", Dir, None).unwrap();
        names.add("l", Hardlink, Some("a/b/c")).unwrap();
        names.add("s", Symlink, None).unwrap();
        assert!(names.add("a/b", Dir, None).is_err(), "twice");
        assert!(names.add("a/b/c", Reg, None).is_err(), "twice");
        assert!(names.add("a", Reg, None).is_err(), "has entries below");
        assert!(names.add("s/x", Reg, None).is_err(), "below a symlink");
        assert!(names.add("m", Hardlink, Some("later")).is_err());
        assert!(names.add("n", Hardlink, Some("a/b")).is_err(), "a folder");
    }
}
