//! What machines are told, and what the global scheduler is told.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use anyplace_model::{
    AttemptStatus, ImageState, InstancePhase, InstanceStatus, MachineDesired, MachineId, Mark, MoveCause,
    MoveStatus, MoveStep, PRIORITY_AWAITED, PlacementStatus, ReasonCode, Refusal,
};

use crate::{
    moves::{Replaced, copies},
    plan::Plan,
    state::{Life, Observed, Reservation, Stage, State},
};

/// The key of a machine's mark in its watch.
const MARK: &str = "mark";

/// What a machine that hasn't reported yet should have, by the key of its watch.
pub fn desired_of_stranger(state: &State) -> BTreeMap<String, MachineDesired> {
    BTreeMap::from([(MARK.to_owned(), MachineDesired::Mark(Mark { process: state.process, number: 0 }))])
}

/// What each machine should have, by the key of its watch.
pub fn desired(state: &State) -> BTreeMap<MachineId, BTreeMap<String, MachineDesired>> {
    let mut machines: BTreeMap<MachineId, BTreeMap<String, MachineDesired>> = BTreeMap::new();
    for (instance, held) in &state.reservations {
        let draining = match held.stage {
            Stage::Serving => false,
            Stage::Draining { .. } => true,
            Stage::Removing { .. } | Stage::Lost | Stage::Preempted => continue,
        };
        let mut assignment = held.assignment.clone();
        assignment.draining = draining;
        machines
            .entry(held.machine.clone())
            .or_default()
            .insert(format!("instances/{instance}"), MachineDesired::Instance(Box::new(assignment)));
    }
    for (name, machine) in &state.machines {
        let mark = Mark { process: state.process, number: machine.mark };
        machines.entry(name.clone()).or_default().insert(MARK.to_owned(), MachineDesired::Mark(mark));
    }
    for (attempt, machine) in &state.prewarms {
        if let Some(spec) = state.attempts.get(attempt) {
            machines
                .entry(machine.clone())
                .or_default()
                .insert(format!("images/{}", spec.image), wanted(&spec.image, PRIORITY_AWAITED));
        }
    }
    for (machine, images) in &state.warm {
        for (image, priority) in images {
            machines
                .entry(machine.clone())
                .or_default()
                .entry(format!("images/{image}"))
                .or_insert_with(|| wanted(image, *priority));
        }
    }
    machines
}

fn wanted(image: &str, priority: u8) -> MachineDesired {
    MachineDesired::Image { image: image.to_owned(), priority }
}

/// How far each wished image is on the machines that keep it.
pub fn prewarm_statuses(state: &State) -> BTreeMap<String, BTreeMap<MachineId, ImageState>> {
    let on = |image: &String| {
        let keepers = state.warm.iter().filter(|(_, images)| images.contains_key(image));
        let states = keepers.map(|(name, _)| {
            let reported = state.machines.get(name).and_then(|machine| machine.report.images.get(image));
            (name.clone(), reported.cloned().unwrap_or(ImageState::Cold))
        });
        states.collect()
    };
    state.wishes.keys().map(|image| (image.clone(), on(image))).collect()
}

/// The status of every instance that holds a reservation.
pub fn instance_statuses(state: &State) -> Vec<InstanceStatus> {
    let observed = Observed::new(state);
    state.reservations.values().map(|held| completed(&observed, held)).collect()
}

/// Addresses of the live machines, to which other locations may send.
pub fn ingress(state: &State) -> Vec<Ipv4Addr> {
    let alive = state.machines.values().filter(|machine| machine.life == Life::Alive);
    alive.map(|machine| machine.report.address).collect::<BTreeSet<_>>().into_iter().collect()
}

/// What became of the placements that a plan has dealt with.
pub fn placement_statuses(state: &State, plan: &Plan) -> Vec<PlacementStatus> {
    let observed = Observed::new(state);
    let mut instances: BTreeMap<_, Vec<InstanceStatus>> = BTreeMap::new();
    for held in state.reservations.values() {
        if let Some(deployment) = held.deployment() {
            instances.entry(deployment).or_default().push(completed(&observed, held));
        }
    }
    // A deployment that is no longer wanted is told until its last instance is gone.
    let unwanted: Vec<_> = instances
        .keys()
        .filter(|name| !plan.placements.contains_key(**name) && !state.placements.contains_key(**name))
        .copied()
        .collect();
    let mut statuses: Vec<PlacementStatus> = plan
        .placements
        .iter()
        .map(|(deployment, verdict)| PlacementStatus {
            deployment: deployment.clone(),
            generation: verdict.generation,
            count: verdict.count,
            instances: instances.remove(deployment).unwrap_or_default(),
            refused: verdict.refused,
            refusals: verdict.refusals.clone(),
        })
        .collect();
    statuses.extend(unwanted.into_iter().map(|deployment| {
        let instances = instances.remove(deployment).unwrap_or_default();
        PlacementStatus {
            deployment: deployment.clone(),
            generation: instances.iter().map(|status| status.generation).max().unwrap_or(0),
            count: 0,
            instances,
            refused: 0,
            refusals: Vec::new(),
        }
    }));
    statuses
}

/// Instances that move, and those that have taken another's place.
pub fn move_statuses(state: &State) -> Vec<MoveStatus> {
    let copies = copies(state);
    let (mut statuses, observed) = (Vec::new(), Observed::new(state));
    let mut add = |held: &Reservation,
                   replaced: &Replaced,
                   to: Option<&MachineId>,
                   copy: Option<&Reservation>,
                   step| {
        let Some(deployment) = held.deployment() else { return };
        let (instance, from, cause) = (&replaced.instance, &replaced.machine, &replaced.cause);
        let name = copy.map(|copy| copy.assignment.instance.clone());
        let how = match (&name, step) {
            (Some(name), MoveStep::Starting) => format!("{name} is starting there"),
            (Some(name), MoveStep::Draining) => {
                format!("{name} serves there, and {instance} is draining")
            }
            (Some(name), MoveStep::Done) => format!("{name} took its place"),
            _ => "waits until its place is free".into(),
        };
        statuses.push(MoveStatus {
            deployment: deployment.clone(),
            instance: instance.clone(),
            from: from.clone(),
            copy: name,
            to: to.cloned(),
            step,
            cause: cause.clone(),
            message: match to {
                Some(to) => format!("{instance} from {from} to {to}, {cause}: {how}"),
                None => format!("{instance} on {from} {cause}: it goes once another is ready"),
            },
        });
    };
    for (cause, moving) in state.moves.under_way.iter().filter(|(_, moving)| moving.is_active()) {
        for claim in moving.claims(state, &copies) {
            let Some(held) = claim.who else { continue };
            let instance = held.assignment.instance.clone();
            let replaced = Replaced { instance, machine: held.machine.clone(), cause: cause.clone() };
            add(held, &replaced, Some(&claim.machine), None, MoveStep::Waiting);
        }
    }
    for copy in copies.values() {
        let Some(replaced) = &copy.replaces else { continue };
        let step = match state.reservations.get(&replaced.instance).map(|old| old.stage) {
            None => MoveStep::Done,
            Some(Stage::Serving) if observed.ready(copy) => MoveStep::Draining,
            Some(Stage::Serving) => MoveStep::Starting,
            Some(_) => MoveStep::Draining,
        };
        add(copy, replaced, Some(&copy.machine), Some(copy), step);
    }
    let serving = state.reservations.values().filter(|held| held.stage == Stage::Serving);
    for held in serving.filter(|held| state.leaves(held)) {
        let instance = held.assignment.instance.clone();
        let replaced = Replaced { instance, machine: held.machine.clone(), cause: MoveCause::Drain };
        add(held, &replaced, None, None, MoveStep::Waiting);
    }
    statuses
}

/// What became of each wanted attempt.
pub fn attempt_statuses(state: &State, plan: &Plan) -> Vec<AttemptStatus> {
    let observed = Observed::new(state);
    let held: BTreeMap<_, _> = state
        .reservations
        .values()
        .filter_map(|held| held.attempt().map(|attempt| (attempt, held)))
        .collect();
    state
        .attempts
        .keys()
        .map(|attempt| {
            let instance = held.get(attempt).map(|held| made_way(completed(&observed, held), held.stage));
            let refusals = match &instance {
                Some(_) => Vec::new(),
                None => plan.attempts.get(attempt).cloned().unwrap_or_default(),
            };
            AttemptStatus {
                attempt: attempt.clone(),
                location: state.site.location.clone(),
                instance,
                refusals,
            }
        })
        .collect()
}

/// The status of an attempt that is wanted: if it ends all the same, it made way for a deployment.
fn made_way(mut status: InstanceStatus, stage: Stage) -> InstanceStatus {
    status.phase = match stage {
        Stage::Removing { .. } => InstancePhase::Stopping,
        Stage::Preempted => InstancePhase::Lost,
        Stage::Serving | Stage::Draining { .. } | Stage::Lost => return status,
    };
    let message = "it made way for a deployment".into();
    status.reason = Some(Refusal { reason: ReasonCode::Preempted, count: 1, message });
    status
}

/// An instance's status as reported, corrected by what only the scheduler knows.
fn completed(observed: &Observed<'_>, held: &Reservation) -> InstanceStatus {
    let unheard = || InstanceStatus::assigned(&held.machine, &held.assignment);
    let mut status = observed.status(held).cloned().unwrap_or_else(unheard);
    status.ready = observed.ready(held);
    status.generation = held.generation;
    let ended = matches!(status.phase, InstancePhase::Exited | InstancePhase::Failed);
    // A job's attempt is lost for good or not at all: its successor starts as soon as it is said to be.
    let silent = held.attempt().is_none() && observed.life(held) != Life::Alive;
    if held.stage == Stage::Lost || (silent && !ended) {
        status.phase = InstancePhase::Lost;
        status.reason = Some(Refusal {
            reason: ReasonCode::Lost,
            count: 1,
            message: format!("machine {} has stopped reporting", held.machine),
        });
    } else if held.stage != Stage::Serving && !ended {
        status.phase = InstancePhase::Stopping;
    }
    status
}
