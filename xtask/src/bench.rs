//! `cargo xtask bench NAME`: our figures beside the peers', measured in the same run on this machine.
//!
//! The binary is built in release and run as its users run it; peers are Debian's packages. Each figure states its
//! target, so that whoever reads one sees whether it holds.

mod daemon;
mod images;
mod packing;
mod payload;
mod registry;
mod report;
mod router;
mod sample;
mod schedule;
mod server;
mod upload;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::shell;
pub(crate) use report::{Op, Report};

/// Names, and what they measure.
pub(crate) const BENCHES: &[(&str, &str)] = &[
    ("registry", "push, pull, manifests and memory of the registry, beside docker-registry"),
    ("router", "the data plane's cost for a packet, tables at scale, updates, memory"),
    ("packing", "how much of a trace's GPUs the schedulers fill, beside the published figure"),
    ("schedule", "how long decisions take, and how many placements a second reach the machines"),
    ("images", "packing, pulling, mounting and prewarming, beside skopeo, podman and containerd"),
];

/// Runs one bench; prints a table, or with `json` one line of JSON as the last of the output.
pub(crate) fn run(words: &[&str]) -> Result<ExitCode> {
    let Options { name, only, json, nodes, pods } = Options::parse(words)?;
    let mut report = Report::new(name, json);
    match name {
        "registry" => registry::run(&mut report, only)?,
        "router" => router::run(&mut report, only)?,
        "packing" => packing::run(&mut report, nodes, pods)?,
        "schedule" => schedule::run(&mut report, only)?,
        "images" => images::run(&mut report, only)?,
        _ => {
            let names: Vec<_> = BENCHES.iter().map(|(name, _)| *name).collect();
            bail!("there is no bench `{name}`; there are: {}", names.join(", "));
        }
    }
    report.print();
    Ok(if report.all_hold() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Options<'a> {
    name: &'a str,
    /// Only this part.
    only: Option<&'a str>,
    json: bool,
    /// Traces for `packing`.
    nodes: Option<&'a str>,
    pods: Option<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(words: &[&'a str]) -> Result<Options<'a>> {
        let (mut name, mut only, mut json) = (None, None, false);
        let (mut nodes, mut pods) = (None, None);
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--json" => json = true,
                "--only" => only = Some(*words.next().context("--only: expected the name of a part")?),
                "--nodes" => nodes = Some(*words.next().context("--nodes: expected a CSV file")?),
                "--pods" => pods = Some(*words.next().context("--pods: expected a CSV file")?),
                word if name.is_none() && !word.starts_with('-') => name = Some(word),
                word => {
                    bail!("found `{word}`, expected NAME [--only PART] [--json] [--nodes FILE] [--pods FILE]")
                }
            }
        }
        Ok(Options {
            name: name.context("expected the name of a bench; `cargo xtask help` lists them")?,
            only,
            json,
            nodes,
            pods,
        })
    }
}

/// Whether a part is to be measured; fails where the name that was asked for isn't among the parts.
pub(crate) fn wanted(only: Option<&str>, parts: &[&str], part: &str) -> Result<bool> {
    match only {
        None => Ok(true),
        Some(only) if parts.contains(&only) => Ok(only == part),
        Some(only) => bail!("there is no part `{only}`; there are: {}", parts.join(", ")),
    }
}

/// A folder for one run, removed at its end: below `target`, which is on a real disk.
pub(crate) struct WorkDir(PathBuf);

impl WorkDir {
    pub(crate) fn new(bench: &str) -> Result<WorkDir> {
        let path = shell::root()?.join("target/bench").join(format!("{bench}-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(WorkDir(path))
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("can't remove {}: {error}", self.0.display());
        }
    }
}

/// Builds the binary and the testbed's programs in release; the folder that they are in.
pub(crate) fn release_build() -> Result<PathBuf> {
    let mut build =
        shell::cargo(&["build", "--release", "--quiet", "-p", "anyplace", "-p", "anyplace-tests", "--bins"])?;
    eprintln!("building in release");
    let status = build.status().context("start cargo")?;
    anyhow::ensure!(
        status.success(),
        "the release build failed; `cargo build --release -p anyplace` shows why"
    );
    Ok(shell::root()?.join("target/release"))
}

/// Fails with the package to install where a program is missing.
pub(crate) fn require(programs: &[(&str, &str)]) -> Result<()> {
    let missing = programs.iter().filter(|(program, _)| !shell::has_program(program));
    let packages: Vec<_> = missing.map(|(_, package)| *package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    bail!("this bench needs peers that are missing; run: apt-get install --yes {}", packages.join(" "))
}

/// Builds a measuring program: an example of a crate.
pub(crate) fn example(package: &str, name: &str) -> Result<PathBuf> {
    let mut build = shell::cargo(&["build", "--release", "--quiet"])?;
    eprintln!("building {name} in release");
    let status = build.args(["-p", package, "--example", name]).status().context("start cargo")?;
    ensure!(status.success(), "the release build of {name} failed");
    Ok(shell::root()?.join("target/release/examples").join(name))
}

/// Measures a fleet of schedulers in a folder that doesn't exist yet.
pub(crate) fn measure_fleet(what: &str, folder: &Path, etcd: Option<&str>) -> Result<BTreeMap<String, f64>> {
    let binary = release_build()?.join("anyplace").display().to_string();
    let program = example("anyplace-location-scheduler", "fleet-bench")?;
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let folder = folder.display().to_string();
    let mut words = vec![what, &binary, &folder];
    words.extend(etcd);
    measure_lines(&program, &words)
}

/// Runs a measuring program that prints lines such as `{"figure":"load_seconds","value":2.1}`; its figures by name.
pub(crate) fn measure_lines(program: &Path, args: &[&str]) -> Result<BTreeMap<String, f64>> {
    let name = program.file_name().unwrap_or_default().display();
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
    let output = child.stdout.take().context("the measuring program's output")?;
    let mut values = BTreeMap::new();
    for line in BufReader::new(output).lines() {
        let line = line?;
        let result: Value =
            serde_json::from_str(&line).with_context(|| format!("found `{line}`, expected JSON"))?;
        let (Some(figure), Some(value)) = (result["figure"].as_str(), result["value"].as_f64()) else {
            bail!("found `{line}`, expected a figure and its value");
        };
        eprintln!("{figure} {value:.4}");
        values.insert(figure.to_owned(), value);
    }
    let status = child.wait()?;
    ensure!(status.success(), "{name} ended with {status}");
    Ok(values)
}
