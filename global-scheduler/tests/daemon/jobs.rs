//! The queue, attempts, and results that are recorded once.

use std::time::Duration;

use anyplace_api::{Client, ErrorCode, Role};
use anyplace_model::{
    AttemptId, AttemptStatus, InstancePhase, JobName, JobPhase, LocationSettings, ReasonCode, Workload,
};
use jiff::{Timestamp, tz::TimeZone};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::support::{Bed, eventually, instance, job};

fn work() -> JobName {
    "work".parse().unwrap()
}

async fn phase(bed: &Bed, wanted: JobPhase) {
    eventually(&format!("work is {wanted:?}"), || async {
        bed.admin.job(&work()).await.unwrap().phase == wanted
    })
    .await;
}

/// A window of some seconds that opens so many seconds from now.
pub(crate) fn window(opens_in_s: i64) -> String {
    let at = |seconds: i64| {
        let at = Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
        at.to_zoned(TimeZone::UTC).time().strftime("%H:%M:%S").to_string()
    };
    format!("{}-{}", at(opens_in_s), at(opens_in_s + 3_600))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_off_peak_job_waits_for_its_window_and_runs_once() {
    let bed = Bed::start().await;
    let ams = bed.location("ams").await;
    ams.script.lock().unwrap().exit_code = Some(0);
    let spec = job(json!({"scheduling_policy": "off-peak"}));
    let view = bed.admin.submit_job(&spec).await.unwrap();
    assert_eq!((view.phase, view.attempt, view.queue_position), (JobPhase::Queued, 0, Some(1)));
    assert_eq!(view.reasons[0].reason, ReasonCode::OutsideOffPeakWindow);
    assert_eq!(view.predicted_start, None);

    let off_peak = Some(window(2).parse().unwrap());
    let settings = LocationSettings { off_peak, ..LocationSettings::default() };
    bed.admin.set_location(&"ams".parse().unwrap(), &settings).await.unwrap();
    eventually("a start is predicted", || async {
        bed.admin.job(&work()).await.unwrap().predicted_start.is_some()
    })
    .await;
    let predicted = bed.admin.job(&work()).await.unwrap().predicted_start.unwrap();
    phase(&bed, JobPhase::Succeeded).await;
    assert!(Timestamp::now() >= predicted);
    let view = bed.admin.job(&work()).await.unwrap();
    assert_eq!((view.attempt, view.exit_code, view.queue_position), (1, Some(0), None));
    assert_eq!(view.instance.unwrap().instance.as_str(), "work-1");
    eventually("the attempt is gone", || async { ams.attempts().is_empty() }).await;
    let events = bed.admin.events(Some("job/work")).await.unwrap();
    let messages: Vec<&str> = events.iter().map(|event| event.message.as_str()).collect();
    assert_eq!(messages, ["submitted", "attempt 1 goes to ams", "attempt 1 succeeded"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_exists_is_refused_until_the_job_is_deleted() {
    let bed = Bed::start().await;
    let ams = bed.location("ams").await;
    bed.admin.submit_job(&job(json!({}))).await.unwrap();
    let error = bed.admin.submit_job(&job(json!({}))).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::AlreadyExists));
    assert!(error.to_string().contains("choose another name, or run `anyplace jobs delete work`"), "{error}");
    phase(&bed, JobPhase::Running).await;
    assert_eq!(bed.admin.delete_job(&work()).await.unwrap_err().code(), Some(ErrorCode::Conflict));
    assert_eq!(bed.admin.cancel_job(&work()).await.unwrap().phase, JobPhase::Cancelled);
    eventually("the attempt is gone", || async { ams.attempts().is_empty() }).await;
    bed.admin.delete_job(&work()).await.unwrap();
    // The successor's attempts have other numbers, so that nothing late can be taken for them.
    bed.admin.submit_job(&job(json!({}))).await.unwrap();
    eventually("it runs again", || async { ams.attempts() == ["work/2"] }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_attempt_is_repeated_as_often_as_allowed() {
    let mut bed = Bed::start().await;
    let ams = bed.location("ams").await;
    ams.script.lock().unwrap().exit_code = Some(3);
    bed.admin.submit_job(&job(json!({"max_attempts": 3}))).await.unwrap();
    phase(&bed, JobPhase::Failed).await;
    let view = bed.admin.job(&work()).await.unwrap();
    assert_eq!((view.attempt, view.exit_code), (3, Some(3)));
    assert_eq!(view.reasons[0].reason, ReasonCode::ExitedNonZero);
    bed.restart().await;
    assert_eq!(bed.admin.job(&work()).await.unwrap(), view);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_attempt_cannot_overwrite_the_result() {
    let bed = Bed::start().await;
    let ams = bed.location("ams").await;
    bed.admin.submit_job(&job(json!({"max_attempts": 2}))).await.unwrap();
    phase(&bed, JobPhase::Running).await;
    // Its location is lost; the next attempt goes elsewhere.
    drop(ams);
    let nrt = bed.location("nrt").await;
    eventually("nrt has attempt 2", || async { nrt.attempts() == ["work/2"] }).await;
    // The first location comes back and tells how attempt 1 ended, and lies about attempt 2.
    let ams = bed.location("ams").await;
    for attempt in [1, 2] {
        let attempt = AttemptId { job: work(), attempt };
        let mut late = instance("work-late", Workload::Job(attempt.clone()), 1, InstancePhase::Exited);
        late.exit_code = Some(99);
        let location = "ams".parse().unwrap();
        let status = AttemptStatus { attempt, location, instance: Some(late), refusals: Vec::new() };
        ams.script.lock().unwrap().foreign.push(status);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    phase(&bed, JobPhase::Running).await;
    assert_eq!(bed.admin.job(&work()).await.unwrap().attempt, 2);
    nrt.script.lock().unwrap().exit_code = Some(0);
    phase(&bed, JobPhase::Succeeded).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let view = bed.admin.job(&work()).await.unwrap();
    assert_eq!((view.phase, view.exit_code, view.attempt), (JobPhase::Succeeded, Some(0), 2));
    assert_eq!(view.location.unwrap().as_str(), "nrt");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_made_way_is_repeated_and_is_no_try() {
    let mut bed = Bed::start().await;
    let ams = bed.location("ams").await;
    bed.admin.submit_job(&job(json!({"max_attempts": 1}))).await.unwrap();
    phase(&bed, JobPhase::Running).await;
    for attempt in 1..=3 {
        ams.script.lock().unwrap().preempted.insert(format!("work/{attempt}"));
        let next = format!("work/{}", attempt + 1);
        eventually("the next attempt is there", || async { ams.attempts() == [next.clone()] }).await;
    }
    // The first one ends well after all: too late.
    let attempt = AttemptId { job: work(), attempt: 1 };
    let mut late = instance("work-late", Workload::Job(attempt.clone()), 1, InstancePhase::Exited);
    late.exit_code = Some(0);
    let location = "ams".parse().unwrap();
    let status = AttemptStatus { attempt, location, instance: Some(late), refusals: Vec::new() };
    ams.script.lock().unwrap().foreign.push(status);
    phase(&bed, JobPhase::Running).await;
    bed.restart().await;
    phase(&bed, JobPhase::Running).await;
    let view = bed.admin.job(&work()).await.unwrap();
    assert_eq!((view.attempt, view.preemptions, view.exit_code), (4, 3, None));
    let events = bed.admin.events(Some("job/work")).await.unwrap();
    let told = "attempt 1 ended: it made way for a deployment; it is tried again";
    assert!(events.iter().any(|event| event.message == told), "{events:?}");

    // What is its own fault counts as before.
    ams.script.lock().unwrap().exit_code = Some(3);
    phase(&bed, JobPhase::Failed).await;
    let view = bed.admin.job(&work()).await.unwrap();
    assert_eq!((view.attempt, view.preemptions, view.exit_code), (4, 3, Some(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_gives_the_same_job_back_also_after_a_restart() {
    let mut bed = Bed::start().await;
    let spec = job(json!({}));
    let first = bed.admin.submit_job_once(&spec, "key-1").await.unwrap();
    assert_eq!(bed.admin.submit_job_once(&spec, "key-1").await.unwrap().created_at, first.created_at);
    bed.restart().await;
    assert_eq!(bed.admin.submit_job_once(&spec, "key-1").await.unwrap().created_at, first.created_at);
    for other in [job(json!({"image": "work:2"})), job(json!({"name": "other"}))] {
        let error = bed.admin.submit_job_once(&other, "key-1").await.unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::Conflict));
        assert!(error.to_string().contains("the key belongs to job work"), "{error}");
    }
    // The name is taken for every other key, and without one.
    let error = bed.admin.submit_job_once(&spec, "key-2").await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::AlreadyExists));
    assert_eq!(bed.admin.submit_job(&spec).await.unwrap_err().code(), Some(ErrorCode::AlreadyExists));
    for no_key in ["", "with space", &"k".repeat(129)] {
        let error = bed.admin.submit_job_once(&spec, no_key).await.unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::InvalidRequest), "{no_key:?}");
    }
    assert_eq!(bed.admin.jobs().await.unwrap().len(), 1);
    // A job that is forgotten frees its key.
    bed.admin.cancel_job(&work()).await.unwrap();
    bed.admin.delete_job(&work()).await.unwrap();
    let anew = bed.admin.submit_job_once(&job(json!({"image": "work:2"})), "key-1").await.unwrap();
    assert_eq!((anew.phase, anew.spec.image.as_str()), (JobPhase::Queued, "work:2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_whose_answer_is_lost_is_sent_again_and_there_is_one_job() {
    let bed = Bed::start().await;
    let token = bed.token(Role::Deployer, None).await;
    let lossy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(&format!("http://{}", lossy.local_addr().unwrap()), Some(token)).unwrap();
    let server = bed.listen;
    let relay = tokio::spawn(async move {
        // The first connection ends as the answer comes; the second is passed on whole.
        let (mut from, _) = lossy.accept().await.unwrap();
        let mut to = TcpStream::connect(server).await.unwrap();
        let mut request = vec![0; 1 << 16];
        loop {
            tokio::select! {
                read = from.read(&mut request) => {
                    to.write_all(&request[..read.unwrap()]).await.unwrap();
                }
                answered = to.readable() => break answered.unwrap(),
            }
        }
        drop((from, to));
        let (mut from, _) = lossy.accept().await.unwrap();
        let mut to = TcpStream::connect(server).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
    });
    let view = client.submit_job_once(&job(json!({})), "key-1").await.unwrap();
    assert_eq!(view.name, work());
    assert_eq!(bed.admin.jobs().await.unwrap().len(), 1);
    relay.abort();
    let events = bed.admin.events(Some("job/work")).await.unwrap();
    assert_eq!(events.iter().filter(|event| event.message == "submitted").count(), 1);
}
