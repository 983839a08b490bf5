//! Who would have to leave a machine, so that something fits there.

use super::{Ask, Free, Lack, Tenant};

/// Sets of one machine that are looked at: enough for every way to free one GPU of 64 tenants with three of them going.
const MAX_SETS: usize = 4_096;

/// The sets of at most `most` of the tenants `here` (each of the machine with this room) without whom `ask` fits.
/// Few of them have a member that isn't needed; none is there twice.
pub(super) fn evictions(
    free: &Free,
    tenants: &[Tenant],
    here: &[u32],
    ask: &Ask,
    most: usize,
) -> Vec<Vec<u32>> {
    let mut all_gone = free.clone();
    for tenant in here.iter().map(|tenant| &tenants[*tenant as usize]) {
        all_gone.give_back(&tenant.ask, tenant.gpus);
    }
    if all_gone.check(ask).is_err() {
        return Vec::new();
    }
    let mut search =
        Evictions { free: free.clone(), tenants, here, ask, most, chosen: Vec::new(), found: Vec::new() };
    search.gpus(0);
    let mut found = search.found;
    found.sort_unstable();
    found.dedup();
    found
}

struct Evictions<'a> {
    /// What is free without the chosen.
    free: Free,
    tenants: &'a [Tenant],
    here: &'a [u32],
    ask: &'a Ask,
    most: usize,
    chosen: Vec<u32>,
    found: Vec<Vec<u32>>,
}

impl Evictions<'_> {
    /// Empties one more GPU, from this one on, until there are enough.
    fn gpus(&mut self, from: u32) {
        let able = self.free.gpus.iter().filter(|gpu| gpu.can(self.ask)).count();
        if able >= self.ask.gpus as usize {
            return self.rest(None, 0);
        }
        for index in from..self.free.gpus.len() as u32 {
            let gpu = &self.free.gpus[index as usize];
            if !gpu.can(self.ask) && self.ask.models.allow(gpu.model) {
                self.gpu(index, 0);
            }
        }
    }

    /// Empties a GPU as far as needed, by tenants from this one on.
    fn gpu(&mut self, index: u32, from: usize) {
        let gpu = &self.free.gpus[index as usize];
        if gpu.can(self.ask) {
            return self.gpus(index + 1);
        }
        let left = self.most - self.chosen.len();
        if left == 0 || (self.ask.slice.is_none() && gpu.holders() as usize > left) {
            return;
        }
        for place in from..self.here.len() {
            if self.tenants[self.here[place] as usize].gpus.contains(index) {
                self.without(place, |search| search.gpu(index, place + 1));
            }
        }
    }

    /// The GPUs will do: CPU, memory and disk. `lacked` and `from` go on where the last one of the same was found.
    fn rest(&mut self, lacked: Option<std::mem::Discriminant<Lack>>, from: usize) {
        let Err(lack) = self.free.check(self.ask) else {
            if self.found.len() < MAX_SETS {
                let mut set = self.chosen.clone();
                set.sort_unstable();
                self.found.push(set);
            }
            return;
        };
        if self.chosen.len() == self.most {
            return;
        }
        let kind = std::mem::discriminant(&lack);
        let from = if lacked == Some(kind) { from } else { 0 };
        let missing = match lack {
            Lack::Gpus(_) => return,
            Lack::Cpu(have) => self.ask.cpu.saturating_sub(have),
            Lack::Memory(have) => self.ask.memory.saturating_sub(have),
            Lack::Disk(have) => self.ask.disk.saturating_sub(have),
        };
        let gives = |tenant: u32| {
            let ask = &self.tenants[tenant as usize].ask;
            match lack {
                Lack::Gpus(_) => 0,
                Lack::Cpu(_) => ask.cpu,
                Lack::Memory(_) => ask.memory,
                Lack::Disk(_) => ask.disk,
            }
        };
        // Even if all that may still leave were as large as the largest.
        let largest = self.here.iter().map(|tenant| gives(*tenant)).max().unwrap_or(0);
        let left = (self.most - self.chosen.len()) as i64;
        if largest.saturating_mul(left) < missing {
            return;
        }
        // The last to leave has to be enough by itself.
        let least = if left == 1 { missing } else { 1 };
        let able: Vec<usize> =
            (from..self.here.len()).filter(|place| gives(self.here[*place]) >= least).collect();
        for place in able {
            self.without(place, |search| search.rest(Some(kind), place + 1));
        }
    }

    fn without(&mut self, place: usize, go_on: impl FnOnce(&mut Self)) {
        let number = self.here[place];
        if self.chosen.contains(&number) || self.chosen.len() == self.most || self.found.len() >= MAX_SETS {
            return;
        }
        let tenant = &self.tenants[number as usize];
        self.free.give_back(&tenant.ask, tenant.gpus);
        self.chosen.push(number);
        go_on(self);
        self.chosen.pop();
        self.free.take(&tenant.ask, tenant.gpus);
    }
}
