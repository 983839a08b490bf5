//! The registry beside docker-registry 2.8.2: the same pushes over one connection, pulls by curl and requests by wrk,
//! one server after the other, three times after a run to warm up, medians.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result};

use super::report::Op;
use super::sample::{median, settle};
use super::server::Server;
use super::{Report, WorkDir, payload, release_build, require, wanted};

const RUNS: u64 = 3;
const GIB: u64 = 1 << 30;
const CHUNK: u64 = 100 << 20;
const REPOSITORY: &str = "bench/blob";
const PEER: &str = "docker-registry";
/// The large layer: 60 parts of 500 MB.
const PART: u64 = 500_000_000;
const PARTS: u64 = 60;
const WRK_SECONDS: u32 = 6;

/// What one server's runs gave.
#[derive(Default)]
struct Measured {
    push: Vec<f64>,
    push_cpu: Vec<f64>,
    chunked: Vec<f64>,
    chunked_cpu: Vec<f64>,
    pull: Vec<f64>,
    pull_cpu: Vec<f64>,
    pull4: Vec<f64>,
    pull4_cpu: Vec<f64>,
    manifests: Vec<f64>,
}

const SECTIONS: &[&str] = &["speed", "memory"];

pub(crate) fn run(report: &mut Report, only: Option<&str>) -> Result<()> {
    let (speed, memory) = (wanted(only, SECTIONS, "speed")?, wanted(only, SECTIONS, "memory")?);
    require(&[("docker-registry", "docker-registry"), ("curl", "curl"), ("wrk", "wrk")])?;
    let binary = release_build()?.join("anyplace");
    let work = WorkDir::new("registry")?;
    if speed {
        compare(report, &binary, &work)?;
    }
    if memory {
        let peak = large(&Server::anyplace(&binary, &work.join("anyplace"), None, "")?, &work)?;
        report.add("memory peak, 30 GB in by parts and out over 4", peak, "MiB", Op::AtMost, 128.0, None);
    }
    Ok(())
}

/// Both servers under the same requests.
fn compare(report: &mut Report, binary: &Path, work: &WorkDir) -> Result<()> {
    let (mut ours, mut peers) = (Measured::default(), Measured::default());
    for run in 0..=RUNS {
        eprintln!(
            "{}",
            if run == 0 { "a run to warm up".to_owned() } else { format!("run {run} of {RUNS}") }
        );
        let mono = work.join("mono");
        let mono_digest = payload::write(&mono, run, GIB)?;
        let chunked = work.join("chunked");
        let chunked_digest = payload::write(&chunked, run + 1_000, GIB)?;
        let parts = split(&chunked, work)?;
        for (name, measured) in [("anyplace", &mut ours), (PEER, &mut peers)] {
            let server = match name {
                "anyplace" => Server::anyplace(binary, &work.join("anyplace"), None, "")?,
                _ => Server::docker_registry(&work.join("docker-registry"), None)?,
            };
            measure(&server, (&mono, &mono_digest), (&parts, &chunked_digest), measured)
                .with_context(|| format!("measuring {name}"))?;
        }
        if run == 0 {
            // Memory that the machine hadn't used for a while is slow to touch, in a virtual machine above all.
            (ours, peers) = Default::default();
        }
    }
    add(report, &ours, &peers);
    Ok(())
}

fn measure(
    server: &Server,
    mono: (&Path, &str),
    chunked: (&[PathBuf], &str),
    measured: &mut Measured,
) -> Result<()> {
    let mb = GIB as f64 / 1e6;
    let (seconds, cpu) = server.timed(|| server.push(REPOSITORY, mono.1, mono.0))?;
    measured.push.push(mb / seconds);
    measured.push_cpu.push(cpu);
    let (seconds, cpu) = server.timed(|| server.push_parts(REPOSITORY, chunked.1, chunked.0, CHUNK))?;
    measured.chunked.push(mb / seconds);
    measured.chunked_cpu.push(cpu);
    let (seconds, cpu) = server.timed(|| server.pull(REPOSITORY, mono.1, 1))?;
    measured.pull.push(mb / seconds);
    measured.pull_cpu.push(cpu);
    let (seconds, cpu) = server.timed(|| server.pull(REPOSITORY, mono.1, 4))?;
    measured.pull4.push(4.0 * mb / seconds);
    measured.pull4_cpu.push(cpu / 4.0);
    server.push_manifest(REPOSITORY, "latest")?;
    measured.manifests.push(server.wrk(&format!("/v2/{REPOSITORY}/manifests/latest"), 16, WRK_SECONDS)?);
    Ok(())
}

fn add(report: &mut Report, ours: &Measured, peers: &Measured) {
    let value = |values: &Vec<f64>| median(values);
    let peer = |values: &Vec<f64>| Some((PEER, median(values)));
    report.add("push 1 GiB, one request", value(&ours.push), "MB/s", Op::AtLeast, 420.0, peer(&peers.push));
    report.add(
        "push 1 GiB, parts of 100 MiB",
        value(&ours.chunked),
        "MB/s",
        Op::AtLeast,
        420.0,
        peer(&peers.chunked),
    );
    let ratio = value(&ours.chunked) / value(&ours.push);
    report.add("parts / one request", ratio, "x", Op::AtLeast, 0.9, None);
    report.add(
        "push, one request: server CPU",
        value(&ours.push_cpu),
        "s/GiB",
        Op::AtMost,
        1.6,
        peer(&peers.push_cpu),
    );
    report.add(
        "push, parts: server CPU",
        value(&ours.chunked_cpu),
        "s/GiB",
        Op::AtMost,
        1.6,
        peer(&peers.chunked_cpu),
    );
    let (one, parts) =
        (value(&ours.push) / median(&peers.push), value(&ours.chunked) / median(&peers.chunked));
    report.add("push, one request: ours / peer", one, "x", Op::AtLeast, 1.8, None);
    report.add("push, parts: ours / peer", parts, "x", Op::AtLeast, 1.8, None);
    report.add(
        "pull 1 GiB, 1 connection",
        value(&ours.pull),
        "MB/s",
        Op::AtLeast,
        median(&peers.pull),
        peer(&peers.pull),
    );
    report.add(
        "pull 1 GiB, 4 connections",
        value(&ours.pull4),
        "MB/s",
        Op::AtLeast,
        median(&peers.pull4),
        peer(&peers.pull4),
    );
    report.add(
        "pull, 1 connection: server CPU",
        value(&ours.pull_cpu),
        "s/GiB",
        Op::AtMost,
        0.5,
        peer(&peers.pull_cpu),
    );
    report.add(
        "pull, 4 connections: server CPU",
        value(&ours.pull4_cpu),
        "s/GiB",
        Op::AtMost,
        0.5,
        peer(&peers.pull4_cpu),
    );
    let rate = value(&ours.manifests);
    report.add("manifest by tag, 16 connections", rate, "1/s", Op::AtLeast, 30_000.0, peer(&peers.manifests));
    report.add("manifest by tag: ours / peer", rate / median(&peers.manifests), "x", Op::AtLeast, 15.0, None);
}

/// A layer of 30 GB goes in by parts and out over four connections; the server's peak of memory in MiB.
fn large(server: &Server, work: &WorkDir) -> Result<f64> {
    eprintln!("30 GB in by parts and out over 4 connections");
    let part = work.join("part");
    payload::write(&part, 30, PART)?;
    let digest = payload::digest_repeated(&part, PARTS)?;
    server.push_parts(REPOSITORY, &digest, &vec![part; PARTS as usize], PART)?;
    let total = PART * PARTS;
    let readers = (0..4).map(|reader| {
        let (first, last) = (total / 4 * reader, total / 4 * (reader + 1) - 1);
        let mut curl = server.curl(&[&format!("/v2/{REPOSITORY}/blobs/{digest}")]);
        curl.args(["--range", &format!("{first}-{last}"), "--output", "/dev/null"]).stdout(Stdio::null());
        curl.spawn().context("start curl")
    });
    for mut reader in readers.collect::<Result<Vec<_>>>()? {
        anyhow::ensure!(reader.wait()?.success(), "a reader failed");
    }
    server.daemon.peak_mib()
}

/// The payload in files of 100 MiB, as a client has its parts.
fn split(file: &Path, work: &WorkDir) -> Result<Vec<PathBuf>> {
    use std::io::Read as _;
    let mut source = std::fs::File::open(file)?;
    let mut parts = Vec::new();
    loop {
        let path = work.join(&format!("part-{}", parts.len()));
        let mut out = std::fs::File::create(&path)?;
        if std::io::copy(&mut (&mut source).take(CHUNK), &mut out)? == 0 {
            std::fs::remove_file(&path)?;
            settle();
            return Ok(parts);
        }
        parts.push(path);
    }
}
