//! Jobs: submit, cancel, delete, attempts and their ends.
//!
//! An attempt is fenced by its number: only the location that has the job's present attempt is listened to, and the
//! end of an attempt is written once, on condition that neither the job nor the attempt has changed since.

use anyplace_api::{ErrorCode, EventSeverity, JobView, Problem};
use anyplace_global_core::RefusedUntil;
use anyplace_model::{
    InstancePhase, InstanceStatus, JobName, JobPhase, JobSpec, LocationId, ReasonCode, Refusal,
};
use anyplace_service::Failure;
use jiff::Timestamp;

use crate::{
    app::{App, Writer},
    arrays::{check_name, last_attempt},
    batch::Batch,
    deployments::invalid,
    observe::REFUSAL_KEPT,
    queue::admit,
    records::{AttemptRecord, JobRecord, Outcome, Tombstone},
    views,
    world::World,
};

/// Jobs that are kept, ended ones included. Each is read at the start and shown in each list.
const MAX_JOBS: usize = 20_000;

pub(crate) fn unknown_job(name: &JobName) -> Failure {
    Problem::new(ErrorCode::NotFound, format!("there is no job {name}")).fix("see `anyplace jobs get`").into()
}

/// How an attempt stands, from what is observed.
enum Standing {
    Unchanged,
    Running(Box<InstanceStatus>),
    Ended { outcome: Outcome, instance: Option<Box<InstanceStatus>>, reasons: Vec<Refusal> },
}

impl App {
    /// Takes a job: with its first attempt in the same write, where a location has room for it now; else it waits in
    /// the queue. With a key that a job was submitted with before, that job is the answer.
    pub(crate) async fn submit(
        &self,
        spec: JobSpec,
        idempotency_key: Option<String>,
    ) -> Result<JobView, Failure> {
        spec.validate().map_err(invalid)?;
        let name = spec.name.clone();
        let writer = self.writer().await;
        let (batch, placed) = {
            let world = self.world();
            if let Some(earlier) = idempotency_key.as_ref().and_then(|key| world.jobs.of_key(key)) {
                return again(&world, earlier, &spec);
            }
            check_name(&world, &spec)?;
            if world.jobs.kept() + spec.array.unwrap_or(1) as usize > MAX_JOBS {
                return Err(Problem::new(
                    ErrorCode::LimitExceeded,
                    format!("{MAX_JOBS} jobs are kept at most"),
                )
                .fix("delete ended ones with `anyplace jobs delete NAME`")
                .into());
            }
            let now = Timestamp::now();
            admit(&world, &spec, now)?;
            let mut batch = Batch::default();
            let what =
                spec.array.map_or("submitted".into(), |size| format!("submitted, with {size} indexes"));
            batch.event(EventSeverity::Normal, format!("job/{name}"), what);
            // Which indexes of an array start is planned once it is there.
            let location = if spec.array.is_none() { self.room_for(&world, &spec) } else { None };
            let attempt = last_attempt(&world, &name);
            let job = JobRecord {
                spec,
                idempotency_key,
                created_at: now,
                order: world.jobs.next_order(),
                phase: JobPhase::Queued,
                attempt,
                tries: 0,
                preemptions: 0,
                location: None,
                instance: None,
                exit_code: None,
                reasons: Vec::new(),
                index_of: None,
            };
            let placed = location.is_some();
            match location {
                Some(location) => place(&mut batch, &world, &job, location, now)?,
                None => batch.put_job(&world, job)?,
            }
            (batch, placed)
        };
        writer.commit(batch).await?;
        if placed {
            tracing::debug!(job = %name, "placed as it came");
            self.publish();
            self.wake.notify_one();
        } else if let Err(Failure(problem)) = self.reconcile(&writer).await {
            tracing::error!(%problem, "the plan after a submission failed; it is tried again");
        }
        views::job(&self.world(), &name).ok_or_else(|| unknown_job(&name))
    }

    /// Ends a job. Nothing changes where it was cancelled before.
    pub(crate) async fn cancel(&self, name: &JobName) -> Result<JobView, Failure> {
        let writer = self.writer().await;
        let is_array = self.world().jobs.array_size(name).is_some();
        if is_array {
            return self.cancel_array(&writer, name).await;
        }
        let batch = {
            let world = self.world();
            let job = world.jobs.find(name).ok_or_else(|| unknown_job(name))?;
            let mut batch = Batch::default();
            match job.phase {
                JobPhase::Cancelled => {}
                JobPhase::Succeeded | JobPhase::Failed => {
                    return Err(Problem::new(ErrorCode::Conflict, format!("job {name} has ended already"))
                        .fix(format!("see `anyplace jobs get {name}`"))
                        .into());
                }
                JobPhase::Queued => {
                    let reasons = vec![cancelled()];
                    batch.event(EventSeverity::Normal, format!("job/{name}"), "cancelled");
                    let job = job.into_owned();
                    batch.put_job(&world, JobRecord { phase: JobPhase::Cancelled, reasons, ..job })?;
                }
                JobPhase::Starting | JobPhase::Running => {
                    end(&mut batch, &world, &job, Outcome::Cancelled, None, vec![cancelled()])?;
                }
            }
            batch
        };
        writer.commit(batch).await?;
        self.publish();
        self.wake.notify_one();
        views::job(&self.world(), name).ok_or_else(|| unknown_job(name))
    }

    /// Forgets a job that has ended.
    pub(crate) async fn delete_job(&self, name: &JobName) -> Result<(), Failure> {
        let writer = self.writer().await;
        let is_array = self.world().jobs.array_size(name).is_some();
        if is_array {
            self.delete_array(&writer, name).await?;
            self.publish();
            return Ok(());
        }
        let batch = {
            let world = self.world();
            let job = world.jobs.find(name).ok_or_else(|| unknown_job(name))?;
            if let Some(of) = &job.index_of {
                let text = format!("{name} is an index of the array {}", of.array);
                return Err(Problem::new(ErrorCode::Conflict, text)
                    .fix(format!("run `anyplace jobs delete {}` for all of it", of.array))
                    .into());
            }
            if !job.has_ended() {
                return Err(Problem::new(ErrorCode::Conflict, format!("job {name} has not ended"))
                    .fix(format!("run `anyplace jobs cancel {name}` first"))
                    .into());
            }
            let mut batch = Batch::default();
            let stone = Tombstone { last: u64::from(job.attempt), deleted_at: Timestamp::now() };
            batch.delete_job(&world, name);
            batch.put_tombstone(tombstone(name), Some(stone))?;
            batch.event(EventSeverity::Normal, format!("job/{name}"), "deleted");
            batch
        };
        writer.commit(batch).await?;
        self.publish();
        Ok(())
    }

    /// Moves placed jobs on by what their locations report.
    pub(crate) async fn follow_attempts(&self, writer: &Writer<'_>) -> Result<(), Failure> {
        let placed: Vec<JobName> = {
            let world = self.world();
            world.jobs.placed().map(|job| job.spec.name.clone()).collect()
        };
        for name in placed {
            let (batch, refused) = {
                let world = self.world();
                let Some(job) = world.jobs.get(&name).map(|stored| &stored.value) else { continue };
                let mut batch = Batch::default();
                let mut refused = None;
                match standing(&world, job) {
                    Standing::Unchanged => {}
                    Standing::Running(instance) => {
                        let message = format!("attempt {} runs on {}", job.attempt, instance.machine);
                        tell(&mut batch, &world, job, EventSeverity::Normal, message);
                        let instance = Some(*instance);
                        batch.put_job(
                            &world,
                            JobRecord { phase: JobPhase::Running, instance, ..job.clone() },
                        )?;
                    }
                    Standing::Ended { outcome, instance, reasons } => {
                        if outcome == Outcome::Refused {
                            refused = job.location.clone().zip(Some(reasons.clone()));
                        }
                        end(&mut batch, &world, job, outcome, instance.map(|it| *it), reasons)?;
                    }
                }
                (batch, refused)
            };
            writer.commit(batch).await?;
            if let Some((id, refusals)) = refused
                && let Ok(until) = Timestamp::now().checked_add(REFUSAL_KEPT)
                && let Some(location) = self.world().locations.get_mut(&id)
            {
                location.refused_jobs.insert(name, RefusedUntil { until, refusals });
            }
        }
        Ok(())
    }
}

/// Answers a submission whose key has a job already.
fn again(world: &World, earlier: &JobRecord, spec: &JobSpec) -> Result<JobView, Failure> {
    let name = &earlier.spec.name;
    if earlier.spec != *spec {
        let text = format!("the key belongs to job {name}, which was submitted with another spec");
        return Err(Problem::new(ErrorCode::Conflict, text)
            .field("Idempotency-Key")
            .fix("send a new key with a new job, or the same spec with the same key")
            .into());
    }
    views::job(world, name).ok_or_else(|| unknown_job(name))
}

/// Gives a job its next attempt.
pub(crate) fn place(
    batch: &mut Batch,
    world: &World,
    job: &JobRecord,
    location: LocationId,
    now: Timestamp,
) -> anyhow::Result<()> {
    let next = JobRecord {
        phase: JobPhase::Starting,
        // An index without a record knows only its array's.
        attempt: job.attempt.max(last_attempt(world, &job.spec.name)) + 1,
        tries: job.tries + 1,
        location: Some(location.clone()),
        instance: None,
        reasons: Vec::new(),
        ..job.clone()
    };
    let message = format!("attempt {} goes to {location}", next.attempt);
    tell(batch, world, job, EventSeverity::Normal, message);
    let attempt = AttemptRecord { location, placed_at: now, ended_at: None, outcome: None, exit_code: None };
    batch.put_attempt(world, next.attempt_id(), attempt)?;
    batch.put_job(world, next)
}

/// What happened to a job. Of an array only the first failure is told: others would drive out everything else.
pub(crate) fn tell(
    batch: &mut Batch,
    world: &World,
    job: &JobRecord,
    severity: EventSeverity,
    message: String,
) {
    match &job.index_of {
        None => batch.event(severity, format!("job/{}", job.spec.name), message),
        Some(of) => {
            let failed = world.jobs.counts(&of.array).map_or(0, |counts| counts.failed);
            if severity == EventSeverity::Warning && failed == 0 {
                batch.event(severity, format!("job/{}", of.array), format!("index {}: {message}", of.index));
            }
        }
    }
}

pub(crate) fn tombstone(name: &JobName) -> String {
    format!("jobs/{name}")
}

pub(crate) fn cancelled() -> Refusal {
    Refusal { reason: ReasonCode::Cancelled, count: 1, message: "cancelled by a user".into() }
}

fn standing(world: &World, job: &JobRecord) -> Standing {
    let Some((id, location)) = job.location.as_ref().and_then(|id| world.locations.get_key_value(id)) else {
        return Standing::Unchanged;
    };
    if location.alive == Some(false) {
        let message = format!("{id} stopped reporting while it had attempt {}", job.attempt);
        let reasons = vec![Refusal { reason: ReasonCode::Lost, count: 1, message }];
        return Standing::Ended { outcome: Outcome::Lost, instance: None, reasons };
    }
    // Only the present attempt, and only from the location that has it: what others report of it is too late.
    let Some(status) = location.observed.as_ref().and_then(|it| it.attempts.get(&job.attempt_id())) else {
        return Standing::Unchanged;
    };
    let Some(instance) = &status.instance else {
        let refused = !status.refusals.is_empty()
            && status.refusals.iter().all(|refusal| is_of_capacity(refusal.reason));
        return if refused {
            let reasons = status.refusals.clone();
            Standing::Ended { outcome: Outcome::Refused, instance: None, reasons }
        } else {
            Standing::Unchanged
        };
    };
    let boxed = Box::new(instance.clone());
    let because =
        |reason, message: String| instance.reason.clone().unwrap_or(Refusal { reason, count: 1, message });
    if let Some(reason) = instance.reason.clone().filter(|reason| reason.reason == ReasonCode::Preempted) {
        // It may still be ending. What it says from now on is late.
        return Standing::Ended { outcome: Outcome::Preempted, instance: Some(boxed), reasons: vec![reason] };
    }
    match instance.phase {
        InstancePhase::Running if job.phase != JobPhase::Running => Standing::Running(boxed),
        InstancePhase::Exited if instance.exit_code == Some(0) && instance.reason.is_none() => {
            Standing::Ended { outcome: Outcome::Succeeded, instance: Some(boxed), reasons: Vec::new() }
        }
        InstancePhase::Exited => {
            let status = instance.exit_code.map_or("no status".into(), |code| format!("status {code}"));
            let reason = because(ReasonCode::ExitedNonZero, format!("it ended with {status}"));
            Standing::Ended { outcome: Outcome::Failed, instance: Some(boxed), reasons: vec![reason] }
        }
        InstancePhase::Failed => {
            let reason = because(ReasonCode::StartFailed, "it could not start".into());
            Standing::Ended { outcome: Outcome::Failed, instance: Some(boxed), reasons: vec![reason] }
        }
        InstancePhase::Lost => {
            let reason = because(ReasonCode::Lost, format!("machine {} stopped reporting", instance.machine));
            Standing::Ended { outcome: Outcome::Lost, instance: Some(boxed), reasons: vec![reason] }
        }
        _ => Standing::Unchanged,
    }
}

/// Whether a location that gives this reason has no room, rather than not having started yet.
const fn is_of_capacity(reason: ReasonCode) -> bool {
    matches!(
        reason,
        ReasonCode::PlacementConstraint
            | ReasonCode::Draining
            | ReasonCode::Lost
            | ReasonCode::InsufficientCpu
            | ReasonCode::InsufficientMemory
            | ReasonCode::InsufficientDisk
            | ReasonCode::NoGpu
            | ReasonCode::NoGpuModel
            | ReasonCode::InsufficientGpu
            | ReasonCode::IsolationUnavailable
            | ReasonCode::NoCgroups
            | ReasonCode::NoAddress
            | ReasonCode::NoMachines
    )
}

/// Ends the present attempt: the job ends with it, or goes back into the queue.
pub(crate) fn end(
    batch: &mut Batch,
    world: &World,
    job: &JobRecord,
    outcome: Outcome,
    instance: Option<InstanceStatus>,
    reasons: Vec<Refusal>,
) -> anyhow::Result<()> {
    let again = match outcome {
        Outcome::Refused | Outcome::Preempted => true,
        Outcome::Failed | Outcome::Lost => job.tries < job.spec.max_attempts,
        Outcome::Succeeded | Outcome::Cancelled | Outcome::Missed => false,
    };
    let phase = match outcome {
        _ if again => JobPhase::Queued,
        Outcome::Succeeded => JobPhase::Succeeded,
        Outcome::Cancelled => JobPhase::Cancelled,
        Outcome::Failed | Outcome::Lost | Outcome::Refused | Outcome::Preempted | Outcome::Missed => {
            JobPhase::Failed
        }
    };
    let exit_code = instance.as_ref().and_then(|instance| instance.exit_code);
    let why: String = reasons.iter().map(|reason| format!(": {}", reason.message)).collect();
    let then = if again { "; it is tried again" } else { "" };
    let (severity, what) = match outcome {
        Outcome::Succeeded => (EventSeverity::Normal, "succeeded"),
        Outcome::Cancelled => (EventSeverity::Normal, "was cancelled"),
        Outcome::Refused => (EventSeverity::Normal, "found no room"),
        Outcome::Preempted => (EventSeverity::Normal, "ended"),
        Outcome::Failed => (EventSeverity::Warning, "failed"),
        Outcome::Lost => (EventSeverity::Warning, "was lost"),
        Outcome::Missed => (EventSeverity::Warning, "came too late"),
    };
    let message = format!("attempt {} {what}{why}{then}", job.attempt);
    // Of an index, what isn't its end is not told.
    let severity = if again && job.index_of.is_some() { EventSeverity::Normal } else { severity };
    tell(batch, world, job, severity, message);
    let counts = !matches!(outcome, Outcome::Refused | Outcome::Preempted);
    if !counts {
        // Nothing bounds how many there may be while a job waits for room that lasts.
        batch.delete_attempt(world, job.attempt_id());
    } else if let Some(attempt) = world.attempts.get(&job.attempt_id()) {
        let ended = AttemptRecord {
            ended_at: Some(Timestamp::now()),
            outcome: Some(outcome),
            exit_code,
            ..attempt.value.clone()
        };
        batch.put_attempt(world, job.attempt_id(), ended)?;
    }
    let record = JobRecord {
        phase,
        tries: if counts { job.tries } else { job.tries.saturating_sub(1) },
        preemptions: job.preemptions.saturating_add(u32::from(outcome == Outcome::Preempted)),
        instance: instance.or_else(|| job.instance.clone()),
        exit_code: exit_code.or(job.exit_code),
        reasons,
        ..job.clone()
    };
    batch.put_job(world, record)
}
