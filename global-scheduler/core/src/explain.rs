//! Why something is where it is, or isn't: reasons counted over all locations, and the nearest fit.

use std::{cmp::Reverse, collections::BTreeMap};

use anyplace_model::{
    DeploymentName, Explanation, GpuRequest, JobName, LocationExplanation, LocationId, PlacementConstraints,
    ReasonCode, Refusal, Resources,
};
use jiff::Timestamp;

use crate::{
    JobOutcome, Liveness, State,
    demand::Travel,
    filter, jobs, order,
    plan::{rooms, why_not_more},
    room::{Room, bytes, describe, fits},
};

/// Locations that a summed message names; the others are only counted.
const NAMED: usize = 3;

/// Refusals of several locations, summed by reason, most frequent first.
pub(crate) fn summed<'a>(locations: impl Iterator<Item = (&'a LocationId, &'a [Refusal])>) -> Vec<Refusal> {
    let mut by_reason: BTreeMap<ReasonCode, (u32, Vec<String>)> = BTreeMap::new();
    let mut any = false;
    for (location, refusals) in locations {
        any = true;
        for refusal in refusals {
            let (count, messages) = by_reason.entry(refusal.reason).or_default();
            *count += 1;
            messages.push(format!("{location}: {}", refusal.message));
        }
    }
    if !any {
        let message = "no location has joined; start a location scheduler with a token from `anyplace token \
                       create --role location --location NAME`";
        return vec![Refusal { reason: ReasonCode::NoLocations, count: 0, message: message.into() }];
    }
    let mut refusals: Vec<Refusal> = by_reason
        .into_iter()
        .map(|(reason, (count, messages))| {
            let more = messages.len().saturating_sub(NAMED);
            let mut message = messages.into_iter().take(NAMED).collect::<Vec<_>>().join("; ");
            if more > 0 {
                message += &format!("; and {more} more");
            }
            Refusal { reason, count, message }
        })
        .collect();
    refusals.sort_by_key(|refusal| Reverse(refusal.count));
    refusals
}

/// What comes nearest to one more instance, as a sentence; nothing where it fits somewhere or no location reports.
pub(crate) fn nearest_fit(
    state: &State,
    wanted: &Resources,
    placement: &PlacementConstraints,
    rooms: &BTreeMap<&LocationId, Room>,
) -> Option<String> {
    let alive: Vec<(&LocationId, &anyplace_model::Advert)> = state
        .locations
        .iter()
        .filter(|(_, location)| location.liveness == Liveness::Alive)
        .filter_map(|(id, location)| Some((id, location.advert.as_ref()?)))
        .collect();
    if alive.is_empty() {
        return None;
    }
    let allowed: Vec<(&LocationId, &anyplace_model::Advert, &Room)> = alive
        .iter()
        .filter(|(_, advert)| filter::constraint(advert, placement).is_none())
        .filter_map(|(id, advert)| Some((*id, *advert, rooms.get(id)?)))
        .collect();
    if allowed.is_empty() {
        let there: Vec<String> = alive
            .iter()
            .map(|(id, advert)| format!("{id} ({}, {})", advert.region, advert.country))
            .collect();
        return Some(format!("no location satisfies the constraints; there are {}", there.join(", ")));
    }
    if let Some(gpu) = &wanted.gpu
        && let Some(text) = nearest_gpu(gpu, &allowed)
    {
        return Some(text);
    }
    // The location with the fewest things against it.
    let (id, _, room) = allowed.iter().min_by_key(|(_, _, room)| room.refusals(wanted).len())?;
    let refusals = room.refusals(wanted);
    if refusals.is_empty() {
        return None;
    }
    let messages: Vec<&str> = refusals.iter().map(|refusal| refusal.message.as_str()).collect();
    Some(format!("{id} comes nearest: {}", messages.join("; ")))
}

fn nearest_gpu(
    gpu: &GpuRequest,
    allowed: &[(&LocationId, &anyplace_model::Advert, &Room)],
) -> Option<String> {
    let models: BTreeMap<&String, Vec<&str>> = allowed
        .iter()
        .flat_map(|(id, advert, _)| advert.gpus.keys().map(|model| (model, id.as_str())))
        .fold(BTreeMap::new(), |mut models, (model, id)| {
            models.entry(model).or_insert_with(Vec::new).push(id);
            models
        });
    if models.is_empty() {
        return Some("no location has a GPU".into());
    }
    if !gpu.models.is_empty() && !models.keys().any(|model| gpu.models.contains(model)) {
        let there: Vec<String> =
            models.iter().map(|(model, ids)| format!("{model} ({})", ids.join(", "))).collect();
        let asked = gpu.models.join(" or ");
        return Some(format!("no location has a {asked} GPU; there are {}", there.join(", ")));
    }
    let largest =
        allowed.iter().filter_map(|(id, _, room)| Some((room.largest_block(gpu)?, *id, *room))).max_by_key(
            |(block, id, room)| (fits(block, gpu), room.together(block, gpu), block.memory, Reverse(*id)),
        );
    let Some((block, id, room)) = largest else {
        return Some(format!("no GPU memory is free; {} was asked for", describe(gpu)));
    };
    if !fits(block, gpu) {
        let asked = gpu.memory.map_or("a whole GPU".into(), |memory| memory.to_string());
        return Some(format!(
            "the largest free GPU block is {} ({}) in {id}; {asked} was asked for",
            bytes(block.memory.0),
            block.model
        ));
    }
    let together = room.together(block, gpu);
    (together < gpu.count).then(|| {
        format!(
            "at most {together} {} with so much free memory are in one machine, in {id}; {} were asked for",
            block.model, gpu.count
        )
    })
}

/// Why a deployment is where it is, or isn't. Nothing where it doesn't exist.
pub fn explain_deployment(state: &State, name: &DeploymentName, now: Timestamp) -> Option<Explanation> {
    let deployment = state.deployments.get(name)?;
    let rooms = rooms(state);
    let why = why_not_more(state, name, deployment, &rooms, now);
    let (wanted, placed) = (deployment.spec.instances.min, state.placed(deployment));
    let shares = deployment.shares.iter();
    let alive = |id: &LocationId| state.locations.get(id).is_some_and(|it| it.liveness == Liveness::Alive);
    let ready: u32 = shares.clone().filter(|(id, _)| alive(id)).map(|(_, share)| share.ready).sum();
    let serving = shares.clone().filter(|(id, share)| alive(id) && share.count > share.refused);
    let travel = Travel::new(&state.latency, &deployment.demand, serving.map(|(id, _)| id));
    let locations: Vec<LocationExplanation> = why
        .iter()
        .map(|(id, refusals)| LocationExplanation {
            location: (*id).clone(),
            placed: deployment.shares.get(*id).map_or(0, |share| share.count),
            room_for: if refusals.is_empty() {
                rooms.get(id).map_or(0, |room| room.count(&deployment.spec.resources))
            } else {
                0
            },
            entering: deployment.demand.get(*id).copied(),
            nearer_ms: travel.average_ms().map(|_| travel.gain(id) as f64 / 1_000.0 / travel.per_second()),
            refusals: refusals.clone(),
            moves: Vec::new(),
        })
        .collect();
    let there: Vec<String> = deployment
        .shares
        .iter()
        .filter(|(_, share)| share.count > 0)
        .map(|(id, share)| format!("{} in {id}", share.count))
        .collect();
    let short = placed < wanted;
    let refusals =
        if short { summed(why.iter().map(|(id, list)| (*id, list.as_slice()))) } else { Vec::new() };
    let fits_somewhere = why.values().any(Vec::is_empty);
    let mut summary = match (placed, short) {
        (0, _) if fits_somewhere => format!("none of {wanted} instances is placed yet, and there is room"),
        (0, _) => format!("none of {wanted} instances fits anywhere now"),
        (_, true) => format!("{placed} of {wanted} instances are placed: {}", there.join(", ")),
        (_, false) => format!("all {wanted} instances are placed: {}; {ready} ready", there.join(", ")),
    };
    if let Some(ms) = travel.average_ms().filter(|_| placed > 0) {
        summary += &format!(
            "; of {:.1} new connections/s, the average one has {ms:.1} ms to the nearest instance",
            travel.per_second()
        );
    }
    let nearest_fit = if short {
        nearest_fit(state, &deployment.spec.resources, &deployment.spec.placement, &rooms)
    } else {
        None
    };
    Some(Explanation {
        subject: format!("deployment/{name}"),
        summary,
        wanted,
        placed,
        ready,
        refusals,
        locations,
        nearest_fit,
    })
}

/// Why a queued job waits. Nothing where it isn't in the queue.
pub fn explain_job(state: &State, name: &JobName, now: Timestamp) -> Option<Explanation> {
    let job = state.queue.iter().find(|job| job.name == *name)?;
    let rooms = rooms(state);
    let why = jobs::why_not(state, job, &rooms, now);
    let decision = jobs::plan_jobs(state, now).into_iter().find(|decision| decision.job == *name)?;
    let (summary, refusals, nearest_fit) = match decision.outcome {
        JobOutcome::Place(location) => (format!("it starts in {location}"), Vec::new(), None),
        JobOutcome::Wait { position, refusals, predicted_start, next_location: _, nearest_fit } => {
            let when = predicted_start.map_or(String::new(), |at| format!("; it can start at {at}"));
            let until =
                job.spec.deadline.map_or(String::new(), |at| format!("; it fails unless it starts by {at}"));
            let turn = order::describe(state, job);
            let summary = format!("it waits at position {position} of the queue ({turn}){when}{until}");
            (summary, refusals, nearest_fit)
        }
    };
    let locations = why
        .into_iter()
        .map(|(id, refusals)| LocationExplanation {
            location: id.clone(),
            placed: 0,
            room_for: if refusals.is_empty() {
                rooms.get(id).map_or(0, |room| room.count(&job.spec.resources))
            } else {
                0
            },
            entering: None,
            nearer_ms: None,
            refusals,
            moves: Vec::new(),
        })
        .collect();
    Some(Explanation {
        subject: format!("job/{name}"),
        summary,
        wanted: 1,
        placed: 0,
        ready: 0,
        refusals,
        locations,
        nearest_fit,
    })
}
