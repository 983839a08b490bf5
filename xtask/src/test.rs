//! `cargo xtask test`: everything that CI runs, with one count at the end.

mod dependencies;
mod licences;
mod suite;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{demo, ebpf, setup, shell};

/// What passed and what failed, steps and tests alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

impl Count {
    fn of_step(result: &Result<()>) -> Self {
        if result.is_ok() { Self { passed: 1, failed: 0 } } else { Self { passed: 0, failed: 1 } }
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// The step that comes after the tests.
const DEMO: &str = "demo";

/// One step beside the tests.
type Step = (&'static str, fn() -> Result<()>);

const STEPS: &[Step] = &[
    ("format", || shell::show(shell::cargo(&["fmt", "--all", "--check"])?)),
    ("lints", lints),
    ("dependencies", || dependencies::check(&metadata()?)),
    ("licences", || licences::check(&metadata()?)),
    ("ebpf", check_ebpf),
    (DEMO, check_demo),
];

/// Runs all steps and tests, or those whose name contains `filter`.
pub(crate) fn run(filter: Option<&str>) -> Result<ExitCode> {
    setup::ensure()?;
    setup::tools::ensure(setup::tools::Which::Usual)?;
    let wanted: Vec<_> =
        STEPS.iter().filter(|(name, _)| filter.is_none_or(|part| name.contains(part))).collect();
    let mut total = Count::default();
    let mut failures = Vec::new();
    for (name, step) in wanted.iter().filter(|(name, _)| *name != DEMO) {
        run_step(name, *step, &mut total, &mut failures);
    }
    // A filter that names a step means that step.
    if filter.is_none() || wanted.is_empty() {
        println!("\n== tests");
        let count = suite::run(filter)?;
        if count.failed > 0 {
            failures.push("tests".to_owned());
        }
        total.add(count);
    }
    // Last, because it needs the build, and the machine for itself.
    for (name, step) in wanted.iter().filter(|(name, _)| *name == DEMO) {
        run_step(name, *step, &mut total, &mut failures);
    }
    if !failures.is_empty() {
        println!("\nfailed: {}", failures.join(", "));
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(if total.failed == 0 && total.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Rebuilds the eBPF object where the compiler is there; the packet tests then run on that one.
fn check_ebpf() -> Result<()> {
    match ebpf::check(&shell::root()?)? {
        ebpf::CheckOutcome::Rebuilt { object, note } => {
            println!("{note}");
            // SAFETY: the steps run one after the other on the main thread; nothing else reads the environment now.
            unsafe { std::env::set_var("ANYPLACE_BPF_OBJECT", object) };
        }
        ebpf::CheckOutcome::Skipped { reason } => println!("not rebuilt: {reason}"),
    }
    Ok(())
}

fn run_step(name: &str, step: fn() -> Result<()>, total: &mut Count, failures: &mut Vec<String>) {
    println!("\n== {name}");
    let start = Instant::now();
    let result = step();
    total.add(Count::of_step(&result));
    match result {
        Ok(()) => println!("== {name}: passed in {:.1} s", start.elapsed().as_secs_f64()),
        Err(error) => {
            println!("== {name}: FAILED: {error:#}");
            failures.push(name.to_owned());
        }
    }
}

/// The main job, with its promises. Users without root can't run it; CI must.
fn check_demo() -> Result<()> {
    if !nix::unistd::geteuid().is_root() && std::env::var_os("CI").is_none() {
        println!("skipped: the demo makes network namespaces and needs root");
        return Ok(());
    }
    match demo::run(true)? {
        true => Ok(()),
        false => bail!("the demo isn't as promised; its output says what"),
    }
}

fn lints() -> Result<()> {
    shell::show(shell::cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?)
}

/// What cargo knows about the workspace and its dependencies on this platform.
fn metadata() -> Result<Value> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut command = shell::cargo(&["metadata", "--format-version", "1", "--filter-platform", &target])?;
    serde_json::from_str(&shell::output(&mut command)?).context("read what `cargo metadata` printed")
}
