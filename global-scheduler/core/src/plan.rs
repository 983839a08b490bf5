//! How many instances of each deployment each location should run.
//!
//! What is placed stays. An instance moves only when its location is lost, refuses it, is draining, or no longer
//! satisfies the constraints. A planned move is made before it is broken: the old location keeps its instances
//! until as many are ready elsewhere. What can't be placed elsewhere stays where it was, so that it goes on as soon
//! as its location can.
//!
//! What fits nowhere is sent, one at a time, where enough is free in sum: that location may make room by moves.
//!
//! Among locations that have equally few instances of a deployment, the one is chosen that brings instances nearest to
//! where its new connections enter (`docs/decisions/0018-demand.md`).

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
};

use anyplace_model::{DeploymentName, LocationId, Refusal, Resources};
use jiff::Timestamp;

use crate::{
    Deployment, Liveness, Location, Share, State,
    demand::{Travel, losses},
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
    /// Where one of the missing instances is sent although it doesn't fit: enough is free there in sum, and the location
    /// may make room. Contained in `counts`.
    pub hopes: BTreeMap<DeploymentName, LocationId>,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Score<'a> {
    /// Instances of this deployment there: a spread survives the loss of a location.
    here: u32,
    /// How much nearer new connections have an instance then.
    gain: Reverse<u64>,
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
    /// How much further new connections have to go without the last of them.
    loss: Reverse<u64>,
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
        let (counts, missing, hope) = plan_one(state, name, deployment, &mut rooms, now);
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
        plan.hopes.extend(hope.map(|location| (name.clone(), location)));
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
    /// The same, where a location has no room for what replaces them, and they serve on: an older generation, or on a machine
    /// that is drained.
    outgoing: BTreeMap<LocationId, u32>,
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
            let serving = share.ready.saturating_sub(count).min(refused);
            present.outgoing.insert(id.clone(), serving);
            present.stranded.insert(id.clone(), refused - serving);
        }
    }
    present
}

/// Counts by location, how many instances couldn't be placed, and where one of those is sent nevertheless.
fn plan_one(
    state: &State,
    name: &DeploymentName,
    deployment: &Deployment,
    rooms: &mut BTreeMap<&LocationId, Room>,
    now: Timestamp,
) -> (BTreeMap<LocationId, u32>, u32, Option<LocationId>) {
    let spec = &deployment.spec;
    let wanted = spec.instances.min;
    let mut present = present(state, deployment);

    trim(&mut present.withdrawn, wanted, state, deployment);
    // Instances in withdrawn locations count, but alone they would leave the virtual IP without an answer.
    let least = if spec.ports.is_empty() { 0 } else { wanted.min(1) };
    let serving = wanted.saturating_sub(present.withdrawn.values().sum()).max(least);
    trim(&mut present.kept, serving, state, deployment);

    let mut counts = present.kept;
    let unplaced = serving.saturating_sub(counts.values().sum());
    if unplaced > 0 {
        let why = why_not_more(state, name, deployment, rooms, now);
        let open = why.into_iter().filter(|(_, refusals)| refusals.is_empty()).map(|(id, _)| id).collect();
        let placed = add(&mut counts, unplaced, open, state, deployment, rooms, Room::fits);
        if placed < unplaced {
            // Only what fits nowhere else takes the room of off-peak jobs; the location has the last word.
            let open = preemptible(state, name, deployment, now);
            add(&mut counts, unplaced - placed, open, state, deployment, rooms, Room::fits_preempting);
        }
    }

    for (id, count) in present.withdrawn {
        *counts.entry(id).or_default() += count;
    }
    let ready: u32 = counts
        .iter()
        .map(|(id, count)| deployment.shares.get(id).map_or(0, |share| share.ready.min(*count)))
        .sum();
    let missing = wanted.saturating_sub(counts.values().sum());
    let leaving = present.leaving.keys().collect();
    let hope = if missing > 0 { hope(state, name, deployment, &leaving, rooms, now) } else { None };
    let mut not_ready = wanted.saturating_sub(ready);
    let mut stranded = missing - u32::from(hope.is_some());
    for (id, count) in present.leaving {
        let held = count.min(not_ready);
        not_ready -= held;
        *counts.entry(id).or_default() += held;
    }
    for (id, count) in present.outgoing {
        // Where others go because they are too many, these do too.
        let share = deployment.shares.get(&id).copied().unwrap_or_default();
        let all_stay = counts.get(&id).copied().unwrap_or(0) >= share.count.saturating_sub(share.refused);
        let held = if all_stay { count.min(not_ready) } else { 0 };
        not_ready -= held;
        stranded = stranded.saturating_sub(held);
        *present.stranded.entry(id.clone()).or_default() += count - held;
        *counts.entry(id).or_default() += held;
    }
    // A location that reports may be making room; one that is lost comes back whether it is asked or not.
    let is_lost = |id: &LocationId| state.locations.get(id).is_none_or(|it| it.liveness == Liveness::Lost);
    let (lost, refused): (Vec<_>, Vec<_>) = present.stranded.into_iter().partition(|(id, _)| is_lost(id));
    for (id, count) in refused.into_iter().chain(lost) {
        let held = count.min(stranded);
        stranded -= held;
        *counts.entry(id).or_default() += held;
    }
    if let Some(location) = &hope {
        *counts.entry(location.clone()).or_default() += 1;
    }
    counts.retain(|_, count| *count > 0);
    (counts, missing, hope)
}

/// A location that may make room for one more by moving other instances; none while one, that isn't to be left, is asked
/// already.
fn hope(
    state: &State,
    name: &DeploymentName,
    deployment: &Deployment,
    leaving: &BTreeSet<&LocationId>,
    rooms: &BTreeMap<&LocationId, Room>,
    now: Timestamp,
) -> Option<LocationId> {
    let gave_up = |location: &Location| location.hopeless.get(name).is_some_and(|until| *until > now);
    let is_asked = |(id, share): (&LocationId, &Share)| {
        let location = state.locations.get(id).filter(|location| location.liveness != Liveness::Lost);
        let unanswered = share.count > share.reserved.saturating_add(share.refused);
        let asks = |location| unanswered || (share.refused > 0 && !gave_up(location));
        !leaving.contains(id) && location.is_some_and(asks)
    };
    if deployment.shares.iter().any(is_asked) {
        return None;
    }
    let spec = &deployment.spec;
    let may = |(id, location): &(&LocationId, &Location)| {
        filter::refusals(location, &spec.placement, spec.isolation).is_empty()
            && !gave_up(location)
            && rooms.get(id).is_some_and(|room| room.fits_in_sum(&spec.resources))
    };
    let able = state.locations.iter().filter(may);
    let (id, _) = able.min_by_key(|(id, _)| (rooms.get(id).map(Room::used_permille), *id))?;
    Some(id.clone())
}

fn is_warm(location: &Location, image: &str) -> bool {
    location.advert.as_ref().is_some_and(|advert| advert.warm_images.iter().any(|warm| warm == image))
}

/// A location that may get more, while it is compared with others.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate<'a> {
    score: Score<'a>,
    /// When its gain was last looked at: it only falls while locations are added, so an older one is a bound.
    looked_at: u32,
}

/// Adds up to `most` instances to the counts, in locations that may take one more; says how many.
fn add<'a>(
    counts: &mut BTreeMap<LocationId, u32>,
    most: u32,
    open: Vec<&'a LocationId>,
    state: &State,
    deployment: &Deployment,
    rooms: &mut BTreeMap<&LocationId, Room>,
    fits: fn(&Room, &Resources) -> bool,
) -> u32 {
    let spec = &deployment.spec;
    let mut travel = Travel::new(&state.latency, &deployment.demand, served(counts));
    let mut candidates: BinaryHeap<Reverse<Candidate<'a>>> = open
        .into_iter()
        .map(|location| Score {
            here: counts.get(location).copied().unwrap_or(0),
            gain: Reverse(travel.gain(location)),
            cold: !is_warm(&state.locations[location], &spec.image),
            used_permille: rooms.get(location).map_or(1_000, Room::used_permille),
            location,
        })
        .map(|score| Reverse(Candidate { score, looked_at: 0 }))
        .collect();
    let mut placed = 0;
    while placed < most {
        let Some(Reverse(Candidate { mut score, looked_at })) = candidates.pop() else { break };
        let id = score.location;
        if looked_at < placed {
            score.gain = Reverse(travel.gain(id));
            candidates.push(Reverse(Candidate { score, looked_at: placed }));
            continue;
        }
        // Rooms only shrink while a plan is made: where it doesn't fit, it won't.
        let Some(room) = rooms.get_mut(id).filter(|room| fits(room, &spec.resources)) else { continue };
        room.deduct(&spec.resources);
        travel.add(id);
        *counts.entry(id.clone()).or_default() += 1;
        placed += 1;
        score = Score { here: score.here + 1, used_permille: room.used_permille(), ..score };
        candidates.push(Reverse(Candidate { score, looked_at }));
    }
    placed
}

/// Locations that may take more of the deployment where only room lacks.
fn preemptible<'a>(
    state: &'a State,
    name: &DeploymentName,
    deployment: &Deployment,
    now: Timestamp,
) -> Vec<&'a LocationId> {
    let spec = &deployment.spec;
    let may = |location: &Location| {
        filter::refusals(location, &spec.placement, spec.isolation).is_empty()
            && location.refused.get(name).is_none_or(|refused| refused.until <= now)
    };
    state.locations.iter().filter(|(_, location)| may(location)).map(|(id, _)| id).collect()
}

fn served(counts: &BTreeMap<LocationId, u32>) -> impl Iterator<Item = &LocationId> {
    counts.iter().filter(|(_, count)| **count > 0).map(|(id, _)| id)
}

/// Takes instances away until at most `most` are left.
fn trim(counts: &mut BTreeMap<LocationId, u32>, most: u32, state: &State, deployment: &Deployment) {
    let ready = |id: &LocationId| deployment.shares.get(id).map_or(0, |share| share.ready);
    for _ in most..counts.values().sum() {
        let losses = losses(&state.latency, &deployment.demand, &served(counts).collect::<Vec<_>>());
        // Where others stay, none has to go further.
        let loss = |location, count| if count > 1 { 0 } else { losses.get(location).copied().unwrap_or(0) };
        let surplus = counts.iter().filter(|(_, count)| **count > 0).map(|(location, count)| Surplus {
            unready: ready(location) < *count,
            here: *count,
            loss: Reverse(loss(location, *count)),
            location,
        });
        let Some(location) = surplus.max().map(|surplus| surplus.location.clone()) else { break };
        counts.entry(location).and_modify(|count| *count -= 1);
    }
}
