//! Health checks: whether an instance takes traffic (readiness), and whether it must be restarted (liveness).

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use anyplace_model::{Check, CheckKind, HttpCheck};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Command,
    time::{Instant, sleep, timeout},
};

use crate::runtime::Runtime;

/// Until the first success, readiness is asked this often: traffic waits for it.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The same for a command, which costs a process each time.
const FIRST_EXEC_PAUSE: Duration = Duration::from_millis(100);
/// An app that isn't ready by then is slow anyway, and asked at its own interval.
const EAGER: Duration = Duration::from_secs(20);
/// Enough for a status line; the rest isn't read.
const STATUS_BYTES: usize = 64;

/// Whom to check.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) address: Ipv4Addr,
    pub(crate) container: String,
    pub(crate) runtime: Runtime,
    /// For a command that must be killed.
    pub(crate) pid_file: PathBuf,
}

/// Checks readiness for ever; `tell` gets each change, and each failure before the first success.
pub(crate) async fn readiness(check: &Check, target: &Target, mut tell: impl FnMut(Result<(), String>)) {
    let begun = Instant::now();
    let first_pause = if check.exec.is_some() { FIRST_EXEC_PAUSE } else { FIRST_PAUSE };
    // Unknown at first: neither ready nor not.
    let mut ready: Option<bool> = None;
    let mut failures = 0;
    loop {
        match probe(check, target).await {
            Ok(()) => {
                failures = 0;
                if ready != Some(true) {
                    ready = Some(true);
                    tell(Ok(()));
                }
            }
            Err(message) => {
                failures += 1;
                let counts = begun.elapsed() >= check.initial_delay.to_std() && failures >= check.failures;
                match ready {
                    Some(true) if counts => {
                        ready = Some(false);
                        tell(Err(message));
                    }
                    Some(true) => {}
                    // Why it isn't ready yet, without a report for each try.
                    None if failures == 1 || failures % 50 == 0 => tell(Err(message)),
                    None | Some(false) => {}
                }
            }
        }
        let eager = ready.is_none() && begun.elapsed() < EAGER;
        sleep(if eager { first_pause } else { check.interval.to_std() }).await;
    }
}

/// Checks liveness until it has failed; returns why.
pub(crate) async fn liveness(check: &Check, target: &Target) -> String {
    sleep(check.initial_delay.to_std()).await;
    let mut failures = 0;
    loop {
        sleep(check.interval.to_std()).await;
        match probe(check, target).await {
            Ok(()) => failures = 0,
            Err(message) => {
                failures += 1;
                if failures >= check.failures {
                    return format!("the liveness check failed {failures} times in a row: {message}");
                }
            }
        }
    }
}

async fn probe(check: &Check, target: &Target) -> Result<(), String> {
    let limit = check.timeout.to_std();
    match check.kind() {
        Some(CheckKind::Http(http)) => {
            let result = timeout(limit, get(target.address, http)).await;
            result.unwrap_or_else(|_| Err(format!("no answer from port {} in {}", http.port, check.timeout)))
        }
        Some(CheckKind::Tcp(tcp)) => {
            match timeout(limit, TcpStream::connect((target.address, tcp.port.get()))).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(format!("can't connect to port {}: {error}", tcp.port)),
                Err(_) => Err(format!("no answer from port {} in {}", tcp.port, check.timeout)),
            }
        }
        Some(CheckKind::Exec(exec)) => run(&exec.command, target, limit).await,
        // The spec's validation lets none through.
        None => Ok(()),
    }
}

/// The smallest HTTP client that a check needs: one request, one status line.
async fn get(address: Ipv4Addr, check: &HttpCheck) -> Result<(), String> {
    let port = check.port.get();
    let failed = |error: std::io::Error| format!("GET {} on port {port}: {error}", check.path);
    let mut stream = TcpStream::connect((address, port)).await.map_err(failed)?;
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: {address}:{port}\r\nUser-Agent: anyplace-check\r\nConnection: close\r\n\r\n",
        check.path
    );
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    let mut answer = Vec::with_capacity(STATUS_BYTES);
    while answer.len() < STATUS_BYTES && !answer.contains(&b'\n') {
        if stream.read_buf(&mut answer).await.map_err(failed)? == 0 {
            break;
        }
    }
    match status(&answer) {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("GET {} on port {port}: status {status}", check.path)),
        None => Err(format!("GET {} on port {port}: the answer is not HTTP", check.path)),
    }
}

fn status(answer: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(answer.split(|byte| *byte == b'\r').next()?).ok()?;
    let (version, rest) = line.split_once(' ')?;
    version.starts_with("HTTP/1.").then(|| rest.get(..3)?.parse().ok())?
}

/// Runs a command in the container; past its time, it is killed there.
async fn run(command: &[String], target: &Target, limit: Duration) -> Result<(), String> {
    let pid_file = target.pid_file.to_string_lossy();
    let mut exec = target.runtime.command(&["exec", "--pid-file", &pid_file, &target.container]);
    exec.args(command);
    let name = command.first().map_or("", String::as_str);
    let child = Command::from(exec).kill_on_drop(true).spawn();
    let mut child = child.map_err(|error| format!("`{name}` can't be run: {error}"))?;
    match timeout(limit, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("`{name}` ended with {status}")),
        Ok(Err(error)) => Err(format!("`{name}` can't be waited for: {error}")),
        Err(_) => {
            // Without this, the command would live on in the container after the runtime is killed.
            let pid =
                std::fs::read_to_string(&target.pid_file).ok().and_then(|text| text.trim().parse().ok());
            if let Some(fd) = pid.and_then(crate::pidfd::open) {
                crate::pidfd::kill(&fd);
            }
            Err(format!("`{name}` did not end in {} ms", limit.as_millis()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_status_line_has_a_status() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r\nServer: x"), Some(200));
        assert_eq!(status(b"HTTP/1.0 404"), Some(404));
        for bad in
            [&b"SSH-2.0-x\r\n"[..], b"", b"HTTP/1.1\r\n", b"HTTP/1.1 x\r\n", b"HTTP/1.1 2", b"\xff\xff"]
        {
            assert_eq!(status(bad), None, "{bad:?}");
        }
    }
}
