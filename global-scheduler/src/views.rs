//! What users see, made from what is desired and what is observed.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use anyplace_api::{
    ArrayCounts, CapacityView, DeploymentPhase, DeploymentView, JobView, LocationShare, PrewarmShare,
    PrewarmView, TeamView,
};
use anyplace_global_core::Totals;
use anyplace_model::{
    DeploymentName, Explanation, ImageState, InstancePhase, InstanceStatus, JobName, JobPhase, LocationId,
    LocationRecord, MoveCause, MoveStatus, Prewarm, ReasonCode, Refusal, Team, Workload,
};
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    arrays::index_name,
    records::{DeploymentRecord, JobRecord},
    world::{LocationState, World, refused},
};

/// An instance with its location.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct LocatedInstance {
    /// The location.
    pub(crate) location: LocationId,
    /// The instance.
    #[serde(flatten)]
    pub(crate) status: InstanceStatus,
}

pub(crate) fn deployments(world: &World) -> impl Iterator<Item = DeploymentView> + use<'_> {
    world.deployments.keys().filter_map(|name| deployment(world, name))
}

pub(crate) fn deployment(world: &World, name: &DeploymentName) -> Option<DeploymentView> {
    let record = &world.deployments.get(name)?.value;
    let locations = shares(world, name, record);
    let wanted = record.spec.instances.min;
    let ready = locations.iter().map(|share| share.ready).sum();
    let placed: u32 = locations
        .iter()
        .filter(|share| world.locations.get(&share.location).is_some_and(|it| it.alive != Some(false)))
        .map(|share| {
            let status = world.locations.get(&share.location).and_then(|location| location.status(name));
            let status = status.filter(|status| status.generation == record.generation);
            share.wanted - status.map_or(0, |status| refused(status, share.wanted))
        })
        .sum();
    let outdated = locations
        .iter()
        .flat_map(|share| &share.instances)
        .filter(|instance| instance.ready && instance.generation < record.generation)
        .count();
    let phase = if placed < wanted {
        DeploymentPhase::Pending
    } else if ready < wanted || outdated > 0 {
        // Done only when every instance behind the address runs what was asked for.
        DeploymentPhase::Progressing
    } else {
        DeploymentPhase::Ready
    };
    let mut reasons = if phase == DeploymentPhase::Ready {
        Vec::new()
    } else {
        reasons(world, name, record, phase, &locations)
    };
    if outdated > 0 {
        reasons.push(Refusal {
            reason: ReasonCode::Draining,
            count: u32::try_from(outdated).unwrap_or(u32::MAX),
            message: "instances of an older generation still take traffic".into(),
        });
    }
    Some(DeploymentView {
        name: name.clone(),
        generation: record.generation,
        vip: record.vip,
        vip6: record.vip6,
        created_at: record.created_at,
        phase,
        wanted,
        ready,
        reasons,
        locations,
        spec: record.spec.clone(),
    })
}

fn shares(world: &World, name: &DeploymentName, record: &DeploymentRecord) -> Vec<LocationShare> {
    let placements = world.placements.get(name);
    let share = |(id, location): (&LocationId, &LocationState)| {
        let wanted = placements.and_then(|placements| placements.get(id)).map_or(0, |it| it.count);
        let status = location.status(name);
        let instances: Vec<InstanceStatus> =
            status.into_iter().flat_map(|status| &status.instances).map(|it| seen(location, it)).collect();
        if wanted == 0 && instances.is_empty() {
            return None;
        }
        let ready = instances.iter().filter(|it| it.ready && it.generation == record.generation).count();
        let refusals = match status {
            _ if location.alive == Some(false) => {
                vec![Refusal {
                    reason: ReasonCode::Lost,
                    count: wanted,
                    message: format!("{id} has stopped reporting"),
                }]
            }
            // Where none is refused, they say for what room is being made.
            Some(status) if refused(status, wanted) > 0 || status.refused == 0 => status.refusals.clone(),
            _ => Vec::new(),
        };
        let ready = u32::try_from(ready).unwrap_or(u32::MAX);
        Some(LocationShare { location: id.clone(), wanted, ready, instances, refusals })
    };
    world.locations.iter().filter_map(share).collect()
}

/// An instance of a location that has stopped reporting is lost, whatever was last heard of it.
fn seen(location: &LocationState, instance: &InstanceStatus) -> InstanceStatus {
    let mut instance = instance.clone();
    if !location.is_alive() {
        instance.phase = InstancePhase::Lost;
        instance.ready = false;
    }
    instance
}

fn reasons(
    world: &World,
    name: &DeploymentName,
    record: &DeploymentRecord,
    phase: DeploymentPhase,
    locations: &[LocationShare],
) -> Vec<Refusal> {
    let missing = world.missing.get(name);
    if phase == DeploymentPhase::Pending && missing.is_none() && locations.iter().all(|it| it.wanted == 0) {
        let message = "it has not been planned yet".into();
        let count = record.spec.instances.min;
        return vec![Refusal { reason: ReasonCode::Unscheduled, count, message }];
    }
    let mut by_reason: BTreeMap<ReasonCode, Refusal> = BTreeMap::new();
    let mut add = |refusal: Refusal| {
        by_reason.entry(refusal.reason).and_modify(|sum| sum.count += refusal.count).or_insert(refusal);
    };
    missing.into_iter().flat_map(|missing| missing.refusals.iter().cloned()).for_each(&mut add);
    for share in locations {
        share.refusals.iter().cloned().for_each(&mut add);
        let current = || share.instances.iter().filter(|it| it.generation == record.generation);
        for instance in current().filter(|instance| !instance.ready) {
            add(instance.reason.clone().unwrap_or_else(|| unready(&share.location, instance)));
        }
        let there = u32::try_from(current().count()).unwrap_or(u32::MAX);
        let alive = world.locations.get(&share.location).is_some_and(LocationState::is_alive);
        if alive && share.refusals.is_empty() && there < share.wanted {
            let (count, message) =
                (share.wanted - there, format!("{} has not started them yet", share.location));
            add(Refusal { reason: ReasonCode::AwaitingLocation, count, message });
        }
    }
    let mut reasons: Vec<Refusal> = by_reason.into_values().collect();
    reasons.sort_by_key(|refusal| Reverse(refusal.count));
    reasons
}

fn unready(location: &LocationId, instance: &InstanceStatus) -> Refusal {
    let (reason, what) = match instance.phase {
        InstancePhase::Assigned | InstancePhase::Starting | InstancePhase::Stopping => {
            (ReasonCode::Starting, "is starting")
        }
        InstancePhase::Pulling => (ReasonCode::PullingImage, "is fetching the image"),
        InstancePhase::Running => (ReasonCode::NotReady, "runs and is not ready"),
        InstancePhase::BackOff => (ReasonCode::BackOff, "waits for its next start"),
        InstancePhase::Exited => (ReasonCode::ExitedNonZero, "has ended"),
        InstancePhase::Failed => (ReasonCode::StartFailed, "can't start"),
        InstancePhase::Lost => (ReasonCode::Lost, "is lost"),
    };
    let message = format!("{} on {} in {location} {what}", instance.instance, instance.machine);
    Refusal { reason, count: 1, message }
}

/// All jobs, oldest first.
pub(crate) fn jobs(world: &World) -> Vec<JobView> {
    let mut records: Vec<&JobRecord> = world.jobs.listed().collect();
    records.sort_by_key(|job| job.order);
    records.into_iter().map(|record| job_view(world, record)).collect()
}

pub(crate) fn job(world: &World, name: &JobName) -> Option<JobView> {
    Some(job_view(world, &*world.jobs.find(name)?))
}

/// All indexes of an array.
pub(crate) fn job_indexes(world: &World, array: &JobName) -> Option<Vec<JobView>> {
    let size = world.jobs.array_size(array)?;
    let names = (0..size).filter_map(|index| index_name(array, index));
    Some(names.filter_map(|name| job(world, &name)).collect())
}

/// An array in the form of a job: what is shown of one that waits is that of the next index.
fn array_view(world: &World, record: &JobRecord, counts: ArrayCounts) -> JobView {
    let name = &record.spec.name;
    let waiting = world.waiting.get(name).filter(|_| counts.queued > 0);
    let first_failed = || world.jobs.indexes(name).find(|job| job.phase == JobPhase::Failed);
    let (exit_code, reasons) = match counts.phase() {
        JobPhase::Succeeded => (Some(0), Vec::new()),
        JobPhase::Failed => match first_failed() {
            Some(job) => (job.exit_code, job.reasons.clone()),
            None => (None, record.reasons.clone()),
        },
        _ => (None, waiting.map_or_else(|| record.reasons.clone(), |waiting| waiting.refusals.clone())),
    };
    JobView {
        name: name.clone(),
        phase: counts.phase(),
        created_at: record.created_at,
        attempt: 0,
        queue_position: waiting.map(|waiting| waiting.position),
        predicted_start: waiting.and_then(|waiting| waiting.predicted_start),
        location: None,
        instance: None,
        exit_code,
        reasons,
        preemptions: world.jobs.indexes(name).map(|job| job.preemptions).sum(),
        array: Some(counts),
        index_of: None,
        spec: record.spec.clone(),
    }
}

/// Teams for which something is set, or whose jobs wait or run.
pub(crate) fn teams(world: &World) -> Vec<TeamView> {
    let names: BTreeSet<&Team> = world.teams.keys().chain(world.jobs.teams().keys()).collect();
    names.into_iter().map(|name| team(world, name)).collect()
}

pub(crate) fn team(world: &World, name: &Team) -> TeamView {
    let jobs = world.jobs.teams().get(name).copied().unwrap_or_default();
    let there = world.locations.values().filter(|location| location.alive != Some(false));
    let totals = Totals::new(there.filter_map(|location| Some(&location.observed.as_ref()?.advert)));
    TeamView {
        team: name.clone(),
        settings: world.teams.get(name).cloned().unwrap_or_default(),
        held: jobs.held,
        share_permille: totals.share_permille(&jobs.held),
        placed: jobs.placed,
        queued: jobs.queued,
    }
}

/// The attempt's instance as last reported, or as stored at its end.
pub(crate) fn job_instance(world: &World, record: &JobRecord) -> Option<InstanceStatus> {
    let reported = || {
        let location = world.locations.get(record.location.as_ref()?)?;
        let status = location.observed.as_ref()?.attempts.get(&record.attempt_id())?;
        Some(seen(location, status.instance.as_ref()?))
    };
    if record.is_placed() { reported().or_else(|| record.instance.clone()) } else { record.instance.clone() }
}

fn job_view(world: &World, record: &JobRecord) -> JobView {
    if let Some(counts) = world.jobs.counts(&record.spec.name) {
        return array_view(world, record, counts);
    }
    let waiting = world.waiting.get(&record.spec.name).filter(|_| record.phase == JobPhase::Queued);
    let instance = job_instance(world, record);
    let status = || {
        let location = world.locations.get(record.location.as_ref()?)?;
        location.observed.as_ref()?.attempts.get(&record.attempt_id())
    };
    let reasons = match (record.phase, waiting) {
        (JobPhase::Queued, Some(waiting)) => waiting.refusals.clone(),
        (JobPhase::Queued, None) => {
            let message = "it has not been planned yet".into();
            vec![Refusal { reason: ReasonCode::Unscheduled, count: 1, message }]
        }
        (JobPhase::Starting, _) => match (status(), &instance) {
            (_, Some(instance)) => instance.reason.iter().cloned().collect(),
            (Some(status), None) if !status.refusals.is_empty() => status.refusals.clone(),
            _ => {
                let message = "the location has not started it yet".into();
                vec![Refusal { reason: ReasonCode::AwaitingLocation, count: 1, message }]
            }
        },
        _ => record.reasons.clone(),
    };
    JobView {
        name: record.spec.name.clone(),
        phase: record.phase,
        created_at: record.created_at,
        attempt: record.attempt,
        queue_position: waiting.map(|waiting| waiting.position),
        predicted_start: waiting.and_then(|waiting| waiting.predicted_start),
        location: record.location.clone().filter(|_| record.phase != JobPhase::Queued),
        instance,
        exit_code: record.exit_code,
        reasons,
        preemptions: record.preemptions,
        array: None,
        index_of: record.index_of.clone(),
        spec: record.spec.clone(),
    }
}

/// Why a job is where it is, or isn't.
pub(crate) fn why_job(world: &World, name: &JobName, now: Timestamp) -> Option<Explanation> {
    let view = job(world, name)?;
    if let Some(counts) = view.array {
        return Some(why_array(world, view, counts, now));
    }
    if view.phase == JobPhase::Queued
        && let Some(mut explanation) = anyplace_global_core::explain_job(&world.state(), name, now)
    {
        if view.preemptions > 0 {
            explanation.summary += &format!("; attempts that made way for deployments: {}", view.preemptions);
        }
        return Some(explanation);
    }
    let place = view.location.as_ref().map_or(String::new(), |id| format!(" in {id}"));
    let summary = match view.phase {
        JobPhase::Succeeded | JobPhase::Failed => {
            let code = view.exit_code.map_or("no exit code".into(), |code| format!("exit code {code}"));
            let word = if view.phase == JobPhase::Succeeded { "succeeded" } else { "failed" };
            format!("attempt {} {word}{place} with {code}", view.attempt)
        }
        JobPhase::Cancelled => "a user cancelled it".into(),
        _ => {
            let word = if view.phase == JobPhase::Running { "runs" } else { "is starting" };
            format!("attempt {} {word}{place}", view.attempt)
        }
    };
    let active = matches!(view.phase, JobPhase::Starting | JobPhase::Running);
    Some(Explanation {
        subject: format!("job/{name}"),
        summary,
        wanted: u32::from(active),
        placed: u32::from(active),
        ready: u32::from(view.phase == JobPhase::Running),
        refusals: view.reasons,
        locations: Vec::new(),
        nearest_fit: None,
    })
}

/// Where an array's indexes are, and why the next of those that wait does.
fn why_array(world: &World, view: JobView, counts: ArrayCounts, now: Timestamp) -> Explanation {
    let of_array = |job: &JobRecord| job.index_of.as_ref().is_some_and(|of| of.array == view.name);
    let next = world.jobs.queue().into_iter().find(|job| of_array(job)).map(|job| job.spec.name.clone());
    let next = next.and_then(|name| anyplace_global_core::explain_job(&world.state(), &name, now));
    let mut summary = format!("its indexes are {counts}");
    let (refusals, locations, nearest_fit) = match next {
        Some(next) => {
            summary += &format!("; {}: {}", next.subject, next.summary);
            (next.refusals, next.locations, next.nearest_fit)
        }
        None => (view.reasons, Vec::new(), None),
    };
    Explanation {
        subject: format!("job/{}", view.name),
        summary,
        wanted: counts.unfinished(),
        placed: counts.starting + counts.running,
        ready: counts.running,
        refusals,
        locations,
        nearest_fit,
    }
}

/// Why a deployment is where it is, or isn't.
pub(crate) fn why_deployment(world: &World, name: &DeploymentName, now: Timestamp) -> Option<Explanation> {
    let mut explanation = anyplace_global_core::explain_deployment(&world.state(), name, now)?;
    let view = deployment(world, name)?;
    for share in &mut explanation.locations {
        let observed = world.locations.get(&share.location).and_then(|location| location.observed.as_ref());
        let concerns = |it: &&MoveStatus| it.deployment == *name || it.cause == MoveCause::Room(name.clone());
        let moves = observed.into_iter().flat_map(|observed| &observed.moves).filter(concerns);
        share.moves = moves.cloned().collect();
    }
    explanation.ready = view.ready;
    if explanation.refusals.is_empty() {
        explanation.refusals = view.reasons;
    }
    Some(explanation)
}

/// Every instance that is reported.
pub(crate) fn instances(world: &World) -> Vec<LocatedInstance> {
    let mut instances = Vec::new();
    for (id, location) in &world.locations {
        let Some(observed) = &location.observed else { continue };
        let of_deployments = observed.placements.values().flat_map(|status| &status.instances);
        let of_jobs = observed.attempts.values().filter_map(|status| status.instance.as_ref());
        instances.extend(
            of_deployments
                .chain(of_jobs)
                .map(|status| LocatedInstance { location: id.clone(), status: seen(location, status) }),
        );
    }
    instances
}

/// Instances of a deployment, with their locations.
pub(crate) fn instances_of(world: &World, name: &DeploymentName) -> Vec<LocatedInstance> {
    let workload = Workload::Deployment(name.clone());
    instances(world).into_iter().filter(|instance| instance.status.workload == workload).collect()
}

/// All locations that have joined.
pub(crate) fn locations(world: &World) -> Vec<LocationRecord> {
    world.locations.keys().filter_map(|id| location(world, id)).collect()
}

pub(crate) fn location(world: &World, id: &LocationId) -> Option<LocationRecord> {
    let location = world.location(id)?;
    let observed = location.observed.as_ref();
    Some(LocationRecord {
        location: id.clone(),
        alive: location.is_alive(),
        last_report_ms: observed
            .map(|observed| u64::try_from(observed.at.elapsed().as_millis()).unwrap_or(u64::MAX)),
        settings: location.settings.clone(),
        advert: observed.map(|observed| observed.advert.clone()),
        advertise: observed.map(|observed| observed.advertise.clone()),
    })
}

/// Capacity of all locations that have reported to this process.
/// Wishes for warm images, and how far they are where anyone reports.
pub(crate) fn prewarms(world: &World) -> impl Iterator<Item = PrewarmView> + use<'_> {
    world.prewarms.values().map(|wish| prewarm(world, wish))
}

pub(crate) fn prewarm(world: &World, wish: &Prewarm) -> PrewarmView {
    let covered = world.locations.iter().filter(|(id, location)| wish.covers(id) && location.is_alive());
    let locations: Vec<PrewarmShare> = covered
        .filter_map(|(id, location)| {
            let machines = location.observed.as_ref()?.prewarms.get(&wish.image).cloned().unwrap_or_default();
            Some(PrewarmShare { location: id.clone(), machines })
        })
        .collect();
    let states = || locations.iter().flat_map(|share| share.machines.values());
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    PrewarmView {
        spec: wish.clone(),
        warm: count(states().filter(|state| **state == ImageState::Warm).count()),
        machines: count(states().count()),
        locations,
    }
}

pub(crate) fn capacity(world: &World, now: Timestamp) -> Vec<CapacityView> {
    let view = |(id, location): (&LocationId, &LocationState)| {
        let observed = location.observed.as_ref()?;
        let instances: usize = observed.placements.values().map(|status| status.instances.len()).sum();
        let jobs = observed.attempts.values().filter(|status| status.instance.is_some()).count();
        Some(CapacityView {
            location: id.clone(),
            alive: location.is_alive(),
            withdrawn: location.settings.withdrawn,
            draining: location.settings.draining,
            off_peak_now: anyplace_global_core::is_off_peak(
                &world.planned_location(location),
                world.job_limits,
                now,
            ),
            instances: u32::try_from(instances + jobs).unwrap_or(u32::MAX),
            advert: observed.advert.clone(),
        })
    };
    world.locations.iter().filter_map(view).collect()
}
