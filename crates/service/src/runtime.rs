//! Start and end of a daemon's process.

use std::{
    io::IsTerminal as _,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Variable that chooses what is logged, such as `debug` or `anyplace_state_router=debug,info`.
const LOG_VARIABLE: &str = "ANYPLACE_LOG";

/// Logs to standard error, coloured on a terminal; `info` and above unless `ANYPLACE_LOG` says otherwise.
pub fn init_logging() {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    // Fails only where something has set a logger already, which is then the one to keep.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}

/// Makes ring the process's cryptography. Needed once before the first HTTP client.
pub fn install_crypto_provider() {
    // Fails only where one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A token that is cancelled at SIGTERM or SIGINT.
///
/// # Errors
/// The signal handlers can't be installed.
pub fn shutdown_signal() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("shutting down");
        cancel.cancel();
    });
    Ok(token)
}

/// A number that differs from one start of a process to the next and grows with the machine's clock:
/// microseconds since 1970. Names an epoch of reports and watch streams.
pub fn unix_epoch() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
