//! The ledger: what locations say of new connections, and what they are granted.

use anyplace_model::{Grant, LocationDesired, LocationId, Traffic};
use serde_json::json;

use crate::support::{Bed, FakeLocation, advert, deployment, eventually};

fn load() -> anyplace_model::DeploymentSpec {
    deployment(json!({"load": {"metric": "connections_per_second", "target": 20}}))
}

fn say(location: &FakeLocation, asked: f64, capacity: f64) {
    let mut script = location.script.lock().unwrap();
    let traffic = script.traffic.entry("hello".parse().unwrap()).or_default();
    (traffic.entering, traffic.asked, traffic.capacity) = (asked / 1.26, asked, capacity);
}

fn granted(location: &FakeLocation) -> Option<Grant> {
    match location.script.lock().unwrap().desired.get("grants/hello") {
        Some(LocationDesired::Grant { deployment, grant }) => {
            assert_eq!(deployment.as_str(), "hello");
            Some(grant.clone())
        }
        _ => None,
    }
}

fn quota(grant: &Grant, location: &str) -> f64 {
    grant.quotas.get(&location.parse::<LocationId>().unwrap()).copied().unwrap_or(0.0)
}

/// As a location does with its grant: it says that it knows it, and sends its parts so.
fn obey(location: &FakeLocation) {
    let grant = granted(location).unwrap();
    location.script.lock().unwrap().traffic.get_mut("hello").unwrap().grant = grant;
}

async fn bed() -> (Bed, FakeLocation, FakeLocation, FakeLocation) {
    let bed = Bed::start().await;
    let at = |latitude, longitude| anyplace_model::Advert { latitude, longitude, ..advert() };
    let ams = bed.location_with("ams", at(52.3, 4.8)).await;
    let fra = bed.location_with("fra", at(50.0, 8.6)).await;
    let nrt = bed.location_with("nrt", at(35.8, 140.4)).await;
    (bed, ams, fra, nrt)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_exceeds_a_location_is_granted_by_the_nearest_and_survives_a_restart() {
    let (mut bed, ams, fra, nrt) = bed().await;
    bed.admin.apply_deployment(&load()).await.unwrap();
    eventually("locations learn the load", || async {
        ams.route("hello").is_some_and(|route| route.connections_per_second == Some(20.0))
    })
    .await;
    say(&fra, 10.0, 60.0);
    say(&nrt, 10.0, 500.0);
    say(&ams, 100.0, 20.0);
    eventually("a grant for Amsterdam", || async {
        granted(&ams).is_some_and(|grant| grant.quotas.values().sum::<f64>() >= 100.0)
    })
    .await;
    let grant = granted(&ams).unwrap();
    assert!(quota(&grant, "ams") < 20.01, "{grant:?}");
    assert!((40.0..50.01).contains(&quota(&grant, "fra")), "what Frankfurt has left: {grant:?}");
    assert!(quota(&grant, "nrt") > 0.0, "the rest: {grant:?}");
    assert_eq!((granted(&fra), granted(&nrt)), (None, None), "who needs nothing from others has no grant");
    obey(&ams);

    // Whoever made the grants is gone and comes back; the same grants hold, and later ones are newer.
    bed.restart().await;
    eventually("the grant is back", || async { granted(&ams) == Some(grant.clone()) }).await;
    say(&ams, 150.0, 20.0);
    eventually("more", || async { granted(&ams).is_some_and(|it| it.quotas.values().sum::<f64>() >= 150.0) })
        .await;
    assert!(granted(&ams).unwrap().revision > grant.revision, "newer");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_withdrawn_location_grants_nothing_and_without_a_load_there_are_no_grants() {
    let (mut bed, ams, fra, nrt) = bed().await;
    bed.admin.apply_deployment(&load()).await.unwrap();
    say(&fra, 0.0, 500.0);
    say(&nrt, 0.0, 500.0);
    say(&ams, 100.0, 20.0);
    eventually("Frankfurt's grant", || async { granted(&ams).is_some_and(|it| quota(&it, "fra") > 70.0) })
        .await;
    let settings = anyplace_model::LocationSettings { withdrawn: true, ..Default::default() };
    bed.admin.set_location(&"fra".parse().unwrap(), &settings).await.unwrap();
    eventually("Tokyo's instead", || async {
        obey(&ams);
        granted(&ams).is_some_and(|it| quota(&it, "fra") == 0.0 && quota(&it, "nrt") > 70.0)
    })
    .await;
    let view = bed.admin.routes(&"hello".parse().unwrap()).await.unwrap();
    let said: Vec<Option<f64>> =
        view.locations.iter().map(|it| it.traffic.as_ref().map(|traffic: &Traffic| traffic.asked)).collect();
    assert_eq!(said, [Some(100.0), Some(0.0), Some(0.0)], "what locations said is shown");

    bed.admin.apply_deployment(&deployment(json!({}))).await.unwrap();
    eventually("no grants", || async { granted(&ams).is_none() }).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn measured_latency_counts_more_than_distance() {
    let (mut bed, ams, fra, nrt) = bed().await;
    let seen = |views: &[anyplace_api::LatencyView], from: &str, to: &str| {
        let found = views.iter().find(|it| (it.from.as_str(), it.to.as_str()) == (from, to)).unwrap();
        (found.latency_ms, found.measured)
    };
    let views = bed.admin.latency(None).await.unwrap();
    assert_eq!(views.len(), 6);
    assert!(views.iter().all(|it| !it.measured) && seen(&views, "ams", "nrt").0 > 130.0, "{views:?}");
    ams.script.lock().unwrap().latency_ms =
        [("fra", 80.0), ("nrt", 40.0), ("stranger", 1.0)].map(|(to, ms)| (to.parse().unwrap(), ms)).into();
    eventually("the matrix", || async {
        let views = bed.admin.latency(Some(&"nrt".parse().unwrap())).await.unwrap();
        views.len() == 2 && seen(&views, "nrt", "ams") == (40.0, true) && !seen(&views, "nrt", "fra").1
    })
    .await;
    let problem = bed.admin.latency(Some(&"xyz".parse().unwrap())).await.unwrap_err();
    assert!(problem.to_string().contains("no location xyz has joined"), "{problem}");

    bed.admin.apply_deployment(&load()).await.unwrap();
    say(&fra, 0.0, 500.0);
    say(&nrt, 0.0, 500.0);
    say(&ams, 100.0, 20.0);
    eventually("the grant of Tokyo, which is further and nearer", || async {
        granted(&ams).is_some_and(|it| quota(&it, "nrt") > 70.0 && quota(&it, "fra") == 0.0)
    })
    .await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_come_where_connections_enter_and_go_where_they_are_missed_least() {
    let (mut bed, ams, fra, nrt) = bed().await;
    let with = |instances: u32| {
        let mut spec = load();
        spec.instances.min = instances;
        spec
    };
    bed.admin.apply_deployment(&with(1)).await.unwrap();
    eventually("the first", || async { ams.count("hello") == 1 }).await;
    say(&ams, 10.0, 500.0);
    say(&fra, 10.0, 500.0);
    say(&nrt, 30.0, 500.0);
    let name: anyplace_model::DeploymentName = "hello".parse().unwrap();
    eventually("the demand is known", || async {
        let why = bed.admin.why_deployment(&name).await.unwrap();
        why.locations.iter().all(|it| it.entering.is_some()) && why.summary.contains("new connections/s")
    })
    .await;
    // By name it would be Frankfurt.
    bed.admin.apply_deployment(&with(2)).await.unwrap();
    eventually("the second in Tokyo", || async { nrt.count("hello") == 1 }).await;
    assert_eq!((ams.count("hello"), fra.count("hello")), (1, 0));
    // Who isn't ready yet would go first.
    eventually("both are ready", || async { bed.admin.deployment(&name).await.unwrap().ready == 2 }).await;
    bed.admin.apply_deployment(&with(1)).await.unwrap();
    eventually("Tokyo's stays", || async { ams.count("hello") == 0 }).await;
    assert_eq!((fra.count("hello"), nrt.count("hello")), (0, 1));
    bed.stop().await;
}
