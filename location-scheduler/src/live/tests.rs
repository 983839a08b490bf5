use std::sync::Arc;

use anyplace_location_core::{Moves, Reservation, Site, Stage, Timing};
use anyplace_model::{Assignment, LocationSettings, Mark};

use super::*;
use crate::persist::Disk;

const LEASE: Duration = Duration::from_millis(600);
const PROCESS: u64 = 7;

fn report(name: &str, numbers: (u64, u64), mark: Option<(u64, u64)>) -> MachineReport {
    let mark = mark.map(|(process, number)| Mark { process, number });
    let report = serde_json::json!({"machine": name, "epoch": numbers.0, "sequence": numbers.1, "mark": mark,
        "advertise": "http://x", "address": "10.1.1.1", "instance_cidr": "10.1.1.64/26", "cpu": 1_000,
        "memory": "1Gi", "disk": "1Gi", "gpus": [], "isolations": [], "images": {}, "instances": [],
        "conditions": []});
    serde_json::from_value(report).unwrap()
}

fn state(machines: &[&str]) -> State {
    let site = Site {
        location: "ams".parse().unwrap(),
        region: "eu".into(),
        country: "NL".into(),
        labels: BTreeMap::new(),
        latitude: 52.0,
        longitude: 4.0,
        timezone: "Europe/Amsterdam".into(),
        off_peak: None,
    };
    let stored =
        |name: &&str| (name.parse().unwrap(), Machine::new(Life::Suspect, report(name, (0, 0), None)));
    State {
        revision: 0,
        process: PROCESS,
        now_ms: 1,
        timing: Timing { drain_ms: 1_000 },
        site,
        settings: LocationSettings::default(),
        vip_prefixes: None,
        machines: machines.iter().map(stored).collect(),
        reservations: BTreeMap::new(),
        withdrawn: BTreeMap::new(),
        moves: Moves::default(),
        placements: BTreeMap::new(),
        attempts: BTreeMap::new(),
        wishes: BTreeMap::new(),
        remote: BTreeMap::new(),
        away: BTreeMap::new(),
        latency_ms: BTreeMap::new(),
        prewarms: BTreeMap::new(),
        warm: BTreeMap::new(),
    }
}

#[test]
fn a_scheduler_that_is_stopped_right_after_its_start_takes_no_machine_for_lost() {
    let start = Instant::now();
    let mut live = Live::new(state(&["m1"]), LEASE, start);
    let stopped = Duration::from_secs(60);
    live.forgive(stopped);
    live.expire(start + stopped + LEASE);
    assert!(!live.is_warm(), "machines still look for it");
    let machine = &live.state.machines["m1"];
    assert_eq!(machine.life, Life::Suspect);
    live.expire(start + stopped + RETURN + LEASE);
    assert_eq!(live.state.machines["m1"].life, Life::Lost);
}

#[test]
fn after_a_loss_only_a_report_of_who_knows_of_it_counts() {
    let start = Instant::now();
    let mut live = Live::new(state(&["m1"]), LEASE, start);
    assert_eq!(live.hear(report("m1", (9, 1), Some((PROCESS, 0))), start), Heard::Changed);
    live.expire(start + LEASE * 2);
    assert_eq!(live.state.machines["m1"].life, Life::Lost);
    let late = start + LEASE * 2;
    for (numbers, mark) in
        [((9, 1), Some((PROCESS, 0))), ((9, 2), Some((PROCESS, 0))), ((10, 1), None), ((10, 2), Some((1, 5)))]
    {
        assert_eq!(live.hear(report("m1", numbers, mark), late), Heard::Stale, "{numbers:?}, {mark:?}");
    }
    // Also of an agent whose clock was set back.
    assert_eq!(live.hear(report("m1", (3, 1), Some((PROCESS, 1))), late), Heard::Changed);
    assert_eq!(live.state.machines["m1"].life, Life::Alive);
    assert_eq!(live.hear(report("m1", (3, 1), Some((PROCESS, 1))), late), Heard::Stale, "twice");
}

#[tokio::test]
async fn a_start_makes_void_what_the_process_before_still_has_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let store = anyplace_store::open(dir.path().join("store.redb"), None).await.unwrap();
    let before = Disk::new(Arc::clone(&store));
    let mut planned_on = state(&[]);
    planned_on.revision = before.load(1).await.unwrap().revision;
    let after = Disk::new(store);
    let now = after.load(2).await.unwrap();
    let changes = [Change::Put(Box::new(reservation()))];
    let written = before.commit(&planned_on, anyplace_store::Txn::new(), &changes, &[]).await;
    assert!(written.unwrap_err().to_string().contains("changed by another process"));
    assert!(after.load(3).await.unwrap().reservations.is_empty());
    planned_on.revision = now.revision;
    let written = after.commit(&planned_on, anyplace_store::Txn::new(), &changes, &[]).await;
    assert!(written.is_err(), "it started once more");
}

fn reservation() -> Reservation {
    let assignment = serde_json::json!({"instance": "hello-abcde", "workload": {"deployment": "hello"},
        "location": "ams", "generation": 1, "image": "hello:v1", "env": {}, "isolation": "container",
        "resources": {}, "gpus": [], "address": "10.1.1.65", "ports": [], "health": {}, "restart": true,
        "draining": false});
    let assignment: Assignment = serde_json::from_value(assignment).unwrap();
    Reservation {
        machine: "m1".parse().unwrap(),
        vip: None,
        vip6: None,
        created_ms: 1,
        stage: Stage::Serving,
        generation: 1,
        slot: 0,
        replaces: None,
        assignment,
    }
}
