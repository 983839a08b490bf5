//! Makes room in generated locations where at most three moves are enough; `cargo xtask bench packing` runs it.
//!
//! ```text
//! {"figure":"solved","value":99.1}       of all cases, in percent: within 50 ms, with a plan that can be carried out
//! {"figure":"p99_ms","value":12.3}
//! {"figure":"worst_ms","value":23.4}
//! ```
//!
//! A case is made backwards: machines are filled by lot until nothing like the newcomer fits anywhere, room for it is
//! cleared on one of them, and then one to three tenants from elsewhere are moved in, or one into the room that another
//! left; so moving them back is a solution. An eighth of all tenants can't be moved.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use anyplace_location_core::{Ask, Free, Gpu, GpuSet, Limits, Mix, Models, Packer, Tenant, make_room};
use anyplace_seed::Seed;

const GIB: i64 = 1 << 30;
/// Machines of a case.
const SIZES: [usize; 4] = [4, 32, 250, 1_000];
const CASES_OF_EACH_SIZE: usize = 250;
const LIMIT: Duration = Duration::from_millis(50);

fn main() -> Result<()> {
    let mut seed = Seed::new(42);
    let (mut solved, mut times): (usize, Vec<Duration>) = (0, Vec::new());
    for size in SIZES {
        let before = (solved, times.len());
        while times.len() - before.1 < CASES_OF_EACH_SIZE {
            let Some(case) = Case::generate(size, &mut seed) else { continue };
            let (is_solved, took) = case.solve()?;
            solved += usize::from(is_solved && took <= LIMIT);
            times.push(took);
        }
        eprintln!("{size} machines: {} of {CASES_OF_EACH_SIZE} solved", solved - before.0);
    }
    times.sort_unstable();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let print = |name: &str, value: f64| println!("{{\"figure\":\"{name}\",\"value\":{value}}}");
    print("solved", 100.0 * solved as f64 / times.len() as f64);
    print("p99_ms", milliseconds(times[times.len() * 99 / 100]));
    print("worst_ms", milliseconds(times[times.len() - 1]));
    Ok(())
}

/// A location, and what fits nowhere in it.
struct Case {
    packer: Packer,
    tenants: Vec<Tenant>,
    newcomer: Ask,
}

impl Case {
    /// A case; none where what was drawn makes none.
    fn generate(size: usize, seed: &mut Seed) -> Option<Self> {
        let kinds: Vec<Ask> = (0..24).map(|_| kind(seed)).collect();
        let newcomer = seed.pick(&kinds);
        let mut location = Location { machines: Vec::new(), tenants: Vec::new() };
        for machine in 0..size {
            location.machines.push(empty(seed));
            let mut misfits = 0;
            while misfits < 12 {
                let ask = seed.pick(&kinds);
                misfits += usize::from(!location.place(machine, ask, seed));
            }
            while location.place(machine, newcomer, seed) {}
        }
        let target = seed.index(size);
        while location.machines[target].fits(&newcomer).is_none() {
            let here = location.on(target);
            location.end(*here.get(seed.index(here.len().max(1)))?);
        }
        location.fill_backwards(target, &newcomer, seed)?;
        if location.machines.iter().any(|machine| machine.fits(&newcomer).is_some()) {
            return None;
        }
        let mut packer = Packer::new(Mix::of(kinds.iter().map(|kind| (*kind, 1))));
        location.machines.into_iter().for_each(|machine| {
            packer.add(machine);
        });
        Some(Self { packer, tenants: location.tenants, newcomer })
    }

    /// Whether it is solved, and how long that takes.
    fn solve(mut self) -> Result<(bool, Duration)> {
        let begun = Instant::now();
        let made = make_room(&self.packer, &self.tenants, &self.newcomer, Limits::default(), &|_, _| Some(0));
        let took = begun.elapsed();
        let Some(made) = made else { return Ok((false, took)) };
        ensure!(made.moves.len() <= 3, "{} moves", made.moves.len());
        for step in &made.moves {
            let tenant = &self.tenants[step.tenant];
            ensure!(tenant.price.is_some(), "{tenant:?} can't be moved");
            ensure!(self.packer.free(step.machine).has(&tenant.ask, step.gpus), "no room for {step:?}");
            self.packer.take(step.machine, &tenant.ask, step.gpus);
            self.packer.give_back(tenant.machine, &tenant.ask, tenant.gpus);
        }
        ensure!(self.packer.free(made.machine).has(&self.newcomer, made.gpus), "no room in the end");
        Ok((true, took))
    }
}

struct Location {
    machines: Vec<Free>,
    tenants: Vec<Tenant>,
}

impl Location {
    fn place(&mut self, machine: usize, ask: Ask, seed: &mut Seed) -> bool {
        let Some(able) = self.machines[machine].fits(&ask) else { return false };
        let gpus = some_of(able, ask.gpus, seed);
        self.machines[machine].take(&ask, gpus);
        let price = (!seed.one_in(8)).then(|| 1 + seed.below(1_000));
        self.tenants.push(Tenant { ask, machine, gpus, price });
        true
    }

    fn on(&self, machine: usize) -> Vec<usize> {
        (0..self.tenants.len()).filter(|tenant| self.tenants[*tenant].machine == machine).collect()
    }

    fn end(&mut self, tenant: usize) {
        let gone = self.tenants.swap_remove(tenant);
        self.machines[gone.machine].give_back(&gone.ask, gone.gpus);
    }

    /// Moves one to three tenants so that `ask` doesn't fit on a machine any more; none where there are no such.
    fn fill_backwards(&mut self, machine: usize, ask: &Ask, seed: &mut Seed) -> Option<()> {
        let (mut hole, mut moved) = ((machine, *ask), Vec::new());
        for _ in 0..1 + seed.index(3) {
            let Some(tenant) = self.mover(hole.0, &moved, seed) else { break };
            let Tenant { ask, machine, gpus, .. } = self.tenants[tenant].clone();
            let to = some_of(self.machines[hole.0].fits(&ask)?, ask.gpus, seed);
            self.machines[hole.0].take(&ask, to);
            self.machines[machine].give_back(&ask, gpus);
            (self.tenants[tenant].machine, self.tenants[tenant].gpus) = (hole.0, to);
            moved.push(tenant);
            if self.machines[hole.0].fits(&hole.1).is_none() && seed.one_in(2) {
                hole = (machine, ask);
            }
        }
        (!moved.is_empty()).then_some(())
    }

    /// Somebody from elsewhere who fits on a machine.
    fn mover(&self, machine: usize, moved: &[usize], seed: &mut Seed) -> Option<usize> {
        (0..500).map(|_| seed.index(self.tenants.len())).find(|number| {
            let tenant = &self.tenants[*number];
            tenant.price.is_some()
                && tenant.machine != machine
                && !moved.contains(number)
                && self.machines[machine].fits(&tenant.ask).is_some()
        })
    }
}

/// What the planner isn't asked here: whether something fits, by adding up.
trait Room {
    /// The GPUs that could be used, if there are enough of them, and of all else.
    fn fits(&self, ask: &Ask) -> Option<Vec<u32>>;
    fn has(&self, ask: &Ask, gpus: GpuSet) -> bool;
}

impl Room for Free {
    fn fits(&self, ask: &Ask) -> Option<Vec<u32>> {
        let will_do = |gpu: &Gpu| {
            ask.models.allow(gpu.model) && ask.slice.map_or(gpu.is_whole(), |slice| gpu.free() >= slice)
        };
        let able: Vec<u32> =
            (0..).zip(&self.gpus).filter(|(_, gpu)| will_do(gpu)).map(|(index, _)| index).collect();
        let enough = self.cpu >= ask.cpu && self.memory >= ask.memory && self.disk >= ask.disk;
        (enough && able.len() >= ask.gpus as usize).then_some(able)
    }

    fn has(&self, ask: &Ask, gpus: GpuSet) -> bool {
        let able = self.fits(ask).unwrap_or_default();
        gpus.iter().count() == ask.gpus as usize && gpus.iter().all(|gpu| able.contains(&gpu))
    }
}

fn some_of(mut able: Vec<u32>, count: u32, seed: &mut Seed) -> GpuSet {
    GpuSet::of((0..count).map(|_| able.swap_remove(seed.index(able.len()))))
}

/// A machine of a location: most have eight GPUs.
fn empty(seed: &mut Seed) -> Free {
    let (gpus, cpu) = seed.pick(&[(8, 96_000), (8, 96_000), (8, 128_000), (4, 64_000), (0, 64_000)]);
    let gpus = vec![Gpu::new(seed.pick(&[0, 0, 1]), 80 * GIB); gpus];
    Free { cpu, memory: cpu / 1_000 * 8 * GIB, disk: 0, gpus, all_cpu: cpu }
}

fn kind(seed: &mut Seed) -> Ask {
    let slice = Some(GIB * seed.pick(&[8, 10, 16, 20, 24, 40, 48, 60]));
    let (gpus, slice) = seed.pick(&[
        (0, None),
        (1, slice),
        (1, slice),
        (1, slice),
        (1, slice),
        (1, None),
        (2, None),
        (2, slice),
        (4, None),
    ]);
    let models = if gpus > 0 && seed.one_in(5) { Models::these([seed.pick(&[0, 1])]) } else { Models::ANY };
    Ask {
        cpu: 1_000 * seed.pick(&[1, 2, 4, 8, 12]),
        memory: GIB * seed.pick(&[4, 8, 32]),
        disk: 0,
        gpus,
        slice,
        models,
    }
}
