//! The state in memory: what machines said last and when, and what is wanted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_location_core::{
    Change, Life, Machine, Plan, State, carry_out, fall_silent, is_stale, life_after, wait_anew,
};
use anyplace_model::{LocationDesired, MachineId, MachineReport};
use anyplace_store::Revision;

use crate::{choice::Choice, latency::Latency};

/// After a start, machines get so long to find the scheduler again: until then nothing is concluded from their
/// silence, routes and reports are withheld (those of before stay in force), and nothing is planned. Watches and
/// reports retry within 2 s at the latest; the global scheduler's lease is 3 s.
const WARM_UP: Duration = Duration::from_millis(1_500);
/// A machine that hasn't reported so long after a start is lost.
const RETURN: Duration = Duration::from_secs(3);
/// A machine that has been lost for so long, with nothing reserved on it, is forgotten.
const FORGET: Duration = Duration::from_secs(3_600);

/// The state of the location, and what the core needs no knowledge of.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) state: State,
    /// New connections, and where they may go.
    pub(crate) choice: Choice,
    /// How far other locations are.
    pub(crate) latency: Latency,
    /// The last plan that was carried out.
    pub(crate) plan: Plan,
    /// What the global scheduler wants, as it said it.
    pub(crate) wanted: Arc<BTreeMap<String, LocationDesired>>,
    planned: bool,
    lease: Duration,
    seen: BTreeMap<MachineId, Instant>,
    /// Machines of before the start that haven't reported since.
    unheard: BTreeSet<MachineId>,
    started: Instant,
    warm: bool,
    /// Machines whose record on disk is out of date.
    unsaved: BTreeSet<MachineId>,
}

/// What a report changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Nothing: it is older than one that came before.
    Stale,
    /// Only that the machine is alive.
    Same,
    /// Something else.
    Changed,
}

impl Live {
    /// The state as it was stored; the machines in it haven't reported yet.
    pub(crate) fn new(state: State, lease: Duration, now: Instant) -> Self {
        let unheard: BTreeSet<MachineId> = state.machines.keys().cloned().collect();
        // As if last heard just so that the grace ends at `RETURN`.
        let heard = now + RETURN.saturating_sub(lease * 2);
        let seen = unheard.iter().map(|machine| (machine.clone(), heard)).collect();
        let warm = unheard.is_empty();
        let (plan, unsaved) = (Plan::default(), BTreeSet::new());
        let wanted = Arc::default();
        let choice = Choice::default();
        let latency = Latency::remembered(&state.latency_ms, now);
        Self {
            state,
            choice,
            latency,
            plan,
            wanted,
            planned: false,
            lease,
            seen,
            unheard,
            started: now,
            warm,
            unsaved,
        }
    }

    /// Whether the silence of machines means anything yet.
    pub(crate) const fn is_warm(&self) -> bool {
        self.warm
    }

    /// Whether anything has been planned since the start.
    pub(crate) const fn is_planned(&self) -> bool {
        self.planned
    }

    /// Takes a report in.
    pub(crate) fn hear(&mut self, report: MachineReport, now: Instant) -> Heard {
        let name = report.machine.clone();
        let was_warm = self.warm;
        // Until a machine has been told by this process, it takes nothing new.
        if report.mark.is_some_and(|mark| mark.process == self.state.process) {
            self.unheard.remove(&name);
            self.warm |= self.unheard.is_empty();
        }
        let changed = match self.state.machines.get_mut(&name) {
            Some(machine) => {
                let numbers = (report.epoch, report.sequence);
                if is_stale(self.state.process, machine, numbers, report.mark) {
                    return Heard::Stale;
                }
                if record(&machine.report) != record(&report) {
                    self.unsaved.insert(name.clone());
                }
                // The numbers differ in every report and mean nothing by themselves.
                (machine.report.epoch, machine.report.sequence) = (report.epoch, report.sequence);
                let changed = machine.life != Life::Alive || machine.report != report;
                (machine.life, machine.report) = (Life::Alive, report);
                changed
            }
            None => {
                self.unsaved.insert(name.clone());
                self.state.machines.insert(name.clone(), Machine::new(Life::Alive, report));
                true
            }
        };
        self.seen.insert(name, now);
        if changed || was_warm != self.warm { Heard::Changed } else { Heard::Same }
    }

    /// Lets leases expire. Returns whether anything changed, and when to look again.
    pub(crate) fn expire(&mut self, now: Instant) -> (bool, Instant) {
        let (mut changed, mut next) = (false, now + self.lease);
        if !self.warm {
            let warm_at = self.started + WARM_UP.max(self.lease);
            self.warm = now >= warm_at;
            changed = self.warm;
            next = next.min(warm_at);
        }
        for (name, machine) in &mut self.state.machines {
            let seen = self.seen.get(name).copied().unwrap_or(now);
            let (suspect, lost) = (seen + self.lease, seen + self.lease * 2);
            // Alive only by a report.
            let life = life_after(now.saturating_duration_since(seen), self.lease);
            if fall_silent(machine, life) {
                tracing::warn!(machine = %name, ?life, "a machine has stopped reporting");
                changed = true;
            }
            match machine.life {
                Life::Alive => next = next.min(suspect),
                Life::Suspect => next = next.min(lost),
                Life::Lost => {}
            }
        }
        (changed, next.max(now))
    }

    /// This process didn't run for so long, so it couldn't hear: leases get that time back, and so do machines that have
    /// just begun to look for it.
    pub(crate) fn forgive(&mut self, late: Duration) {
        self.started += late;
        self.seen.values_mut().for_each(|seen| *seen += late);
    }

    /// Machines that were lost long ago and hold nothing.
    pub(crate) fn forgotten(&self, now: Instant) -> Vec<MachineId> {
        let holds = |name: &MachineId| self.state.reservations.values().any(|held| held.machine == *name);
        self.seen
            .iter()
            .filter(|(_, seen)| now.saturating_duration_since(**seen) > FORGET)
            .map(|(name, _)| name)
            .filter(|name| !holds(name))
            .cloned()
            .collect()
    }

    /// Forgets a machine.
    pub(crate) fn forget(&mut self, machine: &MachineId) {
        self.state.machines.remove(machine);
        self.seen.remove(machine);
        self.unheard.remove(machine);
        self.unsaved.remove(machine);
        self.choice.forget(machine);
        self.latency.forget(machine);
    }

    /// Records of machines to write, each once.
    pub(crate) fn take_unsaved(&mut self) -> Vec<MachineReport> {
        let unsaved = std::mem::take(&mut self.unsaved);
        unsaved.iter().filter_map(|name| self.state.machines.get(name)).map(|m| record(&m.report)).collect()
    }

    /// Takes over what the global scheduler wants.
    pub(crate) fn want(&mut self, desired: Arc<BTreeMap<String, LocationDesired>>) {
        let state = &mut self.state;
        state.placements.clear();
        state.attempts.clear();
        state.wishes.clear();
        state.remote.clear();
        let mut grants = BTreeMap::new();
        for item in desired.values().cloned() {
            match item {
                LocationDesired::Placement(placement) => {
                    state.placements.insert(placement.spec.name.clone(), *placement);
                }
                LocationDesired::Attempt { attempt, spec } => {
                    state.attempts.insert(attempt, *spec);
                }
                LocationDesired::Prewarm(wish) => {
                    state.wishes.insert(wish.image.clone(), wish);
                }
                LocationDesired::Route(route) => {
                    state.remote.insert(route.deployment.clone(), route);
                }
                LocationDesired::Grant { deployment, grant } => {
                    grants.insert(deployment, grant);
                }
                // Compared before anything of it gets here.
                LocationDesired::Term(_) => {}
                LocationDesired::Settings { settings, vip_prefixes } => {
                    state.settings = settings;
                    state.vip_prefixes = Some(vip_prefixes);
                }
            }
        }
        self.choice.granted(grants);
        self.latency.aim(&state.site.location, state.remote.values());
        self.wanted = desired;
    }

    /// The state to plan on, at this time.
    pub(crate) fn at(&mut self, now_ms: u64) -> State {
        self.state.now_ms = now_ms;
        if !self.planned {
            wait_anew(&mut self.state);
        }
        self.state.clone()
    }

    /// A plan is written: makes it the state.
    pub(crate) fn carried_out(&mut self, plan: Plan, changes: Vec<Change>, revision: Revision, now_ms: u64) {
        carry_out(&mut self.state, changes, revision, now_ms);
        self.state.prewarms = plan.prewarms.clone();
        self.state.warm = plan.warm.clone();
        self.state.moves.waiting.clone_from(&plan.waiting);
        self.state.moves.tidied_ms = plan.tidied_ms;
        self.plan = plan;
        self.planned = true;
    }
}

/// The part of a report that is kept on disk: what the machine is, not what it does.
fn record(report: &MachineReport) -> MachineReport {
    MachineReport {
        epoch: 0,
        sequence: 0,
        images: BTreeMap::new(),
        instances: Vec::new(),
        conditions: Vec::new(),
        mark: None,
        ..report.clone()
    }
}

#[cfg(test)]
mod tests;
