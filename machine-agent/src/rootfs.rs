//! The instance's root file system: the image, with what the instance writes above it.

use std::{fs, path::Path};

use anyhow::Context as _;
use anyplace_images::PulledImage;
use nix::mount::{MntFlags, umount2};

use crate::paths::InstancePaths;

/// Mounts a fresh root file system: nothing that an earlier container wrote is in it.
pub(crate) fn mount_fresh(image: &PulledImage, paths: &InstancePaths) -> anyhow::Result<()> {
    unmount(&paths.merged)?;
    for folder in [&paths.upper, &paths.work, &paths.merged] {
        remove(folder)?;
        fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
    }
    image
        .mount(&paths.upper, &paths.work, &paths.merged)
        .with_context(|| format!("can't mount the image at {}", paths.merged.display()))
}

/// Unmounts everything that is mounted at a path.
pub(crate) fn unmount(path: &Path) -> anyhow::Result<()> {
    // Each start mounts once, so a few more tries than that mean something is wrong.
    for _ in 0..8 {
        if !mounted(path) {
            return Ok(());
        }
        umount2(path, MntFlags::MNT_DETACH).with_context(|| format!("can't unmount {}", path.display()))?;
    }
    anyhow::bail!("{} stays mounted", path.display())
}

/// Removes a folder, if it is there.
pub(crate) fn remove(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("can't remove {}", folder.display())),
    }
}

/// Whether something is mounted at a path.
pub(crate) fn mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // Spaces in mount points are written as octal.
    let path = path.to_string_lossy().replace(' ', "\\040");
    table.lines().any(|line| line.split(' ').nth(4) == Some(path.as_str()))
}
