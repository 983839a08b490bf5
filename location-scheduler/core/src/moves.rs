//! Moves under way: instances that go to other machines, so that something fits where they are now.
//!
//! Each begins with a copy on the new machine. When it is ready, the old instance drains and ends, as in any change, and
//! when the last one has left, the newcomer gets the room. Until then *claims* keep all places that are still to be taken
//! from everything else. A claim is subtracted from what is free even while the old instance is there, so what is
//! free may be negative; whoever has the claim gives it back to look whether its place is free by now.
//!
//! The record says what is wanted; how far it is, the reservations say. So nothing needs undoing step by step: where a
//! record ends, the copies of instances that are still there are surplus, and leave.

use std::collections::{BTreeMap, BTreeSet};

use anyplace_model::{
    Assignment, DeploymentName, InstanceId, InstancePhase, MachineId, MoveCause, Resources,
};
use serde::{Deserialize, Serialize};

use crate::{
    packing::GpuSet,
    room::{Demand, InstanceMove},
    state::{Life, Observed, Reservation, Stage, State},
};

/// Records at once: each is a few moves.
pub(crate) const MAX_UNDER_WAY: usize = 4;
/// So long something is refused before room is made for it: elsewhere it starts without moving anybody.
pub(crate) const PATIENCE_MS: u64 = 1_000;
/// Between two searches of room for the same deployment: a search that finds nothing takes up to 30 ms.
pub(crate) const SEARCH_AGAIN_MS: u64 = 5_000;
/// Moves for their own sake at a time.
pub(crate) const TIDY_MOVES: usize = 2;
/// Who was moved for its own sake stays for so many pauses: what pays now may be undone by what comes next.
pub(crate) const STAYS_PAUSES: u64 = 6;
/// Between any two searches.
pub(crate) const SEARCH_PAUSE_MS: u64 = 300;

/// All about moves that a plan is made from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Moves {
    /// How moves are made.
    pub policy: MovePolicy,
    /// Those that are under way, or rest after they failed. Kept in the store.
    pub under_way: BTreeMap<MoveCause, Moving>,
    /// Deployments that the last plan refused.
    pub waiting: BTreeMap<DeploymentName, Waiting>,
    /// When moves for their own sake were last looked for, or were under way, in milliseconds since 1970; none since the
    /// start.
    pub tidied_ms: Option<u64>,
}

/// How moves are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MovePolicy {
    /// How long a copy may take to get ready, in milliseconds. After that long the same is tried again.
    pub ready_ms: u64,
    /// Between moves for their own sake, in milliseconds; none where an operator wants none.
    pub tidy_pause_ms: Option<u64>,
}

impl Default for MovePolicy {
    fn default() -> Self {
        // A large image and a large model, both fetched first.
        Self { ready_ms: 600_000, tidy_pause_ms: Some(600_000) }
    }
}

/// A deployment that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
    /// When room was last looked for.
    pub searched_ms: Option<u64>,
}

/// Moves for one cause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// Why.
    pub cause: MoveCause,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
    /// The moves, in an order in which each fits once those before it are done.
    pub moves: Vec<InstanceMove>,
    /// What the newcomer gets, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// It failed, and isn't tried again for a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gave_up: Option<GaveUp>,
}

/// The room that is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The machine.
    pub machine: MachineId,
    /// Indexes of its GPUs.
    pub gpus: Vec<u32>,
    /// What the newcomer asks for.
    pub resources: Resources,
}

/// Why and when moves were given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GaveUp {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Why, as a sentence.
    pub why: String,
}

/// Whose place an instance took. Kept with its reservation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaced {
    /// The instance that leaves or has left.
    pub instance: InstanceId,
    /// Its machine.
    pub machine: MachineId,
    /// Why it moved.
    pub cause: MoveCause,
}

/// A place that nothing else may take.
#[derive(Debug, Clone)]
pub(crate) struct Claim<'a> {
    /// The instance that moves there; none for the newcomer.
    pub(crate) who: Option<&'a Reservation>,
    pub(crate) machine: MachineId,
    pub(crate) gpus: GpuSet,
    pub(crate) demand: Demand<'a>,
}

/// What becomes of a record.
enum Fate {
    GoesOn,
    Ends,
    GivesUp(String),
}

/// By the instance that leaves: its copy.
pub(crate) type Copies<'a> = BTreeMap<&'a InstanceId, &'a Reservation>;

/// Copies that aren't leaving themselves.
pub(crate) fn copies(state: &State) -> Copies<'_> {
    let serving = state.reservations.values().filter(|held| held.stage == Stage::Serving);
    serving.filter_map(|held| Some((&held.replaces.as_ref()?.instance, held))).collect()
}

/// The records that go on, with what time and observation make of them.
pub(crate) fn go_on(
    state: &State,
    observed: &Observed<'_>,
    copies: &Copies<'_>,
) -> BTreeMap<MoveCause, Moving> {
    let mut kept = BTreeMap::new();
    for (cause, moving) in &state.moves.under_way {
        let gave_up = match moving.fate(state, observed, copies) {
            Fate::GoesOn => moving.gave_up.clone(),
            Fate::Ends => continue,
            Fate::GivesUp(why) => Some(GaveUp { at_ms: state.now_ms, why }),
        };
        kept.insert(cause.clone(), Moving { gave_up, ..moving.clone() });
    }
    kept
}

/// Deployments that are in the middle of moves.
pub(crate) fn busy<'a>(state: &'a State, copies: &Copies<'a>) -> BTreeSet<&'a DeploymentName> {
    let active = state.moves.under_way.values().filter(|moving| moving.is_active());
    let moved = active.flat_map(|moving| &moving.moves).map(|step| &step.instance);
    let undone = copies.keys().copied();
    let held = moved.chain(undone).filter_map(|instance| state.reservations.get(instance));
    held.filter_map(Reservation::deployment).collect()
}

impl Moving {
    /// Whether it is being carried out.
    pub const fn is_active(&self) -> bool {
        self.gave_up.is_none()
    }

    /// Whether an instance moves by it.
    pub(crate) fn involves(&self, instance: &InstanceId) -> bool {
        self.moves.iter().any(|step| step.instance == *instance)
    }

    const fn newcomer(&self) -> Option<&DeploymentName> {
        match &self.cause {
            MoveCause::Room(name) => Some(name),
            MoveCause::Tidying | MoveCause::Drain => None,
        }
    }

    /// What is still to be taken, in the order of the moves.
    pub(crate) fn claims<'a>(&self, state: &'a State, copies: &Copies<'_>) -> Vec<Claim<'a>> {
        if !self.is_active() {
            return Vec::new();
        }
        let waits = |step: &&InstanceMove| !copies.contains_key(&step.instance);
        let moves = self.moves.iter().filter(waits).filter_map(|step| {
            let held = state.reservations.get(&step.instance).filter(|held| held.stage == Stage::Serving)?;
            let (machine, gpus) = (step.machine.clone(), GpuSet::of(step.gpus.iter().copied()));
            Some(Claim { who: Some(held), machine, gpus, demand: made(&held.assignment) })
        });
        let newcomer = self.newcomer().and_then(|name| state.placements.get(name)).zip(self.place.as_ref());
        let newcomer = newcomer.map(|(placement, place)| Claim {
            who: None,
            machine: place.machine.clone(),
            gpus: GpuSet::of(place.gpus.iter().copied()),
            demand: crate::plan::deployment_demand(&placement.spec),
        });
        moves.chain(newcomer).collect()
    }

    fn fate(&self, state: &State, observed: &Observed<'_>, copies: &Copies<'_>) -> Fate {
        let policy = state.moves.policy;
        let since = |since_ms: u64, wait_ms: u64| state.now_ms >= since_ms.saturating_add(wait_ms);
        if !self.is_wanted(state) {
            return Fate::Ends;
        }
        if let Some(gave_up) = &self.gave_up {
            return if since(gave_up.at_ms, policy.ready_ms) { Fate::Ends } else { Fate::GoesOn };
        }
        let lost = |machine: &MachineId| state.machines.get(machine).is_none_or(|it| it.life == Life::Lost);
        let closed = |machine: &MachineId| lost(machine) || state.settings.machines.contains_key(machine);
        if state.settings.draining || self.place.as_ref().is_some_and(|place| closed(&place.machine)) {
            return Fate::Ends;
        }
        for step in &self.moves {
            let held = state.reservations.get(&step.instance);
            let Some(held) = held.filter(|held| held.stage == Stage::Serving) else { continue };
            if closed(&step.machine) || !is_as_wanted(state, held) {
                return Fate::Ends;
            }
            let copy = copies.get(&step.instance).filter(|copy| !observed.ready(copy));
            if let Some(copy) = copy {
                let (name, machine) = (&copy.assignment.instance, &copy.machine);
                let status = observed.status(copy);
                if status.is_some_and(|status| status.phase == InstancePhase::Failed) {
                    let reason = status.and_then(|status| status.reason.clone());
                    let reason = reason.map_or(String::new(), |reason| format!(": {}", reason.message));
                    return Fate::GivesUp(format!("{name} can't start on {machine}{reason}"));
                }
                if since(copy.created_ms, policy.ready_ms) {
                    let limit_s = policy.ready_ms / 1_000;
                    return Fate::GivesUp(format!("{name} on {machine} was not ready within {limit_s} s"));
                }
            }
        }
        // Each move may have to wait for the one before.
        let all = self.moves.len() as u64 + 1;
        if since(self.since_ms, all.saturating_mul(policy.ready_ms.saturating_add(state.timing.drain_ms))) {
            return Fate::GivesUp("it took too long".into());
        }
        Fate::GoesOn
    }

    /// Whether the newcomer still lacks room of this size; or, without one, anybody has yet to go.
    fn is_wanted(&self, state: &State) -> bool {
        let (Some(name), Some(place)) = (self.newcomer(), &self.place) else {
            let held = self.moves.iter().filter_map(|step| state.reservations.get(&step.instance));
            return held.into_iter().any(|held| held.stage == Stage::Serving);
        };
        let Some(placement) = state.placements.get(name) else { return false };
        let held = state.reservations.values().filter(|held| held.deployment() == Some(name));
        let stays = |held: &&Reservation| held.stage == Stage::Serving && !state.leaves(held);
        let serving = held.filter(stays).filter(|held| held.satisfies(placement)).count();
        let wanted = usize::try_from(placement.count).unwrap_or(usize::MAX);
        placement.spec.resources == place.resources && serving < wanted
    }

    /// What is being done, as a sentence.
    pub(crate) fn sentence(&self, state: &State) -> String {
        let moves: Vec<String> = self
            .moves
            .iter()
            .map(|step| match state.reservations.get(&step.instance) {
                Some(held) => format!("{} from {} to {}", step.instance, held.machine, step.machine),
                None => format!("{} to {}", step.instance, step.machine),
            })
            .collect();
        let place = self.place.as_ref().map_or(String::new(), |place| format!(" on {}", place.machine));
        let moves = moves.join(", ");
        match &self.gave_up {
            None => format!("makes room{place} by moving {moves}"),
            Some(GaveUp { why, .. }) => {
                format!(
                    "gave up making room{place} by moving {moves}: {why}; it is tried again after a while"
                )
            }
        }
    }
}

/// What an instance asked for when it was made.
pub(crate) fn made(assignment: &Assignment) -> Demand<'_> {
    Demand { image: &assignment.image, isolation: assignment.isolation, resources: &assignment.resources }
}

/// Whether an instance made now would be the same.
fn is_as_wanted(state: &State, held: &Reservation) -> bool {
    let placement = held.deployment().and_then(|name| state.placements.get(name));
    placement.is_some_and(|placement| held.satisfies(placement) && !state.leaves(held))
}
