//! Packs a trace of pods onto the machines of a trace, as the planner chooses; `cargo xtask bench packing` runs it.
//!
//! ```text
//! packing-bench NODES PODS     CSV: sn,cpu_milli,memory_mib,gpu,...   name,cpu_milli,memory_mib,num_gpu,gpu_milli,...
//! {"figure":"allocated_42","value":95.8}               in percent of the GPUs
//! {"figure":"allocated_with_moves_42","value":96.1}
//! {"figure":"moved_42","value":1.8}                    in percent of the pods that run in the end
//! ```
//!
//! The experiment of the trace's authors: all pods in shuffled order, none leaves; pods drawn from the trace follow until
//! the demand is 130 % of all GPUs; what fits nowhere is dropped. Machines that are equally good are drawn by lot.
//!
//! Then again with moves, at no time more of them than 2 % of the pods that run: one after each 20 pods that pays, once half
//! of the GPUs is allocated; and one for a pod that fits nowhere, where one makes room.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use anyplace_location_core::{
    Ask, Cost, Free, Gpu, GpuSet, Limits, Mix, Models, Move, Packer, Tenant, defragment, make_room,
};
use anyplace_seed::Seed;

const SEEDS: std::ops::Range<u64> = 42..52;
/// Demand in the end, in hundredths of all GPUs.
const DEMAND: i64 = 130;
/// Moves, in hundredths of the pods that run.
const MOST_MOVES: usize = 2;
/// What a move costs, in millionths of a GPU.
const PRICE: u64 = 40_000;
/// Pods after which it is looked for a move that pays.
const DEFRAGMENT_EVERY: usize = 20;
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
        pack(&machines, &pods, capacity, false, seed);
        pack(&machines, &pods, capacity, true, seed);
    }
    Ok(())
}

/// Packs; prints what is allocated in the end, and what was moved for it.
fn pack(machines: &[Free], pods: &[Ask], capacity: i64, moving: bool, seed: u64) {
    let (number, mut seed) = (seed, Seed::new(seed));
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
    machines.iter().for_each(|machine| {
        packer.add(machine.clone());
    });
    let mut location = Location { packer, seed, tenants: Vec::new(), moves: 0 };
    let mut allocated = 0;
    for (place, pod) in order.iter().enumerate() {
        if moving && place % DEFRAGMENT_EVERY == 0 && 2 * allocated > capacity {
            location.defragment();
        }
        let found = location.best(pod).or_else(|| if moving { location.make_room(pod) } else { None });
        if let Some((machine, gpus)) = found {
            location.packer.take(machine, pod, gpus);
            location.tenants.push(Tenant { ask: *pod, machine, gpus, price: Some(PRICE) });
            allocated += milli(pod);
        }
    }
    let percent = |part: f64, whole: f64| 100.0 * part / whole;
    let print = |name: &str, value: f64| println!("{{\"figure\":\"{name}_{number}\",\"value\":{value}}}");
    let allocated = percent(allocated as f64, capacity as f64);
    if moving {
        print("allocated_with_moves", allocated);
        print("moved", percent(location.moves as f64, location.tenants.len() as f64));
    } else {
        print("allocated", allocated);
    }
}

struct Location {
    packer: Packer,
    seed: Seed,
    tenants: Vec<Tenant>,
    /// How often something was moved.
    moves: usize,
}

impl Location {
    /// The best machine, by lot among equals.
    fn best(&mut self, pod: &Ask) -> Option<(usize, GpuSet)> {
        let mut best: Option<(Cost, usize, GpuSet)> = None;
        let mut equal = 0;
        for machine in 0..self.packer.len() {
            let Ok(fit) = self.packer.fit(machine, pod) else { continue };
            equal = match best {
                Some((cost, ..)) if fit.cost > cost => continue,
                Some((cost, ..)) if fit.cost == cost => equal + 1,
                _ => 1,
            };
            if self.seed.one_in(equal) {
                best = Some((fit.cost, machine, fit.gpus));
            }
        }
        best.map(|(_, machine, gpus)| (machine, gpus))
    }

    /// How many moves may follow at once.
    fn left(&self) -> usize {
        (self.tenants.len() * MOST_MOVES / 100).saturating_sub(self.moves).min(1)
    }

    fn defragment(&mut self) {
        let left = self.left();
        let moves = defragment(&mut self.packer, &self.tenants, left, &|_, _| true);
        self.moved(&moves);
    }

    /// Room by one move for a pod that fits nowhere.
    fn make_room(&mut self, pod: &Ask) -> Option<(usize, GpuSet)> {
        if pod.gpus == 0 {
            return None;
        }
        let limits = Limits { moves: self.left(), ..Limits::default() };
        let made = make_room(&self.packer, &self.tenants, pod, limits, &|_, _| Some(0))?;
        for step in &made.moves {
            let tenant = &self.tenants[step.tenant];
            self.packer.take(step.machine, &tenant.ask, step.gpus);
            self.packer.give_back(tenant.machine, &tenant.ask, tenant.gpus);
        }
        self.moved(&made.moves);
        Some((made.machine, made.gpus))
    }

    fn moved(&mut self, moves: &[Move]) {
        self.moves += moves.len();
        for step in moves {
            let tenant = &mut self.tenants[step.tenant];
            (tenant.machine, tenant.gpus) = (step.machine, step.gpus);
        }
    }
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
