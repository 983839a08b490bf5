//! The queue of jobs: who may enter it, who gets an attempt, and who waited for too long.

use std::collections::{BTreeMap, VecDeque};

use anyplace_api::{ErrorCode, EventSeverity, Problem};
use anyplace_global_core::{JobOutcome, QueuedJob, plan_jobs};
use anyplace_model::{Held, JobName, JobPhase, JobSpec, LocationId, ReasonCode, Refusal};
use anyplace_service::Failure;
use jiff::Timestamp;

use crate::{
    app::{App, Writer},
    arrays::parse_index,
    batch::Batch,
    jobs::{end, place, tell},
    records::{JobRecord, Outcome},
    views,
    world::{Waiting, World},
};

impl App {
    /// Where a job that isn't there yet would go now.
    pub(crate) fn room_for(&self, world: &World, spec: &JobSpec) -> Option<LocationId> {
        // As in `decide`: locations that are only slow to report look as if they had nothing.
        if !*self.settled.borrow() {
            return None;
        }
        let mut state = world.state();
        state.queue.push(QueuedJob { name: spec.name.clone(), spec: spec.clone(), refused: BTreeMap::new() });
        let decisions = plan_jobs(&state, Timestamp::now());
        let own = decisions.into_iter().find(|decision| decision.job == spec.name)?;
        match own.outcome {
            JobOutcome::Place(location) => Some(location),
            JobOutcome::Wait { .. } => None,
        }
    }

    /// Gives queued jobs their next attempt where one is possible.
    pub(crate) async fn place_jobs(&self, writer: &Writer<'_>) -> Result<(), Failure> {
        let state = self.world().state();
        let now = Timestamp::now();
        let (mut waiting, mut placed) = (BTreeMap::new(), VecDeque::new());
        for decision in plan_jobs(&state, now) {
            match decision.outcome {
                JobOutcome::Wait { position, refusals, predicted_start, next_location, nearest_fit: _ } => {
                    let wait = Waiting { position, refusals, predicted_start, next_location };
                    let array = parse_index(&decision.job).map(|(array, _)| array);
                    if let Some(array) = array.filter(|name| self.world().jobs.array_size(name).is_some()) {
                        // Of the first that waits, as it comes by position.
                        waiting.entry(array).or_insert_with(|| wait.clone());
                    }
                    waiting.insert(decision.job, wait);
                }
                JobOutcome::Place(location) => placed.push_back((decision.job, location)),
            }
        }
        while !placed.is_empty() {
            let batch = {
                let world = self.world();
                let mut batch = Batch::default();
                while !batch.is_full()
                    && let Some((name, location)) = placed.pop_front()
                {
                    let Some(job) = world.jobs.find(&name) else { continue };
                    place(&mut batch, &world, &job, location, now)?;
                }
                batch
            };
            writer.commit(batch).await?;
        }
        self.world().waiting = waiting;
        Ok(())
    }

    /// Ends the jobs that haven't started by their deadline.
    pub(crate) async fn end_missed(&self, writer: &Writer<'_>) -> Result<(), Failure> {
        let now = Timestamp::now();
        let missed: Vec<JobName> = {
            let world = self.world();
            let until = world.jobs.deadlines().take_while(|(deadline, _)| *deadline <= now);
            until.map(|(_, name)| name.clone()).collect()
        };
        for name in missed {
            let batch = {
                let world = self.world();
                let Some(job) = world.jobs.get(&name).map(|stored| &stored.value) else { continue };
                let Some(deadline) = job.spec.deadline else { continue };
                let instance = views::job_instance(&world, job);
                let started = instance.as_ref().and_then(|instance| instance.started_at);
                if job.is_placed() && started.is_some_and(|at| at <= deadline) {
                    // Its end or its start is about to be taken.
                    continue;
                }
                let message = format!("its deadline was {deadline}, and it hadn't started");
                let reasons = vec![Refusal { reason: ReasonCode::DeadlinePassed, count: 1, message }];
                let mut batch = Batch::default();
                if job.is_placed() {
                    end(&mut batch, &world, job, Outcome::Missed, instance, reasons)?;
                } else {
                    tell(&mut batch, &world, job, EventSeverity::Warning, missed_event(&reasons));
                    batch.put_job(&world, JobRecord { phase: JobPhase::Failed, reasons, ..job.clone() })?;
                }
                batch
            };
            writer.commit(batch).await?;
        }
        Ok(())
    }
}

fn missed_event(reasons: &[Refusal]) -> String {
    reasons.iter().map(|reason| format!("failed: {}", reason.message)).collect()
}

/// Refuses a job that could never start, and one more than its team may have in the queue.
pub(crate) fn admit(world: &World, spec: &JobSpec, now: Timestamp) -> Result<(), Failure> {
    if let Some(deadline) = spec.deadline.filter(|deadline| *deadline <= now) {
        return Err(Problem::new(ErrorCode::InvalidRequest, format!("{deadline} has passed"))
            .field("deadline")
            .fix("write a later one, or leave it out")
            .into());
    }
    let team = &spec.team;
    let Some(settings) = world.teams.get(team) else { return Ok(()) };
    if let Some((field, wanted, quota)) = settings.exceeded(Held::default(), &spec.resources) {
        let text =
            format!("{wanted} asked for, and the quota of team {team} is {quota}: it could never start");
        let flag = if field == "gpu" { "gpus" } else { field };
        return Err(Problem::new(ErrorCode::LimitExceeded, text)
            .field(format!("resources.{field}"))
            .fix(format!("ask for less, or let an admin run `anyplace team set {team} --max-{flag} ...`"))
            .into());
    }
    let (queued, more) =
        (world.jobs.teams().get(team).map_or(0, |jobs| jobs.queued), spec.array.unwrap_or(1));
    if let Some(max) = settings.max_queued.filter(|max| queued.saturating_add(more) > *max) {
        let text = format!("team {team} has {queued} jobs in the queue, and its quota is {max}");
        return Err(Problem::new(ErrorCode::LimitExceeded, text)
            .field("team")
            .fix(format!(
                "submit it once others have started (`anyplace jobs get`), or let an admin run `anyplace team set \
                 {team} --max-queued ...`"
            ))
            .into());
    }
    Ok(())
}
