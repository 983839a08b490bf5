//! Ctrl-C: the signal sets a flag, and the demo looks at it wherever it waits, so that it always cleans up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn ask(_: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP only ask.
pub(super) fn catch() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(ask), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores into an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("catch {signal}"))?;
    }
    Ok(())
}

/// Whether the user asked to stop.
pub(super) fn was_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// An error if the user asked to stop.
pub(super) fn check() -> Result<()> {
    if was_asked() {
        bail!("interrupted");
    }
    Ok(())
}

/// Sleeps, unless the user asks to stop.
pub(super) fn pause(time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    loop {
        check()?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}

/// Waits until `done` gives something; an error that says what was waited for, and what was seen last.
pub(super) fn wait_for<T>(what: &str, timeout: Duration, mut done: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        match done() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("waited {} s for {what}", timeout.as_secs()));
            }
            Err(_) => pause(Duration::from_millis(20))?,
        }
    }
}
