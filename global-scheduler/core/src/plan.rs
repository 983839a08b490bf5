//! How many instances of each deployment each location should run.
//!
//! What is placed stays. An instance moves only when its location is lost, refuses it, is draining, or no longer
//! satisfies the constraints. A planned move is made before it is broken: the old location keeps its instances
//! until as many are ready elsewhere. What can't be placed elsewhere stays where it was, so that it goes on as soon
//! as its location can.

use std::{cmp::Reverse, collections::BTreeMap};

use anyplace_model::{DeploymentName, LocationId, Refusal, Resources};
use jiff::Timestamp;

use crate::{
    Deployment, Liveness, Location, State,
    explain::{nearest_fit, summed},
    filter,
    room::Room,
};

/// What to do: nothing is left to decide. Deployments and locations that aren't in it get no instances.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Instances by deployment and location; never 0.
    pub counts: BTreeMap<DeploymentName, BTreeMap<LocationId, u32>>,
    /// Deployments that have fewer instances than they want.
    pub missing: BTreeMap<DeploymentName, Missing>,
}

/// Instances that can't be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// How many.
    pub count: u32,
    /// Why: locations counted by reason.
    pub refusals: Vec<Refusal>,
    /// What comes nearest.
    pub nearest_fit: Option<String>,
}

/// Order of preference among locations with room: the smallest is chosen.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score<'a> {
    /// Instances of this deployment there: a spread survives the loss of a location.
    here: u32,
    /// Whether the image must be fetched first.
    cold: bool,
    /// Thousandths in use: leaves head-room everywhere.
    used_permille: u64,
    /// Breaks ties.
    location: &'a LocationId,
}

/// Order in which surplus instances are taken away: the largest goes first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Surplus<'a> {
    /// Whether some there aren't ready.
    unready: bool,
    /// Instances there.
    here: u32,
    /// Breaks ties.
    location: &'a LocationId,
}

/// Rooms of all locations that report, less what is on its way there.
pub(crate) fn rooms(state: &State) -> BTreeMap<&LocationId, Room> {
    let mut rooms: BTreeMap<&LocationId, Room> = state
        .locations
        .iter()
        .filter_map(|(name, location)| Some((name, Room::new(location.advert.as_ref()?))))
        .collect();
    for (_, deployment) in in_order(state) {
        for (location, share) in &deployment.shares {
            let Some(room) = rooms.get_mut(location) else { continue };
            for _ in 0..share.count.saturating_sub(share.reserved.saturating_add(share.refused)) {
                room.deduct(&deployment.spec.resources);
            }
        }
    }
    for (name, location) in &state.locations {
        let Some(room) = rooms.get_mut(name) else { continue };
        location.incoming.iter().for_each(|resources| room.deduct(resources));
    }
    rooms
}

/// Plans all deployments.
pub fn plan(state: &State, now: Timestamp) -> Plan {
    let mut rooms = rooms(state);
    let mut plan = Plan::default();
    for (name, deployment) in in_order(state) {
        let (counts, missing) = plan_one(state, name, deployment, &mut rooms, now);
        if missing > 0 {
            let why = why_not_more(state, name, deployment, &rooms, now);
            let missing = Missing {
                count: missing,
                nearest_fit: nearest_fit(
                    state,
                    &deployment.spec.resources,
                    &deployment.spec.placement,
                    &rooms,
                ),
                refusals: summed(why.iter().map(|(location, refusals)| (*location, refusals.as_slice()))),
            };
            plan.missing.insert(name.clone(), missing);
        }
        plan.counts.insert(name.clone(), counts);
    }
    plan
}

/// Large blocks of GPU memory are the scarcest: who needs one chooses first.
fn in_order(state: &State) -> Vec<(&DeploymentName, &Deployment)> {
    let mut order: Vec<(&DeploymentName, &Deployment)> = state.deployments.iter().collect();
    order.sort_by_key(|(_, deployment)| Reverse(gpu_size(&deployment.spec.resources)));
    order
}

/// Memory on each GPU and number of GPUs; a whole GPU is larger than any part of one.
fn gpu_size(resources: &Resources) -> Option<(u64, u32)> {
    let gpu = resources.gpu.as_ref()?;
    Some((gpu.memory.map_or(u64::MAX, |memory| memory.0), gpu.count))
}

/// Why each location takes no further instance of the deployment.
pub(crate) fn why_not_more<'a>(
    state: &'a State,
    name: &DeploymentName,
    deployment: &Deployment,
    rooms: &BTreeMap<&LocationId, Room>,
    now: Timestamp,
) -> BTreeMap<&'a LocationId, Vec<Refusal>> {
    let refusals = |(id, location): (&'a LocationId, &Location)| {
        let mut refusals = filter::refusals(location, &deployment.spec.placement, deployment.spec.isolation);
        if location.liveness == Liveness::Alive {
            if let Some(room) = rooms.get(id) {
                refusals.extend(room.refusals(&deployment.spec.resources));
            }
            let refused = location.refused.get(name).filter(|refused| refused.until > now);
            refusals.extend(refused.into_iter().flat_map(|refused| refused.refusals.iter().cloned()));
        }
        (id, refusals)
    };
    state.locations.iter().map(refusals).collect()
}

/// Where the deployment's present instances stand.
#[derive(Default)]
struct Present {
    /// Stay, in locations that take traffic.
    kept: BTreeMap<LocationId, u32>,
    /// Stay, in withdrawn locations.
    withdrawn: BTreeMap<LocationId, u32>,
    /// Move away once others are ready.
    leaving: BTreeMap<LocationId, u32>,
    /// Can't run where they were sent: refused there, or the location is lost.
    stranded: BTreeMap<LocationId, u32>,
}

fn present(state: &State, deployment: &Deployment) -> Present {
    let mut present = Present::default();
    for (id, share) in &deployment.shares {
        let Some(location) = state.locations.get(id) else { continue };
        if location.liveness == Liveness::Lost {
            present.stranded.insert(id.clone(), share.count);
            continue;
        }
        let refused = share.refused.min(share.count);
        let count = share.count - refused;
        let placement = &deployment.spec.placement;
        let misplaced =
            location.advert.as_ref().is_some_and(|advert| filter::constraint(advert, placement).is_some());
        let leaves = location.liveness == Liveness::Alive && (location.settings.draining || misplaced);
        let part = if leaves {
            &mut present.leaving
        } else if location.settings.withdrawn {
            &mut present.withdrawn
        } else {
            &mut present.kept
        };
        part.insert(id.clone(), count);
        if refused > 0 && !leaves {
            present.stranded.insert(id.clone(), refused);
        }
    }
    present
}

/// Counts by location, and how many instances couldn't be placed.
fn plan_one(
    state: &State,
    name: &DeploymentName,
    deployment: &Deployment,
    rooms: &mut BTreeMap<&LocationId, Room>,
    now: Timestamp,
) -> (BTreeMap<LocationId, u32>, u32) {
    let spec = &deployment.spec;
    let wanted = spec.instances.min;
    let mut present = present(state, deployment);

    trim(&mut present.withdrawn, wanted, deployment);
    // Instances in withdrawn locations count, but alone they would leave the virtual IP without an answer.
    let least = if spec.ports.is_empty() { 0 } else { wanted.min(1) };
    let serving = wanted.saturating_sub(present.withdrawn.values().sum()).max(least);
    trim(&mut present.kept, serving, deployment);

    let mut counts = present.kept;
    let mut unplaced = serving.saturating_sub(counts.values().sum());
    let why = why_not_more(state, name, deployment, rooms, now);
    let mut candidates: Vec<&LocationId> =
        why.into_iter().filter(|(_, refusals)| refusals.is_empty()).map(|(id, _)| id).collect();
    while unplaced > 0 {
        let best = candidates.iter().map(|id| Score {
            here: counts.get(*id).copied().unwrap_or(0),
            cold: !is_warm(&state.locations[*id], &spec.image),
            used_permille: rooms.get(id).map_or(1_000, Room::used_permille),
            location: id,
        });
        let Some(id) = best.min().map(|score| score.location) else { break };
        if !rooms.get_mut(id).is_some_and(|room| room.take(&spec.resources)) {
            // Rooms only shrink while a plan is made.
            candidates.retain(|candidate| *candidate != id);
            continue;
        }
        *counts.entry(id.clone()).or_default() += 1;
        unplaced -= 1;
    }

    for (id, count) in present.withdrawn {
        *counts.entry(id).or_default() += count;
    }
    let ready: u32 = counts
        .iter()
        .map(|(id, count)| deployment.shares.get(id).map_or(0, |share| share.ready.min(*count)))
        .sum();
    let missing = wanted.saturating_sub(counts.values().sum());
    let mut not_ready = wanted.saturating_sub(ready);
    for (id, count) in present.leaving {
        let held = count.min(not_ready);
        not_ready -= held;
        *counts.entry(id).or_default() += held;
    }
    let mut stranded = missing;
    for (id, count) in present.stranded {
        let held = count.min(stranded);
        stranded -= held;
        *counts.entry(id).or_default() += held;
    }
    counts.retain(|_, count| *count > 0);
    (counts, missing)
}

fn is_warm(location: &Location, image: &str) -> bool {
    location.advert.as_ref().is_some_and(|advert| advert.warm_images.iter().any(|warm| warm == image))
}

/// Takes instances away until at most `most` are left.
fn trim(counts: &mut BTreeMap<LocationId, u32>, most: u32, deployment: &Deployment) {
    let ready = |id: &LocationId| deployment.shares.get(id).map_or(0, |share| share.ready);
    for _ in most..counts.values().sum() {
        let surplus = counts.iter().filter(|(_, count)| **count > 0).map(|(location, count)| Surplus {
            unready: ready(location) < *count,
            here: *count,
            location,
        });
        let Some(location) = surplus.max().map(|surplus| surplus.location.clone()) else { break };
        counts.entry(location).and_modify(|count| *count -= 1);
    }
}
