//! Small files that a reader sees whole or not at all. Not synced: what they describe (processes, mounts) doesn't
//! survive a crash of the machine either, and a sync costs more than a container's start.

use std::{fs, io, path::Path};

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

/// None where the file isn't there, or isn't what it should be.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "ignoring a damaged file"))
        .ok()
}
