//! Indexes against looking at all jobs.

use anyplace_seed::Seed;

use super::*;

/// A job, an array of three, or an index of one.
fn random(seed: &mut Seed) -> JobRecord {
    let number = seed.below(6);
    let team = seed.pick(&["ants", "bees"]);
    let (name, array, index_of) = match seed.below(3) {
        0 => (format!("j{number}"), None, None),
        1 => (format!("a{}", number % 2), Some(3), None),
        _ => {
            let (array, index) = (format!("a{}", number % 2), number % 3);
            let of = serde_json::json!({"array": array, "index": index});
            (format!("{array}-{index}"), None, Some(of))
        }
    };
    let mut spec = serde_json::json!({"kind": "Job", "name": name, "image": "work:1", "team": team,
        "resources": {"cpu": format!("{}m", 1 + seed.below(9))}, "array": array});
    if seed.one_in(2) {
        spec["deadline"] = format!("2026-11-24T1{}:00:00Z", seed.below(9)).into();
    }
    let phases = ["queued", "starting", "running", "succeeded", "failed", "cancelled"];
    let phase =
        if array.is_some() { seed.pick(&["queued", "failed", "cancelled"]) } else { seed.pick(&phases) };
    serde_json::from_value(serde_json::json!({
        "spec": spec, "idempotency_key": index_of.is_none().then_some(name), "created_at": "2026-11-24T12:00:00Z",
        "order": seed.below(40), "phase": phase, "attempt": 1, "tries": 1, "location": null, "instance": null,
        "exit_code": null, "reasons": [], "index_of": index_of
    }))
    .unwrap()
}

/// Every job and index, by the rules: an index without a record is as its array.
fn expected(records: &BTreeMap<JobName, JobRecord>) -> Vec<JobRecord> {
    let mut all: Vec<JobRecord> =
        records.values().filter(|record| record.spec.array.is_none()).cloned().collect();
    for array in records.values() {
        for index in 0..array.spec.array.unwrap_or(0) {
            let name: JobName = format!("{}-{index}", array.spec.name).parse().unwrap();
            if !records.contains_key(&name) {
                let mut job = JobRecord { idempotency_key: None, ..array.clone() };
                job.spec.name = name;
                job.spec.array = None;
                job.spec.env.insert("ANYPLACE_JOB_INDEX".into(), index.to_string());
                job.spec.env.insert("ANYPLACE_JOB_INDEXES".into(), "3".into());
                job.index_of = Some(anyplace_api::ArrayIndex { array: array.spec.name.clone(), index });
                all.push(job);
            }
        }
    }
    all
}

fn check(table: &JobTable, records: &BTreeMap<JobName, JobRecord>) {
    let jobs = expected(records);
    let mut queued: Vec<&JobRecord> = jobs.iter().filter(|job| job.phase == JobPhase::Queued).collect();
    queued.sort_by_key(|job| (job.order, job.index_of.as_ref().map(|of| of.index), &job.spec.name));
    let found = table.queue();
    assert!(found.iter().map(AsRef::as_ref).eq(queued), "{found:#?}");
    let mut placed: Vec<&JobRecord> = jobs.iter().filter(|job| job.is_placed()).collect();
    placed.sort_by_key(|job| &job.spec.name);
    assert!(table.placed().eq(placed));
    for job in &jobs {
        assert_eq!(table.find(&job.spec.name).as_deref(), Some(job));
    }
    // Where indexes wait without a record, their deadline is their array's.
    let mut deadlines = BTreeSet::new();
    for job in jobs.iter().filter(|job| matches!(job.phase, JobPhase::Queued | JobPhase::Starting)) {
        let of = job.index_of.as_ref().map(|of| &of.array);
        let name = if records.contains_key(&job.spec.name) { &job.spec.name } else { of.unwrap() };
        deadlines.extend(job.spec.deadline.map(|at| (at, name.clone())));
    }
    assert!(table.deadlines().eq(&deadlines));
    for team in ["ants", "bees"] {
        let mut sum = TeamJobs::default();
        for job in jobs.iter().filter(|job| job.spec.team.as_str() == team) {
            match job.phase {
                JobPhase::Queued => sum.queued += 1,
                JobPhase::Starting | JobPhase::Running => {
                    sum.placed += 1;
                    sum.held.cpu.0 += job.spec.resources.cpu.0;
                    sum.held.memory.0 += job.spec.resources.memory.0;
                }
                _ => {}
            }
        }
        assert_eq!(table.teams().get(team).copied().unwrap_or_default(), sum);
    }
    let mut kept = 0;
    for record in records.values() {
        assert_eq!(table.get(&record.spec.name).map(|stored| &stored.value), Some(record));
        assert!(record.order < table.next_order());
        kept += record.spec.array.unwrap_or(u32::from(record.index_of.is_none())) as usize;
        if let Some(key) = &record.idempotency_key {
            assert_eq!(table.of_key(key), Some(record));
        }
        if let Some(size) = record.spec.array {
            let of = |job: &&JobRecord| job.index_of.as_ref().is_some_and(|of| of.array == record.spec.name);
            let count = |phase| jobs.iter().filter(of).filter(|job| job.phase == phase).count() as u32;
            let counts = ArrayCounts {
                size,
                queued: count(JobPhase::Queued),
                starting: count(JobPhase::Starting),
                running: count(JobPhase::Running),
                succeeded: count(JobPhase::Succeeded),
                failed: count(JobPhase::Failed),
                cancelled: count(JobPhase::Cancelled),
            };
            assert_eq!(table.counts(&record.spec.name), Some(counts));
        }
    }
    assert_eq!(table.kept(), kept);
    let mut orphans: Vec<&JobName> = records
        .values()
        .filter(|job| job.index_of.as_ref().is_some_and(|of| !records.contains_key(&of.array)))
        .map(|job| &job.spec.name)
        .collect();
    orphans.sort();
    assert!(table.orphans().eq(orphans));
    let left = |job: &&JobRecord| {
        let array = job.index_of.as_ref().and_then(|of| records.get(&of.array));
        !job.has_ended() && array.is_some_and(|array| array.phase == JobPhase::Cancelled)
    };
    assert!(table.left_of_cancelled_arrays().eq(records.values().filter(left)));
}

#[test]
fn indexes_say_what_looking_at_all_jobs_says() {
    let mut seed = Seed::from_env();
    let (mut table, mut records) = (JobTable::default(), BTreeMap::new());
    for _ in 0..4_000 {
        let job = random(&mut seed);
        if seed.one_in(4) {
            table.remove(&job.spec.name);
            records.remove(&job.spec.name);
        } else {
            records.insert(job.spec.name.clone(), job.clone());
            table.insert(Stored { value: job, revision: 1 });
        }
        check(&table, &records);
    }
}
