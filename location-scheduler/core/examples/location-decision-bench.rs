//! Times decisions in a location of 1,000 machines with 8 GPUs each; `cargo xtask bench schedule` runs it.
//!
//! ```text
//! {"figure":"one_p99_ms","value":12.3}      a plan in which one more instance is wanted, with 20,000 running
//! {"figure":"many_mean_ms","value":0.1}     for each instance of a plan that starts 1,000
//! {"figure":"first_ms","value":123.4}       the first plan after a start, with 20,000 reservations read from their JSON
//! ```
//!
//! A plan looks at the whole location, so what is timed is all that happens between a change and a value that says what
//! to do.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use anyplace_location_core::{Change, Life, Machine, Reservation, Site, State, Timing, plan};
use anyplace_model::{
    Bytes, DeploymentName, InstanceId, InstancePhase, InstanceStatus, Isolation, LocationSettings, MachineId,
    MachineReport, Mark, MilliCpu, Placement,
};
use anyplace_seed::Seed;
use serde_json::json;

const MACHINES: u32 = 1_000;
const DEPLOYMENTS: u32 = 200;
const RUNNING: u32 = 20_000;
const DECISIONS: usize = 200;
const MANY: u32 = 1_000;
/// The scheduler's process.
const PROCESS: u64 = 1;

fn main() -> Result<()> {
    let mut location = Location::new()?;
    let begun = Instant::now();
    while location.instances < RUNNING {
        location.want(&(0..DEPLOYMENTS).collect::<Vec<_>>(), RUNNING / DEPLOYMENTS / 4)?;
    }
    eprintln!("{} instances after {:.1} s", location.instances, begun.elapsed().as_secs_f64());

    let (mut seed, mut times) = (Seed::new(42), Vec::new());
    for _ in 0..DECISIONS {
        times.push(location.want(&[seed.below(u64::from(DEPLOYMENTS)) as u32], 1)?);
    }
    times.sort_unstable();
    print("one_p50_ms", ms(times[DECISIONS / 2]));
    print("one_p99_ms", ms(times[DECISIONS * 99 / 100]));
    let some: Vec<u32> = (0..10).collect();
    let took = location.want(&some, MANY / 10)?;
    print("many_mean_ms", ms(took) / f64::from(MANY));

    let kept: Vec<String> =
        location.state.reservations.values().map(serde_json::to_string).collect::<Result<_, _>>()?;
    let begun = Instant::now();
    let read: Vec<Reservation> =
        kept.iter().map(|json| serde_json::from_str(json)).collect::<Result<_, _>>()?;
    location.state.reservations =
        read.into_iter().map(|held| (held.assignment.instance.clone(), held)).collect();
    let made = plan(&location.state);
    print("first_ms", ms(begun.elapsed()));
    ensure!(made.changes_nothing(), "what runs is what is wanted");
    Ok(())
}

fn print(figure: &str, value: f64) {
    println!("{{\"figure\":\"{figure}\",\"value\":{value}}}");
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

struct Location {
    state: State,
    instances: u32,
}

impl Location {
    fn new() -> Result<Self> {
        let site = Site {
            location: "ams".parse()?,
            region: "eu".into(),
            country: "NL".into(),
            labels: BTreeMap::new(),
            latitude: 52.3,
            longitude: 4.8,
            timezone: "Europe/Amsterdam".into(),
            off_peak: None,
        };
        let state = State {
            revision: 1,
            process: PROCESS,
            now_ms: 1_000_000,
            timing: Timing { drain_ms: 30_000 },
            site,
            settings: LocationSettings::default(),
            vip_prefixes: None,
            machines: (0..MACHINES).map(machine).collect::<Result<_>>()?,
            reservations: BTreeMap::new(),
            withdrawn: BTreeMap::new(),
            placements: (0..DEPLOYMENTS).map(placement).collect::<Result<_>>()?,
            attempts: BTreeMap::new(),
            wishes: BTreeMap::new(),
            remote: BTreeMap::new(),
            away: BTreeMap::new(),
            latency_ms: BTreeMap::new(),
            prewarms: BTreeMap::new(),
            warm: BTreeMap::new(),
            moves: Default::default(),
        };
        Ok(Self { state, instances: 0 })
    }

    /// So many more of each of some deployments; how long the plan took. Afterwards they run and are ready.
    fn want(&mut self, deployments: &[u32], more: u32) -> Result<Duration> {
        for deployment in deployments {
            let placement = self.state.placements.get_mut(&name(*deployment)?).context("a deployment")?;
            placement.count += more;
        }
        let begun = Instant::now();
        let made = plan(&self.state);
        let took = begun.elapsed();
        let expected = deployments.len() * more as usize;
        ensure!(made.starts.len() == expected, "{} of {expected} started", made.starts.len());
        let mut number = self.instances;
        let changes = made.changes(&self.state, |_| {
            number += 1;
            InstanceId::new(format!("i-{number}"))
                .unwrap_or_else(|_| unreachable!("a name of letters and digits"))
        });
        self.instances = number;
        for change in changes {
            let Change::Put(held) = change else { continue };
            let status = running(&held);
            let machine = self.state.machines.get_mut(&held.machine).context("a machine")?;
            machine.report.instances.push(status);
            self.state.reservations.insert(held.assignment.instance.clone(), *held);
        }
        self.state.warm = made.warm;
        self.state.revision += 1;
        Ok(took)
    }
}

fn name(number: u32) -> Result<DeploymentName> {
    Ok(format!("app-{number:03}").parse()?)
}

/// A third of the deployments take slices of GPUs.
fn placement(number: u32) -> Result<(DeploymentName, Placement)> {
    let mut resources = json!({"cpu": "100m", "memory": "256Mi"});
    if number.is_multiple_of(3) {
        resources["gpu"] = json!({"memory": format!("{}Gi", 2 + number % 8)});
    }
    let spec = json!({"kind": "Deployment", "name": format!("app-{number:03}"), "image": format!("app-{number}:1"),
        "resources": resources, "ports": [{"port": 80}]});
    let [.., third, fourth] = number.to_be_bytes();
    let placement = Placement {
        generation: 1,
        spec: serde_json::from_value(spec)?,
        vip: [203, 0, third, fourth].into(),
        vip6: None,
        count: 0,
    };
    Ok((name(number)?, placement))
}

fn machine(number: u32) -> Result<(MachineId, Machine)> {
    let id: MachineId = format!("m-{number:04}").parse()?;
    let report = MachineReport {
        machine: id.clone(),
        epoch: 1,
        sequence: 1,
        address: format!("10.{}.{}.1", 64 + number / 256, number % 256).parse()?,
        instance_cidr: format!("10.{}.{}.0/24", 64 + number / 256, number % 256).parse()?,
        advertise: "http://127.0.0.1:1".into(),
        cpu: MilliCpu(64_000),
        memory: Bytes(512 << 30),
        disk: Bytes(4 << 40),
        gpus: vec![anyplace_model::Gpu { model: "A100".into(), memory: Bytes(80 << 30) }; 8],
        isolations: vec![Isolation::Container],
        conditions: Vec::new(),
        images: BTreeMap::new(),
        instances: Vec::new(),
        mark: Some(Mark { process: PROCESS, number: 0 }),
    };
    Ok((id, Machine::new(Life::Alive, report)))
}

fn running(held: &Reservation) -> InstanceStatus {
    InstanceStatus {
        instance: held.assignment.instance.clone(),
        workload: held.assignment.workload.clone(),
        generation: held.generation,
        machine: held.machine.clone(),
        address: held.assignment.address,
        phase: InstancePhase::Running,
        ready: true,
        restarts: 0,
        exit_code: None,
        started_at: None,
        ended_at: None,
        reason: None,
    }
}
