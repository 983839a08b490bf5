//! All jobs in memory, with indexes for what is asked at each submission and in each reconciliation: most of the jobs
//! that are kept have ended, and nobody should look at those.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use anyplace_api::ArrayCounts;
use anyplace_model::{Held, JobName, JobPhase, Team};
use jiff::Timestamp;

use crate::{
    arrays::{index_name, parse_index, waiting_index},
    records::JobRecord,
    world::Stored,
};

/// What a team has in the queue and beyond it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TeamJobs {
    /// Jobs that wait for an attempt.
    pub(crate) queued: u32,
    /// Jobs with an attempt in a location.
    pub(crate) placed: u32,
    /// What those hold.
    pub(crate) held: Held,
}

/// The indexes of an array that have records of their own.
#[derive(Debug, Default)]
struct Indexes {
    there: BTreeSet<u32>,
    counts: ArrayCounts,
}

/// All jobs by name.
#[derive(Debug, Default)]
pub(crate) struct JobTable {
    all: BTreeMap<JobName, Stored<JobRecord>>,
    by_key: BTreeMap<String, JobName>,
    queued: BTreeSet<JobName>,
    placed: BTreeSet<JobName>,
    /// Arrays of which indexes wait that have no record yet.
    waiting_arrays: BTreeSet<JobName>,
    /// Deadlines of those that haven't started.
    deadlines: BTreeSet<(Timestamp, JobName)>,
    teams: BTreeMap<Team, TeamJobs>,
    /// By array; also of arrays that are gone.
    indexes: BTreeMap<JobName, Indexes>,
    next_order: u64,
    /// Jobs that are kept: each index of an array is one.
    kept: usize,
}

impl JobTable {
    /// A job, array or index that has a record of its own.
    pub(crate) fn get(&self, name: &JobName) -> Option<&Stored<JobRecord>> {
        self.all.get(name)
    }

    /// A job, an array or an index, with a record of its own or not.
    pub(crate) fn find(&self, name: &JobName) -> Option<Cow<'_, JobRecord>> {
        if let Some(stored) = self.all.get(name) {
            return Some(Cow::Borrowed(&stored.value));
        }
        let (array, index) = parse_index(name)?;
        let array = &self.all.get(&array)?.value;
        array.spec.array.filter(|size| index < *size)?;
        waiting_index(array, index).map(Cow::Owned)
    }

    /// Jobs that are kept, each index of an array counted as one.
    pub(crate) const fn kept(&self) -> usize {
        self.kept
    }

    /// Jobs and arrays, by name.
    pub(crate) fn listed(&self) -> impl Iterator<Item = &JobRecord> {
        self.all.values().map(|stored| &stored.value).filter(|job| job.index_of.is_none())
    }

    /// Jobs, arrays and indexes of which something has yet to run.
    pub(crate) fn unfinished(&self) -> impl Iterator<Item = &JobRecord> {
        let names = self.queued.iter().chain(&self.placed).chain(&self.waiting_arrays);
        names.filter_map(|name| Some(&self.get(name)?.value))
    }

    /// The one that was submitted with this key.
    pub(crate) fn of_key(&self, key: &str) -> Option<&JobRecord> {
        self.get(self.by_key.get(key)?).map(|stored| &stored.value)
    }

    /// Those that wait for an attempt, oldest submission first; indexes of an array in their order.
    pub(crate) fn queue(&self) -> Vec<Cow<'_, JobRecord>> {
        let records = self.queued.iter().filter_map(|name| Some(Cow::Borrowed(&self.get(name)?.value)));
        let waiting = self.waiting_arrays.iter().flat_map(|name| self.indexes_without_record(name));
        let mut queue: Vec<_> = records.chain(waiting.map(Cow::Owned)).collect();
        queue.sort_by_cached_key(|job| {
            let index = job.index_of.as_ref().map(|of| of.index);
            (job.order, index, job.spec.name.clone())
        });
        queue
    }

    fn indexes_without_record(&self, array: &JobName) -> impl Iterator<Item = JobRecord> {
        let array = self.get(array).map(|stored| &stored.value);
        let there = array.and_then(|array| self.indexes.get(&array.spec.name)).map(|indexes| &indexes.there);
        let size = array.and_then(|array| array.spec.array).unwrap_or(0);
        (0..size)
            .filter(move |index| !there.is_some_and(|there| there.contains(index)))
            .filter_map(move |index| waiting_index(array?, index))
    }

    /// Those with an attempt in a location, by name.
    pub(crate) fn placed(&self) -> impl Iterator<Item = &JobRecord> {
        self.placed.iter().filter_map(|name| Some(&self.get(name)?.value))
    }

    /// Deadlines of those that haven't started, soonest first.
    pub(crate) fn deadlines(&self) -> impl Iterator<Item = &(Timestamp, JobName)> {
        self.deadlines.iter()
    }

    /// Teams with jobs that haven't ended.
    pub(crate) fn teams(&self) -> &BTreeMap<Team, TeamJobs> {
        &self.teams
    }

    /// The place of the next submission.
    pub(crate) const fn next_order(&self) -> u64 {
        self.next_order
    }

    /// How many indexes the array has; none where it is no array.
    pub(crate) fn array_size(&self, name: &JobName) -> Option<u32> {
        self.get(name)?.value.spec.array
    }

    /// How many of an array's indexes are where in their life.
    pub(crate) fn counts(&self, name: &JobName) -> Option<ArrayCounts> {
        let array = &self.get(name)?.value;
        let size = array.spec.array?;
        let mut counts = self.indexes.get(name).map(|indexes| indexes.counts).unwrap_or_default();
        counts.size = size;
        *counts.of(array.phase) += self.without_record(array);
        Some(counts)
    }

    /// Indexes of an array that have records of their own, in their order.
    pub(crate) fn indexes(&self, array: &JobName) -> impl Iterator<Item = &JobRecord> {
        let there = self.indexes.get_key_value(array).into_iter();
        let names = there.flat_map(|(array, indexes)| {
            indexes.there.iter().filter_map(move |index| index_name(array, *index))
        });
        names.filter_map(|name| Some(&self.get(&name)?.value))
    }

    /// Indexes that haven't ended although their array was cancelled.
    pub(crate) fn left_of_cancelled_arrays(&self) -> impl Iterator<Item = &JobRecord> {
        let left = self.indexes.iter().filter(|(name, indexes)| {
            indexes.counts.unfinished() > 0
                && self.get(name).is_some_and(|array| array.value.phase == JobPhase::Cancelled)
        });
        left.flat_map(|(name, _)| self.indexes(name)).filter(|job| !job.has_ended())
    }

    /// Indexes whose array is gone.
    pub(crate) fn orphans(&self) -> impl Iterator<Item = &JobName> {
        let gone = self.indexes.keys().filter(|name| self.get(name).is_none());
        gone.flat_map(|name| self.indexes(name)).map(|job| &job.spec.name)
    }

    pub(crate) fn insert(&mut self, stored: Stored<JobRecord>) {
        let job = &stored.value;
        let name = job.spec.name.clone();
        self.remove(&name);
        self.next_order = self.next_order.max(job.order.saturating_add(1));
        let array = job.index_of.as_ref().map(|of| of.array.clone());
        if let Some(key) = &job.idempotency_key {
            self.by_key.insert(key.clone(), name.clone());
        }
        if let Some(of) = &job.index_of {
            self.leave_array(&of.array);
            let indexes = self.indexes.entry(of.array.clone()).or_default();
            indexes.there.insert(of.index);
            *indexes.counts.of(job.phase) += 1;
        }
        match job.spec.array {
            Some(size) => self.kept += size as usize,
            None => {
                self.kept += usize::from(job.index_of.is_none());
                self.count(job, name.clone());
            }
        }
        let is_array = job.spec.array.is_some();
        self.all.insert(name.clone(), stored);
        if is_array {
            self.enter_array(&name);
        }
        if let Some(array) = array {
            self.enter_array(&array);
        }
    }

    pub(crate) fn remove(&mut self, name: &JobName) {
        self.leave_array(name);
        let Some(Stored { value: job, .. }) = self.all.remove(name) else { return };
        if let Some(key) = &job.idempotency_key {
            self.by_key.remove(key);
        }
        if let Some(size) = job.spec.array {
            self.kept -= size as usize;
            return;
        }
        self.kept -= usize::from(job.index_of.is_none());
        self.uncount(&job);
        if let Some(of) = &job.index_of {
            self.leave_array(&of.array);
            if let Some(indexes) = self.indexes.get_mut(&of.array) {
                indexes.there.remove(&of.index);
                *indexes.counts.of(job.phase) -= 1;
                if indexes.there.is_empty() {
                    self.indexes.remove(&of.array);
                }
            }
            self.enter_array(&of.array);
        }
    }

    fn count(&mut self, job: &JobRecord, name: JobName) {
        if job.has_ended() {
            return;
        }
        if let Some(deadline) = unstarted_deadline(job) {
            self.deadlines.insert((deadline, name.clone()));
        }
        let team = self.teams.entry(job.spec.team.clone()).or_default();
        if job.is_placed() {
            team.placed += 1;
            team.held.add(&job.spec.resources);
            self.placed.insert(name);
        } else {
            team.queued += 1;
            self.queued.insert(name);
        }
    }

    fn uncount(&mut self, job: &JobRecord) {
        let name = &job.spec.name;
        self.queued.remove(name);
        self.placed.remove(name);
        if let Some(deadline) = unstarted_deadline(job) {
            self.deadlines.remove(&(deadline, name.clone()));
        }
        if job.has_ended() {
            return;
        }
        let Some(team) = self.teams.get_mut(&job.spec.team) else { return };
        if job.is_placed() {
            team.placed -= 1;
            team.held.remove(&job.spec.resources);
        } else {
            team.queued -= 1;
        }
        if *team == TeamJobs::default() {
            self.teams.remove(&job.spec.team);
        }
    }

    /// How many indexes have no record of their own.
    fn without_record(&self, array: &JobRecord) -> u32 {
        let there = self.indexes.get(&array.spec.name).map_or(0, |indexes| indexes.there.len());
        array.spec.array.unwrap_or(0).saturating_sub(u32::try_from(there).unwrap_or(u32::MAX))
    }

    /// Counts the array's indexes that wait without a record.
    fn enter_array(&mut self, name: &JobName) {
        let Some(array) = self.all.get(name).map(|stored| &stored.value) else { return };
        let waiting = self.without_record(array);
        if array.phase != JobPhase::Queued || waiting == 0 {
            return;
        }
        if let Some(deadline) = array.spec.deadline {
            self.deadlines.insert((deadline, name.clone()));
        }
        self.teams.entry(array.spec.team.clone()).or_default().queued += waiting;
        self.waiting_arrays.insert(name.clone());
    }

    /// Takes back what [`Self::enter_array`] counted.
    fn leave_array(&mut self, name: &JobName) {
        if !self.waiting_arrays.remove(name) {
            return;
        }
        let Some(array) = self.all.get(name).map(|stored| &stored.value) else { return };
        let waiting = self.without_record(array);
        if let Some(deadline) = array.spec.deadline {
            self.deadlines.remove(&(deadline, name.clone()));
        }
        if let Some(team) = self.teams.get_mut(&array.spec.team) {
            team.queued -= waiting;
            if *team == TeamJobs::default() {
                self.teams.remove(&array.spec.team);
            }
        }
    }
}

/// The deadline by which it still has to start.
fn unstarted_deadline(job: &JobRecord) -> Option<Timestamp> {
    job.spec.deadline.filter(|_| matches!(job.phase, JobPhase::Queued | JobPhase::Starting))
}

#[cfg(test)]
mod tests;
