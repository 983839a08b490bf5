//! Three locations, what is asked of them, and what befalls them.

use std::net::Ipv4Addr;

use anyplace_location_core::attempt_statuses;
use anyplace_model::{AttemptId, DeploymentName, InstancePhase, JobName, Placement};

use crate::{
    clock::Clock,
    location::{self, Location, MACHINES},
    things,
};

const LOCATIONS: usize = 3;
const DEPLOYMENTS: u64 = 6;
const JOBS: u64 = 3;
const FOLLOW_MS: u64 = 700;
/// The longest that anything is frozen, cut off or stalled.
const FAULT_MS: u64 = 3_000;
/// Watches stall for at least this time, and meanwhile so many wishes change.
const STALL_MS: u64 = 1_500;
const WHIMS: usize = 6;

/// What happens.
pub(crate) enum Event {
    Location(usize, location::Event),
    /// Somebody wants something else of a location.
    Wish(usize),
    /// Somebody wants something else in a bad moment.
    Whim(usize),
    /// What became of a location's attempts is looked at.
    Follow(usize),
    /// Something fails in a location.
    Fault(usize),
}

pub(crate) struct Fleet {
    locations: Vec<Location>,
}

impl Fleet {
    pub(crate) fn new(clock: &mut Clock) -> Self {
        let locations = (0..LOCATIONS).map(|index| Location::new(clock, index)).collect();
        for index in 0..LOCATIONS {
            clock.after(100, Event::Wish(index));
            clock.after(500, Event::Fault(index));
            clock.after(FOLLOW_MS, Event::Follow(index));
        }
        Self { locations }
    }

    /// Runs with faults, then without.
    ///
    /// # Errors
    /// What was violated.
    pub(crate) fn run(&mut self, clock: &mut Clock, faults_ms: u64, calm_ms: u64) -> Result<(), String> {
        while let Some(event) = clock.next(faults_ms) {
            self.step(clock, event)?;
        }
        clock.faults = false;
        while let Some(event) = clock.next(faults_ms + calm_ms) {
            self.step(clock, event)?;
        }
        self.locations.iter().try_for_each(Location::converged)
    }

    fn step(&mut self, clock: &mut Clock, event: Event) -> Result<(), String> {
        match event {
            Event::Location(index, event) => self.locations[index].step(clock, event)?,
            Event::Wish(index) => {
                if clock.faults {
                    self.wish(clock, index);
                    // Now and then somebody changes their mind at once.
                    let most_ms = if clock.seed.one_in(4) { 150 } else { 12_000 };
                    let pause_ms = 1 + clock.seed.below(most_ms);
                    clock.after(pause_ms, Event::Wish(index));
                }
            }
            Event::Follow(index) => {
                self.follow(clock, index);
                clock.after(FOLLOW_MS, Event::Follow(index));
            }
            Event::Whim(index) => self.wish(clock, index),
            Event::Fault(index) => {
                if clock.faults {
                    self.fault(clock, index);
                    let pause_ms = 100 + clock.seed.below(8_000);
                    clock.after(pause_ms, Event::Fault(index));
                }
            }
        }
        Ok(())
    }

    fn fault(&mut self, clock: &mut Clock, index: usize) {
        let kind = clock.seed.below(13);
        clock.note(kind);
        let at = clock.seed.index(MACHINES);
        let until_ms = clock.now_ms + 1 + clock.seed.below(FAULT_MS);
        clock.tell(index, || format!("fault {kind} of m{at} until {until_ms} ms"));
        let location = &mut self.locations[index];
        match kind {
            0..=1 => location.kill(clock),
            2 => location.freeze(clock, until_ms),
            3 => location.agents[at].freeze(until_ms),
            4 | 5 => location.agents[at].cut_off(until_ms),
            6 => location.boot(clock, at),
            7..=9 => {
                location.agents[at].stream.stalled_until_ms = until_ms + STALL_MS;
                for _ in 0..WHIMS {
                    let wait_ms = clock.seed.below(STALL_MS);
                    clock.after(wait_ms, Event::Whim(index));
                }
            }
            10 => location.set_clock(clock),
            _ => location.ail(clock, at),
        }
    }

    fn wish(&mut self, clock: &mut Clock, index: usize) {
        let location = &mut self.locations[index];
        if clock.seed.one_in(4) {
            let name: JobName = things::id(&format!("j{}", clock.seed.below(JOBS)));
            return Self::ask_job(clock, location, &name);
        }
        let number = clock.seed.below(DEPLOYMENTS);
        let name: DeploymentName = things::id(&format!("d{number}"));
        let before = location.store.wanted.placements.get(&name);
        let generation = before.map_or(0, |it| it.generation) + 1;
        if clock.seed.chance(25) {
            return location.want(clock, |wanted| drop(wanted.placements.remove(&name)));
        }
        let shape = if clock.seed.one_in(3) { clock.seed.below(things::SHAPES) } else { number };
        let count = clock.seed.below(4) as u32;
        let vip = Ipv4Addr::new(203, 0, 113, number as u8 + 1);
        let spec = things::deployment(name.clone(), shape);
        let placement = Placement { generation, spec, vip, vip6: None, count };
        location.want(clock, |wanted| drop(wanted.placements.insert(name, placement)));
    }

    /// Asks for a job's first attempt, or cancels the one that there is.
    fn ask_job(clock: &mut Clock, location: &mut Location, name: &JobName) {
        let attempts = &location.store.wanted.attempts;
        match attempts.keys().find(|attempt| attempt.job == *name).cloned() {
            None => {
                let spec = things::job(name.clone(), clock.seed.below(things::SHAPES));
                let attempt = AttemptId { job: name.clone(), attempt: 1 + clock.now_ms as u32 };
                location.want(clock, |wanted| drop(wanted.attempts.insert(attempt, spec)));
            }
            Some(attempt) if clock.seed.one_in(5) => {
                location.want(clock, |wanted| drop(wanted.attempts.remove(&attempt)));
            }
            Some(_) => {}
        }
    }

    /// Looks what became of attempts, as the global scheduler does: what ended is forgotten, what was lost is tried again.
    fn follow(&mut self, clock: &mut Clock, index: usize) {
        let location = &mut self.locations[index];
        let Some(process) = location.process.as_ref().filter(|process| process.planned) else { return };
        if process.state.attempts.is_empty() {
            return;
        }
        for status in attempt_statuses(&process.state, &process.plan) {
            let attempt = status.attempt;
            let phase = status.instance.map(|instance| instance.phase);
            let over =
                matches!(phase, Some(InstancePhase::Exited | InstancePhase::Failed | InstancePhase::Lost));
            if !over {
                continue;
            }
            let next = AttemptId { attempt: attempt.attempt.max(clock.now_ms as u32) + 1, ..attempt.clone() };
            location.want(clock, |wanted| {
                let spec = wanted.attempts.remove(&attempt);
                if let Some(spec) = spec.filter(|_| phase == Some(InstancePhase::Lost)) {
                    wanted.attempts.insert(next, spec);
                }
            });
        }
    }
}
