//! Arrays: one submission of many jobs.

use std::collections::BTreeMap;

use anyplace_api::{ArrayCounts, ClientError, ErrorCode, JobView, Problem};
use anyplace_model::{JobName, JobPhase, JobSpec, LocationDesired, ReasonCode, TeamSettings};
use serde_json::{Value, json};

use crate::support::{Bed, FakeLocation, eventually, job};

fn array(size: u32, more: Value) -> JobSpec {
    let mut spec = json!({"name": "sweep", "array": size, "resources": {"cpu": "1"}});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    job(spec)
}

fn name(name: &str) -> JobName {
    name.parse().unwrap()
}

async fn sweep(bed: &Bed) -> JobView {
    bed.admin.job(&name("sweep")).await.unwrap()
}

async fn counts(bed: &Bed) -> ArrayCounts {
    sweep(bed).await.array.unwrap()
}

async fn refused(bed: &Bed, spec: &JobSpec) -> Problem {
    match bed.admin.submit_job(spec).await.unwrap_err() {
        ClientError::Refused(problem) => problem,
        error => panic!("{error}"),
    }
}

fn env(location: &FakeLocation, attempt: &str) -> BTreeMap<String, String> {
    match &location.script.lock().unwrap().desired[&format!("attempts/{attempt}")] {
        LocationDesired::Attempt { spec, .. } => {
            assert_eq!(spec.array, None);
            spec.env.clone()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_index_runs_with_retries_of_its_own() {
    let mut bed = Bed::start().await;
    let ams = bed.location("ams").await;
    let spec = array(6, json!({"max_attempts": 2, "env": {"A": "b"}}));
    bed.admin.submit_job_once(&spec, "key-1").await.unwrap();
    // There is room for four, in the order of the indexes.
    let started = ["sweep-0/1", "sweep-1/1", "sweep-2/1", "sweep-3/1"];
    eventually("four run", || async { counts(&bed).await.running == 4 }).await;
    assert_eq!(ams.attempts(), started);
    let expected = [("A", "b"), ("ANYPLACE_JOB_INDEX", "3"), ("ANYPLACE_JOB_INDEXES", "6")];
    let expected = expected.map(|(name, value)| (name.to_string(), value.to_string()));
    assert_eq!(env(&ams, "sweep-3/1"), BTreeMap::from(expected));

    // One line in the list, each index on request, also those that wait; the same after a restart.
    let listed = bed.admin.jobs().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].array.unwrap().to_string(), "6: 2 queued, 4 running");
    assert_eq!((listed[0].phase, listed[0].queue_position), (JobPhase::Running, Some(1)));
    let indexes = bed.admin.job_indexes(&name("sweep")).await.unwrap();
    let phases: Vec<JobPhase> = indexes.iter().map(|view| view.phase).collect();
    assert_eq!(phases, [[JobPhase::Running; 4].as_slice(), &[JobPhase::Queued; 2]].concat());
    let last = bed.admin.job(&name("sweep-5")).await.unwrap();
    assert_eq!((&last, last.queue_position), (&indexes[5], Some(2)));
    assert_eq!(last.index_of.as_ref().map(|of| (of.array.as_str(), of.index)), Some(("sweep", 5)));
    let why = bed.admin.why_job(&name("sweep")).await.unwrap();
    assert!(
        why.summary.starts_with("its indexes are 6: 2 queued, 4 running; job/sweep-4: it waits"),
        "{why:?}"
    );
    assert_eq!(why.refusals[0].reason, ReasonCode::InsufficientCpu);
    assert_eq!(bed.admin.why_job(&name("sweep-5")).await.unwrap().refusals, why.refusals);
    assert_eq!(bed.admin.submit_job_once(&spec, "key-1").await.unwrap().created_at, listed[0].created_at);
    bed.restart().await;
    eventually("they still run", || async { counts(&bed).await.running == 4 }).await;
    assert_eq!(ams.attempts(), started);

    // One fails, and is tried once more; its successor isn't affected.
    ams.script.lock().unwrap().exits.insert("sweep-2".into(), 3);
    eventually("it has failed for good", || async { counts(&bed).await.failed == 1 }).await;
    let failed = bed.admin.job(&name("sweep-2")).await.unwrap();
    assert_eq!((failed.phase, failed.attempt, failed.exit_code), (JobPhase::Failed, 2, Some(3)));
    ams.script.lock().unwrap().exit_code = Some(0);
    eventually("all have ended", || async { sweep(&bed).await.phase == JobPhase::Failed }).await;
    let view = sweep(&bed).await;
    assert_eq!(view.array.unwrap().to_string(), "6: 5 succeeded, 1 failed");
    assert_eq!((view.exit_code, view.reasons[0].reason), (Some(3), ReasonCode::ExitedNonZero));
    let events = bed.admin.events(Some("job/sweep")).await.unwrap();
    let told: Vec<&str> = events.iter().map(|event| event.message.as_str()).collect();
    assert_eq!(told[0], "submitted, with 6 indexes");
    assert!(told.len() == 2 && told[1].starts_with("index 2: attempt 2 failed"), "{told:?}");
    bed.restart().await;
    assert_eq!(sweep(&bed).await, view);

    // Only the whole is forgotten; then names and key are free, and attempts are counted on.
    let error = bed.admin.delete_job(&name("sweep-2")).await.unwrap_err();
    assert!(error.to_string().contains("run `anyplace jobs delete sweep`"), "{error}");
    bed.admin.delete_job(&name("sweep")).await.unwrap();
    assert!(bed.admin.jobs().await.unwrap().is_empty());
    for gone in ["sweep", "sweep-2", "sweep-5"] {
        let error = bed.admin.job(&name(gone)).await.unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::NotFound), "{gone}");
    }
    ams.script.lock().unwrap().exit_code = None;
    bed.admin.submit_job_once(&array(1, json!({})), "key-1").await.unwrap();
    bed.admin.submit_job(&job(json!({"name": "sweep-5"}))).await.unwrap();
    eventually("they run", || async { ams.attempts() == ["sweep-0/3", "sweep-5/3"] }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_index_or_all_are_cancelled() {
    let mut bed = Bed::start().await;
    let ams = bed.location("ams").await;
    bed.admin.submit_job(&array(6, json!({}))).await.unwrap();
    eventually("four run", || async { counts(&bed).await.running == 4 }).await;
    // One that runs makes room for the next, and one that waits never starts.
    for cancelled in ["sweep-1", "sweep-5"] {
        let view = bed.admin.cancel_job(&name(cancelled)).await.unwrap();
        assert_eq!(view.phase, JobPhase::Cancelled);
    }
    let others = ["sweep-0/1", "sweep-2/1", "sweep-3/1", "sweep-4/1"];
    eventually("the others run", || async { ams.attempts() == others && counts(&bed).await.running == 4 })
        .await;
    let error = bed.admin.delete_job(&name("sweep")).await.unwrap_err();
    assert!(error.to_string().contains("4 jobs of the array sweep have not ended"), "{error}");
    bed.admin.submit_job(&job(json!({"name": "sweep-7", "resources": {"cpu": "1"}}))).await.unwrap();

    let view = bed.admin.cancel_job(&name("sweep")).await.unwrap();
    assert_eq!((view.phase, view.array.unwrap().cancelled), (JobPhase::Cancelled, 6));
    eventually("nothing of it is left", || async { ams.attempts() == ["sweep-7/1"] }).await;
    bed.restart().await;
    assert_eq!(bed.admin.cancel_job(&name("sweep")).await.unwrap().array.unwrap().cancelled, 6);
    bed.admin.delete_job(&name("sweep")).await.unwrap();
    assert_eq!(bed.admin.jobs().await.unwrap().len(), 1);

    // What has ended well is not cancelled.
    ams.script.lock().unwrap().exit_code = Some(0);
    bed.admin.submit_job(&array(2, json!({}))).await.unwrap();
    eventually("it succeeds", || async { sweep(&bed).await.phase == JobPhase::Succeeded }).await;
    let error = bed.admin.cancel_job(&name("sweep")).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Conflict));
}

#[tokio::test(flavor = "multi_thread")]
async fn names_sizes_quotas_and_deadlines_hold_for_each_index() {
    let bed = Bed::start().await;
    let night = json!({"scheduling_policy": "off-peak"});
    bed.admin.submit_job(&job(json!({"name": "sweep-1"}))).await.unwrap();
    let problem = refused(&bed, &array(2, night.clone())).await;
    assert_eq!((problem.code, problem.field.as_deref()), (ErrorCode::AlreadyExists, Some("name")));
    assert!(problem.detail.contains("there is a job sweep-1"), "{problem}");
    bed.admin.submit_job(&array(1, night.clone())).await.unwrap();
    let problem = refused(&bed, &job(json!({"name": "sweep-0"}))).await;
    assert!(problem.detail.contains("sweep-0 is index 0 of the array sweep"), "{problem}");
    for (size, field) in [(0, "array"), (1_001, "array")] {
        let problem = refused(&bed, &array(size, json!({"name": "other"}))).await;
        assert_eq!((problem.code, problem.field.as_deref()), (ErrorCode::InvalidRequest, Some(field)));
    }
    let long = "x".repeat(61);
    let problem = refused(&bed, &array(11, json!({"name": long}))).await;
    assert_eq!(problem.field.as_deref(), Some("name"));
    assert!(problem.fix.unwrap().contains("at most 60 characters"));

    let quota = TeamSettings { max_queued: Some(10), ..TeamSettings::default() };
    bed.admin.set_team(&"ants".parse().unwrap(), &quota).await.unwrap();
    let of_ants = |size: u32, name: &str| {
        array(size, json!({"name": name, "team": "ants", "scheduling_policy": "off-peak"}))
    };
    bed.admin.submit_job(&of_ants(8, "eight")).await.unwrap();
    let problem = refused(&bed, &of_ants(3, "three")).await;
    assert!(problem.detail.contains("8 jobs in the queue, and its quota is 10"), "{problem}");
    bed.admin.submit_job(&of_ants(2, "two")).await.unwrap();
    assert_eq!(bed.admin.team(&"ants".parse().unwrap()).await.unwrap().queued, 10);

    let deadline = (jiff::Timestamp::now() + jiff::SignedDuration::from_millis(700)).to_string();
    let late = array(5, json!({"name": "late", "scheduling_policy": "off-peak", "deadline": deadline}));
    bed.admin.submit_job(&late).await.unwrap();
    bed.admin.cancel_job(&name("late-3")).await.unwrap();
    let late = async || bed.admin.job(&name("late")).await.unwrap();
    eventually("it has failed", || async { late().await.phase == JobPhase::Failed }).await;
    assert_eq!(late().await.array.unwrap().to_string(), "5: 4 failed, 1 cancelled");
    assert_eq!(late().await.reasons[0].reason, ReasonCode::DeadlinePassed);
    let index = bed.admin.job(&name("late-4")).await.unwrap();
    assert_eq!((index.phase, index.reasons[0].reason), (JobPhase::Failed, ReasonCode::DeadlinePassed));
    assert_eq!(bed.admin.job_indexes(&name("none")).await.unwrap_err().code(), Some(ErrorCode::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_indexes_are_placed_cancelled_and_forgotten() {
    let bed = Bed::start().await;
    let ams = bed.location("ams").await;
    let small = json!({"resources": {"cpu": "1m", "memory": "4Mi", "disk": "1Mi"}});
    bed.admin.submit_job(&array(300, small)).await.unwrap();
    eventually("all are there", || async { ams.attempts().len() == 300 }).await;
    bed.admin.cancel_job(&name("sweep")).await.unwrap();
    assert_eq!(counts(&bed).await.cancelled, 300);
    eventually("none is left", || async { ams.attempts().is_empty() }).await;
    bed.admin.delete_job(&name("sweep")).await.unwrap();
    assert!(bed.admin.jobs().await.unwrap().is_empty());
}
