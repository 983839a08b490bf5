//! A mount that is being set up (`fsopen`), with the kernel's own words when it fails.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsopen};

use crate::error::{Error, Result};

/// Most messages that the kernel keeps for a mount.
const MESSAGES_MAX: usize = 8;

pub(super) struct Context<'a> {
    fs: OwnedFd,
    /// What is mounted, for messages.
    what: &'a str,
}

impl<'a> Context<'a> {
    pub(super) fn new(kind: &str, what: &'a str) -> Result<Context<'a>> {
        let said = || format!("the kernel has no {kind}; try `modprobe {kind}`");
        let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| failed(what, said(), e.into()))?;
        Ok(Context { fs, what })
    }

    pub(super) fn set(&self, key: &str, value: &str) -> Result<()> {
        rustix::mount::fsconfig_set_string(&self.fs, key, value).map_err(|e| self.failed(key, e))
    }

    pub(super) fn set_fd(&self, key: &str, fd: &OwnedFd) -> Result<()> {
        rustix::mount::fsconfig_set_fd(&self.fs, key, fd).map_err(|e| self.failed(key, e))
    }

    /// The mount, at no place.
    pub(super) fn mount(&self, attributes: MountAttrFlags) -> Result<OwnedFd> {
        rustix::mount::fsconfig_create(&self.fs).map_err(|e| self.failed("create", e))?;
        rustix::mount::fsmount(&self.fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|e| self.failed("mount", e))
    }

    fn failed(&self, step: &str, e: rustix::io::Errno) -> Error {
        let mut said = vec![step.to_owned()];
        let mut message = [0; 1024];
        while said.len() < MESSAGES_MAX
            && let Ok(len) = rustix::io::read(&self.fs, &mut message)
            && len > 0
        {
            said.push(String::from_utf8_lossy(&message[..len]).trim().to_owned());
        }
        failed(self.what, said.join("; "), e.into())
    }
}

pub(super) fn failed(what: &str, said: String, source: io::Error) -> Error {
    Error::Mount { what: what.to_owned(), said, source }
}

/// A path that means an open file to this thread.
pub(super) fn path_of(file: &std::fs::File) -> String {
    format!("/proc/thread-self/fd/{}", file.as_raw_fd())
}
