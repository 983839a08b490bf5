//! The order of the queue, quotas and deadlines, over HTTP.

use anyplace_api::{ClientError, ErrorCode, JobView, Problem, Role};
use anyplace_model::{
    Advert, JobName, JobPhase, JobSpec, LocationDesired, LocationSettings, MilliCpu, ReasonCode, TeamSettings,
};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::support::{Bed, advert, eventually, job};

fn named(name: &str, team: &str, more: Value) -> JobSpec {
    let mut spec = json!({"name": name, "team": team, "resources": {"cpu": "1"}});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    job(spec)
}

fn soon(ms: i64) -> String {
    (Timestamp::now() + SignedDuration::from_millis(ms)).to_string()
}

async fn view(bed: &Bed, name: &str) -> JobView {
    bed.admin.job(&name.parse::<JobName>().unwrap()).await.unwrap()
}

async fn refused(bed: &Bed, spec: &JobSpec) -> Problem {
    match bed.admin.submit_job(spec).await.unwrap_err() {
        ClientError::Refused(problem) => problem,
        error => panic!("{error}"),
    }
}

/// Names of queued jobs by position.
async fn queue(bed: &Bed) -> Vec<String> {
    let mut queued: Vec<(u32, String)> = bed
        .admin
        .jobs()
        .await
        .unwrap()
        .into_iter()
        .filter_map(|view| Some((view.queue_position?, view.name.to_string())))
        .collect();
    queued.sort();
    queued.into_iter().map(|(_, name)| name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn teams_take_turns_and_positions_are_the_order_of_the_starts() {
    let mut bed = Bed::start().await;
    let day = json!({"scheduling_policy": "off-peak"});
    let ants: Vec<JobSpec> = vec![
        named("a-low", "ants", json!({"scheduling_policy": "off-peak", "priority": 10})),
        named("a-1", "ants", day.clone()),
        named("a-2", "ants", day.clone()),
        named("a-high", "ants", json!({"scheduling_policy": "off-peak", "priority": 90})),
    ];
    for spec in ants.iter().chain([&named("b-1", "bees", day.clone()), &named("b-2", "bees", day)]) {
        bed.admin.submit_job(spec).await.unwrap();
    }
    let _ams = bed.location("ams").await;
    let turns = ["a-high", "b-1", "a-1", "b-2", "a-2", "a-low"];
    eventually("they take turns", || async { queue(&bed).await == turns }).await;
    bed.restart().await;
    eventually("also after a restart", || async { queue(&bed).await == turns }).await;
    let weighty = TeamSettings { weight: 3, ..TeamSettings::default() };
    bed.admin.set_team(&"ants".parse().unwrap(), &weighty).await.unwrap();
    let turns = ["a-high", "b-1", "a-1", "a-2", "a-low", "b-2"];
    eventually("by weight", || async { queue(&bed).await == turns }).await;

    // There is room for four.
    let off_peak = Some("00:00-23:59:59.999".parse().unwrap());
    let settings = LocationSettings { off_peak, ..LocationSettings::default() };
    bed.admin.set_location(&"ams".parse().unwrap(), &settings).await.unwrap();
    eventually("two wait", || async { queue(&bed).await == ["a-low", "b-2"] }).await;
    let events = bed.admin.events(None).await.unwrap();
    let starts: Vec<&str> = events
        .iter()
        .filter(|event| event.message.starts_with("attempt 1 goes to"))
        .map(|event| event.subject.trim_start_matches("job/"))
        .collect();
    assert_eq!(starts, turns[..4]);
    let teams = bed.admin.teams().await.unwrap();
    assert_eq!((teams[0].team.as_str(), teams[0].placed, teams[0].queued), ("ants", 3, 1));
    assert_eq!((teams[0].held.cpu, teams[0].share_permille), (MilliCpu(3_000), 750));
    let why = bed.admin.why_job(&"b-2".parse().unwrap()).await.unwrap();
    assert!(why.summary.contains("position 2 of the queue (priority 50 in team bees, which holds 25.0 %)"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_bounds_what_a_team_holds_and_how_many_wait() {
    let mut bed = Bed::start().await;
    let ams = bed.location("ams").await;
    let ants = "ants".parse().unwrap();
    let quota =
        TeamSettings { max_cpu: Some(MilliCpu(2_000)), max_queued: Some(1), ..TeamSettings::default() };
    assert_eq!(bed.admin.set_team(&ants, &quota).await.unwrap().settings, quota);
    let deployer = bed.client(Some(bed.token(Role::Deployer, None).await));
    let forbidden = deployer.set_team(&ants, &TeamSettings::default()).await.unwrap_err();
    assert_eq!(forbidden.code(), Some(ErrorCode::Forbidden));
    let wrong = TeamSettings { weight: 0, ..TeamSettings::default() };
    let error = bed.admin.set_team(&ants, &wrong).await.unwrap_err();
    assert!(error.to_string().contains("weight: 0 is no weight; write 1 to 1000"), "{error}");

    for name in ["one", "two", "three"] {
        bed.admin.submit_job(&named(name, "ants", json!({}))).await.unwrap();
    }
    let waits = view(&bed, "three").await;
    assert_eq!((waits.phase, waits.reasons[0].reason), (JobPhase::Queued, ReasonCode::OverQuota));
    // Others aren't concerned, although they came later.
    bed.admin.submit_job(&named("bee", "bees", json!({}))).await.unwrap();
    eventually("three run", || async { ams.attempts() == ["bee/1", "one/1", "two/1"] }).await;

    let problem = refused(&bed, &named("four", "ants", json!({}))).await;
    assert_eq!((problem.code, problem.field.as_deref()), (ErrorCode::LimitExceeded, Some("team")));
    assert!(problem.detail.contains("1 jobs in the queue, and its quota is 1"), "{problem}");
    assert!(problem.fix.unwrap().contains("`anyplace team set ants --max-queued ...`"));
    let problem = refused(&bed, &named("large", "ants", json!({"resources": {"cpu": "3"}}))).await;
    let field = problem.field.as_deref();
    assert_eq!((problem.code, field), (ErrorCode::LimitExceeded, Some("resources.cpu")));
    assert!(problem.fix.unwrap().contains("`anyplace team set ants --max-cpu ...`"));

    bed.restart().await;
    assert_eq!(bed.admin.team(&ants).await.unwrap().settings, quota);
    assert_eq!(view(&bed, "three").await.phase, JobPhase::Queued);
    bed.admin.cancel_job(&"one".parse().unwrap()).await.unwrap();
    eventually("the third runs", || async { ams.attempts().contains(&"three/1".to_string()) }).await;
    bed.admin.set_team(&ants, &TeamSettings::default()).await.unwrap();
    bed.admin.submit_job(&named("five", "ants", json!({}))).await.unwrap();
    eventually("without a quota, too", || async { ams.attempts().contains(&"five/1".to_string()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_has_not_started_by_its_deadline_has_failed() {
    let mut bed = Bed::start().await;
    let ams = bed.location("ams").await;
    let problem = refused(&bed, &named("past", "ants", json!({"deadline": soon(-1)}))).await;
    assert_eq!((problem.code, problem.field.as_deref()), (ErrorCode::InvalidRequest, Some("deadline")));

    // One waits for a night that doesn't come, one is placed and doesn't get to run, and one runs in time.
    let waits = named("waits", "ants", json!({"deadline": soon(1_500), "scheduling_policy": "off-peak"}));
    bed.admin.submit_job_once(&waits, "key-1").await.unwrap();
    let runs = named("runs", "ants", json!({"deadline": soon(1_500)}));
    bed.admin.submit_job(&runs).await.unwrap();
    eventually("one runs", || async { view(&bed, "runs").await.phase == JobPhase::Running }).await;
    ams.script.lock().unwrap().starting = true;
    let starts = named("starts", "ants", json!({"deadline": soon(1_000), "max_attempts": 3}));
    bed.admin.submit_job(&starts).await.unwrap();
    assert_eq!(view(&bed, "starts").await.phase, JobPhase::Starting);
    // What decides about turns is no concern of locations, which may not know it.
    eventually("it is there", || async { ams.attempts().contains(&"starts/1".to_string()) }).await;
    match &ams.script.lock().unwrap().desired["attempts/starts/1"] {
        LocationDesired::Attempt { spec, .. } => assert_eq!(spec.deadline, None),
        other => panic!("{other:?}"),
    }
    for (name, deadline) in [("waits", waits.deadline), ("starts", starts.deadline)] {
        eventually("it has failed", || async { view(&bed, name).await.phase == JobPhase::Failed }).await;
        let view = view(&bed, name).await;
        assert_eq!(view.reasons[0].reason, ReasonCode::DeadlinePassed, "{view:?}");
        assert!(Timestamp::now() >= deadline.unwrap());
    }
    eventually("its attempt is withdrawn", || async { ams.attempts() == ["runs/1"] }).await;
    assert_eq!(bed.admin.submit_job_once(&waits, "key-1").await.unwrap().phase, JobPhase::Failed);
    // One whose deadline passes while the scheduler is down.
    let sleeps = named("sleeps", "ants", json!({"deadline": soon(300), "scheduling_policy": "off-peak"}));
    bed.admin.submit_job(&sleeps).await.unwrap();
    bed.stop().await;
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    bed.restart_stopped().await;
    eventually("it has failed", || async { view(&bed, "sleeps").await.phase == JobPhase::Failed }).await;
    ams.script.lock().unwrap().starting = false;
    eventually("the one goes on", || async { view(&bed, "runs").await.phase == JobPhase::Running }).await;
    let why = bed.admin.why_job(&"sleeps".parse().unwrap()).await.unwrap();
    assert_eq!(why.refusals[0].reason, ReasonCode::DeadlinePassed);
}

#[tokio::test(flavor = "multi_thread")]
async fn little_use_is_off_peak_and_head_room_stays_free() {
    let bed = Bed::with_jobs(json!({"headroom_percent": 25, "off_peak_below_percent": 60})).await;
    let ams = bed.location("ams").await;
    assert!(bed.admin.capacity().await.unwrap()[0].off_peak_now);
    // Four cores: with the third, 75 % would be reserved.
    for index in 0..3 {
        let spec = named(&format!("n{index}"), "ants", json!({"scheduling_policy": "off-peak"}));
        bed.admin.submit_job(&spec).await.unwrap();
    }
    eventually("two run", || async { ams.attempts() == ["n0/1", "n1/1"] }).await;
    let words = "it has no off-peak window; with it, 75 % would be reserved, and below 60 % it is off-peak at any hour";
    eventually("it says how much", || async {
        let why = bed.admin.why_job(&"n2".parse().unwrap()).await.unwrap();
        let refusal = &why.locations[0].refusals[0];
        refusal.reason == ReasonCode::OutsideOffPeakWindow && refusal.message == words
    })
    .await;
    // At any time, too, a quarter is left.
    for name in ["a0", "a1"] {
        bed.admin.submit_job(&named(name, "bees", json!({}))).await.unwrap();
    }
    eventually("one more runs", || async { ams.attempts() == ["a0/1", "n0/1", "n1/1"] }).await;
    let words = "with it, 4 of 4 CPU would be reserved, and 25 % are kept free for deployments";
    eventually("the other one waits", || async {
        let why = bed.admin.why_job(&"a1".parse().unwrap()).await.unwrap();
        let refusal = &why.locations[0].refusals[0];
        refusal.reason == ReasonCode::Headroom && refusal.message == words
    })
    .await;
    assert_eq!(view(&bed, "a1").await.reasons[0].reason, ReasonCode::Headroom);
    eventually("it is off-peak no longer", || async { !bed.admin.capacity().await.unwrap()[0].off_peak_now })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_is_predicted_for_those_that_will_fit() {
    let bed = Bed::start().await;
    let opens = Timestamp::now() + SignedDuration::from_hours(2);
    let window = opens.strftime("%H:%M:00").to_string();
    let ends = (opens + SignedDuration::from_hours(2)).strftime("%H:%M:00").to_string();
    let off_peak = Some(format!("{window}-{ends}").parse().unwrap());
    let _ams = bed.location_with("ams", Advert { off_peak, ..advert() }).await;
    for index in 0..5 {
        let night = json!({"scheduling_policy": "off-peak"});
        bed.admin.submit_job(&named(&format!("n{index}"), "ants", night)).await.unwrap();
    }
    // Four cores are there.
    for index in 0..5 {
        let view = view(&bed, &format!("n{index}")).await;
        assert_eq!(view.queue_position, Some(index + 1));
        assert_eq!(view.predicted_start.is_some(), index < 4, "{view:?}");
    }
}
