//! The cgroups of a testbed's containers: `anyplace-<bed>` in every v1 hierarchy and in v2.

use std::path::{Path, PathBuf};

use crate::mounts;

/// How deep below a hierarchy's root the parent is looked for: a runtime may put it below the caller's own cgroup.
const SEARCH_DEPTH: usize = 3;

/// The parent's name.
pub(crate) fn parent(bed: &str) -> String {
    format!("anyplace-{bed}")
}

/// The folders of a testbed in all hierarchies.
pub(crate) fn of_bed(bed: &str) -> Vec<PathBuf> {
    let name = parent(bed);
    let mut found = Vec::new();
    for root in mounts::of_types(&["cgroup", "cgroup2"]) {
        search(&root, &name, SEARCH_DEPTH, &mut found);
    }
    found
}

fn search(folder: &Path, name: &str, depth: usize, found: &mut Vec<PathBuf>) {
    for child in folders(folder) {
        if child.file_name().is_some_and(|file| file == name) {
            found.push(child);
        } else if depth > 1 {
            search(&child, name, depth - 1, found);
        }
    }
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.map(|entry| entry.path()).collect()
}

/// All processes in a folder and below it.
pub(crate) fn pids(folder: &Path) -> Vec<i32> {
    let text = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    for child in folders(folder) {
        pids.extend(self::pids(&child));
    }
    pids
}

/// Lets frozen processes go on, so that they can die.
pub(crate) fn thaw(folder: &Path) {
    for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
        let path = folder.join(file);
        if path.exists() {
            let _ = std::fs::write(path, value);
        }
    }
    for child in folders(folder) {
        thaw(&child);
    }
}

/// Removes a folder and all below it; the kernel may need a moment after the last process has gone.
pub(crate) fn remove(folder: &Path) -> std::io::Result<()> {
    for child in folders(folder) {
        remove(&child)?;
    }
    let mut tries = 0;
    loop {
        match std::fs::remove_dir(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy && tries < 100 => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
    }
}
