//! Named network namespaces, entered with setns.
//!
//! `ip netns exec` would also remount /sys, which hides a bpffs below it; setns in the child (or in a thread of its
//! own) changes the network and nothing else.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

use crate::procs::BED_VARIABLE;

/// Where iproute2 keeps named namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// The prefix of the namespaces of one testbed.
pub(crate) fn prefix(bed: &str) -> String {
    format!("ap-{bed}-")
}

/// Path of a namespace's bind mount.
pub(crate) fn path(netns: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(netns)
}

/// Opens a namespace.
pub(crate) fn open(netns: &str) -> Result<OwnedFd> {
    let path = path(netns);
    let file = File::open(&path).with_context(|| format!("open network namespace {}", path.display()))?;
    Ok(file.into())
}

/// The inode that identifies a namespace, if it is there.
pub(crate) fn inode(netns: &str) -> Option<u64> {
    std::fs::metadata(path(netns)).ok().map(|meta| meta.ino())
}

/// Makes `command` run in a namespace.
pub(crate) fn enter_on_exec(command: &mut Command, netns: &str) {
    let path = path(netns);
    let open = File::open(&path);
    let raw = open.as_ref().ok().map(AsRawFd::as_raw_fd);
    // SAFETY: between fork and exec only setns is called, which is async-signal-safe; the descriptor is owned by the
    // closure, so it stays open as long as the command lives.
    unsafe {
        command.pre_exec(move || {
            let _keep = &open;
            match raw {
                Some(fd) if libc::setns(fd, libc::CLONE_NEWNET) == 0 => Ok(()),
                Some(_) => Err(std::io::Error::last_os_error()),
                None => Err(std::io::Error::from_raw_os_error(libc::ENOENT)),
            }
        });
    }
}

/// Moves the calling thread into a namespace; threads and processes it starts follow.
pub(crate) fn enter(netns: &str) -> Result<()> {
    setns(open(netns)?, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter network namespace {netns}"))
}

/// Runs `work` on a thread of its own inside a namespace.
pub(crate) fn inside<T: Send>(netns: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(netns)?;
            work()
        });
        thread.join().map_err(|_| anyhow!("the thread inside {netns} panicked"))?
    })
}

/// Makes a named namespace of a testbed. Where this process is killed meanwhile, `ip` goes on: the mark tells whose it
/// is, so that whoever cleans up ends it first.
pub(crate) fn add(bed: &str, netns: &str) -> Result<()> {
    run(Command::new("ip").args(["netns", "add", netns]).env(BED_VARIABLE, bed)).map(drop)
}

/// Sets a kernel parameter of a namespace; missing ones (IPv6 compiled out) are left alone.
pub(crate) fn sysctls(netns: &str, values: &[(&str, &str)]) -> Result<()> {
    inside(netns, || {
        for (name, value) in values {
            let path = Path::new("/proc/sys").join(name);
            if path.exists() {
                std::fs::write(&path, value)
                    .with_context(|| format!("write {value} to {}", path.display()))?;
            }
        }
        Ok(())
    })
}

/// Runs `ip -batch` in a namespace.
pub(crate) fn ip_batch(netns: &str, lines: &[String]) -> Result<()> {
    use std::io::Write;
    let mut child = Command::new("ip")
        .args(["-n", netns, "-batch", "-"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .context("start ip (package iproute2)")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all((lines.join("\n") + "\n").as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip -n {netns}: {}; ran:\n{}", String::from_utf8_lossy(&output.stderr), lines.join("\n"));
    }
    Ok(())
}

/// Runs a command to its end; its output, or an error that says what it printed.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command.output().with_context(|| format!("start {shown}"))?;
    if !output.status.success() {
        let printed = [output.stdout, output.stderr].concat();
        bail!("{shown}: {}: {}", output.status, String::from_utf8_lossy(&printed).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
