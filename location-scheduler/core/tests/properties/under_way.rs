//! Moves under way, judged: what they need stays free, they are few, and they end with their cause.

use super::*;

/// Judges moves under way: what they need stays free, they are few, and they end with their cause.
pub(crate) fn under_way(before: &State, after: &State) -> Verdict {
    let records: Vec<_> = after.moves.under_way.iter().collect();
    prop_assert!(records.iter().filter(|(_, moving)| moving.gave_up.is_none()).count() <= 4);
    for (cause, moving) in &records {
        prop_assert!((1..=3).contains(&moving.moves.len()) && **cause == moving.cause);
        let MoveCause::Room(newcomer) = cause else {
            prop_assert!(**cause == MoveCause::Tidying && moving.place.is_none() && moving.moves.len() <= 2);
            continue;
        };
        let Some(placement) = after.placements.get(newcomer) else {
            return Err(TestCaseError::fail(format!("{newcomer} isn't wanted, and others move for it")));
        };
        let leaves =
            |h: &Reservation| after.settings.machines.get(&h.machine) == Some(&MachineMode::Draining);
        let serving = of(after, newcomer).filter(|held| held.stage == Stage::Serving && !leaves(held));
        let lacks = serving.filter(|held| same(held, placement)).count() < placement.count as usize;
        prop_assert!(lacks, "{newcomer} has all, and others move for it");
        let lost = after.machines[&moving.place.as_ref().unwrap().machine].life == Life::Lost;
        prop_assert!(!lost || moving.gave_up.is_some(), "{moving:?} goes on");
    }
    let is_moving = |held: &Reservation| {
        let instance = &held.assignment.instance;
        let mut active = records.iter().filter(|(_, moving)| moving.gave_up.is_none());
        active.any(|(_, moving)| moving.moves.iter().any(|step| step.instance == *instance))
    };
    // Once all who move have left, everything that is kept is there.
    let kept = kept(after);
    for (name, machine) in &after.machines {
        let here = kept.iter().filter(|(at, _)| at == name).map(|(_, kept)| kept);
        let mut addresses = machine.report.instance_cidr.hosts();
        let stay: Vec<&Assignment> = after
            .reservations
            .values()
            .filter(|held| held.machine == *name && held.stage != Stage::Preempted && !is_moving(held))
            .map(|held| &held.assignment)
            .collect();
        let mut new: Vec<Assignment> = here.cloned().collect();
        for one in &mut new {
            let is_free = |host: &Ipv4Addr| stay.iter().all(|held| held.address != *host);
            let Some(address) = addresses.find(is_free) else {
                return Err(TestCaseError::fail(format!("no address is kept on {name}")));
            };
            one.address = address;
        }
        let is_empty = new.is_empty();
        let all: Vec<&Assignment> = stay.into_iter().chain(&new).collect();
        let fit = fits(&machine.report, &all);
        prop_assert!(is_empty || fit.is_ok(), "what is kept on {name} is taken: {fit:?}");
    }
    // Copies of instances that serve are there only for moves under way.
    for held in after.reservations.values().filter(|held| held.stage == Stage::Serving) {
        if is_extra(after, held) {
            let old = &after.reservations[&held.replaces.as_ref().unwrap().instance];
            let name = held.deployment().unwrap();
            let serving = of(after, name).filter(|held| ready(after, held)).count();
            let is_needed = ready(after, held) && serving <= after.placements[name].count as usize;
            prop_assert!(is_moving(old) || is_needed, "{held:?} is surplus");
            prop_assert!(held.attempt().is_none());
        }
    }
    // Where no generation changes, as many are ready as before or as are wanted.
    for (name, placement) in &after.placements {
        let is_old = |held: &Reservation| held.stage == Stage::Serving && !same(held, placement);
        if of(before, name).any(is_old) {
            continue;
        }
        let was = of(before, name).filter(|held| ready(before, held)).count();
        let is = of(after, name).filter(|held| ready(after, held)).count();
        prop_assert!(is >= was.min(placement.count as usize), "{name}: {was} ready before, {is} after");
    }
    Ok(())
}
