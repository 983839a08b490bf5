//! The state router of a machine: follows its location's routes, programs the data plane with them, and tells the
//! BGP daemon what to announce.
//!
//! The data plane is pinned in the kernel, so nothing stops when this process is killed. A snapshot of the routes on
//! disk lets a new process serve before, and without, its location scheduler.
//!
//! This crate must not know about deployments, images or placement.

mod bgp;
mod config;
mod plane;
mod routes;

use std::time::Duration;

use anyhow::Context as _;
use anyplace_api::{Client, Watcher};
use anyplace_ebpf::{DataPlane, Options};
use anyplace_model::RouteRecord;
use tokio_util::sync::CancellationToken;

pub use config::{BgpConfig, Config};

use crate::{bgp::Bgp, plane::Plane, routes::Routes};

/// How soon what failed (an instance's interface that isn't there yet, a BGP daemon that doesn't answer) is tried
/// again.
const RETRY: Duration = Duration::from_millis(100);

/// Runs the router until the shutdown. Routes stay in force after it.
///
/// # Errors
/// The data plane can't be loaded, or the configuration can't be used.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let token = anyplace_service::read_token(&config.token_file)?;
    let client = Client::new(&config.location_scheduler, Some(token)).context("location_scheduler")?;
    let data_plane = DataPlane::load(Options {
        uplink: config.uplink.clone(),
        address: config.address,
        pin_dir: config.pin_dir.clone(),
        object: None,
    })
    .context("the data plane can't be loaded")?;
    tracing::info!(uplink = config.uplink, mode = ?data_plane.xdp_mode(), "data plane loaded");
    let mut plane = Plane::new(data_plane, config.machine.clone());
    let mut bgp = config.bgp.clone().map(Bgp::new);
    let mut routes = Routes::load(config.data_dir.join("routes.json"));
    let mut watcher = Watcher::<RouteRecord>::new(client, Client::ROUTES_PATH);
    let mut failing = false;

    // Without a snapshot nothing is known yet, and what an earlier process pinned stays in force.
    let mut settled = true;
    if !routes.is_empty() {
        tracing::info!("serving the routes of the last run until the location scheduler answers");
        settled = apply(&mut plane, bgp.as_mut(), &routes).await;
    }
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => break,
            () = tokio::time::sleep(RETRY), if !settled => None,
            event = watcher.try_next() => Some(event),
        };
        match event {
            None => {}
            Some(Ok(event)) => {
                if std::mem::take(&mut failing) {
                    tracing::info!("the location scheduler answers again");
                }
                if !routes.apply(event) {
                    continue;
                }
                routes.save();
            }
            Some(Err(error)) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "serving the last routes");
                }
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    () = tokio::time::sleep(RETRY) => {}
                }
                continue;
            }
        }
        settled = apply(&mut plane, bgp.as_mut(), &routes).await;
    }
    Ok(())
}

/// Brings data plane and BGP daemon to the routes; returns whether both are there.
async fn apply(plane: &mut Plane, bgp: Option<&mut Bgp>, routes: &Routes) -> bool {
    // System calls of some microseconds each: not worth a thread of their own.
    let forwards = plane.apply(routes.vips());
    let announces = match (bgp, routes.announcement()) {
        (Some(bgp), Some(announcement)) => bgp.announce(&announcement.prefixes).await,
        _ => true,
    };
    forwards && announces
}
