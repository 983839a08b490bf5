//! Images: packing, cold pulls, the next version, many machines at once, mounting; beside skopeo, podman and containerd.
//!
//! Peers pull the gzip original from docker-registry, as they would today; we pull what `anyplace push` made of it from
//! our registry. Each pull starts from nothing on disk and ends when a program of the image has run in the mounted
//! root file system.

mod network;
mod prewarm;
mod puller;
mod source;
mod start;

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use super::report::Op;
use super::sample::{median, settle};
use super::server::Server;
use super::{Report, WorkDir, release_build, require, wanted};
use crate::shell;
pub(crate) use network::inside;
use network::{Network, SERVER_ADDRESS};
use puller::{Pull, Tool};
use source::Source;

const RUNS: u32 = 3;
const IMAGE: &str = "bench/image";
/// 40 ms there and back.
const LINK_DELAY_US: u64 = 20_000;
const LINK_MBIT: u32 = 1_000;
const LARGE_BYTES: u64 = 5_000_000_000;
/// Runs of changed bytes in the large file: 50 MB in all.
const LARGE_RUNS: u64 = 50;
const MACHINES: usize = 100;
/// The image for all machines together is this part of the whole, so that their stores fit on the disk.
const MACHINES_SHARE: u64 = 16;

/// What all parts need.
struct Bench {
    release: std::path::PathBuf,
    work: WorkDir,
}

const PARTS: &[&str] = &["pack", "cold", "slow", "next", "large", "many", "prewarm", "start"];

pub(crate) fn run(report: &mut Report, only: Option<&str>) -> Result<()> {
    require(&[
        ("docker-registry", "docker-registry"),
        ("skopeo", "skopeo"),
        ("podman", "podman"),
        ("containerd", "containerd"),
        ("curl", "curl"),
    ])?;
    let wanted = |part| wanted(only, PARTS, part);
    // Before anything is built for a name that isn't there.
    let first = PARTS.iter().map(|part| wanted(part)).collect::<Result<Vec<bool>>>()?;
    let bench = Bench { release: release_build()?, work: WorkDir::new("images")? };
    if first[..4].contains(&true) {
        let mut source = Source::collect(&bench.work.join("source"), 1)?;
        eprintln!("the image has {} files, {:.0} MB", source.files, source.bytes as f64 / 1e6);
        if wanted("pack")? {
            bench.pack(report, &source)?;
        }
        if wanted("cold")? {
            bench.cold(report, &source)?;
        }
        if wanted("slow")? {
            bench.slow(report, &source)?;
        }
        if wanted("next")? {
            bench.next(report, &mut source)?;
        }
    }
    if wanted("large")? {
        bench.large(report)?;
    }
    if wanted("many")? {
        bench.many(report)?;
    }
    if wanted("prewarm")? {
        prewarm::measure(&bench, report)?;
    }
    if wanted("start")? {
        bench.start(report)?;
    }
    Ok(())
}

impl Bench {
    fn anyplace(&self) -> std::path::PathBuf {
        self.release.join("anyplace")
    }

    fn start(&self, report: &mut Report) -> Result<()> {
        let starts = start::measure(&self.anyplace(), &self.work.join("start"))?;
        let peer = Some(("crun run by itself", starts.raw_crun_ms));
        report.add("job start on a prewarmed machine", starts.median_ms, "ms", Op::AtMost, 60.0, peer);
        let fetched = starts.fetched_bytes as f64;
        report.add("bytes fetched for those jobs", fetched, "B", Op::AtMost, 0.0, None);
        Ok(())
    }

    fn pack(&self, report: &mut Report, source: &Source) -> Result<()> {
        let (ours, theirs, plain) =
            (self.work.join("packed"), self.work.join("skopeo"), self.work.join("zstd"));
        let mut seconds = Vec::new();
        // The first run is not measured: it makes the machine's memory warm.
        for _ in 0..=RUNS {
            let _ = std::fs::remove_dir_all(&ours);
            settle();
            let begun = Instant::now();
            shell::output(
                Command::new(self.anyplace()).args(["image", "pack"]).arg(&source.layout).arg(&ours),
            )?;
            seconds.push(begun.elapsed().as_secs_f64());
        }
        seconds.remove(0);
        settle();
        let begun = Instant::now();
        skopeo(&source.layout, &format!("oci:{}", theirs.display()), "zstd:chunked")?;
        let peer = begun.elapsed().as_secs_f64();
        skopeo(&source.layout, &format!("oci:{}", plain.display()), "zstd")?;
        let (packed, baseline) = (blobs_bytes(&ours)?, blobs_bytes(&plain)?);
        report.add(
            "pack to zstd:chunked",
            median(&seconds),
            "s",
            Op::AtMost,
            4.0,
            Some(("skopeo zstd:chunked", peer)),
        );
        let theirs_ratio = blobs_bytes(&theirs)? / baseline;
        report.add(
            "size / plain zstd -3",
            packed / baseline,
            "x",
            Op::AtMost,
            1.15,
            Some(("skopeo zstd:chunked", theirs_ratio)),
        );
        for folder in [ours, theirs, plain] {
            std::fs::remove_dir_all(folder)?;
        }
        Ok(())
    }

    /// Our registry with the packed image, and docker-registry with the gzip original.
    fn servers(&self, layout: &Path, namespace: Option<&str>) -> Result<(Server, Server)> {
        let ours = Server::anyplace(&self.anyplace(), &self.work.join("anyplace"), namespace, "")?;
        let theirs = Server::docker_registry(&self.work.join("docker-registry"), namespace)?;
        self.push(&ours, layout, "v1", namespace)?;
        let to = format!("docker://{}/{IMAGE}:v1", theirs.daemon.address);
        let from = format!("oci:{}", layout.display());
        let words = ["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false", &from, &to];
        shell::output(&mut client(namespace, "skopeo", &words))?;
        Ok((ours, theirs))
    }

    fn push(&self, server: &Server, layout: &Path, tag: &str, namespace: Option<&str>) -> Result<()> {
        self.push_as(server, layout, &format!("{IMAGE}:{tag}"), namespace).map(drop)
    }

    /// The push's summary.
    fn push_as(&self, server: &Server, layout: &Path, name: &str, namespace: Option<&str>) -> Result<String> {
        let registry = format!("http://{}", server.daemon.address);
        let credentials = server.credentials_path();
        let (layout, credentials) = (layout.to_string_lossy(), credentials.to_string_lossy());
        let to = ["--registry", &registry, "--registry-credentials-file", &*credentials, "-o", "json"];
        let words = [&["push", &*layout, name][..], &to].concat();
        shell::output(&mut client(namespace, &self.anyplace().to_string_lossy(), &words))
    }

    /// The median seconds of cold pulls by one tool.
    fn pulls(
        &self,
        tool: Tool,
        server: &Server,
        host: Option<&str>,
        namespace: Option<&str>,
        runs: u32,
    ) -> Result<f64> {
        let registry = match host {
            Some(host) => server.daemon.at(host)?,
            None => server.daemon.address,
        };
        let (binary, credentials) = (self.anyplace(), server.credentials_path());
        let mut seconds = Vec::new();
        // The first run is not measured: it makes the machine's memory and the server's cache warm.
        for run in 0..=runs {
            // Kept until the end: ext4 is slow to give out numbers of inodes that were deleted a short while ago, so
            // who removed the last run's files would measure that.
            let work = self.work.join(&format!("pull-{tool:?}-{}-{run}", namespace.unwrap_or("here")));
            settle();
            let image = format!("{IMAGE}:v1");
            let pull = Pull {
                tool,
                binary: &binary,
                registry,
                credentials: &credentials,
                image: &image,
                namespace,
                work: &work,
            };
            seconds.push(pull.run()?);
            eprintln!("{tool:?} pull {run} of {runs}: {:.2} s", seconds[run as usize]);
        }
        Ok(median(&seconds[1..]))
    }

    fn cold(&self, report: &mut Report, source: &Source) -> Result<()> {
        let (ours, theirs) = self.servers(&source.layout, None)?;
        let seconds = self.pulls(Tool::Anyplace, &ours, None, None, RUNS)?;
        for (tool, name) in [(Tool::Podman, "podman"), (Tool::Containerd, "containerd")] {
            let peer = self.pulls(tool, &theirs, None, None, RUNS)?;
            report.add(
                &format!("cold pull to running: {name} / ours"),
                peer / seconds,
                "x",
                Op::AtLeast,
                4.0,
                None,
            );
            report.add(
                &format!("cold pull to running, beside {name}"),
                seconds,
                "s",
                Op::AtMost,
                peer / 4.0,
                Some((name, peer)),
            );
        }
        self.mounts(report, &ours)
    }

    /// Mounting an image that is there: `anyplace image pull` finds it and mounts it; what the mount took it says itself.
    fn mounts(&self, report: &mut Report, server: &Server) -> Result<()> {
        let (work, binary, credentials) =
            (self.work.join("mount"), self.anyplace(), server.credentials_path());
        let target = work.join("root");
        std::fs::create_dir_all(&target)?;
        let mut millis = Vec::new();
        for _ in 0..=5 * RUNS {
            let image = format!("{IMAGE}:v1");
            let pull = Pull {
                tool: Tool::Anyplace,
                binary: &binary,
                registry: server.daemon.address,
                credentials: &credentials,
                image: &image,
                namespace: None,
                work: &work,
            };
            let text = shell::output(pull.anyplace_pull(&work.join("store")).arg("--mount").arg(&target))?;
            puller::unmount(&target)?;
            millis.push(field(&text, "mount_ms")?);
        }
        // The first one pulled.
        report.add("mount of an image that is there", median(&millis[1..]), "ms", Op::AtMost, 20.0, None);
        Ok(())
    }

    fn slow(&self, report: &mut Report, source: &Source) -> Result<()> {
        let network =
            Network::slow_link(&self.release.join("anyplace-delay-link"), LINK_DELAY_US, LINK_MBIT)?;
        let (server, client) = (network.server(), network.client(0));
        let (ours, theirs) = self.servers(&source.layout, Some(&server))?;
        let seconds = self.pulls(Tool::Anyplace, &ours, Some(SERVER_ADDRESS), Some(&client), RUNS)?;
        for (tool, name) in [(Tool::Podman, "podman"), (Tool::Containerd, "containerd")] {
            let peer = self.pulls(tool, &theirs, Some(SERVER_ADDRESS), Some(&client), 1)?;
            let figure = format!("cold pull, 1 Gbit/s and 40 ms: {name} / ours");
            report.add(&figure, peer / seconds, "x", Op::AtLeast, 2.0, None);
        }
        Ok(())
    }

    /// One file of a hundred changed: what part of the layers' bytes is fetched.
    fn next(&self, report: &mut Report, source: &mut Source) -> Result<()> {
        let server = Server::anyplace(&self.anyplace(), &self.work.join("anyplace"), None, "")?;
        let (sent, fetched) = self.update(&server, source, |source| source.change_some(7))?;
        report.add("next version, 1 % of files changed: sent", sent, "%", Op::AtMost, 5.0, None);
        report.add("next version, 1 % of files changed: fetched", fetched, "%", Op::AtMost, 5.0, None);
        Ok(())
    }

    fn large(&self, report: &mut Report) -> Result<()> {
        let mut source = Source::large(&self.work.join("source-large"), LARGE_BYTES)?;
        let server = Server::anyplace(&self.anyplace(), &self.work.join("anyplace"), None, "")?;
        let (sent, fetched) =
            self.update(&server, &mut source, |source| source.change_runs(7, LARGE_RUNS))?;
        report.add("next version, 1 % of a 5 GB file: sent", sent, "%", Op::AtMost, 5.0, None);
        report.add("next version, 1 % of a 5 GB file: fetched", fetched, "%", Op::AtMost, 5.0, None);
        Ok(())
    }

    /// Pushes and pulls a version, then the next: bytes of the next's layers that were sent, and fetched, in percent.
    fn update(
        &self,
        server: &Server,
        source: &mut Source,
        change: impl FnOnce(&mut Source) -> Result<()>,
    ) -> Result<(f64, f64)> {
        let (work, binary, credentials) =
            (self.work.join("update"), self.anyplace(), server.credentials_path());
        std::fs::create_dir_all(&work)?;
        let pull = |tag: &str| -> Result<String> {
            let image = format!("{IMAGE}:{tag}");
            let pull = Pull {
                tool: Tool::Anyplace,
                binary: &binary,
                registry: server.daemon.address,
                credentials: &credentials,
                image: &image,
                namespace: None,
                work: &work,
            };
            shell::output(&mut pull.anyplace_pull(&work.join("store")))
        };
        self.push(server, &source.layout, "v1", None)?;
        pull("v1")?;
        change(source)?;
        let pushed = self.push_as(server, &source.layout, &format!("{IMAGE}:v2"), None)?;
        let text = pull("v2")?;
        std::fs::remove_dir_all(&work).context("remove the store")?;
        let part = |text: &str, of: &str, all: &str| anyhow::Ok(100.0 * field(text, of)? / field(text, all)?);
        Ok((part(&pushed, "bytes_sent", "bytes_packed")?, part(&text, "bytes_fetched", "layer_bytes")?))
    }

    /// Many cold machines pull at once through a location's cache: what the origin sends.
    fn many(&self, report: &mut Report) -> Result<()> {
        let source = Source::collect(&self.work.join("source-many"), MACHINES_SHARE)?;
        // The origin's own namespace is the first client of the switch: its interface counts what it sends.
        let network = Network::switch(MACHINES + 1)?;
        let (switch, origin) = (network.server(), network.client(MACHINES));
        let ours = Server::anyplace(&self.anyplace(), &self.work.join("origin"), Some(&origin), "")?;
        self.push(&ours, &source.layout, "v1", Some(&origin))?;
        let upstream = ours.daemon.at(&network.address(MACHINES))?;
        let more = format!(
            "[[upstreams]]\nurl = \"http://{upstream}\"\ncredentials_file = {:?}\n",
            ours.credentials_path()
        );
        let cache = Server::anyplace(&self.anyplace(), &self.work.join("cache"), Some(&switch), &more)?;
        let (registry, binary, credentials) =
            (cache.daemon.at(SERVER_ADDRESS)?, self.anyplace(), cache.credentials_path());
        let before = network.sent(MACHINES)?;
        let image = format!("{IMAGE}:v1");
        let mut pulls = Vec::new();
        for machine in 0..MACHINES {
            let (namespace, work) = (network.client(machine), self.work.join(&format!("machine-{machine}")));
            std::fs::create_dir_all(&work)?;
            let pull = Pull {
                tool: Tool::Anyplace,
                binary: &binary,
                registry,
                credentials: &credentials,
                image: &image,
                namespace: Some(&namespace),
                work: &work,
            };
            let mut command = pull.anyplace_pull(&work.join("store"));
            command.stdout(std::process::Stdio::piped()).stderr(pull.log()?);
            pulls.push(command.spawn().context("start a pull")?);
        }
        let mut layer_bytes = 0.0;
        for pull in pulls {
            let output = pull.wait_with_output()?;
            anyhow::ensure!(output.status.success(), "a machine's pull failed");
            layer_bytes = field(&String::from_utf8_lossy(&output.stdout), "layer_bytes")?;
        }
        let egress = (network.sent(MACHINES)? - before) as f64;
        report.add(
            "100 cold machines: origin egress / image",
            egress / layer_bytes,
            "x",
            Op::AtMost,
            1.05,
            None,
        );
        Ok(())
    }
}

fn client(namespace: Option<&str>, program: &str, words: &[&str]) -> Command {
    match namespace {
        Some(namespace) => inside(namespace, program, words),
        None => {
            let mut command = Command::new(program);
            command.args(words);
            command
        }
    }
}

fn skopeo(layout: &Path, to: &str, format: &str) -> Result<()> {
    let mut command = Command::new("skopeo");
    command.args(["copy", "--quiet", "--insecure-policy", "--dest-compress-format", format]);
    command
        .args(["--dest-compress-level", "3", "--dest-compress"])
        .arg(format!("oci:{}", layout.display()))
        .arg(to);
    shell::output(&mut command).map(drop)
}

/// Bytes of all blobs of a layout.
fn blobs_bytes(layout: &Path) -> Result<f64> {
    let folder = layout.join("blobs/sha256");
    let mut bytes = 0;
    for entry in std::fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes as f64)
}

/// A number of the JSON that a command printed.
fn field(text: &str, name: &str) -> Result<f64> {
    let value: serde_json::Value = serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?;
    value[name].as_f64().with_context(|| format!("no `{name}` in {text}"))
}
