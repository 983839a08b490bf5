//! All jobs in memory, with indexes for what is asked at each submission and in each reconciliation: most of the jobs
//! that are kept have ended, and nobody should look at those.

use std::collections::{BTreeMap, BTreeSet};

use anyplace_model::{Held, JobName, JobPhase, Team};
use jiff::Timestamp;

use crate::{records::JobRecord, world::Stored};

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

/// All jobs by name.
#[derive(Debug, Default)]
pub(crate) struct JobTable {
    all: BTreeMap<JobName, Stored<JobRecord>>,
    by_key: BTreeMap<String, JobName>,
    /// Those that wait, by their place among all submissions.
    queued: BTreeSet<(u64, JobName)>,
    placed: BTreeSet<JobName>,
    /// Deadlines of those that haven't started.
    deadlines: BTreeSet<(Timestamp, JobName)>,
    teams: BTreeMap<Team, TeamJobs>,
    next_order: u64,
}

impl JobTable {
    pub(crate) fn get(&self, name: &JobName) -> Option<&Stored<JobRecord>> {
        self.all.get(name)
    }

    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    /// By name.
    pub(crate) fn values(&self) -> impl Iterator<Item = &JobRecord> {
        self.all.values().map(|stored| &stored.value)
    }

    /// The one that was submitted with this key.
    pub(crate) fn of_key(&self, key: &str) -> Option<&JobRecord> {
        self.get(self.by_key.get(key)?).map(|stored| &stored.value)
    }

    /// Those that wait for an attempt, oldest submission first.
    pub(crate) fn queued(&self) -> impl Iterator<Item = &JobRecord> {
        self.queued.iter().filter_map(|(_, name)| Some(&self.get(name)?.value))
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

    pub(crate) fn insert(&mut self, stored: Stored<JobRecord>) {
        let name = stored.value.spec.name.clone();
        self.remove(&name);
        let job = &stored.value;
        self.next_order = self.next_order.max(job.order.saturating_add(1));
        if let Some(key) = &job.idempotency_key {
            self.by_key.insert(key.clone(), name.clone());
        }
        if job.phase == JobPhase::Queued {
            self.queued.insert((job.order, name.clone()));
        }
        if job.is_placed() {
            self.placed.insert(name.clone());
        }
        if let Some(deadline) = unstarted_deadline(job) {
            self.deadlines.insert((deadline, name.clone()));
        }
        if !job.has_ended() {
            let team = self.teams.entry(job.spec.team.clone()).or_default();
            if job.is_placed() {
                team.placed += 1;
                team.held.add(&job.spec.resources);
            } else {
                team.queued += 1;
            }
        }
        self.all.insert(name, stored);
    }

    pub(crate) fn remove(&mut self, name: &JobName) {
        let Some(Stored { value: job, .. }) = self.all.remove(name) else { return };
        if let Some(key) = &job.idempotency_key {
            self.by_key.remove(key);
        }
        self.queued.remove(&(job.order, name.clone()));
        self.placed.remove(name);
        if let Some(deadline) = unstarted_deadline(&job) {
            self.deadlines.remove(&(deadline, name.clone()));
        }
        if let Some(team) = self.teams.get_mut(&job.spec.team).filter(|_| !job.has_ended()) {
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
    }
}

/// The deadline by which it still has to start.
fn unstarted_deadline(job: &JobRecord) -> Option<Timestamp> {
    job.spec.deadline.filter(|_| matches!(job.phase, JobPhase::Queued | JobPhase::Starting))
}

#[cfg(test)]
mod tests {
    use anyplace_seed::Seed;

    use super::*;

    fn random(seed: &mut Seed) -> JobRecord {
        let mut spec = serde_json::json!({"kind": "Job", "name": format!("j{}", seed.below(12)), "image": "work:1",
            "team": seed.pick(&["ants", "bees"]), "resources": {"cpu": format!("{}m", 1 + seed.below(9))}});
        if seed.one_in(2) {
            spec["deadline"] = format!("2026-11-24T1{}:00:00Z", seed.below(9)).into();
        }
        let phase = seed.pick(&["queued", "starting", "running", "succeeded", "failed", "cancelled"]);
        let name = spec["name"].as_str().unwrap().to_string();
        serde_json::from_value(serde_json::json!({
            "spec": spec, "idempotency_key": seed.one_in(2).then_some(name), "created_at": "2026-11-24T12:00:00Z",
            "order": seed.below(40), "phase": phase, "attempt": 1, "tries": 1, "location": null, "instance": null,
            "exit_code": null, "reasons": []
        }))
        .unwrap()
    }

    /// What the indexes should say, by looking at all jobs.
    fn check(table: &JobTable) {
        let all: Vec<&JobRecord> = table.values().collect();
        let mut queued: Vec<_> = all.iter().filter(|job| job.phase == JobPhase::Queued).collect();
        queued.sort_by_key(|job| (job.order, &job.spec.name));
        assert!(table.queued().eq(queued.into_iter().copied()));
        assert!(table.placed().eq(all.iter().copied().filter(|job| job.is_placed())));
        let unstarted = |job: &&&JobRecord| matches!(job.phase, JobPhase::Queued | JobPhase::Starting);
        let mut deadlines: Vec<_> = all
            .iter()
            .filter(unstarted)
            .filter_map(|job| Some((job.spec.deadline?, job.spec.name.clone())))
            .collect();
        deadlines.sort();
        assert!(table.deadlines().eq(deadlines.iter()));
        for job in &all {
            if let Some(key) = &job.idempotency_key {
                assert_eq!(table.of_key(key), Some(*job));
            }
            assert!(job.order < table.next_order());
        }
        for team in ["ants", "bees"] {
            let mut expected = TeamJobs::default();
            for job in all.iter().filter(|job| job.spec.team.as_str() == team) {
                match job.phase {
                    JobPhase::Queued => expected.queued += 1,
                    JobPhase::Starting | JobPhase::Running => {
                        expected.placed += 1;
                        expected.held.cpu.0 += job.spec.resources.cpu.0;
                        expected.held.memory.0 += job.spec.resources.memory.0;
                    }
                    _ => {}
                }
            }
            assert_eq!(table.teams().get(team).copied().unwrap_or_default(), expected);
        }
    }

    #[test]
    fn indexes_say_what_looking_at_all_jobs_says() {
        let mut seed = Seed::from_env();
        let mut table = JobTable::default();
        for _ in 0..2_000 {
            if seed.one_in(4) {
                table.remove(&format!("j{}", seed.below(12)).parse().unwrap());
            } else {
                table.insert(Stored { value: random(&mut seed), revision: 1 });
            }
            check(&table);
        }
    }
}
