//! The daemon in this process, between a scripted global scheduler and scripted machines, over real HTTP.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test: it should stop there")]

#[path = "daemon/bed.rs"]
mod bed;
#[path = "daemon/choice.rs"]
mod choice;
#[path = "daemon/global.rs"]
mod global;
#[path = "daemon/machine.rs"]
mod machine;
#[path = "daemon/moves.rs"]
mod moves;
#[path = "daemon/routes.rs"]
mod routes;

use std::time::Duration;

use anyplace_api::{Client, ErrorCode, LogQuery};
use anyplace_model::{
    ImageState, InstancePhase, LocationDesired, LocationReport, LocationSettings, MilliCpu, PlacementStatus,
    ReasonCode,
};
use bed::{Bed, LEASE, attempt, attempt_of, placement};

/// A generous bound for "at once" on a busy machine; what is asserted to be fast says its own.
const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_is_placed_gets_ready_and_leaves_the_route_when_it_is_not() {
    let bed = Bed::start(&["m1", "m2"]).await;
    bed.want("hello", placement("hello", 1, 2, ""));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready("203.0.113.1") == 2).await;
    let report = bed.global.until(SOON, |r| r.placements.iter().any(|p| ready(p) == 2)).await;
    let machines: Vec<_> = report.placements[0].instances.iter().map(|i| i.machine.to_string()).collect();
    assert!(machines.contains(&"m1".into()) && machines.contains(&"m2".into()), "{machines:?}");
    assert_eq!((report.ingress.len(), report.advert.machines, report.placements[0].refused), (2, 2, 0));
    // Whoever asks for the route sees what routers see.
    let reader = Client::new(bed.url(), Some(report.log_token)).unwrap();
    let route = reader.route("203.0.113.1".parse().unwrap()).await.unwrap();
    assert_eq!(route.local, routes.now().endpoints("203.0.113.1"));
    let unknown = reader.route("203.0.113.9".parse().unwrap()).await.unwrap_err();
    assert_eq!(unknown.code(), Some(ErrorCode::NotFound), "{unknown}");

    bed.machine("m1").set_ready(false);
    let took = routes.until(SOON, |r| r.ready("203.0.113.1") == 1).await;
    assert!(took < Duration::from_millis(250), "out of the routes only after {took:?}");
    bed.machine("m1").set_ready(true);
    routes.until(SOON, |r| r.ready("203.0.113.1") == 2).await;

    // Gone from the wish: drained first, then ended.
    bed.forget("hello");
    routes.until(SOON, |r| r.draining("203.0.113.1") == 2).await;
    bed.until(SOON, "all ended", |bed| bed.running().is_empty()).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ipv6_address_comes_to_running_instances_and_stays_while_they_drain() {
    let mut bed = Bed::start(&["m1", "m2"]).await;
    let mut wish = placement("hello", 1, 2, "");
    bed.want("hello", wish.clone());
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready("203.0.113.1") == 2).await;
    let before = bed.running();
    assert_eq!(routes.now().endpoints("2001:db8:a::1"), []);

    wish.vip6 = Some("2001:db8:a::1".parse().unwrap());
    bed.want("hello", wish);
    routes.until(SOON, |r| r.ready("2001:db8:a::1") == 2).await;
    let addresses = |vip: &str| -> Vec<_> {
        routes.now().endpoints(vip).into_iter().map(|it| (it.instance, it.address, it.slot)).collect()
    };
    assert_eq!(addresses("2001:db8:a::1"), addresses("203.0.113.1"));
    assert_eq!((bed.running(), bed.started()), (before, 2), "the same instances");
    bed.restart().await;
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready("2001:db8:a::1") == 2).await;

    bed.forget("hello");
    routes.until(SOON, |r| r.draining("2001:db8:a::1") == 2 && r.draining("203.0.113.1") == 2).await;
    bed.until(SOON, "all ended", |bed| bed.running().is_empty()).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_machine_leaves_the_routes_with_its_lease_and_is_replaced_soon_after() {
    let bed = Bed::start(&["m1", "m2"]).await;
    bed.want("hello", placement("hello", 1, 1, ""));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready("203.0.113.1") == 1).await;
    let first = routes.now().endpoints("203.0.113.1").remove(0);
    let (lost, other) = if first.machine.as_str() == "m1" { ("m1", "m2") } else { ("m2", "m1") };

    bed.machine(lost).set_silent(true);
    let out = routes.until(SOON, |r| r.ready("203.0.113.1") == 0).await;
    assert!(out < LEASE + Duration::from_millis(300), "out of the routes only after {out:?}");
    let replaced = routes.until(SOON, |r| r.ready("203.0.113.1") == 1).await;
    assert!(out + replaced < LEASE * 2 + Duration::from_millis(700), "replaced only after {replaced:?}");
    let second = routes.now().ready_endpoints("203.0.113.1").remove(0);
    assert_eq!(second.machine.as_str(), other);
    assert_ne!(second.instance, first.instance);

    // The machine still runs the first; back again, it is told to end it.
    assert_eq!(bed.machine(lost).running(), [first.instance.to_string()]);
    bed.machine(lost).set_silent(false);
    bed.until(SOON, "the first ended", |bed| bed.machine(lost).running().is_empty()).await;
    assert_eq!(bed.machine(other).running(), [second.instance.to_string()]);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_instances_and_routes() {
    let mut bed = Bed::start(&["m1", "m2"]).await;
    bed.want("hello", placement("hello", 1, 3, ""));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready("203.0.113.1") == 3).await;
    let before = bed.running();
    routes.forget_lows();
    bed.restart().await;
    bed.global.until(SOON, |r| r.placements.iter().any(|p| ready(p) == 3)).await;
    tokio::time::sleep(LEASE * 3).await;
    assert_eq!(bed.running(), before, "the same instances, none doubled");
    assert!(bed.started() == 3, "nothing was started twice");
    assert_eq!(routes.lowest("203.0.113.1"), 3, "routers never saw fewer");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_that_was_written_but_not_published_is_neither_lost_nor_doubled() {
    let mut bed = Bed::start(&["m1"]).await;
    // The machine reports but hears nothing, as if the process died between transaction and feed.
    bed.machine("m1").set_deaf(true);
    bed.want("hello", placement("hello", 1, 1, ""));
    let report = bed.global.until(SOON, |r| r.placements.iter().any(|p| p.instances.len() == 1)).await;
    let reserved = report.placements[0].instances[0].clone();
    assert_eq!(reserved.phase, InstancePhase::Assigned);
    bed.restart().await;
    bed.machine("m1").set_deaf(false);
    bed.until(SOON, "it runs", |bed| bed.running() == [reserved.instance.to_string()]).await;
    bed.global.until(SOON, |r| r.placements.iter().any(|p| ready(p) == 1)).await;
    assert_eq!(bed.started(), 1);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_global_scheduler_the_location_heals_even_after_a_restart() {
    let mut bed = Bed::start(&["m1", "m2"]).await;
    bed.want("hello", placement("hello", 1, 1, ""));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready("203.0.113.1") == 1).await;
    bed.global.stop().await;
    bed.restart().await;
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready("203.0.113.1") == 1).await;
    let machine = routes.now().endpoints("203.0.113.1").remove(0).machine;
    bed.machine(machine.as_str()).set_silent(true);
    routes
        .until(SOON, |r| r.ready_endpoints("203.0.113.1").iter().any(|endpoint| endpoint.machine != machine))
        .await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_term_of_the_global_scheduler_wants_is_void() {
    let mut bed = Bed::start(&["m1", "m2"]).await;
    let desired = bed.global.desired.clone();
    desired.set("term", LocationDesired::Term(5));
    bed.want("hello", placement("hello", 1, 2, ""));
    bed.global.until(SOON, |r| r.placements.iter().any(|p| ready_in(p, 1) == 2)).await;
    let wanted = desired.entries();
    // One that led before, and slept: it knows nothing of the deployment.
    desired.replace([("term".to_owned(), LocationDesired::Term(4))].into());
    for _ in 0..2 {
        // Many times the moment in which it would be followed; and a restart doesn't forget the term.
        tokio::time::sleep(Duration::from_secs(2)).await;
        bed.global.until(SOON, |r| r.placements.iter().any(|p| ready_in(p, 1) == 2)).await;
        bed.restart().await;
    }
    assert_eq!(bed.started(), 2, "what runs was left alone");
    // The present one is listened to, whatever was missed meanwhile.
    let mut next = wanted;
    next.remove("placements/hello");
    next.insert("term".into(), LocationDesired::Term(6));
    desired.replace(next);
    bed.until(SOON, "nothing runs", |bed| bed.running().is_empty()).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_waits_for_its_image_runs_once_and_its_log_outlives_it() {
    let bed = Bed::start(&["m1", "m2"]).await;
    ["m1", "m2"].iter().for_each(|name| bed.machine(name).set_fetching(false));
    bed.want_attempt(attempt("nightly", 1));
    let report = bed.global.until(SOON, |r| r.attempts.iter().any(|a| !a.refusals.is_empty())).await;
    let refusals = &report.attempts[0].refusals;
    assert_eq!(refusals.len(), 1);
    assert_eq!((refusals[0].reason, refusals[0].count), (ReasonCode::PullingImage, 2));
    bed.until(SOON, "one machine fetches", |bed| bed.wanted_images() == 1).await;
    tokio::time::sleep(LEASE).await;
    assert_eq!((bed.started(), bed.wanted_images()), (0, 1), "it waits, and the choice stays");

    ["m1", "m2"].iter().for_each(|name| bed.machine(name).set_fetching(true));
    bed.until(SOON, "it runs", |bed| bed.running().len() == 1).await;
    let instance = bed.running().remove(0);
    assert!(instance.starts_with("nightly-1-"), "{instance}");
    ["m1", "m2"].iter().for_each(|name| bed.machine(name).end_all(7));
    let ended = bed
        .global
        .until(SOON, |r| {
            r.attempts.iter().any(|a| a.instance.as_ref().is_some_and(|i| i.exit_code == Some(7)))
        })
        .await;
    let log_token = ended.log_token.clone();
    bed.forget_attempt("nightly", 1);
    bed.until(SOON, "it is gone", |bed| bed.running().is_empty()).await;
    bed.global.until(SOON, |r| r.attempts.is_empty()).await;
    assert_eq!(bed.started(), 1, "once");

    tokio::time::sleep(LEASE * 2).await;
    let reader = Client::new(bed.url(), Some(log_token)).unwrap();
    let log = reader.instance_logs(&instance.parse().unwrap(), &LogQuery::default()).await.unwrap();
    assert_eq!(log.text().await.unwrap(), format!("log of {instance}\n"));
    let nobody = reader.instance_logs(&"nobody".parse().unwrap(), &LogQuery::default()).await.unwrap_err();
    assert_eq!(nobody.code(), Some(ErrorCode::NotFound));
    assert_eq!(
        reader.machines().await.unwrap_err().code(),
        Some(ErrorCode::Forbidden),
        "logs and nothing else"
    );
    bed.stop().await;
}

/// What an attempt's last report says of it: phase, and the reason's code.
fn told(report: &LocationReport, job: &str) -> Option<(InstancePhase, Option<ReasonCode>)> {
    let status = report.attempts.iter().find(|status| status.attempt.job.as_str() == job)?;
    let instance = status.instance.as_ref()?;
    Some((instance.phase, instance.reason.as_ref().map(|reason| reason.reason)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn off_peak_attempts_make_way_for_a_deployment_where_that_lets_it_in() {
    let mut bed = Bed::start(&["m1"]).await;
    // The machine's four cores.
    let off_peak = |cpu: u32| format!("scheduling_policy: off-peak\nresources: {{cpu: '{cpu}'}}");
    bed.want_attempt(attempt_of("night", 1, &off_peak(2)));
    bed.until(SOON, "the first runs", |bed| bed.running().len() == 1).await;
    bed.want_attempt(attempt_of("small", 1, &off_peak(1)));
    bed.want_attempt(attempt_of("day", 1, "resources: {cpu: '1'}"));
    bed.until(SOON, "all run", |bed| bed.running().len() == 3).await;
    let report = bed.global.until(SOON, |r| r.advert.free_cpu == MilliCpu(0)).await;
    assert_eq!(report.advert.preemptible.unwrap().largest_free_cpu, MilliCpu(3_000));

    // Four cores are never free: nobody ends for nothing.
    bed.want("big", placement("big", 1, 1, "resources: {cpu: '4'}"));
    bed.global.until(SOON, |r| r.placements.iter().any(|p| p.refused == 1)).await;
    tokio::time::sleep(LEASE).await;
    assert_eq!((bed.running().len(), bed.started()), (3, 3));
    bed.forget("big");

    // One goes for two cores: the others wouldn't do, or needn't.
    bed.machine("m1").set_deaf(true);
    bed.want("hello", placement("hello", 1, 1, "resources: {cpu: '2'}"));
    let is_hello = |p: &&PlacementStatus| p.deployment.as_str() == "hello" && !p.refusals.is_empty();
    let report = bed.global.until(SOON, |r| r.placements.iter().any(|p| is_hello(&p))).await;
    let waits = report.placements.iter().find(is_hello).unwrap();
    assert_eq!((waits.refused, waits.refusals[0].reason), (0, ReasonCode::AwaitingRoom));
    assert_eq!(told(&report, "night"), Some((InstancePhase::Stopping, Some(ReasonCode::Preempted))));
    bed.restart().await;
    bed.machine("m1").set_deaf(false);
    bed.global.until(SOON, |r| r.placements.iter().any(|p| ready_in(p, 1) == 1)).await;
    let lost = Some((InstancePhase::Lost, Some(ReasonCode::Preempted)));
    let report = bed.global.until(SOON, |r| told(r, "night") == lost).await;
    for other in ["small", "day"] {
        assert_eq!(told(&report, other), Some((InstancePhase::Running, None)), "{other}");
    }
    // While the global scheduler goes on wanting it, it stays so, also after a restart and with room for it.
    bed.restart().await;
    bed.forget("hello");
    bed.until(SOON, "the deployment is gone", |bed| bed.running().len() == 2).await;
    bed.global.until(SOON, |r| r.advert.free_cpu == MilliCpu(2_000) && told(r, "night") == lost).await;
    tokio::time::sleep(LEASE).await;
    assert_eq!((bed.running().len(), bed.started()), (2, 4));
    bed.forget_attempt("night", 1);
    bed.want_attempt(attempt_of("night", 2, &off_peak(2)));
    bed.until(SOON, "the next attempt runs", |bed| bed.running().iter().any(|it| it.starts_with("night-2-")))
        .await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fits_nowhere_is_refused_with_reasons_that_count_every_machine() {
    let bed = Bed::start(&["m1", "m2"]).await;
    bed.want("big", placement("big", 1, 1, "resources: {cpu: '64'}"));
    bed.want("gpu", placement("gpu", 1, 2, "resources: {gpu: {models: [H100]}}"));
    let report = bed
        .global
        .until(SOON, |r| r.placements.len() == 2 && r.placements.iter().all(|p| p.refused == p.count))
        .await;
    let refusal = |index: usize| report.placements[index].refusals[0].clone();
    assert_eq!((refusal(0).reason, refusal(0).count), (ReasonCode::InsufficientCpu, 2));
    assert_eq!(refusal(0).message, "asks for 64 CPU; the most that is free on one machine is 4");
    assert_eq!((refusal(1).reason, refusal(1).count), (ReasonCode::NoGpu, 2));

    // The operator's settings.
    let routes = bed.routes();
    routes.until(SOON, |r| r.announced() == Some(1)).await;
    bed.settings(LocationSettings { withdrawn: true, draining: true, ..LocationSettings::default() });
    routes.until(SOON, |r| r.announced() == Some(0)).await;
    bed.global
        .until(SOON, |r| {
            r.placements.iter().all(|p| p.refusals.iter().all(|r| r.reason == ReasonCode::Draining))
        })
        .await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_generation_rolls_over_without_a_gap_and_a_change_outside_restarts_nothing() {
    let bed = Bed::start(&["m1", "m2"]).await;
    bed.want("hello", placement("hello", 1, 2, ""));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready("203.0.113.1") == 2).await;
    let first = bed.running();

    bed.want("hello", placement("hello", 2, 2, "instances: {min: 1, max: 9}"));
    bed.global.until(SOON, |r| r.placements.iter().any(|p| p.generation == 2 && ready_in(p, 2) == 2)).await;
    assert_eq!((bed.running(), bed.started()), (first.clone(), 2), "nothing that an instance could notice");

    routes.forget_lows();
    bed.want("hello", placement("hello", 3, 2, "env: {VERSION: '3'}"));
    bed.global
        .until(SOON, |r| r.placements.iter().any(|p| ready_in(p, 3) == 2 && p.instances.len() == 2))
        .await;
    assert_eq!(bed.started(), 4);
    assert!(bed.running().iter().all(|instance| !first.contains(instance)));
    assert_eq!(routes.lowest("203.0.113.1"), 2, "as many ready as wanted, all the time");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_impossible_reports_are_refused() {
    let bed = Bed::start(&["m1"]).await;
    let machines = |token: Option<&str>| {
        let client = Client::new(bed.url(), token.map(str::to_string)).unwrap();
        async move { client.machines().await }
    };
    for token in [None, Some("ap_wrong")] {
        assert_eq!(machines(token).await.unwrap_err().code(), Some(ErrorCode::Unauthenticated));
    }
    let client = bed.client();
    bed.until_async(SOON, "m1 reports", async || client.machines().await.unwrap().len() == 1).await;
    let known = client.machines().await.unwrap().remove(0);
    assert!(known.alive && known.free_cpu.to_string() == "4", "{known:?}");

    // Older than what came: ignored.
    let mut old = known.report.clone();
    (old.epoch, old.sequence, old.cpu) = (1, 1, "1".parse().unwrap());
    client.report_machine(&old).await.unwrap();
    assert_eq!(client.machines().await.unwrap()[0].report.cpu.to_string(), "4");

    // A second machine with the addresses of the first.
    let mut twin = known.report.clone();
    twin.machine = "twin".parse().unwrap();
    let refused = client.report_machine(&twin).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::Conflict));
    assert!(refused.to_string().contains("give each machine an address and an instance_cidr of its own"));

    // Another machine's name in the path.
    let path = "/v1/machines/m2/report";
    let refused = client.json::<_, ()>(http::Method::PUT, path, Some(&known.report)).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::InvalidRequest), "{refused}");
    client.healthz().await.unwrap();
    bed.stop().await;
}

fn ready(status: &anyplace_model::PlacementStatus) -> usize {
    status.instances.iter().filter(|instance| instance.ready).count()
}

fn ready_in(status: &anyplace_model::PlacementStatus, generation: u64) -> usize {
    status.instances.iter().filter(|instance| instance.ready && instance.generation == generation).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wished_images_are_kept_on_the_machines_chosen_for_them() {
    let bed = Bed::start(&["m1", "m2", "m3"]).await;
    bed.machines.values().for_each(|machine| machine.set_fetching(false));
    bed.wish("app:1", Some(2));
    let states =
        |report: &anyplace_model::LocationReport| report.prewarms.get("app:1").cloned().unwrap_or_default();
    let cold = bed.global.until(SOON, |report| states(report).len() == 2).await;
    assert!(states(&cold).values().all(|state| *state != ImageState::Warm), "{cold:?}");
    bed.machines.values().for_each(|machine| machine.set_fetching(true));
    let warm = |report: &anyplace_model::LocationReport| {
        let states = states(report);
        states.len() == 2 && states.values().all(|state| *state == ImageState::Warm)
    };
    let first = states(&bed.global.until(SOON, warm).await);
    // One that goes silent is replaced; the other stays.
    let (lost, kept) = (first.keys().next().unwrap().clone(), first.keys().nth(1).unwrap().clone());
    bed.machine(lost.as_str()).set_silent(true);
    let moved = bed.global.until(SOON, |report| warm(report) && !states(report).contains_key(&lost)).await;
    assert!(states(&moved).contains_key(&kept));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_has_a_spare_machine_with_its_image() {
    let bed = Bed::start(&["m1", "m2", "m3"]).await;
    bed.want("hello", placement("hello", 1, 1, ""));
    bed.routes().until(SOON, |r| r.ready("203.0.113.1") == 1).await;
    bed.until(SOON, "one machine is the spare", |bed| bed.wanted_images() == 1).await;
    bed.forget("hello");
    bed.until(SOON, "no spare is needed", |bed| bed.wanted_images() == 0).await;
    bed.stop().await;
}
