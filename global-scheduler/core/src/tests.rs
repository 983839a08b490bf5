//! The policy, case by case; `properties` judges random plans with an oracle of its own.

use std::collections::BTreeMap;

use anyplace_model::{
    Advert, Bytes, DeploymentName, DeploymentSpec, GpuBlock, JobSpec, LocationId, LocationSettings, MilliCpu,
    ReasonCode, Refusal,
};
use jiff::{Timestamp, tz::TimeZone};

use crate::*;

mod demand;
mod order;
mod properties;

pub(crate) fn noon() -> Timestamp {
    "2026-11-24T12:00:00Z".parse().unwrap()
}

pub(crate) fn id(name: &str) -> LocationId {
    name.parse().unwrap()
}

pub(crate) fn name(name: &str) -> DeploymentName {
    name.parse().unwrap()
}

pub(crate) fn deployment(text: &str) -> DeploymentSpec {
    let mut value = serde_json::json!({"kind": "Deployment", "name": "hello", "image": "hello:1",
        "ports": [{"port": 80}]});
    let more: serde_json::Value = serde_json::from_str(text).unwrap();
    value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(value).unwrap()
}

pub(crate) fn advert() -> Advert {
    Advert {
        region: "eu".into(),
        country: "NL".into(),
        labels: BTreeMap::from([("tier".into(), "edge".into())]),
        latitude: 52.3,
        longitude: 4.8,
        timezone: "UTC".into(),
        off_peak: None,
        machines: 2,
        cpu: MilliCpu(8_000),
        memory: Bytes(16 << 30),
        free_cpu: MilliCpu(8_000),
        free_memory: Bytes(16 << 30),
        free_disk: Bytes(100 << 30),
        largest_free_cpu: MilliCpu(4_000),
        largest_free_memory: Bytes(8 << 30),
        largest_free_disk: Bytes(50 << 30),
        gpus: BTreeMap::new(),
        gpu_blocks: Vec::new(),
        isolations: vec![anyplace_model::Isolation::Container],
        warm_images: Vec::new(),
        conditions: Vec::new(),
        preemptible: None,
    }
}

pub(crate) fn location(advert: Advert) -> Location {
    Location {
        liveness: Liveness::Alive,
        settings: LocationSettings::default(),
        advert: Some(advert),
        zone: Some(TimeZone::UTC),
        refused: BTreeMap::new(),
        hopeless: BTreeMap::new(),
        incoming: Vec::new(),
    }
}

fn three(instances: u32) -> State {
    let spec = deployment(&format!(r#"{{"instances": {{"min": {instances}}}}}"#));
    let mut state = State::default();
    for name in ["ams", "gru", "nrt"] {
        state.locations.insert(id(name), location(advert()));
    }
    state
        .deployments
        .insert(name("hello"), Deployment { spec, shares: BTreeMap::new(), demand: BTreeMap::new() });
    state
}

/// Carries the plan out, as locations would: they answer refusals no more, and nothing new is ready yet.
pub(crate) fn carry_out(state: &mut State, plan: &Plan) {
    for (name, deployment) in &mut state.deployments {
        let counts = plan.counts.get(name).cloned().unwrap_or_default();
        let old = std::mem::take(&mut deployment.shares);
        for (location, count) in counts {
            let before = old.get(&location).copied().unwrap_or_default();
            let accepted = before.count - before.refused.min(before.count);
            let refused = before.refused.min(count.saturating_sub(accepted));
            deployment.shares.insert(location, Share { count, refused, ..before });
        }
    }
}

fn settle(state: &mut State) {
    let plan = plan(state, noon());
    carry_out(state, &plan);
    for deployment in state.deployments.values_mut() {
        for share in deployment.shares.values_mut() {
            share.ready = share.count;
            share.reserved = share.count;
        }
    }
}

fn counts(state: &State) -> Vec<(String, u32)> {
    let plan = plan(state, noon());
    plan.counts[&name("hello")].iter().map(|(location, count)| (location.to_string(), *count)).collect()
}

fn pairs(expected: &[(&str, u32)]) -> Vec<(String, u32)> {
    expected.iter().map(|(name, count)| (name.to_string(), *count)).collect()
}

#[test]
fn instances_spread_over_locations_and_stay_there() {
    let mut state = three(4);
    assert_eq!(counts(&state), pairs(&[("ams", 2), ("gru", 1), ("nrt", 1)]));
    settle(&mut state);
    // A better place that turns up moves nothing.
    state.locations.insert(id("aaa"), location(advert()));
    assert_eq!(counts(&state), pairs(&[("ams", 2), ("gru", 1), ("nrt", 1)]));
}

#[test]
fn a_warm_image_decides_between_equals() {
    let mut state = three(1);
    state.locations.get_mut(&id("nrt")).unwrap().advert.as_mut().unwrap().warm_images =
        vec!["hello:1".into()];
    assert_eq!(counts(&state), pairs(&[("nrt", 1)]));
}

#[test]
fn a_lost_location_is_replaced_at_once_and_an_unknown_one_is_not() {
    let mut state = three(3);
    settle(&mut state);
    state.locations.get_mut(&id("gru")).unwrap().liveness = Liveness::Unknown;
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1), ("nrt", 1)]));
    state.locations.get_mut(&id("gru")).unwrap().liveness = Liveness::Lost;
    assert_eq!(counts(&state), pairs(&[("ams", 2), ("nrt", 1)]));
    // With nowhere else to go it stays assigned, so that it goes on when its location comes back.
    state.locations.get_mut(&id("ams")).unwrap().liveness = Liveness::Lost;
    state.locations.get_mut(&id("nrt")).unwrap().liveness = Liveness::Lost;
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1), ("nrt", 1)]));
    assert_eq!(plan(&state, noon()).missing[&name("hello")].refusals[0].reason, ReasonCode::Lost);
}

#[test]
fn a_draining_location_keeps_its_instances_until_others_are_ready() {
    let mut state = three(1);
    settle(&mut state);
    state.locations.get_mut(&id("ams")).unwrap().settings.draining = true;
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1)]));
    let next = plan(&state, noon());
    carry_out(&mut state, &next);
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1)]));
    state.deployments.get_mut(&name("hello")).unwrap().shares.get_mut(&id("gru")).unwrap().ready = 1;
    assert_eq!(counts(&state), pairs(&[("gru", 1)]));
}

#[test]
fn a_withdrawn_location_keeps_its_instances_but_never_serves_alone() {
    let mut state = three(3);
    settle(&mut state);
    state.locations.get_mut(&id("ams")).unwrap().settings.withdrawn = true;
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1), ("nrt", 1)]));
    let mut state = three(1);
    settle(&mut state);
    state.locations.get_mut(&id("ams")).unwrap().settings.withdrawn = true;
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1)]));
    settle(&mut state);
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1)]));
    state.locations.get_mut(&id("ams")).unwrap().settings.withdrawn = false;
    assert_eq!(counts(&state).iter().map(|(_, count)| count).sum::<u32>(), 1);
}

#[test]
fn a_refused_instance_goes_elsewhere_and_waits_where_nothing_else_is_left() {
    let mut state = three(3);
    settle(&mut state);
    let refusals = vec![Refusal { reason: ReasonCode::NoAddress, count: 2, message: "none free".into() }];
    let refuse = |state: &mut State, at: &str| {
        let until = noon() + jiff::SignedDuration::from_secs(10);
        let refused = RefusedUntil { until, refusals: refusals.clone() };
        state.locations.get_mut(&id(at)).unwrap().refused.insert(name("hello"), refused);
        let share = state.deployments.get_mut(&name("hello")).unwrap().shares.get_mut(&id(at)).unwrap();
        (share.refused, share.ready) = (1, 0);
    };
    refuse(&mut state, "ams");
    assert_eq!(counts(&state), pairs(&[("gru", 2), ("nrt", 1)]));
    for at in ["gru", "nrt"] {
        let found = state.locations.get_mut(&id(at)).unwrap();
        found.settings.draining = false;
        found.advert.as_mut().unwrap().free_cpu = MilliCpu(0);
    }
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1), ("nrt", 1)]));
    let missing = &plan(&state, noon()).missing[&name("hello")];
    assert_eq!(missing.count, 1);
    assert!(missing.refusals.iter().any(|it| it.reason == ReasonCode::NoAddress), "{missing:?}");
    assert!(missing.refusals.iter().any(|it| it.reason == ReasonCode::InsufficientCpu && it.count == 2));
}

#[test]
fn large_gpu_blocks_are_not_spent_on_small_requests() {
    let mut state = State::default();
    let mut with_gpu = advert();
    with_gpu.gpus = BTreeMap::from([("H100".into(), 1), ("L4".into(), 1)]);
    let block = |model: &str, gib: u64| GpuBlock {
        model: model.into(),
        memory: Bytes(gib << 30),
        whole: true,
        count: 1,
        most_in_one_machine: 1,
    };
    with_gpu.gpu_blocks = vec![block("H100", 80), block("L4", 24)];
    state.locations.insert(id("nrt"), location(with_gpu));
    for (who, gib) in [("a-small", 20), ("b-large", 70)] {
        let spec =
            deployment(&format!(r#"{{"name": "{who}", "resources": {{"gpu": {{"memory": "{gib}Gi"}}}}}}"#));
        state
            .deployments
            .insert(name(who), Deployment { spec, shares: BTreeMap::new(), demand: BTreeMap::new() });
    }
    assert!(plan(&state, noon()).missing.is_empty());

    // And what is too large for all is told what comes nearest.
    state.deployments.clear();
    let spec = deployment(r#"{"resources": {"gpu": {"memory": "80Gi", "models": ["L4", "A100"]}}}"#);
    state
        .deployments
        .insert(name("hello"), Deployment { spec, shares: BTreeMap::new(), demand: BTreeMap::new() });
    let why = explain_deployment(&state, &name("hello"), noon()).unwrap();
    let nearest = why.nearest_fit.unwrap();
    assert_eq!(nearest, "the largest free GPU block is 24Gi (L4) in nrt; 80Gi was asked for");
    assert_eq!(why.refusals[0].reason, ReasonCode::InsufficientGpu);
}

#[test]
fn what_fits_nowhere_is_explained_with_reasons_and_counts() {
    let mut state = three(2);
    let explain = |state: &mut State, spec: &str| {
        state.deployments.get_mut(&name("hello")).unwrap().spec = deployment(spec);
        explain_deployment(state, &name("hello"), noon()).unwrap()
    };
    let why = explain(&mut state, r#"{"resources": {"gpu": {"count": 1}}}"#);
    assert_eq!(why.nearest_fit.as_deref(), Some("no location has a GPU"));
    assert_eq!((why.refusals[0].reason, why.refusals[0].count), (ReasonCode::NoGpu, 3));
    let why = explain(&mut state, r#"{"placement": {"regions": ["us"]}}"#);
    assert_eq!((why.refusals[0].reason, why.refusals[0].count), (ReasonCode::PlacementConstraint, 3));
    assert!(why.nearest_fit.unwrap().contains("ams (eu, NL)"));
    let why = explain(&mut state, r#"{"resources": {"cpu": "6"}}"#);
    assert_eq!((why.refusals[0].reason, why.refusals[0].count), (ReasonCode::InsufficientCpu, 3));
    assert_eq!(
        why.nearest_fit.as_deref(),
        Some("ams comes nearest: 6 CPU asked for, at most 4 free in one machine")
    );
    let why = explain(&mut state, r#"{"isolation": "microvm"}"#);
    assert_eq!((why.refusals[0].reason, why.refusals[0].count), (ReasonCode::IsolationUnavailable, 3));
    for location in state.locations.values_mut() {
        let advert = location.advert.as_mut().unwrap();
        advert.isolations.clear();
        advert.free_cpu = MilliCpu(0);
        let message = "no usable cgroup hierarchy below /sys/fs/cgroup; mount one".into();
        advert.conditions = vec![Refusal { reason: ReasonCode::NoCgroups, count: advert.machines, message }];
    }
    let why = explain(&mut state, "{}");
    let no_cgroups = why.refusals.iter().find(|it| it.reason == ReasonCode::NoCgroups).unwrap();
    assert!(no_cgroups.count == 3 && no_cgroups.message.contains("no usable cgroup hierarchy"), "{why:?}");
    state.locations.clear();
    let why = explain(&mut state, "{}");
    assert_eq!(why.refusals[0].reason, ReasonCode::NoLocations);
}

#[test]
fn the_room_of_off_peak_jobs_is_taken_only_where_nothing_else_is_left() {
    let mut state = three(3);
    let mut full = advert();
    (full.free_cpu, full.largest_free_cpu) = (MilliCpu(0), MilliCpu(0));
    full.preemptible = Some(anyplace_model::Preemptible {
        free_cpu: MilliCpu(200),
        free_memory: full.free_memory,
        free_disk: full.free_disk,
        largest_free_cpu: MilliCpu(200),
        largest_free_memory: full.largest_free_memory,
        largest_free_disk: full.largest_free_disk,
        gpu_blocks: Vec::new(),
    });
    for name in ["gru", "nrt"] {
        state.locations.get_mut(&id(name)).unwrap().advert = Some(full.clone());
    }
    assert_eq!(counts(&state), pairs(&[("ams", 3)]));
    // Two and two fit there, of what asks for a tenth of a core.
    let spread = state.locations.get_mut(&id("ams")).unwrap().advert.as_mut().unwrap();
    (spread.free_cpu, spread.largest_free_cpu) = (MilliCpu(100), MilliCpu(100));
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 1), ("nrt", 1)]));
    state.deployments.get_mut(&name("hello")).unwrap().spec.instances.min = 7;
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("gru", 2), ("nrt", 2)]));
    assert_eq!(plan(&state, noon()).missing[&name("hello")].count, 2);
    // Jobs have no part in it, and none goes where an instance is about to come.
    state.queue = vec![queued("a", "anytime")];
    assert!(matches!(plan_jobs(&state, noon())[0].outcome, JobOutcome::Wait { .. }));
    // Where it was refused, it isn't sent again at once.
    let until = noon() + jiff::SignedDuration::from_secs(10);
    let refused = RefusedUntil { until, refusals: Vec::new() };
    state.locations.get_mut(&id("gru")).unwrap().refused.insert(name("hello"), refused);
    assert_eq!(counts(&state), pairs(&[("ams", 1), ("nrt", 2)]));
}

fn queued(name: &str, policy: &str) -> QueuedJob {
    let spec: JobSpec = serde_json::from_value(serde_json::json!({
        "kind": "Job", "name": name, "image": "work:1", "scheduling_policy": policy,
        "resources": {"cpu": "3"}
    }))
    .unwrap();
    QueuedJob { name: spec.name.clone(), spec, refused: BTreeMap::new() }
}

#[test]
fn off_peak_jobs_wait_for_a_window_and_say_when_it_opens() {
    let mut state = three(1);
    state.locations.get_mut(&id("nrt")).unwrap().advert.as_mut().unwrap().off_peak =
        Some("22:00-06:00".parse().unwrap());
    state.queue = vec![queued("a", "off-peak"), queued("b", "anytime"), queued("c", "off-peak")];
    let decisions = plan_jobs(&state, noon());
    // What is placed comes first.
    assert_eq!(decisions[0].outcome, JobOutcome::Place(id("ams")));
    let JobOutcome::Wait { position: 1, predicted_start, refusals, .. } = &decisions[1].outcome else {
        panic!("{decisions:?}")
    };
    assert_eq!(*predicted_start, Some("2026-11-24T22:00:00Z".parse().unwrap()));
    assert_eq!((refusals[0].reason, refusals[0].count), (ReasonCode::OutsideOffPeakWindow, 3));
    assert!(refusals[0].message.contains("opens at 2026-11-24T22:00:00Z"), "{refusals:?}");
    assert!(matches!(decisions[2].outcome, JobOutcome::Wait { position: 2, .. }));

    let night = "2026-11-24T23:00:00Z".parse().unwrap();
    let decisions = plan_jobs(&state, night);
    assert_eq!(decisions[0].outcome, JobOutcome::Place(id("nrt")));
    // The operator's window replaces the location's own.
    state.locations.get_mut(&id("nrt")).unwrap().settings.off_peak = Some("01:00-02:00".parse().unwrap());
    assert!(matches!(plan_jobs(&state, night)[1].outcome, JobOutcome::Wait { position: 1, .. }));
}

#[test]
fn jobs_that_fit_nowhere_do_not_hold_up_the_others() {
    let mut state = three(1);
    let mut impossible = queued("a", "anytime");
    impossible.spec.resources.cpu = MilliCpu(100_000);
    state.queue = vec![impossible];
    state.queue.extend((0..7).map(|index| queued(&format!("b{index}"), "anytime")));
    let placed = plan_jobs(&state, noon())
        .iter()
        .filter(|decision| matches!(decision.outcome, JobOutcome::Place(_)))
        .count();
    // 8 CPU in each of three locations, 3 CPU a job: two fit in each.
    assert_eq!(placed, 6);
    assert!(
        explain_job(&state, &"a".parse().unwrap(), noon()).unwrap().nearest_fit.unwrap().contains("100 CPU")
    );
}

#[test]
fn what_fits_only_in_sum_is_sent_where_room_may_be_made_one_location_after_the_other() {
    let mut state = three(0);
    let spec = deployment(r#"{"instances": {"min": 2}, "resources": {"gpu": {"memory": "30Gi"}}}"#);
    for (name, count) in [("ams", 2), ("gru", 1), ("nrt", 4)] {
        let advert = state.locations.get_mut(&id(name)).unwrap().advert.as_mut().unwrap();
        advert.gpus = BTreeMap::from([("L4".into(), 4)]);
        let (memory, most_in_one_machine) = (Bytes(20 << 30), 2);
        let block = GpuBlock { model: "L4".into(), memory, whole: false, count, most_in_one_machine };
        advert.gpu_blocks = vec![block];
    }
    let (shares, demand) = (BTreeMap::new(), BTreeMap::new());
    state.deployments = BTreeMap::from([(name("hello"), Deployment { spec, shares, demand })]);
    let first = plan(&state, noon());
    assert_eq!(first.counts[&name("hello")], BTreeMap::from([(id("ams"), 1)]), "one, not in gru");
    assert_eq!((first.missing[&name("hello")].count, &first.hopes[&name("hello")]), (2, &id("ams")));
    // On its way, and then refused while room is being made: nobody else is asked.
    let share = Share { count: 1, ..Share::default() };
    let set = |state: &mut State, location: &str, share: Share| {
        let deployment = state.deployments.get_mut(&name("hello")).unwrap();
        deployment.shares = BTreeMap::from([(id(location), share)]);
    };
    for share in [share, Share { refused: 1, ..share }] {
        set(&mut state, "ams", share);
        let next = plan(&state, noon());
        assert_eq!((next.counts, next.hopes.len()), (first.counts.clone(), 0), "{share:?}");
    }
    // In vain: the next one.
    let until = noon() + jiff::SignedDuration::from_mins(1);
    state.locations.get_mut(&id("ams")).unwrap().hopeless.insert(name("hello"), until);
    let second = plan(&state, noon());
    assert_eq!((&second.hopes[&name("hello")], second.counts[&name("hello")].len()), (&id("nrt"), 2));
    set(&mut state, "nrt", Share { count: 1, refused: 1, ..Share::default() });
    state.locations.get_mut(&id("nrt")).unwrap().hopeless.insert(name("hello"), until);
    let third = plan(&state, noon());
    assert_eq!(
        (third.hopes.len(), third.counts[&name("hello")].clone()),
        (0, BTreeMap::from([(id("nrt"), 1)]))
    );
    // nrt goes on saying so; what ams said is over.
    let later = until + jiff::SignedDuration::from_mins(1);
    state.locations.get_mut(&id("nrt")).unwrap().hopeless.insert(name("hello"), later);
    assert_eq!(plan(&state, until).hopes[&name("hello")], id("ams"), "after a while, once more");
}

#[test]
fn what_a_location_replaces_elsewhere_serves_until_the_other_is_ready() {
    let mut state = three(2);
    let shares = &mut state.deployments.get_mut(&name("hello")).unwrap().shares;
    // Both serve, one of them on a machine that is drained, and nothing else there has room.
    shares.insert(id("ams"), Share { count: 2, reserved: 2, refused: 1, ready: 2 });
    let refusal = Refusal { reason: ReasonCode::InsufficientCpu, count: 1, message: String::new() };
    let refused = RefusedUntil { until: Timestamp::MAX, refusals: vec![refusal] };
    state.locations.get_mut(&id("ams")).unwrap().refused.insert(name("hello"), refused);
    let first = plan(&state, noon()).counts[&name("hello")].clone();
    assert_eq!(first, BTreeMap::from([(id("ams"), 2), (id("gru"), 1)]));
    let shares = &mut state.deployments.get_mut(&name("hello")).unwrap().shares;
    shares.insert(id("gru"), Share { count: 1, reserved: 1, refused: 0, ready: 0 });
    assert_eq!(plan(&state, noon()).counts[&name("hello")], first, "not ready yet");
    let shares = &mut state.deployments.get_mut(&name("hello")).unwrap().shares;
    shares.insert(id("gru"), Share { count: 1, reserved: 1, refused: 0, ready: 1 });
    assert_eq!(plan(&state, noon()).counts[&name("hello")], BTreeMap::from([(id("ams"), 1), (id("gru"), 1)]));
    // With no room anywhere it serves on.
    state.locations.retain(|location, _| *location == id("ams"));
    state.deployments.get_mut(&name("hello")).unwrap().shares.remove(&id("gru"));
    assert_eq!(plan(&state, noon()).counts[&name("hello")], BTreeMap::from([(id("ams"), 2)]));
}
