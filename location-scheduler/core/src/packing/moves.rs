//! Making room: when something fits nowhere but in the sum of what is free, the fewest and cheapest moves after which
//! it does.
//!
//! A move starts a copy first and ends the old one when the copy serves, so a tenant needs room for both at once; moves
//! are in an order in which each finds its room once those before it are done. What is looked for, for one number of
//! moves after the other: sets of tenants of one machine without whom the newcomer fits there, the cheapest first; for
//! each of them another machine, which may have to be cleared by the moves that are left.
//!
//! Whatever at most three moves can do is found, for the least price, unless the steps run out; but for tenants on several
//! GPUs that would have to change only some of them.

use std::{collections::HashMap, rc::Rc};

use super::{Ask, Cost, Free, GpuSet, Packer, evictions::evictions};

/// Machines that are tried for one tenant: one more than others that can be in its way.
const LOOK: usize = 6;
/// Machines among which those are the best.
const LOOK_AMONG: usize = 32;
/// Sets of GPUs that are tried on one machine: all fours of eight.
const MAX_CHOICES: usize = 70;

/// Something that is placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// What it asked for.
    pub ask: Ask,
    /// Its machine.
    pub machine: usize,
    /// Its GPUs there.
    pub gpus: GpuSet,
    /// What moving it costs; none for what can't be moved.
    pub price: Option<u64>,
}

/// One move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Who: an index among the tenants.
    pub tenant: usize,
    /// To which machine.
    pub machine: usize,
    /// To which of its GPUs.
    pub gpus: GpuSet,
}

/// Room that can be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clearing {
    /// The moves, each of a different tenant, in order.
    pub moves: Vec<Move>,
    /// Where the newcomer fits then.
    pub machine: usize,
    /// On which GPUs.
    pub gpus: GpuSet,
    /// Price of all moves.
    pub price: u64,
}

/// How much is done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Moves.
    pub moves: usize,
    /// Steps of the search, each of a tenth to a fifth of a microsecond.
    pub steps: u32,
}

impl Default for Limits {
    /// Three moves, and 30 ms or so on a slow core: whoever waits for a plan waits for this.
    fn default() -> Self {
        Self { moves: 3, steps: 200_000 }
    }
}

/// Plans room for `ask`, which fits nowhere now. `rank` says whether a machine may take a tenant (or the newcomer:
/// none), and how gladly: less is better.
pub fn make_room(
    packer: &Packer,
    tenants: &[Tenant],
    ask: &Ask,
    limits: Limits,
    rank: &dyn Fn(Option<usize>, usize) -> Option<u32>,
) -> Option<Clearing> {
    let mut here = vec![Vec::new(); packer.len()];
    for (number, tenant) in (0..).zip(tenants) {
        if tenant.price.is_some() {
            here[tenant.machine].push(number);
        }
    }
    let mut search = Search {
        packer,
        tenants,
        newcomer: ask,
        rank,
        here,
        steps: limits.steps,
        changed: Vec::new(),
        moves: Vec::new(),
        fits: HashMap::new(),
        evictions: HashMap::new(),
        best: None,
    };
    (1..=limits.moves).find_map(|most| search.with_at_most(most))
}

/// Tenants of one machine without whom something fits there.
#[derive(Debug)]
struct Eviction {
    price: u64,
    machine: usize,
    tenants: Vec<u32>,
}

/// Something is to be placed on a machine once some have left it.
struct Goal<'g> {
    leaving: &'g [u32],
    /// The newcomer, or who moves.
    who: Option<u32>,
    machine: usize,
    next: Option<&'g Goal<'g>>,
}

impl Goal<'_> {
    /// Whether a machine is to be cleared.
    fn keeps(&self, machine: usize) -> bool {
        self.machine == machine || self.next.is_some_and(|next| next.keeps(machine))
    }

    /// Whether a tenant is going to move anyway.
    fn involves(&self, tenant: u32) -> bool {
        self.who == Some(tenant)
            || self.leaving.contains(&tenant)
            || self.next.is_some_and(|next| next.involves(tenant))
    }
}

struct Search<'a> {
    packer: &'a Packer,
    tenants: &'a [Tenant],
    newcomer: &'a Ask,
    rank: &'a dyn Fn(Option<usize>, usize) -> Option<u32>,
    /// By machine: tenants that can be moved.
    here: Vec<Vec<u32>>,
    steps: u32,
    /// Machines that the moves so far have changed, each once.
    changed: Vec<(usize, Free)>,
    moves: Vec<Move>,
    /// Before any move: machines where something fits, the fullest first.
    fits: HashMap<Ask, Rc<[usize]>>,
    /// Before any move: who would have to leave, by what is to fit and how many at most; the cheapest first.
    evictions: HashMap<(Ask, usize), Rc<[Eviction]>>,
    best: Option<Clearing>,
}

impl Search<'_> {
    fn with_at_most(&mut self, most: usize) -> Option<Clearing> {
        for eviction in self.evictions(self.newcomer, most).iter() {
            if !self.is_cheaper(eviction.price) {
                break;
            }
            if (self.rank)(None, eviction.machine).is_some() {
                let (leaving, machine) = (eviction.tenants.as_slice(), eviction.machine);
                let goal = Goal { leaving, who: None, machine, next: None };
                self.reach(&goal, most - leaving.len(), eviction.price);
            }
        }
        self.best.take()
    }

    fn is_cheaper(&self, price: u64) -> bool {
        self.steps > 0 && self.best.as_ref().is_none_or(|best| price < best.price)
    }

    fn free(&self, machine: usize) -> &Free {
        let changed = self.changed.iter().find(|(changed, _)| *changed == machine);
        changed.map_or_else(|| self.packer.free(machine), |(_, free)| free)
    }

    fn is_changed(&self, machine: usize) -> bool {
        self.changed.iter().any(|(changed, _)| *changed == machine)
    }

    /// Reaches a goal and those after it, if that can be done with `spare` moves besides those that they name, for
    /// less than what is the best so far. `price` is that of all that leave.
    fn reach(&mut self, goal: &Goal<'_>, spare: usize, price: u64) {
        if !self.is_cheaper(price) {
            return;
        }
        self.steps -= 1;
        if goal.leaving.is_empty() {
            return self.arrive(goal, spare, price);
        }
        for place in 0..goal.leaving.len() {
            let mut rest = goal.leaving.to_vec();
            let tenant = rest.swap_remove(place);
            let next = Goal { leaving: &rest, ..*goal };
            let best = self.destinations(tenant, goal);
            for (machine, gpus) in &best {
                self.with_move(tenant, *machine, *gpus, |search| search.reach(&next, spare, price));
            }
            // What comes next may need the very GPUs that are best for this one.
            for (machine, first) in &best {
                if !self.is_cheaper(price) {
                    return;
                }
                let others = choices(self.free(*machine), &self.tenants[tenant as usize].ask);
                for gpus in others.into_iter().filter(|gpus| gpus != first) {
                    self.with_move(tenant, *machine, gpus, |search| search.reach(&next, spare, price));
                }
            }
            if spare > 0 {
                self.clear_for(tenant, &next, spare, price);
            }
        }
    }

    /// All have left.
    fn arrive(&mut self, goal: &Goal<'_>, spare: usize, price: u64) {
        let machine = goal.machine;
        let ask = goal.who.map_or(*self.newcomer, |tenant| self.tenants[tenant as usize].ask);
        if self.free(machine).check(&ask).is_err() {
            return self.clear_again(goal, &ask, spare, price);
        }
        if let (Some(tenant), Some(next)) = (goal.who, goal.next) {
            for gpus in choices(self.free(machine), &ask) {
                self.with_move(tenant, machine, gpus, |search| search.reach(next, spare, price));
            }
        } else if let Ok(fit) = self.packer.fit_into(self.free(machine), &ask) {
            self.best = Some(Clearing { moves: self.moves.clone(), machine, gpus: fit.gpus, price });
        }
    }

    /// Somebody moved to where others had to leave: more have to.
    fn clear_again(&mut self, goal: &Goal<'_>, ask: &Ask, spare: usize, price: u64) {
        if spare == 0 {
            return;
        }
        for eviction in self.evictions_after_moves(goal.machine, ask, spare, |it| goal.involves(it)) {
            let goal = Goal { leaving: &eviction.tenants, ..*goal };
            self.reach(&goal, spare - eviction.tenants.len(), price + eviction.price);
        }
    }

    /// Who would have to leave a machine that moves have changed, the cheapest first; without those that move anyway.
    fn evictions_after_moves(
        &mut self,
        machine: usize,
        ask: &Ask,
        most: usize,
        is_busy: impl Fn(u32) -> bool,
    ) -> Vec<Eviction> {
        let has_moved = |it: u32| self.moves.iter().any(|done| done.tenant == it as usize);
        let here = self.here[machine].iter().copied().filter(|it| !is_busy(*it) && !has_moved(*it));
        let here: Vec<u32> = here.collect();
        let sets = evictions(self.free(machine), self.tenants, &here, ask, most).into_iter();
        let mut found: Vec<Eviction> =
            sets.filter(|set| !set.is_empty()).map(|set| self.eviction(machine, set)).collect();
        found.sort_by_key(|eviction| eviction.price);
        self.steps = self.steps.saturating_sub(1 + found.len() as u32);
        found
    }

    /// Clears a machine for a tenant that fits nowhere yet, or only where it is in the way.
    fn clear_for(&mut self, tenant: u32, next: &Goal<'_>, spare: usize, price: u64) {
        let ask = &self.tenants[tenant as usize].ask;
        // Moves may have made new room where they left.
        let changed: Vec<usize> = self.changed.iter().map(|(machine, _)| *machine).collect();
        for machine in changed {
            let is_busy = |it: u32| it == tenant || next.involves(it);
            for eviction in self.evictions_after_moves(machine, ask, spare, is_busy) {
                self.clear(&eviction, tenant, next, spare, price);
            }
        }
        for eviction in self.evictions(ask, spare).iter() {
            if !self.is_cheaper(price + eviction.price) {
                return;
            }
            if !self.is_changed(eviction.machine) {
                self.clear(eviction, tenant, next, spare, price);
            }
        }
    }

    fn clear(&mut self, eviction: &Eviction, tenant: u32, next: &Goal<'_>, spare: usize, price: u64) {
        self.steps = self.steps.saturating_sub(1);
        let (leaving, machine) = (eviction.tenants.as_slice(), eviction.machine);
        let price = price + eviction.price;
        if !self.is_cheaper(price)
            || leaving.iter().any(|it| *it == tenant || next.involves(*it))
            || self.moves.iter().any(|done| leaving.contains(&(done.tenant as u32)))
            || (self.rank)(Some(tenant as usize), machine).is_none()
        {
            return;
        }
        let goal = Goal { leaving, who: Some(tenant), machine, next: Some(next) };
        self.reach(&goal, spare - leaving.len(), price);
    }

    fn eviction(&self, machine: usize, tenants: Vec<u32>) -> Eviction {
        let price = tenants.iter().filter_map(|tenant| self.tenants[*tenant as usize].price).sum();
        Eviction { price, machine, tenants }
    }

    fn evictions(&mut self, ask: &Ask, most: usize) -> Rc<[Eviction]> {
        if let Some(known) = self.evictions.get(&(*ask, most)) {
            return known.clone();
        }
        let mut found = Vec::new();
        for machine in 0..self.here.len() {
            let here = &self.here[machine];
            let sets = evictions(self.packer.free(machine), self.tenants, here, ask, most);
            self.steps = self.steps.saturating_sub(1 + sets.len() as u32);
            for set in sets {
                // Somebody has to begin.
                let spare = most - set.len();
                let asks: Vec<Ask> = set.iter().map(|tenant| self.tenants[*tenant as usize].ask).collect();
                if asks.iter().any(|ask| self.is_hopeful(ask, spare)) {
                    found.push(self.eviction(machine, set));
                }
            }
        }
        found.sort_by_key(|eviction| eviction.price);
        let found: Rc<[Eviction]> = found.into();
        self.evictions.insert((*ask, most), found.clone());
        found
    }

    /// Whether something might be placed by `spare` moves.
    fn is_hopeful(&mut self, ask: &Ask, spare: usize) -> bool {
        !self.fits(ask).is_empty() || (spare > 0 && !self.evictions(ask, spare).is_empty())
    }

    fn fits(&mut self, ask: &Ask) -> Rc<[usize]> {
        if let Some(known) = self.fits.get(ask) {
            return known.clone();
        }
        let mut found: Vec<(i64, usize)> = (0..self.here.len())
            .map(|machine| (self.packer.free(machine), machine))
            .filter(|(free, _)| free.check(ask).is_ok())
            .map(|(free, machine)| (free.gpu_parts(), machine))
            .collect();
        self.steps = self.steps.saturating_sub(self.here.len() as u32 / 4);
        found.sort_unstable();
        let found: Rc<[usize]> = found.into_iter().map(|(_, machine)| machine).collect();
        self.fits.insert(*ask, found.clone());
        found
    }

    /// Where a tenant could go at once, the best first, with the best GPUs of each machine.
    fn destinations(&mut self, tenant: u32, goal: &Goal<'_>) -> Vec<(usize, GpuSet)> {
        let who = &self.tenants[tenant as usize];
        let fits = self.fits(&who.ask);
        let changed = self.changed.iter().filter(|(_, free)| free.check(&who.ask).is_ok());
        let machines = changed
            .map(|(machine, _)| *machine)
            .chain(fits.iter().copied().filter(|machine| !self.is_changed(*machine)));
        let mut found: Vec<(bool, u32, Cost, usize, GpuSet)> = machines
            .filter_map(|machine| Some((machine, (self.rank)(Some(tenant as usize), machine)?)))
            .take(LOOK_AMONG)
            .filter_map(|(machine, rank)| {
                let fit = self.packer.fit_into(self.free(machine), &who.ask).ok()?;
                Some((goal.keeps(machine), rank, fit.cost, machine, fit.gpus))
            })
            .collect();
        self.steps = self.steps.saturating_sub(20 * found.len() as u32);
        found.sort_unstable();
        found.truncate(LOOK);
        found.into_iter().map(|(.., machine, gpus)| (machine, gpus)).collect()
    }

    /// Goes on with a tenant moved.
    fn with_move(&mut self, tenant: u32, machine: usize, gpus: GpuSet, go_on: impl FnOnce(&mut Self)) {
        let who = &self.tenants[tenant as usize];
        if self.steps == 0 || (machine, gpus) == (who.machine, who.gpus) {
            return;
        }
        let before = self.changed.len();
        let old: Vec<(usize, Free)> = [who.machine, machine].map(|it| (it, self.free(it).clone())).into();
        for (changed, _) in &old {
            if !self.is_changed(*changed) {
                self.changed.push((*changed, self.packer.free(*changed).clone()));
            }
        }
        self.change(machine, |free| free.take(&who.ask, gpus));
        self.change(who.machine, |free| free.give_back(&who.ask, who.gpus));
        self.moves.push(Move { tenant: tenant as usize, machine, gpus });
        go_on(self);
        self.moves.pop();
        for (changed, free) in old {
            self.change(changed, |it| *it = free);
        }
        self.changed.truncate(before);
    }

    fn change(&mut self, machine: usize, change: impl FnOnce(&mut Free)) {
        if let Some((_, free)) = self.changed.iter_mut().find(|(changed, _)| *changed == machine) {
            change(free);
        }
    }
}

/// The sets of GPUs on which something fits.
fn choices(free: &Free, ask: &Ask) -> Vec<GpuSet> {
    if free.check(ask).is_err() {
        return Vec::new();
    }
    let able: Vec<u32> =
        (0..).zip(&free.gpus).filter(|(_, gpu)| gpu.can(ask)).map(|(index, _)| index).collect();
    let mut sets = Vec::new();
    choose(&able, ask.gpus as usize, GpuSet::default(), &mut sets);
    sets
}

fn choose(able: &[u32], count: usize, chosen: GpuSet, sets: &mut Vec<GpuSet>) {
    if sets.len() >= MAX_CHOICES {
        return;
    }
    if count == 0 {
        return sets.push(chosen);
    }
    for (place, gpu) in able.iter().enumerate() {
        choose(&able[place + 1..], count - 1, chosen.with(*gpu), sets);
    }
}

#[cfg(test)]
mod tests;
