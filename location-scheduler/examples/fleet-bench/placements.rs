//! From the API to machines that know their instances, with every step written to disk on the way.

use std::{path::PathBuf, time::Instant};

use anyplace_model::DeploymentSpec;
use serde_json::json;

use crate::{
    fleet::{Fleet, Shape},
    report, until,
};

const LOCATIONS: usize = 5;
const MACHINES: usize = 1_000;
const DEPLOYMENTS: usize = 100;
const INSTANCES: usize = 100;

pub(crate) async fn measure(anyplace: PathBuf, folder: PathBuf, etcd: Option<&str>) {
    let shape = Shape { locations: LOCATIONS, machines: MACHINES, serving: LOCATIONS, processes: true, etcd };
    let begun = Instant::now();
    let fleet = Fleet::start(&anyplace, &folder, shape).await;
    let machines = LOCATIONS * MACHINES;
    eprintln!(
        "{machines} machines in {LOCATIONS} locations report after {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    let assigned = || fleet.machines().map(|machine| machine.instances().len()).sum::<usize>();

    let begun = Instant::now();
    for number in 0..DEPLOYMENTS {
        fleet.global.apply_deployment(&deployment(number)).await.unwrap();
    }
    let applied_s = begun.elapsed().as_secs_f64();
    let wanted = DEPLOYMENTS * INSTANCES;
    let mut said = Instant::now();
    until("all instances to be assigned", || {
        if said.elapsed().as_secs() >= 2 {
            eprintln!("{} of {wanted} assigned after {:.0} s", assigned(), begun.elapsed().as_secs_f64());
            said = Instant::now();
        }
        assigned() == wanted
    })
    .await;
    let took_s = begun.elapsed().as_secs_f64();
    eprintln!("applied after {applied_s:.2} s, assigned after {took_s:.2} s");
    report("placements_per_s", wanted as f64 / took_s);

    let mut ready = 0;
    while ready < wanted {
        let views = fleet.global.deployments().await.unwrap();
        ready = views.iter().map(|view| view.ready as usize).sum();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    report("ready_per_s", wanted as f64 / begun.elapsed().as_secs_f64());
    fleet.stop().await;
}

fn deployment(number: usize) -> DeploymentSpec {
    let mut resources = json!({"cpu": "500m", "memory": "1Gi"});
    if number.is_multiple_of(3) {
        resources["gpu"] = json!({"memory": format!("{}Gi", 2 + number % 8)});
    }
    let spec = json!({"kind": "Deployment", "name": format!("web-{number}"), "image": format!("web-{number}:1"),
        "ports": [{"port": 80}], "instances": {"min": INSTANCES}, "resources": resources});
    serde_json::from_value(spec).unwrap()
}
