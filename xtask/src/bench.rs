//! `cargo xtask bench NAME`: our figures beside the peers', measured in the same run on this machine.
//!
//! The binary is built in release and run as its users run it; peers are Debian's packages. Each figure states its
//! target, so that whoever reads one sees whether it holds.

mod daemon;
mod images;
mod payload;
mod registry;
mod report;
mod sample;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::shell;
pub(crate) use report::Report;

/// Names, and what they measure.
pub(crate) const BENCHES: &[(&str, &str)] = &[
    ("registry", "push, pull, manifests and memory of the registry, beside docker-registry"),
    ("images", "packing, pulling, mounting and prewarming, beside skopeo, podman and containerd"),
];

/// Runs one bench; prints a table, or with `json` one line of JSON as the last of the output.
pub(crate) fn run(name: &str, json: bool) -> Result<ExitCode> {
    let mut report = Report::new(name, json);
    match name {
        "registry" => registry::run(&mut report)?,
        "images" => images::run(&mut report)?,
        _ => {
            let names: Vec<_> = BENCHES.iter().map(|(name, _)| *name).collect();
            bail!("there is no bench `{name}`; there are: {}", names.join(", "));
        }
    }
    report.print();
    Ok(if report.all_hold() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
