//! `cargo xtask sim`: the schedulers in simulated time, with faults from seeds. What fails is printed with its seed; one
//! seed alone tells all that happens in it.

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};

use crate::bench::{Op, Report, measure_lines};
use crate::shell;

/// As many as CI runs.
const SEEDS: u64 = 200;

pub(crate) fn run(words: &[&str]) -> Result<ExitCode> {
    let (mut seeds, mut first, mut json) = (None, None, false);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut number = || -> Result<u64> {
            let text = words.next().copied().unwrap_or_default();
            text.parse().with_context(|| format!("{word}: found `{text}`, expected a number"))
        };
        match *word {
            "--seeds" => seeds = Some(number()?),
            "--seed" => first = Some(number()?),
            "--json" => json = true,
            word => bail!("found `{word}`, expected [--seeds N] [--seed S] [--json]"),
        }
    }
    let seeds = seeds.unwrap_or(if first.is_some() { 1 } else { SEEDS });
    let first = first.unwrap_or(1);
    ensure!(seeds > 0, "--seeds: found 0, expected at least 1");
    eprintln!("building in release");
    let status = shell::cargo(&["build", "--release", "--quiet", "-p", "anyplace-sim"])?.status();
    ensure!(status.context("start cargo")?.success(), "the release build of anyplace-sim failed");
    let program = shell::root()?.join("target/release/anyplace-sim");
    let values = measure_lines(&program, &[&first.to_string(), &seeds.to_string()])?;
    let value = |name: &str| values.get(name).copied().unwrap_or(f64::NAN);
    let mut report = Report::new("sim", json);
    report.add("seeds", value("seeds"), "", Op::AtLeast, seeds as f64, None);
    report.add("violations", value("violations"), "", Op::AtMost, 0.0, None);
    let rate = "simulated minutes of three locations a second of CPU";
    report.add(rate, value("minutes_per_cpu_second"), "min/s", Op::AtLeast, 100.0, None);
    report.print();
    // A debugger's machine may be slow: what fails the command is a violation.
    Ok(if value("violations") == 0.0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
