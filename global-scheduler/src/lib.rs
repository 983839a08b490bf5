//! The API, placement into locations, virtual IPs and the off-peak queue.
//!
//! One process with one store, or several over one etcd, of which one leads. What is desired (deployments, placements, jobs, settings, tokens) is written to the
//! store by conditional transactions, one writer at a time, and mirrored in memory; what is observed (reports of
//! locations) is in memory only, and comes again within a heartbeat of a restart. A reconcile loop compares the
//! two, plans, writes, and publishes what each location should have as a watch stream. Beside it, a ledger grants every
//! half second what locations may send to each other of new connections.
//!
//! This crate must not know machines, runtimes or packets.

mod api;
mod app;
mod arrays;
mod batch;
mod choice;
mod config;
mod demand;
mod deployments;
mod job_table;
mod jobs;
mod latency;
mod observe;
mod publish;
mod queue;
mod reconcile;
mod records;
mod standby;
mod term;
mod views;
mod vips;
mod world;

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use anyplace_store::Store;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use config::{Config, JobsConfig};

/// The OpenAPI document of the global scheduler's API.
pub fn openapi() -> utoipa::openapi::OpenApi {
    api::router().split_for_parts().1
}

/// Whose store an export is.
const STORE_OF: &str = "global-scheduler";

/// What is in the store of a configuration, as a file. Over etcd, the scheduler may run meanwhile; a local file is only
/// read while it doesn't.
///
/// # Errors
/// The store can't be opened or read.
pub async fn export(config: &Config) -> anyhow::Result<Vec<u8>> {
    config.validate()?;
    let store = anyplace_store::open(config.store_path(), config.etcd.as_ref()).await?;
    Ok(anyplace_store::export(store.as_ref(), STORE_OF).await?)
}

/// Fills the empty store of a configuration with what was exported; returns the number of entries.
///
/// # Errors
/// The file isn't a whole export, the store isn't empty, or can't be opened or written.
pub async fn import(config: &Config, file: &[u8]) -> anyhow::Result<usize> {
    config.validate()?;
    let store = anyplace_store::open_any(config.store_path(), config.etcd.as_ref()).await?;
    Ok(anyplace_store::import(store.as_ref(), STORE_OF, file).await?)
}

/// Runs the global scheduler until the shutdown.
///
/// # Errors
/// The configuration is impossible, the store can't be opened or read, or the address can't be listened on.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    config.validate()?;
    anyplace_service::install_crypto_provider();
    let admin = anyplace_service::load_or_create_token(&config.data_dir.join("admin.token"))?;
    let store = anyplace_store::open(config.store_path(), config.etcd.as_ref()).await.context("opening")?;
    if config.etcd.is_none() {
        // The file's lock keeps others out.
        let term = term::begin(store.as_ref()).await?;
        return lead(store, term, config, &admin, shutdown).await;
    }
    let (me, seen) = (term::Leader::new(config.advertised()), watch::Sender::new(None));
    while let Some(won) = stand_by(store.as_ref(), &me, &seen, config.listen, &shutdown).await? {
        let end = shutdown.child_token();
        let (led, ()) = tokio::join!(
            async {
                let led = lead(store.clone(), won.term, config.clone(), &admin, end.clone()).await;
                end.cancel();
                led
            },
            term::keep(store.as_ref(), &won, &end),
        );
        // What can't be read or listened on is told again by the next try; giving up would leave nobody.
        if let Err(error) = led {
            tracing::error!(error = format!("{error:#}"), "the term ended");
            if shutdown.is_cancelled() {
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Answers that another one leads until this one does. None after the shutdown.
async fn stand_by(
    store: &dyn Store,
    me: &term::Leader,
    seen: &watch::Sender<Option<term::Leader>>,
    listen: SocketAddr,
    shutdown: &CancellationToken,
) -> anyhow::Result<Option<term::Lead>> {
    let end = shutdown.child_token();
    let elected = async {
        let won = term::win(store, me, seen, &end).await;
        end.cancel();
        won
    };
    let standby = anyplace_service::serve(listen, standby::service(seen.subscribe()), end.clone());
    let (won, served) = tokio::join!(elected, async {
        let served = standby.await;
        end.cancel();
        served
    });
    served?;
    Ok(won)
}

/// Does everything until the shutdown, or the end of the term.
async fn lead(
    store: Arc<dyn Store>,
    term: term::Term,
    config: Config,
    admin: &str,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let listen = config.listen;
    let app = app::App::load(store, term, config, admin, shutdown.clone()).await?;
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
