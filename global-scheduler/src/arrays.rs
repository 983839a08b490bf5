//! Arrays of jobs: one submission, and an index for each of its jobs.
//!
//! An array has one record, with its spec. Index 7 of the array `sweep` is the job `sweep-7`, with attempts and retries
//! of its own. It gets a record of its own with its first attempt, or when it is cancelled; until then, what its array's
//! record says is so for it: it waits, or was ended with all that still waited. So a submission is one write, whatever
//! the size.

use anyplace_api::{ArrayIndex, ErrorCode, EventSeverity, JobView, Problem};
use anyplace_model::{JobName, JobPhase, JobSpec};
use anyplace_service::Failure;
use jiff::Timestamp;

use crate::{
    app::{App, Writer},
    batch::Batch,
    jobs::{cancelled, end, tombstone, unknown_job},
    records::{JobRecord, Outcome, Tombstone},
    views,
    world::World,
};

/// Indexes that are changed in one write: each is up to three keys, and a write has at most 1,024.
const AT_ONCE: usize = 100;
/// Tells a container which index it is.
const INDEX_VARIABLE: &str = "ANYPLACE_JOB_INDEX";
/// Tells a container how many indexes there are.
const SIZE_VARIABLE: &str = "ANYPLACE_JOB_INDEXES";

/// The job of an index.
pub(crate) fn index_name(array: &JobName, index: u32) -> Option<JobName> {
    // Its length was checked with the spec.
    format!("{array}-{index}").parse().ok()
}

/// The array and the index that a job's name would have.
pub(crate) fn parse_index(name: &JobName) -> Option<(JobName, u32)> {
    let (array, digits) = name.as_str().rsplit_once('-')?;
    let index: u32 = digits.parse().ok()?;
    (index.to_string() == digits).then_some((array.parse().ok()?, index))
}

/// The record of an index that has none of its own yet.
pub(crate) fn waiting_index(array: &JobRecord, index: u32) -> Option<JobRecord> {
    let size = array.spec.array?;
    let name = index_name(&array.spec.name, index)?;
    let mut spec = JobSpec { name, array: None, ..array.spec.clone() };
    spec.env.insert(INDEX_VARIABLE.into(), index.to_string());
    spec.env.insert(SIZE_VARIABLE.into(), size.to_string());
    let of = ArrayIndex { array: array.spec.name.clone(), index };
    Some(JobRecord { spec, idempotency_key: None, index_of: Some(of), ..array.clone() })
}

/// The highest attempt of jobs of this name that are gone, also as an index of an array.
pub(crate) fn last_attempt(world: &World, name: &JobName) -> u32 {
    let last = |name: &JobName| world.tombstones.get(&tombstone(name)).map_or(0, |stone| stone.last);
    let of_array = parse_index(name).map_or(0, |(array, _)| last(&array));
    u32::try_from(last(name).max(of_array)).unwrap_or(u32::MAX)
}

/// Refuses a name that is taken: by a job, by an index of an array, or, for an array, any of its indexes'.
pub(crate) fn check_name(world: &World, spec: &JobSpec) -> Result<(), Failure> {
    let name = &spec.name;
    let taken = |text: String, other: &JobName| -> Result<(), Failure> {
        Err(Problem::new(ErrorCode::AlreadyExists, text)
            .field("name")
            .fix(format!("choose another name, or run `anyplace jobs delete {other}`"))
            .into())
    };
    if world.jobs.get(name).is_some() {
        return taken(format!("there is a job {name} already"), name);
    }
    if let Some((array, index)) = parse_index(name)
        && world.jobs.array_size(&array).is_some_and(|size| index < size)
    {
        return taken(format!("{name} is index {index} of the array {array}"), &array);
    }
    let size = spec.array.unwrap_or(0);
    match (0..size).filter_map(|index| index_name(name, index)).find(|index| world.jobs.get(index).is_some())
    {
        Some(other) => taken(format!("there is a job {other}, and an index would have that name"), &other),
        None => Ok(()),
    }
}

impl App {
    /// Ends everything of an array that hasn't ended.
    pub(crate) async fn cancel_array(&self, writer: &Writer<'_>, name: &JobName) -> Result<JobView, Failure> {
        let batch = {
            let world = self.world();
            let array = &world.jobs.get(name).ok_or_else(|| unknown_job(name))?.value;
            let counts = world.jobs.counts(name).unwrap_or_default();
            let mut batch = Batch::default();
            if counts.unfinished() == 0 && counts.cancelled == 0 {
                return Err(Problem::new(
                    ErrorCode::Conflict,
                    format!("all jobs of the array {name} have ended already"),
                )
                .fix(format!("see `anyplace jobs ls {name} --indexes`"))
                .into());
            }
            if array.phase != JobPhase::Cancelled {
                batch.event(EventSeverity::Normal, format!("job/{name}"), "cancelled");
                let reasons = vec![cancelled()];
                batch.put_job(&world, JobRecord { phase: JobPhase::Cancelled, reasons, ..array.clone() })?;
            }
            batch
        };
        writer.commit(batch).await?;
        self.end_cancelled_arrays(writer).await?;
        self.publish();
        self.wake.notify_one();
        views::job(&self.world(), name).ok_or_else(|| unknown_job(name))
    }

    /// Ends what is left of cancelled arrays: the intent is one write, what follows from it may be many.
    pub(crate) async fn end_cancelled_arrays(&self, writer: &Writer<'_>) -> Result<(), Failure> {
        loop {
            let batch = {
                let world = self.world();
                let mut batch = Batch::default();
                for job in world.jobs.left_of_cancelled_arrays().take(AT_ONCE) {
                    if job.is_placed() {
                        end(&mut batch, &world, job, Outcome::Cancelled, None, vec![cancelled()])?;
                    } else {
                        let (phase, reasons) = (JobPhase::Cancelled, vec![cancelled()]);
                        batch.put_job(&world, JobRecord { phase, reasons, ..job.clone() })?;
                    }
                }
                batch
            };
            if batch.is_empty() {
                return Ok(());
            }
            writer.commit(batch).await?;
        }
    }

    /// Forgets an array of which everything has ended: first the array, so that no index of it can wait again.
    pub(crate) async fn delete_array(&self, writer: &Writer<'_>, name: &JobName) -> Result<(), Failure> {
        let batch = {
            let world = self.world();
            let counts = world.jobs.counts(name).unwrap_or_default();
            if counts.unfinished() > 0 {
                let text = format!("{} jobs of the array {name} have not ended", counts.unfinished());
                return Err(Problem::new(ErrorCode::Conflict, text)
                    .fix(format!("run `anyplace jobs cancel {name}` first"))
                    .into());
            }
            let indexes = world.jobs.indexes(name).map(|job| job.attempt);
            let last = indexes.max().unwrap_or(0).max(last_attempt(&world, name));
            let mut batch = Batch::default();
            batch.delete_job(&world, name);
            let stone = Tombstone { last: u64::from(last), deleted_at: Timestamp::now() };
            batch.put_tombstone(tombstone(name), Some(stone))?;
            batch.event(EventSeverity::Normal, format!("job/{name}"), "deleted");
            batch
        };
        writer.commit(batch).await?;
        self.drop_orphans(writer).await
    }

    /// Forgets indexes whose array was deleted.
    pub(crate) async fn drop_orphans(&self, writer: &Writer<'_>) -> Result<(), Failure> {
        loop {
            let batch = {
                let world = self.world();
                let mut batch = Batch::default();
                let orphans: Vec<JobName> = world.jobs.orphans().take(AT_ONCE).cloned().collect();
                orphans.iter().for_each(|name| batch.delete_job(&world, name));
                batch
            };
            if batch.is_empty() {
                return Ok(());
            }
            writer.commit(batch).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_an_index_only_as_it_would_be_written() {
        let parse = |name: &str| {
            let (array, index) = parse_index(&name.parse().unwrap())?;
            Some((array.to_string(), index))
        };
        assert_eq!(parse("sweep-0"), Some(("sweep".into(), 0)));
        assert_eq!(parse("sweep-1-17"), Some(("sweep-1".into(), 17)));
        for other in ["sweep", "sweep-01", "sweep-x", "sweep-99999999999", "7"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
