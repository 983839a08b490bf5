//! New connections that go to other locations: routers measure, the global scheduler grants, the location decides.

use std::collections::BTreeMap;

use anyplace_model::{
    DeploymentName, Grant, LocationDesired, LocationId, PARTS, RemoteRoute, Traffic, TrafficReport,
};
use serde_json::json;

use crate::{
    SOON,
    bed::{Bed, placement},
};

const VIP: &str = "203.0.113.1";
const LOAD: &str = "load: {metric: connections_per_second, target: 20}";

fn name() -> DeploymentName {
    "hello".parse().unwrap()
}

fn nrt() -> LocationId {
    "nrt".parse().unwrap()
}

/// Tokyo serves the deployment too, or doesn't.
fn served(bed: &Bed, in_tokyo: bool, each: Option<f64>) {
    let backend = |location: &str| json!({"location": location, "latitude": 35.76, "longitude": 140.39, "ready": 1, "ingress": ["10.2.1.1"]});
    let backends = if in_tokyo { vec![backend("ams"), backend("nrt")] } else { vec![backend("ams")] };
    let mut route = json!({"deployment": "hello", "vip": VIP, "ports": [{"port": 80}], "backends": backends});
    if let Some(each) = each {
        route["connections_per_second"] = each.into();
    }
    let route: RemoteRoute = serde_json::from_value(route).unwrap();
    bed.global.desired.set("routes/hello", LocationDesired::Route(route));
}

fn grant(bed: &Bed, revision: u64, asked: f64, quotas: &[(&str, f64)]) {
    let quotas = quotas.iter().map(|(location, quota)| (location.parse().unwrap(), *quota)).collect();
    let grant = Grant { revision, asked, quotas };
    bed.global.desired.set("grants/hello", LocationDesired::Grant { deployment: name(), grant });
}

/// What routers say until it is dropped.
struct Routers(tokio::task::JoinHandle<()>);

impl Routers {
    fn measure(bed: &Bed, rates: &[(&str, f64)]) -> Self {
        let client = bed.client();
        let rates: Vec<(String, f64)> =
            rates.iter().map(|(machine, rate)| ((*machine).into(), *rate)).collect();
        Self(tokio::spawn(async move {
            loop {
                for (machine, rate) in &rates {
                    let connections = BTreeMap::from([(VIP.parse().unwrap(), *rate)]);
                    let report = TrafficReport { connections, ..TrafficReport::default() };
                    let _ = client.report_traffic(&machine.parse().unwrap(), &report).await;
                }
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        }))
    }
}

impl Drop for Routers {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn until(bed: &Bed, holds: impl Fn(&Traffic) -> bool) -> Traffic {
    let report = bed.global.until(SOON, |report| report.traffic.get(&name()).is_some_and(&holds)).await;
    report.traffic[&name()].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_go_where_they_are_granted_stay_without_news_and_leave_who_is_gone() {
    let mut bed = Bed::start(&["m1", "m2"]).await;
    bed.want("hello", placement("hello", 1, 1, LOAD));
    served(&bed, true, Some(20.0));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready(VIP) == 1).await;
    let routers = Routers::measure(&bed, &[("m1", 60.0), ("m2", 40.0), ("stranger", 9.0)]);
    let traffic = until(&bed, |traffic| traffic.asked > 0.0).await;
    assert_eq!((traffic.entering, traffic.away.len(), &traffic.grant), (100.0, 0, &Grant::default()));
    assert!((traffic.asked - 126.0).abs() < 1e-6, "{traffic:?}");
    until(&bed, |traffic| (traffic.capacity - 20.0).abs() < 1e-6).await;

    grant(&bed, 7, 126.0, &[("ams", 31.5), ("nrt", 94.5)]);
    let three_quarters = PARTS / 4 * 3;
    routes.until(SOON, |r| r.parts(VIP, "nrt") == three_quarters).await;
    let traffic = until(&bed, |traffic| traffic.grant.revision == 7).await;
    assert_eq!(traffic.away, BTreeMap::from([(nrt(), three_quarters)]));
    let away = routes.now().away(VIP);

    // The location's and the global scheduler are gone, and the routers silent; what was said stays in force.
    drop((routes, routers));
    bed.global.stop().await;
    bed.restart().await;
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready(VIP) == 1).await;
    assert_eq!(routes.now().away(VIP), away);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_serves_no_more_has_nothing_at_once_and_without_a_load_all_comes_home() {
    let bed = Bed::start(&["m1"]).await;
    bed.want("hello", placement("hello", 1, 1, LOAD));
    served(&bed, true, Some(20.0));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready(VIP) == 1).await;
    let _routers = Routers::measure(&bed, &[("m1", 100.0)]);
    until(&bed, |traffic| traffic.asked > 0.0).await;
    grant(&bed, 1, 126.0, &[("ams", 63.0), ("nrt", 63.0)]);
    routes.until(SOON, |r| r.parts(VIP, "nrt") == PARTS / 2).await;

    served(&bed, false, Some(20.0));
    routes.until(SOON, |r| r.parts(VIP, "nrt") == 0).await;
    let changes = routes.now().away(VIP);
    assert_eq!(changes.len(), 2, "what was away is remembered: {changes:?}");

    // Without a load nothing is granted, whatever was; what was away is remembered all the same.
    served(&bed, true, None);
    bed.global.until(SOON, |report| report.traffic.is_empty()).await;
    assert_eq!(routes.now().away(VIP), changes);
    bed.forget("hello");
    bed.global.desired.remove("routes/hello");
    bed.until(SOON, "the end", |bed| bed.running().is_empty()).await;
    routes.until(SOON, |r| r.away(VIP).is_empty()).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_router_measures_and_the_nearest_by_that_takes_over_also_after_a_restart() {
    let mut bed = Bed::start(&["m1", "m2"]).await;
    let backend = |location: &str, ingress: &str| json!({"location": location, "latitude": 35.76, "longitude": 140.39, "ready": 1, "ingress": [ingress]});
    let mut backends =
        vec![backend("ams", "10.1.1.1"), backend("nrt", "10.2.1.1"), backend("gru", "10.3.1.1")];
    backends[2]["latitude"] = (-23.43).into();
    backends[2]["longitude"] = (-46.47).into();
    let route = json!({"deployment": "hello", "vip": VIP, "ports": [{"port": 80}], "backends": backends});
    bed.global.desired.set("routes/hello", LocationDesired::Route(serde_json::from_value(route).unwrap()));
    let routes = bed.routes();
    routes.until(SOON, |it| it.takes_over(VIP).as_deref() == Some("nrt")).await;

    let client = bed.client();
    let say = async |machine: &str, measured: &[(&str, f64)]| {
        let latency_ms = measured.iter().map(|(to, ms)| (to.parse().unwrap(), *ms)).collect();
        let report = TrafficReport { latency_ms, ..TrafficReport::default() };
        client.report_traffic(&machine.parse().unwrap(), &report).await.unwrap().targets
    };
    let asked = say("m1", &[]).await;
    let expected = BTreeMap::from([
        (nrt(), vec!["10.2.1.1".parse().unwrap()]),
        ("gru".parse().unwrap(), vec!["10.3.1.1".parse().unwrap()]),
    ]);
    assert_eq!(asked, expected, "all others that serve something");
    assert!(say("m2", &[("nrt", 1.0)]).await.is_empty(), "one is enough");
    assert!(say("stranger", &[("nrt", 1.0)]).await.is_empty());
    say("m1", &[("nrt", 120.0), ("gru", 100.0)]).await;
    routes.until(SOON, |it| it.takes_over(VIP).as_deref() == Some("gru")).await;
    let report = bed.global.until(SOON, |report| !report.latency_ms.is_empty()).await;
    assert_eq!(report.latency_ms, BTreeMap::from([(nrt(), 120.0), ("gru".parse().unwrap(), 100.0)]));

    drop(routes);
    bed.restart().await;
    let routes = bed.routes();
    routes.until(SOON, |it| it.takes_over(VIP).is_some()).await;
    assert_eq!(routes.now().takes_over(VIP).as_deref(), Some("gru"), "nobody has measured anything since");
    bed.stop().await;
}
