//! Small files that a reader sees whole or not at all. Not synced: what they describe (processes, mounts) doesn't
//! survive a crash of the machine either, and a sync costs more than a container's start.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
};

use anyhow::Context as _;
use serde::{Serialize, de::DeserializeOwned};

pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec(value).context("can't be written as JSON")?;
    write(path, &bytes).with_context(|| format!("can't write {}", path.display()))
}

pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, path)
}

/// Makes a folder that only root may enter: below it are instances' environments, their logs, and programs of images
/// that would run with their owner's rights.
pub(crate) fn make_private(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    fs::set_permissions(folder, Permissions::from_mode(0o700))
}

/// None where the file isn't there, or isn't what it should be.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "ignoring a damaged file"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_folders_are_for_their_owner_also_where_they_were_not() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a/b");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        make_private(&folder).unwrap();
        assert_eq!(mode(&folder), 0o700);
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        make_private(&folder).unwrap();
        assert_eq!(mode(&folder), 0o700);
    }
}
