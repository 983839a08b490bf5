//! Packing: how much of the GPUs of a trace is allocated at 130 % of demand.
//!
//! The packing program is an example of the crate `anyplace-location-core`: the planner's own choice, fed with the trace.

use anyhow::{Context, Result, ensure};

use super::report::Op;
use super::{Report, measure_lines};
use crate::shell;

const EXAMPLE: &str = "packing-bench";
/// Mean of ten orders at 130 %, by the paper's authors; ties by the lowest name.
const FGD: (&str, f64) = ("FGD, published", 95.39);

pub(crate) fn run(report: &mut Report, nodes: Option<&str>, pods: Option<&str>) -> Result<()> {
    let ask = "expected --nodes FILE --pods FILE: CSV files of the open GPU trace `openb` (nodes: \
               sn,cpu_milli,memory_mib,gpu; pods: name,cpu_milli,memory_mib,num_gpu,gpu_milli)";
    let (nodes, pods) = nodes.zip(pods).context(ask)?;
    eprintln!("building in release");
    let package = ["build", "--release", "--quiet", "-p", "anyplace-location-core", "--example", EXAMPLE];
    let status = shell::cargo(&package)?.status().context("start cargo")?;
    ensure!(status.success(), "the release build of {EXAMPLE} failed");
    let program = shell::root()?.join("target/release/examples").join(EXAMPLE);
    let values = measure_lines(&program, &[nodes, pods])?;
    let allocated: Vec<f64> = values.into_values().collect();
    let least = allocated.iter().copied().fold(f64::MAX, f64::min);
    let mean = allocated.iter().sum::<f64>() / allocated.len() as f64;
    let name = "GPUs allocated at 130 % demand, ties by lot";
    report.add(&format!("{name}, mean of 10 seeds"), mean, "%", Op::AtLeast, 95.7, Some(FGD));
    report.add(&format!("{name}, worst of 10 seeds"), least, "%", Op::AtLeast, 95.7, None);
    report.missing("the same with moves of at most 2 % of pods", "%", Op::AtLeast, 96.0);
    Ok(())
}
