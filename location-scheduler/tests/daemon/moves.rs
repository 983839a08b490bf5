//! Room that is made by moving other instances.

use anyplace_model::{
    LocationReport, LocationSettings, MachineMode, MoveCause, MoveStep, Placement, ReasonCode,
};

use crate::{
    SOON,
    bed::{Bed, placement},
    ready,
    routes::Routes,
};

const SMALL: &str = "203.0.113.1";
const BIG: &str = "203.0.113.2";

fn big() -> Placement {
    let big = placement("big", 1, 1, "resources: {gpu: {models: [A]}}");
    Placement { vip: BIG.parse().unwrap(), ..big }
}

/// Two slices hold both GPUs of m1, which alone has one of model A; m2's GPU is free. Nothing gets ready on m2.
async fn nearly_full() -> (Bed, Routes) {
    let bed = Bed::start_with(&["m1", "m2"], &[&["A", "B"], &["B"]]).await;
    bed.machine("m2").set_silent(true);
    let client = bed.client();
    let alive = async || client.machines().await.unwrap().iter().filter(|machine| machine.alive).count();
    bed.until_async(SOON, "m2 is silent", async || alive().await == 1).await;
    bed.want("small", placement("small", 1, 2, "resources: {gpu: {memory: 30Gi}}"));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready(SMALL) == 2).await;
    assert_eq!(bed.machine("m1").running().len(), 2);
    bed.machine("m2").set_ready(false);
    bed.machine("m2").set_silent(false);
    bed.until_async(SOON, "m2 is back", async || alive().await == 2).await;
    (bed, routes)
}

fn step(report: &LocationReport) -> Option<MoveStep> {
    report.moves.first().map(|step| step.step)
}

fn is_making_room(report: &LocationReport) -> bool {
    let mut refusals = report.placements.iter().flat_map(|placement| &placement.refusals);
    refusals.any(|refusal| refusal.reason == ReasonCode::MakingRoom)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn room_is_made_without_a_gap_even_across_a_restart() {
    let (mut bed, routes) = nearly_full().await;
    routes.forget_lows();
    bed.want("big", big());
    let report = bed.global.until(SOON, |r| is_making_room(r) && step(r) == Some(MoveStep::Starting)).await;
    let moved = report.moves[0].clone();
    assert_eq!((moved.from.as_str(), moved.to.unwrap().as_str()), ("m1", "m2"));
    assert!(moved.message.contains("makes room for big"), "{}", moved.message);
    bed.until(SOON, "the copy runs", |bed| bed.machine("m2").running().len() == 1).await;

    bed.restart().await;
    let same = bed.global.until(SOON, |r| is_making_room(r) && step(r) == Some(MoveStep::Starting)).await;
    assert_eq!(same.moves, report.moves);
    assert_eq!(bed.machine("m1").running().len(), 2, "nobody ends before the copy is ready");

    bed.machine("m2").set_ready(true);
    routes.until(SOON, |r| r.draining(SMALL) == 1).await;
    let big_runs =
        |r: &LocationReport| r.placements.iter().any(|p| p.deployment.as_str() == "big" && ready(p) == 1);
    let done = bed.global.until(SOON, big_runs).await;
    assert_eq!((step(&done), done.moves[0].copy.clone()), (Some(MoveStep::Done), moved.copy));
    let instance = routes.now().endpoints(BIG).remove(0);
    assert_eq!(instance.machine.as_str(), "m1");
    assert!(!bed.running().contains(&moved.instance.to_string()));
    assert_eq!((bed.started(), bed.running().len()), (4, 3));
    assert_eq!(routes.lowest(SMALL), 2, "as many ready as wanted, all the time");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn room_that_nobody_wants_any_more_is_not_made() {
    let (bed, _routes) = nearly_full().await;
    let before = bed.running();
    bed.want("big", big());
    bed.until(SOON, "the copy runs", |bed| bed.machine("m2").running().len() == 1).await;
    bed.forget("big");
    bed.until(SOON, "the copy is gone", |bed| bed.machine("m2").running().is_empty()).await;
    bed.global.until(SOON, |r| r.moves.is_empty() && r.placements.len() == 1).await;
    assert_eq!((bed.running(), bed.started()), (before, 3));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_never_gets_ready_is_given_up_with_the_reason() {
    let (bed, _routes) = nearly_full().await;
    let before = bed.running();
    bed.want("big", big());
    let said = |r: &LocationReport| {
        let mut refusals = r.placements.iter().flat_map(|placement| &placement.refusals);
        refusals.any(|it| it.reason == ReasonCode::NoMoves && it.message.contains("was not ready within 3 s"))
    };
    bed.global.until(SOON, said).await;
    bed.until(SOON, "the copy is gone", |bed| bed.running() == before).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_drained_without_a_gap_and_taken_back() {
    let bed = Bed::start(&["m1", "m2"]).await;
    bed.want("hello", placement("hello", 1, 2, ""));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready(SMALL) == 2).await;
    routes.forget_lows();
    // What is to take over isn't ready at first.
    bed.machine("m2").set_ready(false);
    routes.until(SOON, |r| r.ready(SMALL) == 1).await;
    let machines = [("m1".parse().unwrap(), MachineMode::Draining)].into();
    bed.settings(LocationSettings { machines, ..LocationSettings::default() });
    let leaving = |r: &LocationReport| r.moves.iter().any(|it| it.cause == MoveCause::Drain);
    let report = bed.global.until(SOON, leaving).await;
    assert_eq!((report.moves[0].from.as_str(), report.moves[0].step), ("m1", MoveStep::Waiting));
    bed.until(SOON, "m2 has two", |bed| bed.machine("m2").running().len() == 2).await;
    assert_eq!(bed.machine("m1").running().len(), 1);
    bed.machine("m2").set_ready(true);
    bed.until(SOON, "m1 is empty", |bed| bed.machine("m1").running().is_empty()).await;
    assert_eq!((routes.now().ready(SMALL), routes.lowest(SMALL)), (2, 1), "the one on m1 served to the end");
    bed.settings(LocationSettings::default());
    bed.want("hello", placement("hello", 1, 3, ""));
    bed.until(SOON, "m1 takes again", |bed| bed.machine("m1").running().len() == 1).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_of_gpus_are_joined_once_an_operator_lets_it_happen() {
    let mut bed = Bed::start_with(&["m1", "m2", "m3"], &[&["A", "B"], &["B"], &["A"]]).await;
    let client = bed.client();
    let alive = async || client.machines().await.unwrap().iter().filter(|machine| machine.alive).count();
    ["m2", "m3"].iter().for_each(|name| bed.machine(name).set_silent(true));
    bed.until_async(SOON, "m1 is alone", async || alive().await == 1).await;
    bed.want("small", placement("small", 1, 2, "resources: {gpu: {memory: 30Gi}}"));
    let routes = bed.routes();
    routes.until(SOON, |r| r.ready(SMALL) == 2).await;
    ["m2", "m3"].iter().for_each(|name| bed.machine(name).set_silent(false));
    bed.until_async(SOON, "all are back", async || alive().await == 3).await;
    bed.want("big", big());
    routes.until(SOON, |r| r.ready(BIG) == 1).await;
    let before = bed.running();
    // m1's A would be of use whole, as m3's is.
    bed.tidy_pause_ms = 100;
    routes.forget_lows();
    bed.restart().await;
    let done = |r: &LocationReport| {
        r.moves.iter().any(|it| it.cause == MoveCause::Tidying && it.step == MoveStep::Done)
    };
    let report = bed.global.until(SOON, done).await;
    let (from, to) = (&report.moves[0].from, report.moves[0].to.as_ref().unwrap());
    assert_eq!((from.as_str(), to.as_str(), report.moves.len()), ("m1", "m2", 1));
    assert_eq!(routes.lowest(SMALL), 2, "as many ready as wanted, all the time");
    assert_eq!(bed.running().iter().filter(|it| before.contains(it)).count(), 2, "two stay");
    bed.stop().await;
}
