//! How an instance's change of health reaches the routers of 330 locations: how long it takes, and how many bytes it is on
//! the way to a router. The routers are simulated too: each follows its location's routes, and keeps them.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyplace_model::DeploymentSpec;
use serde_json::json;

use crate::{
    fleet::{Fleet, Location, Shape},
    report,
    router::{Change, Router},
    until,
};

const LOCATIONS: usize = 330;
/// The first so many have instances.
const SERVING: usize = 16;

const DEPLOYMENTS: usize = 10;
/// Of each deployment, in the locations that serve.
const INSTANCES: u32 = 64;
/// Changes (an even number), with routers that ask for whole values, and with those that ask for what differs.
const WHOLE: usize = 60;
const PATCHED: usize = 200;
/// Between changes, so that each is alone.
const PAUSE: Duration = Duration::from_millis(100);

pub(crate) async fn measure(anyplace: PathBuf, folder: PathBuf) {
    let fleet = Fleet::start(
        &anyplace,
        &folder,
        Shape { locations: LOCATIONS, machines: 1, serving: SERVING, processes: false, etcd: None },
    )
    .await;
    for number in 0..DEPLOYMENTS {
        fleet.global.apply_deployment(&deployment(number)).await.unwrap();
    }
    let wanted = DEPLOYMENTS * INSTANCES as usize;
    until("all instances to run", || {
        fleet.machines().map(|machine| machine.instances().len()).sum::<usize>() == wanted
    })
    .await;
    eprintln!("{} locations, {wanted} instances in {SERVING} of them", fleet.locations.len());

    let whole = phase(&fleet, false, WHOLE).await;
    report("dissemination_whole_bytes", whole.bytes);
    report("dissemination_whole_p99_s", whole.p99_s);
    let patched = phase(&fleet, true, PATCHED).await;
    report("dissemination_bytes", patched.bytes);
    report("dissemination_own_bytes", patched.own_bytes);
    report("dissemination_p50_s", patched.p50_s);
    report("dissemination_p99_s", patched.p99_s);
    report("dissemination_max_s", patched.max_s);
    report("dissemination_misfits", patched.misfits as f64);
    fleet.stop().await;
}

/// What a number of changes came to.
struct Found {
    /// Of a change, on the way to a router, with HTTP's framing: on average over all routers.
    bytes: f64,
    /// The same over the routers of the location where it happened.
    own_bytes: f64,
    p50_s: f64,
    p99_s: f64,
    max_s: f64,
    misfits: u64,
}

/// Some changes, each of one instance, and each until all routers have it.
async fn phase(fleet: &Fleet, patches: bool, changes: usize) -> Found {
    let routers: Vec<Router> = fleet.locations.iter().map(|it| Router::follow(it, patches)).collect();
    let complete = |router: &Router| router.vips_with(INSTANCES) == DEPLOYMENTS;
    until("all routers to have all routes", || routers.iter().all(complete)).await;
    let vips = fleet.vips().await;
    let bytes = || routers.iter().map(Router::bytes).sum::<u64>();
    let (before, mut took, mut own_bytes) = (bytes(), Vec::new(), 0);
    let mut failing = None;
    for round in 0..changes {
        // Every other change takes the one before back.
        let (place, instance, ready) = match failing.take() {
            Some((place, instance)) => (place, instance, true),
            None => {
                let place = round / 2 % SERVING;
                let instances = fleet.locations[place].machines[0].instances();
                let instance = instances[round * 5 % instances.len()].clone();
                failing = Some((place, instance.clone()));
                (place, instance, false)
            }
        };
        let Location { name, machines, .. } = &fleet.locations[place];
        let own_before = routers[place].bytes();
        let start = Instant::now();
        let (deployment, ready_there) = machines[0].set_ready(&instance, ready).await;
        let key = format!("vips/{}", vips[&deployment]);
        let change = Change { location: name.clone(), key, instance, ready, ready_there };
        for router in &routers {
            took.push(router.reached(&change).await.saturating_duration_since(start).as_secs_f64());
        }
        own_bytes += routers[place].bytes() - own_before;
        tokio::time::sleep(PAUSE).await;
    }
    let bytes = bytes() - before;
    took.sort_by(f64::total_cmp);
    let at = |per_cent: usize| took[(took.len() - 1) * per_cent / 100];
    Found {
        bytes: bytes as f64 / (changes * routers.len()) as f64,
        own_bytes: own_bytes as f64 / changes as f64,
        p50_s: at(50),
        p99_s: at(99),
        max_s: at(100),
        misfits: routers.iter().map(Router::misfits).sum(),
    }
}

fn deployment(number: usize) -> DeploymentSpec {
    let spec = json!({"kind": "Deployment", "name": format!("web-{number}"), "image": "web:1", "ports": [{"port": 80}],
        "instances": {"min": INSTANCES}, "placement": {"regions": ["eu"]},
        "resources": {"cpu": "10m", "memory": "4Mi"}});
    serde_json::from_value(spec).unwrap()
}
