//! From apply to traffic, and what happens when locations go.

use std::time::Duration;

use anyplace_api::{DeploymentPhase, ErrorCode, Role};
use anyplace_model::{DeploymentName, LocationSettings, ReasonCode};
use serde_json::json;

use crate::support::{Bed, deployment, eventually};

fn hello() -> DeploymentName {
    "hello".parse().unwrap()
}

async fn phase(bed: &Bed, wanted: DeploymentPhase) {
    eventually(&format!("hello is {wanted:?}"), || async {
        bed.admin.deployment(&hello()).await.unwrap().phase == wanted
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_is_placed_becomes_ready_and_is_routed() {
    let bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    ams.script.lock().unwrap().ready = false;
    let outcome = bed.admin.apply_deployment(&deployment(json!({"instances": {"min": 3}}))).await.unwrap();
    assert!(outcome.created && outcome.changed);
    assert_eq!(outcome.deployment.vip.to_string(), "203.0.113.1");
    // Planned before the answer.
    let placed: Vec<u32> = outcome.deployment.locations.iter().map(|share| share.wanted).collect();
    assert_eq!(placed, [2, 1]);
    eventually("the placements arrive", || async { (ams.count("hello"), nrt.count("hello")) == (2, 1) })
        .await;
    phase(&bed, DeploymentPhase::Progressing).await;
    eventually("only nrt serves", || async { ams.serving("hello") == ["nrt"] }).await;
    eventually("it says that ams is starting", || async {
        let reasons = bed.admin.deployment(&hello()).await.unwrap().reasons;
        reasons.iter().any(|it| it.reason == ReasonCode::Starting && it.count == 2)
    })
    .await;

    ams.script.lock().unwrap().ready = true;
    phase(&bed, DeploymentPhase::Ready).await;
    eventually("both serve", || async { nrt.serving("hello") == ["ams", "nrt"] }).await;
    let route = nrt.route("hello").unwrap();
    assert_eq!((route.backends[0].ready, route.backends[1].ready), (2, 1));
    assert_eq!(bed.admin.deployment(&hello()).await.unwrap().reasons, []);

    // The same spec again changes nothing; another one is the next generation with the same address.
    let spec = deployment(json!({"instances": {"min": 3}}));
    let same = bed.admin.apply_deployment(&spec).await.unwrap();
    assert!(!same.created && !same.changed && same.deployment.generation == 1);
    let next = bed
        .admin
        .apply_deployment(&deployment(json!({"instances": {"min": 3}, "image": "hello:2"})))
        .await
        .unwrap();
    assert!(!next.created && next.changed && next.deployment.generation == 2);
    assert_eq!(next.deployment.vip.to_string(), "203.0.113.1");
    phase(&bed, DeploymentPhase::Ready).await;

    bed.admin.delete_deployment(&hello()).await.unwrap();
    eventually("it is gone everywhere", || async {
        ams.count("hello") + nrt.count("hello") == 0 && ams.route("hello").is_none()
    })
    .await;
    // A successor counts on, so that no one takes the old one's remains for the new one's.
    let again = bed.admin.apply_deployment(&spec).await.unwrap();
    assert_eq!(again.deployment.generation, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_location_that_stops_reporting_is_replaced_and_leaves_the_routes() {
    let bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    bed.admin.apply_deployment(&deployment(json!({"instances": {"min": 2}}))).await.unwrap();
    phase(&bed, DeploymentPhase::Ready).await;
    drop(ams);
    eventually("nrt runs both", || async { nrt.count("hello") == 2 }).await;
    eventually("ams is no backend", || async { nrt.serving("hello") == ["nrt"] }).await;
    phase(&bed, DeploymentPhase::Ready).await;
    let record = bed.admin.location(&"ams".parse().unwrap()).await.unwrap();
    assert!(!record.alive);
    let events = bed.admin.events(Some("location/ams")).await.unwrap();
    let messages: Vec<&str> = events.iter().map(|event| event.message.as_str()).collect();
    assert_eq!(messages, ["joined", "lost: no report for 1000 ms"]);

    // Back again it gets nothing that has moved away, and nothing moves back.
    let ams = bed.location("ams").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((ams.count("hello"), nrt.count("hello")), (0, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_location_refuses_goes_elsewhere() {
    let bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    ams.script.lock().unwrap().refuses = 9;
    bed.admin.apply_deployment(&deployment(json!({"instances": {"min": 2}}))).await.unwrap();
    eventually("nrt runs both", || async { (ams.count("hello"), nrt.count("hello")) == (0, 2) }).await;
    phase(&bed, DeploymentPhase::Ready).await;
    let events = bed.admin.events(Some("deployment/hello")).await.unwrap();
    assert!(events.iter().any(|event| event.message.contains("ams can't run 1 of it: no free address")));

    nrt.script.lock().unwrap().refuses = 9;
    phase(&bed, DeploymentPhase::Pending).await;
    let view = bed.admin.deployment(&hello()).await.unwrap();
    assert!(view.reasons.iter().any(|it| it.reason == ReasonCode::NoAddress), "{:?}", view.reasons);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_withdrawn_location_leaves_the_routes_and_a_draining_one_is_emptied() {
    let bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    bed.admin.apply_deployment(&deployment(json!({"instances": {"min": 2}}))).await.unwrap();
    phase(&bed, DeploymentPhase::Ready).await;
    let id = "ams".parse().unwrap();
    let settings = LocationSettings { withdrawn: true, ..LocationSettings::default() };
    assert_eq!(bed.admin.set_location(&id, &settings).await.unwrap().settings, settings);
    eventually("only nrt serves", || async { nrt.serving("hello") == ["nrt"] }).await;
    assert_eq!(ams.count("hello"), 1);
    let draining = LocationSettings { draining: true, ..LocationSettings::default() };
    nrt.script.lock().unwrap().ready = false;
    bed.admin.set_location(&id, &draining).await.unwrap();
    eventually("nrt gets both", || async { nrt.count("hello") == 2 }).await;
    // Not before others are ready.
    assert_eq!(ams.count("hello"), 1);
    nrt.script.lock().unwrap().ready = true;
    eventually("ams is empty", || async { ams.count("hello") == 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything_and_moves_nothing() {
    let mut bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    bed.admin.apply_deployment(&deployment(json!({"name": "first"}))).await.unwrap();
    bed.admin.apply_deployment(&deployment(json!({"instances": {"min": 2}}))).await.unwrap();
    phase(&bed, DeploymentPhase::Ready).await;
    let before = bed.admin.deployment(&hello()).await.unwrap();
    let events = bed.admin.events(Some("deployment/hello")).await.unwrap();
    for _ in 0..3 {
        bed.restart().await;
        // Whatever a location hears meanwhile, it never hears that it should stop, or that nobody serves.
        for _ in 0..30 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            assert_eq!((ams.count("hello"), nrt.count("hello")), (1, 1));
            assert_eq!(ams.serving("hello"), ["ams", "nrt"]);
        }
    }
    phase(&bed, DeploymentPhase::Ready).await;
    let after = bed.admin.deployment(&hello()).await.unwrap();
    assert_eq!(
        (after.vip, after.generation, after.created_at),
        (before.vip, before.generation, before.created_at)
    );
    assert_eq!(bed.admin.events(Some("deployment/hello")).await.unwrap(), events);
    // Locations that stay away over the restart are lost after a lease, not before.
    bed.stop().await;
    drop(nrt);
    let start = std::time::Instant::now();
    bed.restart_stopped().await;
    eventually("ams runs both", || async { ams.count("hello") == 2 }).await;
    assert!(start.elapsed() >= Duration::from_millis(crate::support::LEASE_MS));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spec_that_fits_nowhere_says_why_with_counts() {
    let bed = Bed::start().await;
    let spec = deployment(json!({"resources": {"gpu": {"memory": "80Gi", "models": ["H100"]}}}));
    bed.admin.apply_deployment(&spec).await.unwrap();
    let why = bed.admin.why_deployment(&hello()).await.unwrap();
    assert_eq!(why.refusals[0].reason, ReasonCode::NoLocations);
    let (_ams, _nrt) = (bed.location("ams").await, bed.location("nrt").await);
    let why = bed.admin.why_deployment(&hello()).await.unwrap();
    assert_eq!((why.refusals[0].reason, why.refusals[0].count), (ReasonCode::NoGpu, 2));
    assert_eq!(why.nearest_fit.as_deref(), Some("no location has a GPU"));
    assert_eq!((why.wanted, why.placed, why.locations.len()), (1, 0, 2));
    phase(&bed, DeploymentPhase::Pending).await;
    let error = bed.admin.deployment_logs(&hello(), &Default::default()).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotFound));
    assert!(error.to_string().contains("no instance has started; see `anyplace why`"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_nothing_half_done() {
    use tokio::io::AsyncWriteExt as _;

    let bed = Bed::start().await;
    let token = bed.token(Role::Deployer, None).await;
    let spec = |index: u64| deployment(json!({"name": format!("app-{index}")}));
    for index in 0..40 {
        let body = serde_json::to_string(&spec(index)).unwrap();
        let request = format!(
            "PUT /v1/deployments/app-{index} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = tokio::net::TcpStream::connect(bed.listen).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_micros(index * 250)).await;
    }
    // What was written is known, so that the same can be said again, and no virtual IP is given away twice.
    for index in 0..40 {
        bed.admin.apply_deployment(&spec(index)).await.unwrap();
    }
}
