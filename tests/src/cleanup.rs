//! Removing a testbed, also what an earlier run left that was killed with -9.
//!
//! Order matters: processes hold namespaces, mounts and cgroups; mounts hold the state folder. The state folder is
//! removed only once nothing is mounted below it, so that a delete never crosses into something that is mounted there.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};

use crate::procs::Selection;
use crate::{cgroups, mounts, netns};

/// A testbed's name appears in interface-like names and prefixes: short, and without a dash, so that no name is the
/// prefix of another's.
pub(crate) fn check_name(bed: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if bed.is_empty() || bed.len() > 16 || !bed.bytes().all(fits) {
        bail!("found testbed name `{bed}`, expected 1 to 16 of a-z and 0-9");
    }
    Ok(())
}

/// Where a testbed keeps its files.
pub(crate) fn state_dir(bed: &str) -> PathBuf {
    PathBuf::from(format!("/var/tmp/anyplace-testbed-{bed}"))
}

/// How long to wait for a lock whose owner is gone: a process that it was starting when it was killed holds the lock
/// too, until it runs its own program.
const FORKED: Duration = Duration::from_secs(2);

/// Held by the process that uses a testbed; the kernel lets go of it however that process ends.
pub(crate) type OwnerLock = Flock<File>;

/// Takes the state folder's lock, making the folder; an error when a live process has it.
pub(crate) fn lock(bed: &str) -> Result<OwnerLock> {
    let folder = state_dir(bed);
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let path = folder.join("owner");
    let deadline = Instant::now() + FORKED;
    loop {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                std::fs::write(&path, std::process::id().to_string())?;
                return Ok(lock);
            }
            Err((_, Errno::EWOULDBLOCK)) => {
                let owner = std::fs::read_to_string(&path).unwrap_or_default();
                if !Path::new("/proc").join(&owner).exists() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                bail!(
                    "testbed `{bed}` is in use by process {owner}; end that first (Ctrl-C, or `kill {owner}`)"
                )
            }
            Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
    }
}

/// Removes everything that a testbed of this name left.
pub fn cleanup(bed: &str) -> Result<()> {
    check_name(bed)?;
    if !state_dir(bed).exists() {
        // Namespaces or cgroups may be left all the same, when somebody deleted the folder by hand.
        return remove(bed);
    }
    let _lock = lock(bed)?;
    remove(bed)
}

/// The same for the owner of the lock.
pub(crate) fn remove(bed: &str) -> Result<()> {
    Selection::of_bed(bed).kill()?;
    let state = state_dir(bed);
    unmount(|point| point.starts_with(&state))?;
    remove_namespaces(bed)?;
    remove_links(bed)?;
    for folder in cgroups::of_bed(bed) {
        cgroups::remove(&folder).with_context(|| format!("remove cgroup {}", folder.display()))?;
    }
    let left = mounts::matching(|point| point.starts_with(&state));
    if !left.is_empty() {
        bail!("still mounted below {}: {left:?}; nothing was deleted there", state.display());
    }
    match std::fs::remove_dir_all(&state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("delete {}", state.display()))
        }
        _ => Ok(()),
    }
}

fn unmount(wanted: impl Fn(&Path) -> bool) -> Result<()> {
    for point in mounts::matching(wanted) {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // EINVAL: it went with a mount above it.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(error).with_context(|| format!("unmount {}", point.display())),
        }
    }
    Ok(())
}

fn remove_namespaces(bed: &str) -> Result<()> {
    let prefix = netns::prefix(bed);
    for entry in std::fs::read_dir(netns::NETNS_DIR).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with(&prefix) {
            continue;
        }
        let path = entry.path();
        unmount(|point| point == path)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("delete {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Nothing of a testbed belongs into the root namespace; a link there is one that failed half-way.
fn remove_links(bed: &str) -> Result<()> {
    for link in root_links(bed) {
        netns::run(Command::new("ip").args(["link", "delete", &link]))?;
    }
    Ok(())
}

/// Links in the caller's namespace that carry a testbed's name. Instance links (`apv...`) don't say whose they are, and
/// on a machine that serves for real they aren't ours: [`crate::leftovers`] reports them, nobody deletes them.
fn root_links(bed: &str) -> Vec<String> {
    let prefix = netns::prefix(bed);
    let entries = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(&prefix)).collect()
}
