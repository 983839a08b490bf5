//! The queue of jobs: first come, first served, without priorities. A job that fits nowhere doesn't hold up those
//! behind it: a wish for a GPU that nobody has would stop all work.

use std::collections::BTreeMap;

use anyplace_model::{JobName, LocationId, ReasonCode, Refusal, SchedulingPolicy};
use jiff::{Timestamp, ToSpan as _};

use crate::{
    Location, QueuedJob, State,
    explain::{nearest_fit, summed},
    filter,
    plan::rooms,
    room::{Room, one},
};

/// What becomes of a queued job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDecision {
    /// The job.
    pub job: JobName,
    /// What becomes of it.
    pub outcome: JobOutcome,
}

/// What becomes of a queued job now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobOutcome {
    /// Its next attempt goes to this location.
    Place(LocationId),
    /// It waits on.
    Wait {
        /// Place among those that wait, from 1.
        position: u32,
        /// Why: locations counted by reason.
        refusals: Vec<Refusal>,
        /// When the next window opens, where it waits for one.
        predicted_start: Option<Timestamp>,
        /// Where that is: it may fetch the image before.
        next_location: Option<LocationId>,
        /// What comes nearest.
        nearest_fit: Option<String>,
    },
}

/// Order of preference among locations that can take a job: the smallest is chosen.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score<'a> {
    /// Whether the image must be fetched first.
    cold: bool,
    /// Thousandths in use.
    used_permille: u64,
    /// Breaks ties.
    location: &'a LocationId,
}

/// Decides about every job in the queue, in its order.
pub fn plan_jobs(state: &State, now: Timestamp) -> Vec<JobDecision> {
    let mut rooms = rooms(state);
    let mut waiting = 0;
    let mut decisions = Vec::with_capacity(state.queue.len());
    for job in &state.queue {
        let why = why_not(state, job, &rooms, now);
        let best = why
            .iter()
            .filter(|(_, refusals)| refusals.is_empty())
            .map(|(id, _)| Score {
                cold: !state.locations[*id]
                    .advert
                    .as_ref()
                    .is_some_and(|advert| advert.warm_images.contains(&job.spec.image)),
                used_permille: rooms.get(id).map_or(1_000, Room::used_permille),
                location: id,
            })
            .min()
            .map(|score| score.location.clone());
        let outcome = match best {
            Some(location) => {
                if let Some(room) = rooms.get_mut(&location) {
                    room.deduct(&job.spec.resources);
                }
                JobOutcome::Place(location)
            }
            None => {
                waiting += 1;
                // Only locations that lack nothing but their window will take it when that opens.
                let next = why
                    .iter()
                    .filter(|(_, refusals)| {
                        refusals.iter().all(|refusal| refusal.reason == ReasonCode::OutsideOffPeakWindow)
                    })
                    .filter_map(|(id, _)| Some((opening(&state.locations[*id], now)?, *id)))
                    .min();
                JobOutcome::Wait {
                    position: waiting,
                    refusals: summed(why.iter().map(|(id, refusals)| (*id, refusals.as_slice()))),
                    predicted_start: next.map(|(at, _)| at),
                    next_location: next.map(|(_, id)| id.clone()),
                    nearest_fit: nearest_fit(state, &job.spec.resources, &job.spec.placement, &rooms),
                }
            }
        };
        decisions.push(JobDecision { job: job.name.clone(), outcome });
    }
    decisions
}

/// Why each location doesn't take the job now.
pub(crate) fn why_not<'a>(
    state: &'a State,
    job: &QueuedJob,
    rooms: &BTreeMap<&LocationId, Room>,
    now: Timestamp,
) -> BTreeMap<&'a LocationId, Vec<Refusal>> {
    let refusals = |(id, location): (&'a LocationId, &Location)| {
        let mut refusals = filter::refusals(location, &job.spec.placement, job.spec.isolation);
        if location.liveness == crate::Liveness::Alive {
            if let Some(room) = rooms.get(id) {
                refusals.extend(room.refusals(&job.spec.resources));
            }
            if job.spec.scheduling_policy == SchedulingPolicy::OffPeak && !window_is_open(location, now) {
                refusals.push(outside_window(location, now));
            }
            let refused = job.refused.get(id).filter(|refused| refused.until > now);
            refusals.extend(refused.into_iter().flat_map(|refused| refused.refusals.iter().cloned()));
        }
        (id, refusals)
    };
    state.locations.iter().map(refusals).collect()
}

fn window(location: &Location) -> Option<anyplace_model::OffPeakWindow> {
    location.settings.off_peak.or(location.advert.as_ref()?.off_peak)
}

/// Whether the location is inside its off-peak window.
pub fn window_is_open(location: &Location, now: Timestamp) -> bool {
    match (window(location), &location.zone) {
        (Some(window), Some(zone)) => window.contains(now, zone),
        _ => false,
    }
}

/// When the location's window opens next.
fn opening(location: &Location, now: Timestamp) -> Option<Timestamp> {
    let seconds = window(location)?.opens_in_s(now, location.zone.as_ref()?);
    let whole_second = Timestamp::from_second(now.as_second()).ok()?;
    whole_second.checked_add(i64::try_from(seconds).ok()?.seconds()).ok()
}

fn outside_window(location: &Location, now: Timestamp) -> Refusal {
    let zone = location.advert.as_ref().map_or("", |advert| advert.timezone.as_str());
    let text = match (window(location), opening(location, now)) {
        (None, _) => "it has no off-peak window".into(),
        (Some(window), Some(at)) => {
            format!("its off-peak window is {window} ({zone}) and opens at {at}")
        }
        (Some(_), None) => format!("its time zone `{zone}` is not known"),
    };
    one(ReasonCode::OutsideOffPeakWindow, text)
}
