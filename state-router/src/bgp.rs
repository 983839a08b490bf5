//! Drives bird2: writes the file that `bird.conf` includes, and tells the daemon to read it again.
//!
//! The file is one static protocol, `anyplace_vips`, with a route for each announced prefix. A placeholder from
//! TEST-NET-1 is always there, so the file never changes its form; the export filter in `bird.conf` must leave it
//! out. The control socket speaks lines: a reply ends with a line whose four-digit code is followed by a space.

use std::{fmt::Write as _, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

use crate::BgpConfig;

/// In the file, and never exported: 192.0.2.255/32.
const PLACEHOLDER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 255);
/// Reading a configuration anew takes bird some milliseconds.
const TIMEOUT: Duration = Duration::from_secs(2);
/// A reply to `configure` has three lines.
const MAX_REPLY_LINES: usize = 100;

/// The BGP daemon, and what it was last told.
pub(crate) struct Bgp {
    config: BgpConfig,
    announced: Option<Vec<Ipv4Net>>,
    failing: bool,
}

impl Bgp {
    pub(crate) fn new(config: BgpConfig) -> Self {
        Self { config, announced: None, failing: false }
    }

    /// Announces exactly these prefixes. Returns whether the daemon has taken them.
    pub(crate) async fn announce(&mut self, prefixes: &[Ipv4Net]) -> bool {
        if self.announced.as_deref() == Some(prefixes) {
            return true;
        }
        match self.configure(prefixes).await {
            Ok(()) => {
                let list: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
                tracing::info!(prefixes = list.join(" "), "announcing");
                self.announced = Some(prefixes.to_vec());
                self.failing = false;
                true
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!("BGP: {error:#}; trying again");
                }
                false
            }
        }
    }

    async fn configure(&self, prefixes: &[Ipv4Net]) -> anyhow::Result<()> {
        let (include, socket) = (&self.config.include, &self.config.control_socket);
        anyplace_service::write_atomically(include, include_file(prefixes).as_bytes(), 0o644)
            .with_context(|| format!("can't write {}; check bgp.include", include.display()))?;
        let exchange = async {
            let stream = UnixStream::connect(socket).await.with_context(|| {
                format!(
                    "bird doesn't listen on {}; check bgp.control_socket and that bird runs",
                    socket.display()
                )
            })?;
            let mut stream = BufReader::new(stream);
            reply(&mut stream).await?;
            stream.write_all(b"configure\n").await?;
            reply(&mut stream).await
        };
        tokio::time::timeout(TIMEOUT, exchange).await.context("bird doesn't answer")?
    }
}

/// Reads a reply; codes from 8000 are errors.
async fn reply(stream: &mut BufReader<UnixStream>) -> anyhow::Result<()> {
    for _ in 0..MAX_REPLY_LINES {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            bail!("bird closed its control socket");
        }
        let Some((code, rest)) = line.split_at_checked(4) else { continue };
        let Ok(code) = code.parse::<u32>() else { continue };
        if code >= 8_000 {
            bail!("bird refuses its configuration: {}; run `bird -p -c bird.conf`", rest.trim());
        }
        if rest.starts_with(' ') {
            return Ok(());
        }
    }
    bail!("bird's reply has no end")
}

fn include_file(prefixes: &[Ipv4Net]) -> String {
    let mut text = String::from(
        "# Written by the state router; changes are lost.\nprotocol static anyplace_vips {\n  ipv4;\n",
    );
    for prefix in std::iter::once(&Ipv4Net::from(PLACEHOLDER)).chain(prefixes) {
        // Writing to a string can't fail.
        let _ = writeln!(text, "  route {prefix} unreachable;");
    }
    text + "}\n"
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::UnixListener};

    use super::*;

    #[test]
    fn the_file_is_never_empty() {
        assert!(include_file(&[]).contains("route 192.0.2.255/32 unreachable;"));
        assert!(
            include_file(&["203.0.113.0/24".parse().unwrap()]).contains("route 203.0.113.0/24 unreachable;")
        );
    }

    async fn announce_to(answer: &'static str) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let config =
            BgpConfig { include: dir.path().join("vips.conf"), control_socket: dir.path().join("ctl") };
        let listener = UnixListener::bind(&config.control_socket).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"0001 BIRD 2.0.12 ready.\n").await.unwrap();
            let mut command = [0; 10];
            stream.read_exact(&mut command).await.unwrap();
            assert_eq!(&command, b"configure\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let done = Bgp::new(config).announce(&["203.0.113.0/24".parse().unwrap()]).await;
        server.await.unwrap();
        done
    }

    #[tokio::test]
    async fn a_refusal_is_not_taken_for_done() {
        assert!(announce_to("0002-Reading configuration from x\n0003 Reconfigured\n").await);
        assert!(!announce_to("0002-Reading configuration from x\n8002 x:1:1 syntax error\n").await);
        assert!(
            !Bgp::new(BgpConfig { include: "/proc/none/x".into(), control_socket: "/none".into() })
                .announce(&[])
                .await
        );
    }
}
