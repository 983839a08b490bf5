//! Deployments: scale, replace, roll over to a new generation.
//!
//! A new generation starts one more than wanted where there is room, and an old instance goes when as many are ready
//! without it. Where there is no room, an old one goes first, one at a time, and only if a new one fits in its place;
//! so a generation that fits nowhere, or never gets ready, leaves the old one serving.
//!
//! Instances on machines that an operator drains are replaced like those of an older generation.
//!
//! An instance that moves and its copy count as one until the copy is ready; then the old one goes if as many are ready
//! without it.

use std::{cmp::Reverse, collections::BTreeMap};

use anyplace_model::{DeploymentName, MoveCause, Placement, ReasonCode, Refusal, Workload};

use super::{Planner, Verdict, deployment_demand, size};
use crate::{
    room::Demand,
    state::{Reservation, Stage},
};

/// Instances over the wanted count during a change of generation.
const SURGE: usize = 1;

#[derive(Debug, Default)]
struct Group<'a> {
    /// As wanted.
    current: Vec<&'a Reservation>,
    /// Started to take the place of one of those.
    copies: Vec<&'a Reservation>,
    /// Of an older spec, or on a machine that is to be left.
    old: Vec<&'a Reservation>,
    /// Draining, or being removed.
    leaving: Vec<&'a Reservation>,
    /// Started by this plan.
    started: usize,
}

impl Group<'_> {
    fn running(&self) -> usize {
        self.current.len() + self.started
    }

    fn all(&self) -> usize {
        self.running() + self.old.len()
    }

    /// Copies of instances that leave take their places. One that has may move again: then it has a copy itself.
    fn settle(&mut self) {
        let all = std::mem::take(&mut self.copies);
        let is_there = |copy: &&Reservation| self.current.iter().chain(&all).any(|held| replaces(copy, held));
        let (copies, settled) = all.iter().copied().partition(is_there);
        self.copies = copies;
        self.current.extend::<Vec<_>>(settled);
    }
}

fn replaces(copy: &Reservation, held: &Reservation) -> bool {
    copy.replaces.as_ref().is_some_and(|replaced| replaced.instance == held.assignment.instance)
}

/// Says that nothing is refused, and why nothing has started.
fn awaiting_room() -> Refusal {
    let message = "off-peak jobs are ending to make room".into();
    Refusal { reason: ReasonCode::AwaitingRoom, count: 1, message }
}

impl<'a> Planner<'a> {
    pub(super) fn deployments(&mut self) {
        let state = self.state;
        let mut groups: BTreeMap<&DeploymentName, Group<'a>> = BTreeMap::new();
        let released: std::collections::BTreeSet<_> = self.plan.releases.iter().cloned().collect();
        for (instance, held) in &state.reservations {
            let Some(deployment) = held.deployment().filter(|_| !released.contains(instance)) else {
                continue;
            };
            let group = groups.entry(deployment).or_default();
            let satisfies =
                state.placements.get(deployment).is_some_and(|placement| held.satisfies(placement));
            let satisfies = satisfies && !state.leaves(held);
            match held.stage {
                Stage::Serving if satisfies && held.replaces.is_some() => group.copies.push(held),
                Stage::Serving if satisfies => group.current.push(held),
                Stage::Serving => group.old.push(held),
                Stage::Draining { .. } | Stage::Removing { .. } | Stage::Lost | Stage::Preempted => {
                    group.leaving.push(held);
                }
            }
        }
        let mut placements: Vec<_> = state.placements.iter().collect();
        // Those first for whom others move: they may move no more afterwards.
        placements.sort_by_cached_key(|(name, placement)| {
            (!self.has_room_made(name), size(deployment_demand(&placement.spec)), *name)
        });
        for (name, placement) in placements {
            let mut group = groups.remove(name).unwrap_or_default();
            group.settle();
            let verdict = self.deployment(name, placement, group);
            self.plan.placements.insert(name.clone(), verdict);
        }
        // What is left isn't wanted here at all.
        for group in groups.into_values() {
            let serving = group.current.into_iter().chain(group.copies).chain(group.old);
            self.plan.drains.extend(serving.map(|held| held.assignment.instance.clone()));
        }
    }

    fn deployment(
        &mut self,
        name: &'a DeploymentName,
        placement: &'a Placement,
        mut group: Group<'a>,
    ) -> Verdict {
        let verdict = self.scale_and_roll(name, placement, &mut group);
        let count = usize::try_from(placement.count).unwrap_or(usize::MAX);
        if self.has_room_made(name) && group.running() >= count {
            self.end_moves(&MoveCause::Room(name.clone()));
        }
        let outdated = group
            .current
            .iter()
            .chain(&group.copies)
            // Those that leave their machine, not for what they are.
            .chain(group.old.iter().filter(|held| held.satisfies(placement)))
            .filter(|held| held.generation != placement.generation || held.vip6 != placement.vip6);
        let adopted = outdated.map(|held| (held.assignment.instance.clone(), placement.generation));
        self.plan.adoptions.extend(adopted);
        verdict
    }

    fn scale_and_roll(
        &mut self,
        name: &'a DeploymentName,
        placement: &'a Placement,
        group: &mut Group<'a>,
    ) -> Verdict {
        let count = usize::try_from(placement.count).unwrap_or(usize::MAX);
        let demand = deployment_demand(&placement.spec);
        let mut verdict = Verdict {
            generation: placement.generation,
            count: placement.count,
            refused: 0,
            refusals: Vec::new(),
        };
        // Each turn drains or starts one, or ends the loop.
        loop {
            if self.shift_one(group, count) || self.drain_one(group, count) {
                continue;
            }
            let missing = count.saturating_sub(group.running());
            if missing == 0 || (!group.old.is_empty() && group.all() >= count.saturating_add(SURGE)) {
                return verdict;
            }
            let entered = self.enter(name);
            match entered.map_or_else(|| self.choose(demand, Some((name, placement.generation))), Ok) {
                Ok((machine, slot)) => {
                    let workload = Workload::Deployment(name.clone());
                    self.start(workload, placement.generation, demand, machine, slot);
                    self.rooms.count(machine, name, placement.generation);
                    group.started += 1;
                }
                Err(tally) => {
                    if self.make_way(group, demand) {
                        return verdict;
                    }
                    // For whom others move already, nobody makes way.
                    if !self.has_room_made(name) && self.preempt(demand) {
                        verdict.refusals = vec![awaiting_room()];
                    } else {
                        verdict.refused = u32::try_from(missing).unwrap_or(u32::MAX);
                        verdict.refusals = tally.refusals(demand);
                    }
                    return verdict;
                }
            }
        }
    }

    /// Ends one of an instance that moves and its copy, if one is enough.
    fn shift_one(&mut self, group: &mut Group<'a>, count: usize) -> bool {
        let all_ready = self.ready(&group.current) + self.ready(&group.copies) + self.ready(&group.old);
        for copy in group.copies.clone() {
            let Some(held) = group.current.iter().copied().find(|held| replaces(copy, held)) else {
                continue;
            };
            let (old_is_ready, is_ready) = (self.observed.ready(held), self.observed.ready(copy));
            let (moves, one_is_enough) = (self.is_moving(held), all_ready > count);
            if is_ready && (!old_is_ready || (moves && one_is_enough)) {
                return self.drain(Some(held), |group| &mut group.current, group);
            }
            if !moves && (!is_ready || one_is_enough) {
                return self.drain(Some(copy), |group| &mut group.copies, group);
            }
        }
        false
    }

    /// Drains one instance that isn't needed, if there is one.
    fn drain_one(&mut self, group: &mut Group<'a>, count: usize) -> bool {
        if group.running() > count {
            // The newest goes first: the older has proved itself, and has the connections.
            let worst = self.worst(&group.current, |held| Reverse(held.created_ms));
            return self.drain(worst, |group| &mut group.current, group);
        }
        let ready = self.ready(&group.current) + self.ready(&group.old);
        let worst = self.worst(&group.old, |held| held.created_ms);
        let spare = match worst {
            Some(held) if self.observed.ready(held) => ready > count,
            Some(_) => group.all() > count,
            None => false,
        };
        spare && self.drain(worst, |group| &mut group.old, group)
    }

    fn drain(
        &mut self,
        held: Option<&'a Reservation>,
        list: impl for<'g> FnOnce(&'g mut Group<'a>) -> &'g mut Vec<&'a Reservation>,
        group: &mut Group<'a>,
    ) -> bool {
        let Some(held) = held else { return false };
        let instance = &held.assignment.instance;
        list(group).retain(|other| other.assignment.instance != *instance);
        group.leaving.push(held);
        group.settle();
        self.plan.drains.push(instance.clone());
        true
    }

    /// Whether room is being made, or begins to be made, where a new one fits. False: it fits nowhere.
    fn make_way(&mut self, group: &mut Group<'a>, demand: Demand<'_>) -> bool {
        if self.rooms.fits_without(&group.leaving, demand) {
            return true;
        }
        let mut old = group.old.clone();
        old.retain(|held| self.rooms.fits_without(&[*held], demand));
        let Some(worst) = self.worst(&old, |held| held.created_ms) else { return false };
        // One at a time: the one before must serve first, unless nothing is lost by this one.
        let one_under_way = !group.leaving.is_empty()
            || group.started > 0
            || self.ready(&group.current) < group.current.len();
        if !one_under_way || (group.leaving.is_empty() && !self.observed.ready(worst)) {
            self.drain(Some(worst), |group| &mut group.old, group);
        }
        true
    }

    fn ready(&self, group: &[&Reservation]) -> usize {
        group.iter().filter(|held| self.observed.ready(held)).count()
    }

    /// The one to end first: not ready, then on the most crowded machine, then by age.
    fn worst<K: Ord>(
        &self,
        group: &[&'a Reservation],
        age: impl Fn(&Reservation) -> K,
    ) -> Option<&'a Reservation> {
        let crowd = |held: &Reservation| group.iter().filter(|other| other.machine == held.machine).count();
        group.iter().copied().min_by_key(|held| {
            (self.observed.ready(held), Reverse(crowd(held)), age(held), &held.assignment.instance)
        })
    }
}
