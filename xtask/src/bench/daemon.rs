//! A server under measurement: started, watched through /proc, ended.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::images::inside;

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A running server; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Daemon {
    /// Starts a server, its output in a file, and waits until it takes connections.
    pub(crate) fn start(
        mut command: Command,
        address: SocketAddr,
        namespace: Option<&str>,
        log: &Path,
    ) -> Result<Daemon> {
        let file = File::create(log).with_context(|| format!("make {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
        let mut daemon = Daemon { child, address };
        let begun = Instant::now();
        while !answers(address, namespace) {
            if let Some(status) = daemon.child.try_wait()? {
                let text = std::fs::read_to_string(log).unwrap_or_default();
                bail!("{} ended with {status}: {}", command.get_program().display(), text.trim());
            }
            anyhow::ensure!(
                begun.elapsed() < START_TIMEOUT,
                "nothing listens on {address}; see {}",
                log.display()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    /// Process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU that it has used so far, in seconds.
    pub(crate) fn cpu_s(&self) -> Result<f64> {
        let path = format!("/proc/{}/stat", self.pid());
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        // After the program's name in brackets: state is field 3, utime 14 and stime 15.
        let rest = text.rsplit_once(')').context("no name in the process's stat")?.1;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks: u64 =
            fields.get(11..13).context("short stat")?.iter().filter_map(|f| f.parse::<u64>().ok()).sum();
        // SAFETY: sysconf reads a constant of the system.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Ok(ticks as f64 / per_second as f64)
    }

    /// Highest resident memory so far, in MiB.
    pub(crate) fn peak_mib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().split(' ').next()?.parse::<f64>().ok());
        Ok(kib.context("no VmHWM")? / 1024.0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether something takes connections there.
fn answers(address: SocketAddr, namespace: Option<&str>) -> bool {
    let Some(namespace) = namespace else { return TcpStream::connect(address).is_ok() };
    let url = format!("http://{address}/v2/");
    inside(namespace, "curl", &["--silent", "--output", "/dev/null", &url])
        .status()
        .is_ok_and(|status| status.success())
}

/// An address of loopback that nothing listens on.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
