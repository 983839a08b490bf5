//! The API, placement into locations, virtual IPs and the off-peak queue.
//!
//! One process with one store. What is desired (deployments, placements, jobs, settings, tokens) is written to the
//! store by conditional transactions, one writer at a time, and mirrored in memory; what is observed (reports of
//! locations) is in memory only, and comes again within a heartbeat of a restart. A reconcile loop compares the
//! two, plans, writes, and publishes what each location should have as a watch stream. Beside it, a ledger grants every
//! half second what locations may send to each other of new connections.
//!
//! This crate must not know machines, runtimes or packets.

mod api;
mod app;
mod batch;
mod choice;
mod config;
mod deployments;
mod jobs;
mod latency;
mod observe;
mod publish;
mod reconcile;
mod records;
mod views;
mod vips;
mod world;

use anyhow::Context as _;
use anyplace_store::EmbeddedStore;
use tokio_util::sync::CancellationToken;

pub use config::Config;

/// The OpenAPI document of the global scheduler's API.
pub fn openapi() -> utoipa::openapi::OpenApi {
    api::router().split_for_parts().1
}

/// Runs the global scheduler until the shutdown.
///
/// # Errors
/// The configuration is impossible, the store can't be opened or read, or the address can't be listened on.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    config.validate()?;
    anyplace_service::install_crypto_provider();
    let admin = anyplace_service::load_or_create_token(&config.data_dir.join("admin.token"))?;
    let path = config.data_dir.join("store.redb");
    let store = tokio::task::spawn_blocking(move || EmbeddedStore::open(path)).await.context("opening")??;
    let listen = config.listen;
    let app = app::App::load(store, config, &admin, shutdown.clone()).await?;
    // What locations should have is published before the first of them can ask, or they would stop everything.
    app.reconcile_once().await?;
    let reconciler = tokio::spawn(reconcile::run(app.clone()));
    let granter = tokio::spawn(choice::run(app.clone()));
    let served = anyplace_service::serve(listen, api::service(app), shutdown.clone()).await;
    // The server may have failed by itself; the loop ends with it.
    shutdown.cancel();
    reconciler.await.context("the reconcile loop failed")?;
    granter.await.context("the ledger failed")?;
    served
}
