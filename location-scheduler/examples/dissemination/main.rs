//! Measures for `cargo xtask bench router` how an instance's change of health reaches the routers of 330 locations: how long
//! it takes, and how many bytes it is on the way to a router.
//!
//! Run: `dissemination ANYPLACE FOLDER`, the binary and an empty folder. Everything is real and on loopback: a global
//! scheduler as a process of its own, 330 location schedulers in this one, each with its store, its tokens and its HTTP;
//! simulated are the machines (each reports its instances and follows what it should have) and the routers (each follows its
//! location's routes, and keeps them). Each result is a line of JSON: `{"figure": ..., "value": ...}`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench's panic is its report")]

mod fleet;
mod machine;
mod router;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyplace_model::DeploymentSpec;
use serde_json::json;

use crate::{
    fleet::{Fleet, Location, SERVING},
    router::{Change, Router},
};

const DEPLOYMENTS: usize = 10;
/// Of each deployment, in the locations that serve.
const INSTANCES: u32 = 64;
/// Changes (an even number), with routers that ask for whole values, and with those that ask for what differs.
const WHOLE: usize = 60;
const PATCHED: usize = 200;
/// Between changes, so that each is alone.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest that anything may take before the bench gives up.
const PATIENCE: Duration = Duration::from_secs(180);

fn main() {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(anyplace), Some(folder)) = (args.next(), args.next()) else {
        panic!("expected the binary `anyplace` and an empty folder");
    };
    anyplace_service::install_crypto_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(measure(anyplace, folder));
    runtime.shutdown_timeout(Duration::from_secs(5));
}

async fn measure(anyplace: PathBuf, folder: PathBuf) {
    let fleet = Fleet::start(&anyplace, &folder).await;
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
                let instances = fleet.locations[place].machine.instances();
                let instance = instances[round * 5 % instances.len()].clone();
                failing = Some((place, instance.clone()));
                (place, instance, false)
            }
        };
        let Location { name, machine, .. } = &fleet.locations[place];
        let own_before = routers[place].bytes();
        let start = Instant::now();
        let (deployment, ready_there) = machine.set_ready(&instance, ready).await;
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

/// Prints a result.
fn report(figure: &str, value: f64) {
    println!("{}", json!({ "figure": figure, "value": value }));
}

/// Waits until something is so.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
