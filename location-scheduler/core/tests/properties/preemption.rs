//! Judges who makes way for whom.

use anyplace_location_core::{Plan, Reservation, Stage, State};
use anyplace_model::{InstancePhase, MachineId, SchedulingPolicy};
use proptest::prelude::*;

use crate::oracle::{Verdict, takes};

/// Whether an attempt ends that holds room, for whatever reason.
pub(crate) fn ends(state: &State, held: &Reservation) -> bool {
    let reported = state.machines.get(&held.machine).into_iter().flat_map(|it| &it.report.instances);
    let phase =
        reported.filter(|status| status.instance == held.assignment.instance).map(|it| it.phase).next();
    let ended = matches!(phase, Some(InstancePhase::Exited | InstancePhase::Failed));
    held.attempt().is_some() && (matches!(held.stage, Stage::Removing { .. }) || ended)
}

/// The state without some reservations and what runs for them.
pub(crate) fn without(state: &State, gone: impl Fn(&Reservation) -> bool) -> State {
    let mut rest = state.clone();
    rest.reservations.retain(|_, held| !gone(held));
    for machine in rest.machines.values_mut() {
        let kept = |held: &Reservation| !gone(held);
        machine.report.instances.retain(|it| state.reservations.get(&it.instance).is_none_or(kept));
    }
    rest
}

/// Judges who makes way: only off-peak attempts that run, and only those without which an instance gets in there.
pub(crate) fn judge(before: &State, plan: &Plan, after: &State) -> Verdict {
    for instance in &plan.preemptions {
        let held = &before.reservations[instance];
        let spec = &before.attempts[held.attempt().unwrap()];
        prop_assert_eq!(spec.scheduling_policy, SchedulingPolicy::OffPeak);
        prop_assert_eq!(held.stage, Stage::Serving);
        prop_assert!(!ends(before, held), "{instance} ends by itself");
        let here = |name: &MachineId| *name == held.machine;
        let rest = without(after, |held| ends(after, held));
        let others = without(after, |held| ends(after, held) && held.assignment.instance != *instance);
        let lets_in = after.placements.iter().any(|(name, placement)| {
            let (verdict, spec) = (&plan.placements[name], &placement.spec);
            let waits = verdict.refused == 0 && !verdict.refusals.is_empty();
            waits
                && takes(&rest, &spec.resources, spec.isolation, here)
                && !takes(&others, &spec.resources, spec.isolation, here)
        });
        prop_assert!(lets_in, "{instance} makes way for nobody");
    }
    Ok(())
}
