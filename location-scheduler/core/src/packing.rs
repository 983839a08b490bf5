//! Which machine and which GPUs: by the least growth of fragmentation.
//!
//! GPU memory that is free but that nothing which people ask for can use is a *fragment*: on a machine without the CPU
//! for it, or in pieces that are too small. For a machine, that is averaged over the [`Mix`] of what is asked for, and
//! what is placed goes where the average grows least (Fragmentation Gradient Descent, Weng and others, USENIX ATC '23).
//!
//! Added to it is a price for machines whose CPU and GPUs are used unevenly: growth looks one placement ahead, while a
//! machine that runs out of CPU strands its GPUs for good. On the trace of that paper this is worth half a percent of
//! all GPUs (`cargo xtask bench packing`); any price between 7 and 20 hundredths of a GPU is about as good.
//!
//! GPUs are compared in parts of one GPU, whatever memory they have: [`PARTS`].

mod defragment;
mod evictions;
mod free;
mod mix;
mod moves;

use std::collections::HashMap;

pub use defragment::defragment;
pub use free::{Ask, Free, Gpu, GpuSet, Lack, Models};
pub use mix::Mix;
pub use moves::{Clearing, Limits, Move, Tenant, make_room};

/// Parts of one GPU.
pub(crate) const PARTS: i64 = 1_000_000;
/// What a machine costs whose CPU is entirely used and whose GPUs are entirely free, or the other way round, in parts.
const UNEVEN: i64 = 140_000;
/// Costs that are closer than this, in parts, count as equal: the fuller machine is better then.
const GRAIN: i64 = 4_000;

/// What it costs to place something on a machine; the order of the fields is the policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost {
    /// Growth of fragmentation and unevenness, in grains.
    growth: i64,
    /// Parts of GPUs that were free before.
    free: i64,
}

/// Where on a machine something fits best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// The GPUs.
    pub gpus: GpuSet,
    /// What it costs.
    pub cost: Cost,
    /// Growth of fragments alone, in parts of a GPU.
    fragments: i64,
}

/// Machines, and what it costs to place something on them; equal questions about equal machines are answered once.
#[derive(Debug, Clone, Default)]
pub struct Packer {
    mix: Mix,
    /// What is free on each machine, and the number of that state.
    machines: Vec<(Free, u32)>,
    states: HashMap<Free, u32>,
    /// Fragments by state.
    fragments: Vec<i64>,
    asks: HashMap<Ask, usize>,
    /// Answers by ask and state.
    fits: Vec<Vec<Option<Result<Fit, Lack>>>>,
}

impl Packer {
    /// No machines yet; `mix` is what will be asked for.
    pub fn new(mix: Mix) -> Self {
        Self { mix, ..Self::default() }
    }

    /// Adds a machine; its index.
    pub fn add(&mut self, free: Free) -> usize {
        let state = self.state(&free);
        self.machines.push((free, state));
        self.machines.len() - 1
    }

    /// What is free on a machine.
    pub fn free(&self, machine: usize) -> &Free {
        &self.machines[machine].0
    }

    /// How many machines there are.
    pub fn len(&self) -> usize {
        self.machines.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.machines.is_empty()
    }

    /// Takes what was asked for.
    pub fn take(&mut self, machine: usize, ask: &Ask, gpus: GpuSet) {
        self.change(machine, |free| free.take(ask, gpus));
    }

    /// Gives it back.
    pub fn give_back(&mut self, machine: usize, ask: &Ask, gpus: GpuSet) {
        self.change(machine, |free| free.give_back(ask, gpus));
    }

    fn change(&mut self, machine: usize, change: impl FnOnce(&mut Free)) {
        let mut free = self.machines[machine].0.clone();
        change(&mut free);
        let state = self.state(&free);
        self.machines[machine] = (free, state);
    }

    /// Where `ask` fits best on a machine.
    ///
    /// # Errors
    /// What the machine lacks.
    pub fn fit(&mut self, machine: usize, ask: &Ask) -> Result<Fit, Lack> {
        let asked = self.asked(ask);
        let (free, state) = &self.machines[machine];
        let place = *state as usize;
        if let Some(Some(fit)) = self.fits[asked].get(place) {
            return *fit;
        }
        let fit = self.work_out(free, self.fragments[place], ask);
        let fits = &mut self.fits[asked];
        if fits.len() <= place {
            fits.resize(self.fragments.len(), None);
        }
        fits[place] = Some(fit);
        fit
    }

    /// Where `ask` fits best in room that may be no machine's.
    pub(crate) fn fit_into(&self, free: &Free, ask: &Ask) -> Result<Fit, Lack> {
        self.work_out(free, self.mix.fragments(free), ask)
    }

    /// By how much a change lessens a machine's fragments, in parts of a GPU.
    fn gain(&self, machine: usize, change: impl FnOnce(&mut Free)) -> i64 {
        let (free, state) = &self.machines[machine];
        let mut after = free.clone();
        change(&mut after);
        self.fragments[*state as usize] - self.mix.fragments(&after)
    }

    /// The number of a state.
    fn state(&mut self, free: &Free) -> u32 {
        if let Some(state) = self.states.get(free) {
            return *state;
        }
        let state = self.fragments.len() as u32;
        self.fragments.push(self.mix.fragments(free));
        self.states.insert(free.clone(), state);
        state
    }

    /// The number of an ask.
    fn asked(&mut self, ask: &Ask) -> usize {
        if let Some(asked) = self.asks.get(ask) {
            return *asked;
        }
        self.asks.insert(*ask, self.fits.len());
        self.fits.push(Vec::new());
        self.fits.len() - 1
    }

    fn work_out(&self, free: &Free, before: i64, ask: &Ask) -> Result<Fit, Lack> {
        free.check(ask)?;
        let full = free.gpu_parts();
        let mut best: Option<(Cost, GpuSet, i64)> = None;
        let mut after = free.clone();
        free.for_each_choice(ask, |gpus| {
            after.take(ask, gpus);
            let fragments = self.mix.fragments(&after) - before;
            let growth = fragments + UNEVEN * after.unevenness() / PARTS;
            after.give_back(ask, gpus);
            let cost = Cost { growth: growth.div_euclid(GRAIN), free: full };
            if best.is_none_or(|least| (cost, gpus, fragments) < least) {
                best = Some((cost, gpus, fragments));
            }
        });
        best.map(|(cost, gpus, fragments)| Fit { gpus, cost, fragments }).ok_or(Lack::Gpus(0))
    }
}

#[cfg(test)]
mod tests;
