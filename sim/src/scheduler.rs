//! A location scheduler's process, and the store that survives it.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    time::Duration,
};

use anyplace_location_core::{
    Change, Life, Machine, Moves, Moving, Plan, Reservation, State, Timing, fall_silent, is_stale, life_after,
};
use anyplace_model::{
    AttemptId, DeploymentName, InstanceId, JobSpec, LocationSettings, MachineId, MachineReport, Mark,
    MoveCause, Placement,
};

use crate::{Fence, agent::Desired, clock::Clock, things};

/// As the location scheduler's: a machine's lease, the time after a start until silence means anything and until a silent
/// machine is lost, and how often everything is looked at.
pub(crate) const LEASE_MS: u64 = 600;
const WARM_UP_MS: u64 = 1_500;
const RETURN_MS: u64 = 3_000;
pub(crate) const TICK_MS: u64 = 1_000;
/// A configured one.
pub(crate) const DRAIN_MS: u64 = 1_000;

/// What survives a kill.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) revision: u64,
    pub(crate) reservations: BTreeMap<InstanceId, Reservation>,
    pub(crate) machines: BTreeMap<MachineId, MachineReport>,
    pub(crate) moves: BTreeMap<MoveCause, Moving>,
    pub(crate) wanted: Wanted,
}

/// What the global scheduler wants.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) placements: BTreeMap<DeploymentName, Placement>,
    pub(crate) attempts: BTreeMap<AttemptId, JobSpec>,
}

impl Store {
    /// A transaction: all of the changes or none.
    pub(crate) fn write(&mut self, changes: &[Change]) {
        self.revision += 1;
        for change in changes {
            match change {
                Change::Put(held) => {
                    let name = held.assignment.instance.clone();
                    self.reservations.insert(name, held.as_ref().clone());
                }
                Change::Delete(name) => drop(self.reservations.remove(name)),
                Change::Moves(cause, Some(moving)) => {
                    self.moves.insert(cause.clone(), moving.as_ref().clone());
                }
                Change::Moves(cause, None) => drop(self.moves.remove(cause)),
            }
        }
    }
}

/// What doesn't survive.
pub(crate) struct Process {
    pub(crate) number: u64,
    /// When it began, by the clock.
    pub(crate) began_clock_ms: u64,
    pub(crate) state: State,
    pub(crate) plan: Plan,
    /// What its machines' watches show.
    pub(crate) published: BTreeMap<MachineId, Rc<Desired>>,
    pub(crate) started_ms: u64,
    /// From when on silence means something.
    warms_ms: u64,
    seen_ms: BTreeMap<MachineId, u64>,
    unheard: BTreeSet<MachineId>,
    /// Reports as they came last.
    heard: BTreeMap<MachineId, Rc<MachineReport>>,
    /// The number of each machine's mark, and since when it has that.
    marked: BTreeMap<MachineId, (u64, u64)>,
    pub(crate) warm: bool,
    pub(crate) planned: bool,
    /// A plan is on its way to the store; something has changed since.
    pub(crate) committing: bool,
    pub(crate) again: bool,
    /// A look is on its way.
    pub(crate) woken: bool,
    /// When one comes because time alone changes the plan.
    pub(crate) wakes_ms: u64,
    pub(crate) frozen_until_ms: u64,
}

impl Process {
    /// Begins with what is stored.
    pub(crate) fn start(clock: &Clock, number: u64, location: usize, store: &Store, clock_ms: u64) -> Self {
        let suspect = |report: &MachineReport| Machine::new(Life::Suspect, report.clone());
        let machines: BTreeMap<_, _> =
            store.machines.iter().map(|(name, report)| (name.clone(), suspect(report))).collect();
        let heard_ms = clock.now_ms + RETURN_MS - LEASE_MS * 2;
        let unheard: BTreeSet<MachineId> = machines.keys().cloned().collect();
        let state = State {
            revision: store.revision,
            process: number,
            now_ms: clock_ms,
            timing: Timing { drain_ms: DRAIN_MS },
            site: things::site(location),
            settings: LocationSettings::default(),
            vip_prefixes: None,
            machines,
            reservations: store.reservations.clone(),
            withdrawn: BTreeMap::new(),
            moves: Moves { under_way: store.moves.clone(), ..Moves::default() },
            placements: store.wanted.placements.clone(),
            attempts: store.wanted.attempts.clone(),
            wishes: BTreeMap::new(),
            remote: BTreeMap::new(),
            away: BTreeMap::new(),
            latency_ms: BTreeMap::new(),
            prewarms: BTreeMap::new(),
            warm: BTreeMap::new(),
        };
        Self {
            number,
            began_clock_ms: clock_ms,
            state,
            plan: Plan::default(),
            published: BTreeMap::new(),
            started_ms: clock.now_ms,
            warms_ms: clock.now_ms + WARM_UP_MS,
            seen_ms: unheard.iter().map(|name| (name.clone(), heard_ms)).collect(),
            warm: unheard.is_empty(),
            unheard,
            heard: BTreeMap::new(),
            marked: BTreeMap::new(),
            planned: false,
            committing: false,
            again: false,
            woken: false,
            wakes_ms: 0,
            frozen_until_ms: 0,
        }
    }

    /// Takes over what is wanted.
    pub(crate) fn want(&mut self, wanted: &Wanted) {
        self.state.placements.clone_from(&wanted.placements);
        self.state.attempts.clone_from(&wanted.attempts);
    }

    /// A plan is carried out, or has nothing to carry out: what it says beside reservations holds.
    pub(crate) fn follow(&mut self, plan: Plan) {
        let state = &mut self.state;
        (state.prewarms, state.warm) = (plan.prewarms.clone(), plan.warm.clone());
        state.moves.waiting.clone_from(&plan.waiting);
        self.plan = plan;
        self.planned = true;
    }

    /// Takes a report in; whether it says anything new.
    pub(crate) fn hear(
        &mut self,
        clock: &Clock,
        (epoch, sequence): (u64, u64),
        report: &Rc<MachineReport>,
    ) -> bool {
        let name = &report.machine;
        let was_warm = self.warm;
        let mark = self.mark(clock, report);
        if mark.is_some_and(|mark| mark.process == self.number) {
            self.unheard.remove(name);
            self.warm |= self.unheard.is_empty();
        }
        let fenced = !clock.is_without(Fence::Sequence);
        let changed = match self.state.machines.get_mut(name) {
            Some(machine) if fenced && is_stale(self.number, machine, (epoch, sequence), mark) => {
                return false;
            }
            Some(machine)
                if machine.life == Life::Alive
                    && machine.report.mark == mark
                    && self.heard.get(name).is_some_and(|last| Rc::ptr_eq(last, report)) =>
            {
                (machine.report.epoch, machine.report.sequence) = (epoch, sequence);
                false
            }
            _ => {
                let mut said = MachineReport { epoch, sequence, mark, ..report.as_ref().clone() };
                if clock.is_without(Fence::Strangers) {
                    said.instances.retain(|it| self.state.reservations.contains_key(&it.instance));
                }
                match self.state.machines.get_mut(name) {
                    Some(machine) => (machine.life, machine.report) = (Life::Alive, said),
                    None => {
                        self.state.machines.insert(name.clone(), Machine::new(Life::Alive, said));
                    }
                }
                self.heard.insert(name.clone(), report.clone());
                true
            }
        };
        match self.seen_ms.get_mut(name) {
            Some(seen_ms) => *seen_ms = clock.now_ms,
            None => drop(self.seen_ms.insert(name.clone(), clock.now_ms)),
        }
        changed || was_warm != self.warm
    }

    /// Lets leases expire; whether anything changed.
    pub(crate) fn expire(&mut self, now_ms: u64) -> bool {
        let warmed = !self.warm && now_ms >= self.warms_ms;
        self.warm |= warmed;
        let mut changed = warmed;
        for (name, machine) in &mut self.state.machines {
            let seen_ms = self.seen_ms.get(name).copied().unwrap_or(now_ms);
            let silence = Duration::from_millis(now_ms.saturating_sub(seen_ms));
            let life = life_after(silence, Duration::from_millis(LEASE_MS));
            changed |= fall_silent(machine, life);
        }
        self.note_marks(now_ms);
        changed
    }

    /// Notes when something was taken from machines.
    pub(crate) fn note_marks(&mut self, now_ms: u64) {
        for (name, machine) in &self.state.machines {
            let noted = self.marked.entry(name.clone()).or_default();
            if noted.0 != machine.mark {
                *noted = (machine.mark, now_ms);
            }
        }
    }

    /// The report's mark; without that fence, time stands in for it.
    fn mark(&self, clock: &Clock, report: &MachineReport) -> Option<Mark> {
        if !clock.is_without(Fence::Mark) {
            return report.mark;
        }
        let (number, since_ms) = self.marked.get(&report.machine).copied().unwrap_or_default();
        let settled = number == 0 || clock.now_ms >= since_ms + LEASE_MS;
        Some(Mark { process: self.number, number: if settled { number } else { number - 1 } })
    }

    /// It didn't run for so long: leases get that time back.
    pub(crate) fn forgive(&mut self, late_ms: u64) {
        self.warms_ms += late_ms;
        self.seen_ms.values_mut().for_each(|seen_ms| *seen_ms += late_ms);
    }
}
