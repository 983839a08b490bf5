//! Waiting for processes that aren't children, without polling: a pidfd becomes readable when its process ends.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use tokio::io::unix::AsyncFd;

/// Opens a process; none where it is gone.
pub(crate) fn open(pid: i32) -> Option<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a process, unless the number belongs to another process by now.
pub(crate) fn open_same(pid: i32, start_ticks: u64) -> Option<OwnedFd> {
    let fd = open(pid)?;
    (start_ticks_of(pid) == Some(start_ticks)).then_some(fd)
}

/// Kills the process behind the descriptor.
pub(crate) fn kill(fd: &OwnedFd) {
    // SAFETY: a null siginfo is allowed; the descriptor is open. A process that has ended already is fine.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}

/// Returns when the process has ended (it may still be a zombie).
pub(crate) async fn ended(fd: OwnedFd) {
    // SAFETY: the descriptor is owned, and neither replaced nor closed before the registration is dropped.
    match unsafe { AsyncFd::register(fd) } {
        Ok(fd) => {
            // An error can only mean that the reactor shuts down, and then nobody waits.
            let _ = fd.readable().await;
        }
        Err(error) => tracing::error!(%error, "can't wait for a process"),
    }
}

/// When a process started, in clock ticks since the boot: with its number, its identity.
pub(crate) fn start_ticks_of(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold anything; the 22nd field is the 20th after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
