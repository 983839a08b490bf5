//! Packs a trace of pods onto the machines of a trace, as the planner chooses; `cargo xtask bench packing` runs it.
//!
//! ```text
//! packing-bench NODES PODS     CSV: sn,cpu_milli,memory_mib,gpu,...   name,cpu_milli,memory_mib,num_gpu,gpu_milli,...
//! {"figure":"allocated_42","value":95.8}
//! ```
//!
//! The experiment of the trace's authors: all pods in shuffled order, none leaves; pods drawn from the trace follow until
//! the demand is 130 % of all GPUs; what fits nowhere is dropped. Machines that are equally good are drawn by lot.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use anyplace_location_core::{Ask, Cost, Free, Gpu, GpuSet, Mix, Models, Packer};
use anyplace_seed::Seed;

const SEEDS: std::ops::Range<u64> = 42..52;
/// Demand in the end, in hundredths of all GPUs.
const DEMAND: i64 = 130;
/// A thousandth of a GPU is a MiB here.
const MIB: i64 = 1 << 20;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(nodes), Some(pods)) = (args.next(), args.next()) else {
        anyhow::bail!("expected two files: packing-bench NODES PODS");
    };
    let machines = read(&nodes, &["cpu_milli", "memory_mib", "gpu"], |row| {
        let gpus = usize::try_from(row[2]).context("gpu")?;
        let gpus = vec![Gpu::new(0, 1_000 * MIB); gpus];
        Ok(Free { cpu: row[0], memory: row[1].saturating_mul(MIB), disk: 0, gpus, all_cpu: row[0] })
    })?;
    let pods = read(&pods, &["cpu_milli", "memory_mib", "num_gpu", "gpu_milli"], |row| {
        let gpus = u32::try_from(row[2]).context("num_gpu")?;
        ensure!((0..=1_000).contains(&row[3]), "gpu_milli: found {}, expected 0 to 1000", row[3]);
        let slice = (row[3] < 1_000).then_some(row[3] * MIB);
        Ok(Ask { cpu: row[0], memory: row[1].saturating_mul(MIB), disk: 0, gpus, slice, models: Models::ANY })
    })?;
    let capacity: i64 = machines.iter().map(|machine| machine.gpus.len() as i64 * 1_000).sum();
    ensure!(capacity > 0, "{nodes}: no GPU in it");
    ensure!(pods.iter().any(|pod| milli(pod) > 0), "no pod asks for a GPU");
    for seed in SEEDS {
        let allocated = pack(&machines, &pods, capacity, Seed::new(seed));
        let percent = 100.0 * allocated as f64 / capacity as f64;
        println!("{{\"figure\":\"allocated_{seed}\",\"value\":{percent}}}");
    }
    Ok(())
}

/// What is allocated in the end, in thousandths of a GPU.
fn pack(machines: &[Free], pods: &[Ask], capacity: i64, mut seed: Seed) -> i64 {
    let mut order = pods.to_vec();
    for last in (1..order.len()).rev() {
        order.swap(last, seed.index(last + 1));
    }
    let mut demand: i64 = order.iter().map(milli).sum();
    while demand * 100 < capacity * DEMAND {
        let pod = seed.pick(pods);
        demand += milli(&pod);
        order.push(pod);
    }
    let mut packer = Packer::new(Mix::of(pods.iter().map(|pod| (*pod, 1))));
    let machines: Vec<usize> = machines.iter().map(|machine| packer.add(machine.clone())).collect();
    let mut allocated = 0;
    for pod in &order {
        let mut best: Option<(Cost, usize, GpuSet)> = None;
        let mut equal = 0;
        for machine in &machines {
            let Ok(fit) = packer.fit(*machine, pod) else { continue };
            equal = match best {
                Some((cost, ..)) if fit.cost > cost => continue,
                Some((cost, ..)) if fit.cost == cost => equal + 1,
                _ => 1,
            };
            if seed.one_in(equal) {
                best = Some((fit.cost, *machine, fit.gpus));
            }
        }
        if let Some((_, machine, gpus)) = best {
            packer.take(machine, pod, gpus);
            allocated += milli(pod);
        }
    }
    allocated
}

/// Thousandths of a GPU.
fn milli(pod: &Ask) -> i64 {
    i64::from(pod.gpus) * pod.slice.map_or(1_000, |slice| slice / MIB)
}

/// The rows of a CSV file without quotes; `columns` are given to `make`, as numbers.
fn read<T>(path: &str, columns: &[&str], make: impl Fn(&[i64]) -> Result<T>) -> Result<Vec<T>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let mut lines = text.lines().zip(1..);
    let (header, _) = lines.next().with_context(|| format!("{path}: it is empty"))?;
    let names: Vec<&str> = header.split(',').collect();
    let places = columns
        .iter()
        .map(|column| {
            let place = names.iter().position(|name| name == column);
            place.with_context(|| format!("{path}: no column `{column}` among {header}"))
        })
        .collect::<Result<Vec<usize>>>()?;
    let row = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        let numbers = places.iter().zip(columns).map(|(place, column)| {
            let field = fields.get(*place).copied().unwrap_or_default();
            field.parse::<i64>().with_context(|| format!("{column}: found `{field}`, expected a number"))
        });
        make(&numbers.collect::<Result<Vec<i64>>>()?)
    };
    lines.map(|(line, number)| row(line).with_context(|| format!("{path}, line {number}"))).collect()
}
