//! Drives bird2: writes the file that `bird.conf` includes, and tells the daemon to read it again.
//!
//! The file is two static protocols, `anyplace_vips` and `anyplace_vips6`, with a route for each announced prefix of
//! their family. A placeholder is always in each, from TEST-NET-1 and from the discard prefix, so the file never changes
//! its form; the export filters in `bird.conf` must leave them out. The control socket speaks lines: a reply ends with a line whose four-digit code is followed by a space.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

use crate::BgpConfig;

/// In the file, and never exported: 192.0.2.255/32 and 100::/128.
const PLACEHOLDER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 255);
const PLACEHOLDER6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0);
/// Reading a configuration anew takes bird some milliseconds.
const TIMEOUT: Duration = Duration::from_secs(2);
/// A reply to `configure` has three lines.
const MAX_REPLY_LINES: usize = 100;

/// The BGP daemon, and what it was last told.
pub(crate) struct Bgp {
    config: BgpConfig,
    announced: Option<Vec<IpNet>>,
    failing: bool,
}

impl Bgp {
    pub(crate) fn new(config: BgpConfig) -> Self {
        Self { config, announced: None, failing: false }
    }

    /// Announces exactly these prefixes. Returns whether the daemon has taken them.
    pub(crate) async fn announce(&mut self, prefixes: &[IpNet]) -> bool {
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

    async fn configure(&self, prefixes: &[IpNet]) -> anyhow::Result<()> {
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

fn include_file(prefixes: &[IpNet]) -> String {
    let mut text = String::from("# Written by the state router; changes are lost.\n");
    let families = [
        ("anyplace_vips", "ipv4", IpNet::from(IpAddr::from(PLACEHOLDER))),
        ("anyplace_vips6", "ipv6", IpNet::from(IpAddr::from(PLACEHOLDER6))),
    ];
    for (protocol, channel, placeholder) in families {
        let same = prefixes.iter().filter(|prefix| prefix.addr().is_ipv4() == placeholder.addr().is_ipv4());
        // Writing to a string can't fail.
        let _ = writeln!(text, "protocol static {protocol} {{\n  {channel};");
        for prefix in std::iter::once(&placeholder).chain(same) {
            let _ = writeln!(text, "  route {prefix} unreachable;");
        }
        text += "}\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::UnixListener};

    use super::*;

    #[test]
    fn the_file_is_never_empty() {
        let file = |prefixes: &[&str]| {
            let prefixes: Vec<IpNet> = prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect();
            include_file(&prefixes)
        };
        let head = "# Written by the state router; changes are lost.\n";
        let empty = "protocol static anyplace_vips {
  ipv4;
  route 192.0.2.255/32 unreachable;
}
protocol static anyplace_vips6 {
  ipv6;
  route 100::/128 unreachable;
}
";
        assert_eq!(file(&[]), format!("{head}{empty}"));
        let both = "protocol static anyplace_vips {
  ipv4;
  route 192.0.2.255/32 unreachable;
  route 203.0.113.0/24 unreachable;
}
protocol static anyplace_vips6 {
  ipv6;
  route 100::/128 unreachable;
  route 2001:db8:a::/64 unreachable;
}
";
        assert_eq!(file(&["2001:db8:a::/64", "203.0.113.0/24"]), format!("{head}{both}"));
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
