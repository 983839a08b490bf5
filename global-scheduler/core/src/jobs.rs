//! The queue of jobs. A job that fits nowhere doesn't hold up those behind it: a wish for a GPU that nobody has would
//! stop all work.

use std::{cell::Cell, collections::BTreeMap, rc::Rc};

use anyplace_model::{Held, JobName, LocationId, ReasonCode, Refusal, SchedulingPolicy, Team};
use jiff::{Timestamp, ToSpan as _};

use crate::{
    JobLimits, Location, QueuedJob, State,
    explain::{nearest_fit, summed},
    filter,
    order::{Order, held, over_quota},
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
        /// Place among those that wait, from 1: they would start in this order, were there room.
        position: u32,
        /// Why: locations counted by reason.
        refusals: Vec<Refusal>,
        /// When the next window opens that has room for it beside those before it, where it waits for one.
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

/// Why a job is placed nowhere now.
#[derive(Debug, Default)]
struct Misfit<'a> {
    refusals: Vec<Refusal>,
    nearest_fit: Option<String>,
    /// Locations that lack nothing but their window, by when it opens.
    openings: Vec<(Timestamp, &'a LocationId)>,
    /// How many of them are full by then. What waits only adds to that.
    full: Cell<usize>,
}

/// Decides about every job in the queue: first those that are placed, in the order in which they got their turn, then
/// those that wait, by position.
pub fn plan_jobs(state: &State, now: Timestamp) -> Vec<JobDecision> {
    let mut rooms = rooms(state);
    let mut held = held(state);
    let mut order = Order::new(state, &held, 0..state.queue.len());
    let mut decisions = Vec::with_capacity(state.queue.len());
    let mut waiting = BTreeMap::new();
    // Rooms only shrink in a plan: what has found none for a job finds none for others like it.
    let mut alike: BTreeMap<String, Rc<Misfit<'_>>> = BTreeMap::new();
    while let Some(index) = order.next() {
        let job = &state.queue[index];
        let at_once = has_missed(job, now).or_else(|| over_quota(state, job, held.get(&job.spec.team)));
        let shape = shape(job);
        let misfit = match (at_once, alike.get(&shape)) {
            (Some(refusal), _) => Err(Rc::new(Misfit { refusals: vec![refusal], ..Misfit::default() })),
            (None, Some(misfit)) if job.refused.is_empty() => Err(misfit.clone()),
            (None, _) => fit(state, job, &rooms, now).map_err(Rc::new),
        };
        match misfit {
            Ok(location) => {
                if let Some(room) = rooms.get_mut(location) {
                    room.deduct(&job.spec.resources);
                }
                order.hold(job);
                held.entry(&job.spec.team).or_default().add(&job.spec.resources);
                let outcome = JobOutcome::Place(location.clone());
                decisions.push(JobDecision { job: job.name.clone(), outcome });
            }
            Err(misfit) => {
                if job.refused.is_empty() && !misfit.refusals.iter().any(is_its_own) {
                    alike.entry(shape).or_insert_with(|| misfit.clone());
                }
                waiting.insert(index, misfit);
            }
        }
    }
    wait(state, &waiting, held, rooms, &mut decisions);
    decisions
}

/// Numbers those that wait, each as if those before it had started, and predicts when they do.
fn wait<'a>(
    state: &'a State,
    waiting: &BTreeMap<usize, Rc<Misfit<'a>>>,
    mut held: BTreeMap<&'a Team, Held>,
    mut rooms: BTreeMap<&'a LocationId, Room>,
    decisions: &mut Vec<JobDecision>,
) {
    let mut order = Order::new(state, &held, waiting.keys().copied());
    let mut position = 0;
    while let Some(index) = order.next() {
        let (job, misfit) = (&state.queue[index], &waiting[&index]);
        order.hold(job);
        position += 1;
        let next = predicted(state, job, misfit, held.get(&job.spec.team), &mut rooms);
        if next.is_some() {
            held.entry(&job.spec.team).or_default().add(&job.spec.resources);
        }
        let outcome = JobOutcome::Wait {
            position,
            refusals: misfit.refusals.clone(),
            predicted_start: next.map(|(at, _)| at),
            next_location: next.map(|(_, id)| id.clone()),
            nearest_fit: misfit.nearest_fit.clone(),
        };
        decisions.push(JobDecision { job: job.name.clone(), outcome });
    }
}

/// The first window that opens and has room for the job, which it takes.
fn predicted<'a>(
    state: &State,
    job: &QueuedJob,
    misfit: &Misfit<'a>,
    held: Option<&Held>,
    rooms: &mut BTreeMap<&'a LocationId, Room>,
) -> Option<(Timestamp, &'a LocationId)> {
    if over_quota(state, job, held).is_some() {
        return None;
    }
    for (at, id) in misfit.openings.iter().skip(misfit.full.get()) {
        if job.spec.deadline.is_some_and(|deadline| *at >= deadline) {
            return None;
        }
        let (room, wanted) = (rooms.get_mut(id)?, &job.spec.resources);
        if room.fits(wanted) && state.job_limits.headroom(room, wanted).is_none() {
            room.deduct(wanted);
            return Some((*at, id));
        }
        misfit.full.set(misfit.full.get() + 1);
    }
    None
}

/// What decides where a job fits, and when.
fn shape(job: &QueuedJob) -> String {
    let spec = &job.spec;
    format!("{:?}", (&spec.resources, &spec.placement, spec.isolation, spec.scheduling_policy))
}

/// Whether a refusal says nothing of others like it.
const fn is_its_own(refusal: &Refusal) -> bool {
    matches!(refusal.reason, ReasonCode::OverQuota | ReasonCode::DeadlinePassed)
}

/// Why the job may not start any more; nothing while it may.
fn has_missed(job: &QueuedJob, now: Timestamp) -> Option<Refusal> {
    let deadline = job.spec.deadline.filter(|deadline| *deadline <= now)?;
    Some(one(ReasonCode::DeadlinePassed, format!("its deadline was {deadline}, and it hadn't started")))
}

/// Where the job goes now.
fn fit<'a>(
    state: &'a State,
    job: &QueuedJob,
    rooms: &BTreeMap<&LocationId, Room>,
    now: Timestamp,
) -> Result<&'a LocationId, Misfit<'a>> {
    let why = why_not(state, job, rooms, now);
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
        .min();
    if let Some(score) = best {
        return Ok(score.location);
    }
    // Only locations that lack nothing but their window will take it when that opens.
    let mut openings: Vec<_> = why
        .iter()
        .filter(|(_, refusals)| {
            refusals.iter().all(|refusal| refusal.reason == ReasonCode::OutsideOffPeakWindow)
        })
        .filter_map(|(id, _)| Some((opening(&state.locations[*id], now)?, *id)))
        .collect();
    openings.sort();
    Err(Misfit {
        refusals: summed(why.iter().map(|(id, refusals)| (*id, refusals.as_slice()))),
        nearest_fit: nearest_fit(state, &job.spec.resources, &job.spec.placement, rooms),
        openings,
        full: Cell::new(0),
    })
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
            let (room, wanted) = (rooms.get(id), &job.spec.resources);
            if let Some(room) = room {
                refusals.extend(room.refusals(wanted));
                // What doesn't fit at all is told by that.
                refusals.extend(state.job_limits.headroom(room, wanted).filter(|_| room.fits(wanted)));
            }
            let is_idle = || room.is_some_and(|room| state.job_limits.is_idle(room, wanted));
            if job.spec.scheduling_policy == SchedulingPolicy::OffPeak
                && !window_is_open(location, now)
                && !is_idle()
            {
                let above = room.map_or(String::new(), |room| state.job_limits.above(room, wanted));
                refusals.push(outside_window(location, now, &above));
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

/// Whether the location is off-peak: inside its window, or with little of it reserved.
pub fn is_off_peak(location: &Location, limits: JobLimits, now: Timestamp) -> bool {
    window_is_open(location, now) || location.advert.as_ref().is_some_and(|advert| limits.is_idle_now(advert))
}

/// Whether the location is inside its off-peak window.
fn window_is_open(location: &Location, now: Timestamp) -> bool {
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

fn outside_window(location: &Location, now: Timestamp, above: &str) -> Refusal {
    let zone = location.advert.as_ref().map_or("", |advert| advert.timezone.as_str());
    let text = match (window(location), opening(location, now)) {
        (None, _) => "it has no off-peak window".to_string(),
        (Some(window), Some(at)) => {
            format!("its off-peak window is {window} ({zone}) and opens at {at}")
        }
        (Some(_), None) => format!("its time zone `{zone}` is not known"),
    };
    one(ReasonCode::OutsideOffPeakWindow, text + above)
}
