//! Packing: how much of the GPUs of a trace is allocated at 130 % of demand, without moves and with; and how often and how
//! fast room is made where moves can make it.
//!
//! The packing programs are examples of the crate `anyplace-location-core`: the planner's own choices, fed with the trace and
//! with generated locations.

use anyhow::{Context, Result, ensure};

use super::report::Op;
use super::{Report, measure_lines};
use crate::shell;

const PACKING: &str = "packing-bench";
const ROOM: &str = "room-bench";
/// Mean of ten orders at 130 %, by the paper's authors; ties by the lowest name.
const FGD: (&str, f64) = ("FGD, published", 95.39);

pub(crate) fn run(report: &mut Report, nodes: Option<&str>, pods: Option<&str>) -> Result<()> {
    let ask = "expected --nodes FILE --pods FILE: CSV files of the open GPU trace `openb` (nodes: \
               sn,cpu_milli,memory_mib,gpu; pods: name,cpu_milli,memory_mib,num_gpu,gpu_milli)";
    let (nodes, pods) = nodes.zip(pods).context(ask)?;
    eprintln!("building in release");
    let package = ["build", "--release", "--quiet", "-p", "anyplace-location-core"];
    let examples = ["--example", PACKING, "--example", ROOM];
    let status = shell::cargo(&package)?.args(examples).status().context("start cargo")?;
    ensure!(status.success(), "the release build of {PACKING} and {ROOM} failed");
    let programs = shell::root()?.join("target/release/examples");
    let values = measure_lines(&programs.join(PACKING), &[nodes, pods])?;
    let of = |figure: &str| -> Vec<f64> {
        let is_it = |name: &str| name.rsplit_once('_').is_some_and(|(name, _)| name == figure);
        values.iter().filter(|(name, _)| is_it(name)).map(|(_, value)| *value).collect()
    };
    let name = "GPUs allocated at 130 % demand, ties by lot";
    let allocated = of("allocated");
    report.add(&format!("{name}, mean of 10 seeds"), mean(&allocated), "%", Op::AtLeast, 95.7, Some(FGD));
    report.add(&format!("{name}, worst of 10 seeds"), least(&allocated), "%", Op::AtLeast, 95.7, None);
    let moved = of("allocated_with_moves");
    report.add("the same with moves, mean of 10 seeds", mean(&moved), "%", Op::AtLeast, 96.0, None);
    report.add("the same with moves, worst of 10 seeds", least(&moved), "%", Op::AtLeast, 96.0, None);
    let most = of("moved").into_iter().fold(0.0, f64::max);
    report.add("pods moved, worst of 10 seeds", most, "%", Op::AtMost, 2.0, None);
    let values = measure_lines(&programs.join(ROOM), &[])?;
    let value = |name: &str| values.get(name).copied().unwrap_or(f64::NAN);
    report.add("make room: solved within 50 ms", value("solved"), "%", Op::AtLeast, 95.0, None);
    report.add("make room: time, p99", value("p99_ms"), "ms", Op::AtMost, 50.0, None);
    Ok(())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::MAX, f64::min)
}
