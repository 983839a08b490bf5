//! The state router of a machine: follows its location's routes, programs the data plane with them, and tells the
//! BGP daemon what to announce, and the location scheduler how many new connections come and how far other locations are.
//!
//! The data plane is pinned in the kernel, so nothing stops when this process is killed. A snapshot of the routes on
//! disk lets a new process serve before, and without, its location scheduler.
//!
//! This crate must not know about deployments, images or placement.

mod bgp;
mod config;
mod flow_log;
mod latency;
mod liveness;
mod metrics;
mod plane;
mod routes;
mod shares;
mod suspicion;
mod trace;
mod traffic;

use std::time::Duration;

use anyhow::Context as _;
use anyplace_api::{Client, WatchEvent, Watcher};
use anyplace_ebpf::{Capacity, DataPlane, FlowEvents, Options};
use anyplace_model::RouteRecord;
use tokio_util::sync::CancellationToken;

pub use config::{BgpConfig, Config, FlowLogConfig};
pub use shares::{Backend, BackendState, Owner, Shares, shares};
pub use trace::{Flow, Hop, Served, Step, Trace, trace};

use crate::{bgp::Bgp, latency::Latency, liveness::Liveness, suspicion::Suspicion};
#[doc(hidden)]
pub use crate::{
    flow_log::{Log, run as run_flow_log},
    metrics::render as render_metrics,
    plane::{Change, Names, Plane},
    routes::Routes,
};

/// How soon what failed (an instance's interface that isn't there yet, a BGP daemon that doesn't answer) is tried
/// again.
const RETRY: Duration = Duration::from_millis(100);
/// Routes of a snapshot that are brought into the data plane together.
const BATCH: usize = 1_024;

/// Runs the router until the shutdown. Routes stay in force after it.
///
/// # Errors
/// The data plane can't be loaded, or the configuration can't be used.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    anyhow::ensure!(
        config.liveness_floor_percent <= 100,
        "liveness_floor_percent is {}; set it to 0 to 100, or leave it out for 50",
        config.liveness_floor_percent
    );
    let token = anyplace_service::read_token(&config.token_file)?;
    let client = Client::new(&config.location_scheduler, Some(token)).context("location_scheduler")?;
    let options = Options {
        uplink: config.uplink.clone(),
        address: config.address,
        address6: config.address6,
        pin_dir: config.pin_dir.clone(),
        object: None,
    };
    let capacity = Capacity::for_vips(config.max_vip_ports);
    let mut data_plane = DataPlane::load_for(options, capacity).context("the data plane can't be loaded")?;
    let fleet: Vec<_> = config.fleet.iter().map(|net| (net.addr(), net.prefix_len())).collect();
    data_plane.set_fleet(&fleet).context("fleet")?;
    if data_plane.capacity() != capacity {
        let found = data_plane.capacity().vips;
        tracing::warn!(
            found,
            configured = capacity.vips,
            "max_vip_ports takes effect once the pinned maps are gone"
        );
    }
    let flow_log = start_flow_log(&config, &mut data_plane)?;
    tracing::info!(uplink = config.uplink, mode = ?data_plane.xdp_mode(), "data plane loaded");
    let mut plane = Plane::new(data_plane, config.machine.clone());
    let flow_log = flow_log
        .map(|(events, log)| tokio::spawn(flow_log::run(events, log, plane.names(), shutdown.clone())));
    let liveness = Liveness::new(plane.names());
    let latency = Latency::new(liveness.clone());
    let pin_dir = config.pin_dir.clone();
    let metrics = metrics::serve(config.listen, pin_dir, plane.names(), latency.clone(), shutdown.clone());
    let mut bgp = config.bgp.clone().map(Bgp::new);
    let mut routes = Routes::load(config.data_dir.join("routes.log"));
    let (machine, pin_dir) = (config.machine.clone(), config.pin_dir.clone());
    let traffic =
        tokio::spawn(traffic::run(client.clone(), machine, pin_dir, latency.clone(), shutdown.clone()));
    let trying = tokio::spawn(liveness.clone().run(shutdown.clone()));
    let mut suspects = liveness.suspects();
    let mut suspicion = Suspicion::new(config.machine.clone(), config.liveness_floor_percent, liveness);
    let probing = tokio::spawn(latency.run(config.address, config.fleet.clone(), shutdown.clone()));
    let mut watcher = Watcher::<RouteRecord>::new(client, Client::ROUTES_PATH);
    let mut failing = false;

    // Without a log nothing is known yet, and what an earlier process pinned stays in force.
    let mut announced = true;
    if !routes.is_empty() {
        tracing::info!("serving the routes of the last run until the location scheduler answers");
        restore(&mut plane, &routes);
        announced = announce(bgp.as_mut(), &routes).await;
    }
    let mut changes = Vec::new();
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => break,
            () = tokio::time::sleep(RETRY), if !(announced && plane.is_settled()) => {
                plane.retry();
                None
            }
            _ = suspects.changed() => {
                let now = suspects.borrow_and_update().clone();
                plane.apply(suspicion.suspect(now, &routes));
                suspicion.applied();
                None
            }
            event = watcher.try_next_patched(|key| routes.text(key)) => Some(event),
        };
        match event {
            None => {}
            Some(Ok(event)) => {
                if std::mem::take(&mut failing) {
                    tracing::info!("the location scheduler answers again");
                    plane.apply(suspicion.answered(&routes));
                    suspicion.applied();
                }
                let completes = routes.receives() && matches!(event, WatchEvent::Synced { .. });
                changes.extend(routes.apply(event));
                if routes.receives() && changes.len() < BATCH {
                    continue;
                }
                // System calls of some microseconds each: not worth a thread of their own.
                plane.apply(std::mem::take(&mut changes));
                if completes {
                    plane.finish(|vip| routes.contains(vip));
                }
            }
            Some(Err(error)) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "serving the last routes");
                }
                // What came before the stream broke is as true as the rest.
                plane.apply(std::mem::take(&mut changes));
                suspicion.unanswered(&routes);
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    () = tokio::time::sleep(RETRY) => {}
                }
                continue;
            }
        }
        announced = announce(bgp.as_mut(), &routes).await;
    }
    if let Some(flow_log) = flow_log {
        flow_log.await.context("the flow log panicked")?;
    }
    traffic.await.context("the counting of new connections panicked")?;
    probing.await.context("the measuring of latency panicked")?;
    trying.await.context("the looking after instances panicked")?;
    metrics.await.context("the metrics' listener panicked")
}

/// Has the programs tell of flows, if that is configured; the events, and where they go.
fn start_flow_log(
    config: &Config,
    data_plane: &mut DataPlane,
) -> anyhow::Result<Option<(FlowEvents, flow_log::Log)>> {
    let Some(flow_log) = &config.flow_log else { return Ok(None) };
    let log = flow_log::Log::open(flow_log, &config.data_dir)?;
    let events = FlowEvents::open(&config.pin_dir).context("flow_log")?;
    data_plane.set_flow_events(Some(flow_log.one_in)).context("flow_log")?;
    Ok(Some((events, log)))
}

/// Brings the routes of the last run into the data plane.
fn restore(plane: &mut Plane, routes: &Routes) {
    let mut changes = Vec::new();
    let read = routes.for_each(|route| {
        changes.push(Change::Put(route));
        if changes.len() >= BATCH {
            plane.apply(std::mem::take(&mut changes));
        }
    });
    plane.apply(changes);
    match read {
        Ok(()) => plane.finish(|vip| routes.contains(vip)),
        Err(error) => tracing::warn!(%error, "not all routes of the last run could be read"),
    }
}

/// Tells the BGP daemon what to announce; returns whether it has taken it.
async fn announce(bgp: Option<&mut Bgp>, routes: &Routes) -> bool {
    match (bgp, routes.announcement()) {
        (Some(bgp), Some(announcement)) => bgp.announce(&announcement.prefixes).await,
        _ => true,
    }
}
