//! Times decisions over 330 locations; `cargo xtask bench schedule` runs it.
//!
//! ```text
//! {"figure":"one_p99_ms","value":1.2}       a plan in which one deployment of 1,000 wants one more instance
//! {"figure":"new_mean_ms","value":0.1}      for each deployment of a plan that places 100 new ones
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyplace_global_core::{Deployment, Liveness, Location, Share, State, plan};
use anyplace_model::{Advert, Bytes, DeploymentName, GpuBlock, Isolation, LocationId, MilliCpu};
use jiff::{Timestamp, tz::TimeZone};
use serde_json::json;

const LOCATIONS: u32 = 330;
const DEPLOYMENTS: u32 = 1_000;
const DECISIONS: u32 = 100;
const NEW: u32 = 100;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut state = State::default();
    for number in 0..LOCATIONS {
        state.locations.insert(id(number)?, location());
    }
    for number in 0..DEPLOYMENTS {
        state.deployments.insert(name(number)?, deployment(number)?);
    }
    let begun = Instant::now();
    settle(&mut state);
    eprintln!("{DEPLOYMENTS} deployments are placed after {:.1} s", begun.elapsed().as_secs_f64());

    let mut times = Vec::new();
    for decision in 0..DECISIONS {
        let deployment = state.deployments.get_mut(&name(decision * 7)?).ok_or("a deployment")?;
        deployment.spec.instances.min += 1;
        times.push(settle(&mut state));
    }
    times.sort_unstable();
    print("one_p50_ms", ms(times[times.len() / 2]));
    print("one_p99_ms", ms(times[times.len() * 99 / 100]));
    for number in DEPLOYMENTS..DEPLOYMENTS + NEW {
        state.deployments.insert(name(number)?, deployment(number)?);
    }
    print("new_mean_ms", ms(settle(&mut state)) / f64::from(NEW));
    Ok(())
}

fn print(figure: &str, value: f64) {
    println!("{{\"figure\":\"{figure}\",\"value\":{value}}}");
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Plans, and lets locations do as planned; how long the plan took.
fn settle(state: &mut State) -> Duration {
    let begun = Instant::now();
    let made = plan(state, Timestamp::UNIX_EPOCH);
    let took = begun.elapsed();
    for (name, counts) in made.counts {
        let Some(deployment) = state.deployments.get_mut(&name) else { continue };
        let share = |count| Share { count, reserved: count, refused: 0, ready: count };
        deployment.shares = counts.into_iter().map(|(location, count)| (location, share(count))).collect();
    }
    took
}

fn id(number: u32) -> Result<LocationId, Failure> {
    Ok(format!("l-{number:03}").parse()?)
}

fn name(number: u32) -> Result<DeploymentName, Failure> {
    Ok(format!("app-{number:04}").parse()?)
}

/// 20 instances; a third of them on slices of GPUs.
fn deployment(number: u32) -> Result<Deployment, Failure> {
    let mut resources = json!({"cpu": "500m", "memory": "1Gi"});
    if number.is_multiple_of(3) {
        resources["gpu"] = json!({"memory": format!("{}Gi", 2 + number % 8)});
    }
    let spec = json!({"kind": "Deployment", "name": format!("app-{number:04}"), "image": format!("app-{number}:1"),
        "resources": resources, "ports": [{"port": 80}], "instances": {"min": 20}});
    Ok(Deployment { spec: serde_json::from_value(spec)?, shares: BTreeMap::new(), demand: BTreeMap::new() })
}

/// 1,000 machines with 8 GPUs each.
fn location() -> Location {
    let block = |gib: u64, count: u32| GpuBlock {
        model: "A100".into(),
        memory: Bytes(gib << 30),
        whole: gib == 80,
        count,
        most_in_one_machine: 8,
    };
    let advert = Advert {
        region: "eu".into(),
        country: "NL".into(),
        labels: BTreeMap::new(),
        latitude: 52.3,
        longitude: 4.8,
        timezone: "UTC".into(),
        off_peak: None,
        machines: 1_000,
        cpu: MilliCpu(64_000_000),
        memory: Bytes(512 << 40),
        free_cpu: MilliCpu(32_000_000),
        free_memory: Bytes(256 << 40),
        free_disk: Bytes(4_000 << 40),
        largest_free_cpu: MilliCpu(64_000),
        largest_free_memory: Bytes(512 << 30),
        largest_free_disk: Bytes(4 << 40),
        gpus: BTreeMap::from([("A100".into(), 8_000)]),
        gpu_blocks: [(80, 2_000), (60, 500), (40, 500), (20, 500), (8, 500)]
            .map(|(gib, count)| block(gib, count))
            .into(),
        isolations: vec![Isolation::Container],
        warm_images: Vec::new(),
        conditions: Vec::new(),
        preemptible: Default::default(),
    };
    Location {
        liveness: Liveness::Alive,
        settings: Default::default(),
        advert: Some(advert),
        zone: Some(TimeZone::UTC),
        refused: BTreeMap::new(),
        incoming: Vec::new(),
        hopeless: Default::default(),
    }
}
