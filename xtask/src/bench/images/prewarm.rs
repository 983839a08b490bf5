//! What prewarming costs live pulls and live traffic, each by itself and beside prewarming in turns.
//!
//! The live image is the one of the cold pulls; what is prewarmed is one large file, so that it never ends first. The
//! traffic is a download over the same link, which prewarming takes the agent's default part of: a twelfth.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use super::super::Report;
use super::super::report::Op;
use super::super::sample::{median, settle};
use super::super::server::Server;
use super::{Bench, IMAGE, LINK_DELAY_US, LINK_MBIT, Network, SERVER_ADDRESS, Source, client, field};
use crate::shell;

const EXAMPLE: &str = "prewarm-bench";
/// How often each is measured alone and beside prewarming.
const PAIRS: u32 = 7;
const LARGE: &str = "bench/large";
const LARGE_BYTES: u64 = 2_000_000_000;
/// The agent's default, of the link's bytes a second.
const RATE: u64 = LINK_MBIT as u64 * 1_000_000 / 8 / 12;

pub(super) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let program = build()?;
    let source = Source::collect(&bench.work.join("source-prewarm"), 1)?;
    let large = Source::large(&bench.work.join("source-large"), LARGE_BYTES)?;
    let delay_link = bench.release.join("anyplace-delay-link");
    let network = Network::slow_link(&delay_link, LINK_DELAY_US, LINK_MBIT)?;
    let (servers, machine) = (network.server(), network.client(0));
    for (name, namespaces) in [("", None), (", 1 Gbit/s and 40 ms", Some((&*servers, &*machine)))] {
        let namespace = namespaces.map(|(servers, _)| servers);
        let data = bench.work.join(if namespace.is_some() { "ours-slow" } else { "ours" });
        let server = Server::anyplace(&bench.anyplace(), &data, namespace, "")?;
        bench.push(&server, &source.layout, "v1", namespace)?;
        bench.push_as(&server, &large.layout, &format!("{LARGE}:v1"), namespace)?;
        let machine = Machine {
            program: &program,
            registry: match namespace {
                Some(_) => server.daemon.at(SERVER_ADDRESS)?.to_string(),
                None => server.daemon.address.to_string(),
            },
            credentials: server.credentials_path(),
            namespace: namespaces.map(|(_, machine)| machine),
            work: bench.work.join(if namespace.is_some() { "machine-slow" } else { "machine" }),
        };
        let pulls = in_pairs(|run, prewarm| {
            let pulled = machine.live(run, prewarm)?;
            eprintln!("live pull {run} of {PAIRS}, prewarming {prewarm}: {pulled:.3} s");
            Ok(pulled)
        })?;
        let figure = format!("live pull beside prewarming / alone{name}");
        // A tenth less of the rate is a ninth more of time.
        report.add(&figure, pulls, "x", Op::AtMost, 10.0 / 9.0, None);
        if namespace.is_some() {
            let traffic = in_pairs(|run, prewarm| {
                let rate = machine.traffic(run, prewarm)?;
                eprintln!("traffic {run} of {PAIRS}, prewarming {prewarm}: {:.1} MB/s", rate / 1e6);
                Ok(rate)
            })?;
            let figure = format!("traffic beside prewarming / alone{name}");
            report.add(&figure, traffic, "x", Op::AtLeast, 0.9, None);
        }
    }
    Ok(())
}

/// What is measured beside prewarming in parts of what it is right before without: the median of the pairs' parts, as a
/// machine may be faster or slower a minute later. The first pair is to get warm.
fn in_pairs(mut measure: impl FnMut(u32, bool) -> Result<f64>) -> Result<f64> {
    let mut parts = Vec::new();
    for run in 0..=PAIRS {
        let alone = measure(run, false)?;
        parts.push(measure(run, true)? / alone);
    }
    Ok(median(&parts[1..]))
}

/// A machine that pulls and serves.
struct Machine<'a> {
    program: &'a Path,
    registry: String,
    credentials: PathBuf,
    namespace: Option<&'a str>,
    work: PathBuf,
}

impl Machine<'_> {
    /// Seconds of a cold live pull.
    fn live(&self, run: u32, prewarm: bool) -> Result<f64> {
        let store = self.work.join(format!("live-{run}-{prewarm}"));
        let mut child = self.start(&store, "-", prewarm, Some(&format!("{IMAGE}:v1")))?;
        let output = child.stdout.take().context("its output")?;
        let last = BufReader::new(output).lines().map_while(Result::ok).last().unwrap_or_default();
        anyhow::ensure!(child.wait()?.success(), "{EXAMPLE} failed: {last}");
        if prewarm {
            eprintln!("  {:.1} MB prewarmed meanwhile", field(&last, "prewarmed")? / 1e6);
            // Large, and no inode of the next runs comes from it.
            std::fs::remove_dir_all(&store)?;
        }
        field(&last, "seconds")
    }

    /// Bytes a second of a download.
    fn traffic(&self, run: u32, prewarm: bool) -> Result<f64> {
        let store = self.work.join(format!("traffic-{run}"));
        let prewarming = match prewarm {
            false => None,
            true => {
                let mut child = self.start(&store, &RATE.to_string(), true, None)?;
                let mut output = BufReader::new(child.stdout.take().context("its output")?);
                let mut line = String::new();
                output.read_line(&mut line)?;
                anyhow::ensure!(line.trim() == "ready", "{EXAMPLE} said `{}`", line.trim());
                Some((child, output))
            }
        };
        let rate = self.download();
        if let Some((mut child, mut output)) = prewarming {
            drop(child.stdin.take());
            let mut last = String::new();
            std::io::Read::read_to_string(&mut output, &mut last)?;
            anyhow::ensure!(child.wait()?.success(), "{EXAMPLE} failed");
            let (bytes, seconds) = (field(&last, "prewarmed")?, field(&last, "seconds")?);
            eprintln!("  prewarmed at {:.1} MB/s meanwhile", bytes / seconds / 1e6);
            std::fs::remove_dir_all(&store)?;
        }
        rate
    }

    /// Bytes a second of the large image's layer, by curl, to nowhere.
    fn download(&self) -> Result<f64> {
        let user = std::fs::read_to_string(&self.credentials)?;
        let base = format!("http://{}/v2/{LARGE}", self.registry);
        let curl = |words: &[&str]| {
            let more = ["--silent", "--show-error", "--fail", "--user", user.trim()];
            shell::output(&mut client(self.namespace, "curl", &[&more, words].concat()))
        };
        let accept = "Accept: application/vnd.oci.image.manifest.v1+json";
        let manifest: serde_json::Value =
            serde_json::from_str(&curl(&["--header", accept, &format!("{base}/manifests/v1")])?)?;
        let digest = manifest["layers"][0]["digest"].as_str().context("no layer")?;
        let speed = curl(&[
            "--range",
            "0-499999999",
            "--output",
            "/dev/null",
            "--write-out",
            "%{speed_download}",
            &format!("{base}/blobs/{digest}"),
        ])?;
        speed.trim().parse().context("curl's speed")
    }

    fn start(&self, store: &Path, rate: &str, prewarm: bool, live: Option<&str>) -> Result<Child> {
        std::fs::create_dir_all(store)?;
        settle();
        let (registry, large) = (format!("http://{}", self.registry), format!("{LARGE}:v1"));
        let (credentials, store) = (self.credentials.to_string_lossy(), store.to_string_lossy());
        let prewarm = if prewarm { &*large } else { "-" };
        let words = [&*registry, &credentials, &store, rate, prewarm, live.unwrap_or("-")];
        let mut command = client(self.namespace, &self.program.to_string_lossy(), &words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().with_context(|| format!("start {EXAMPLE}"))
    }
}

fn build() -> Result<PathBuf> {
    let mut build: Command = shell::cargo(&["build", "--release", "--quiet"])?;
    let status =
        build.args(["-p", "anyplace-images", "--example", EXAMPLE]).status().context("start cargo")?;
    anyhow::ensure!(status.success(), "the release build of {EXAMPLE} failed");
    Ok(shell::root()?.join("target/release/examples").join(EXAMPLE))
}
