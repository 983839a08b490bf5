//! Machines, specs and names of the simulated fleet: small, so that everything is scarce.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyplace_location_core::Site;
use anyplace_model::{
    Bytes, DeploymentName, DeploymentSpec, Gpu, GpuRequest, Health, Instances, Isolation, JobName, JobSpec,
    MachineReport, MilliCpu, PlacementConstraints, Resources, SchedulingPolicy, Team,
};

/// Kinds of what is asked for.
pub(crate) const SHAPES: u64 = 6;

pub(crate) fn id<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} is no name"))
}

/// A machine that reports for the first time.
pub(crate) fn machine(location: usize, index: usize) -> MachineReport {
    let gpus = [2, 1, 0][index % 3];
    let (location, index) = (location as u8, index as u8);
    MachineReport {
        machine: id(&format!("m{index}")),
        epoch: 0,
        sequence: 0,
        address: Ipv4Addr::new(10, location, index, 1),
        instance_cidr: format!("10.{location}.{index}.64/28").parse().unwrap_or_default(),
        advertise: String::new(),
        cpu: MilliCpu(3_000),
        memory: Bytes(4 << 30),
        disk: Bytes(10 << 30),
        gpus: (0..gpus).map(|_| Gpu { model: "A".into(), memory: Bytes(40 << 30) }).collect(),
        isolations: vec![Isolation::Container],
        conditions: Vec::new(),
        images: BTreeMap::new(),
        instances: Vec::new(),
        mark: None,
    }
}

pub(crate) fn site(location: usize) -> Site {
    Site {
        location: id(&format!("l{location}")),
        region: "eu".into(),
        country: "NL".into(),
        labels: BTreeMap::new(),
        latitude: 0.0,
        longitude: 0.0,
        timezone: "UTC".into(),
        off_peak: None,
    }
}

fn resources(shape: u64) -> Resources {
    let gpu = |count, memory| Some(GpuRequest { count, memory, models: Vec::new() });
    let (cpu, gpu) = match shape {
        0 => (500, None),
        1 => (1_000, None),
        2 => (2_000, None),
        3 => (100, gpu(1, None)),
        4 => (100, gpu(1, Some(Bytes(15 << 30)))),
        _ => (100, gpu(2, Some(Bytes(10 << 30)))),
    };
    Resources { cpu: MilliCpu(cpu), memory: Bytes(512 << 20), disk: Bytes(1 << 30), gpu }
}

pub(crate) fn deployment(name: DeploymentName, shape: u64) -> DeploymentSpec {
    DeploymentSpec {
        kind: Default::default(),
        name,
        team: Team::default(),
        image: format!("i{shape}"),
        command: None,
        env: BTreeMap::new(),
        isolation: Isolation::Container,
        resources: resources(shape),
        ports: Vec::new(),
        instances: Instances::default(),
        placement: PlacementConstraints::default(),
        health: Health::default(),
        load: None,
    }
}

pub(crate) fn job(name: JobName, shape: u64) -> JobSpec {
    JobSpec {
        kind: Default::default(),
        name,
        team: Team::default(),
        image: format!("i{shape}"),
        command: None,
        env: BTreeMap::new(),
        isolation: Isolation::Container,
        resources: resources(shape),
        placement: PlacementConstraints::default(),
        scheduling_policy: if shape.is_multiple_of(2) {
            SchedulingPolicy::OffPeak
        } else {
            SchedulingPolicy::Anytime
        },
        priority: 50,
        deadline: None,
        array: None,
        max_attempts: 3,
        timeout: None,
    }
}
