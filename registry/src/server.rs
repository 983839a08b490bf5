//! Start and end of the registry.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::auth::Users;
use crate::config::Config;
use crate::routes;
use crate::storage::Storage;
use crate::uploads::Uploads;
use crate::upstream::Cache;

/// What all endpoints share.
pub(crate) struct App {
    pub(crate) users: Users,
    pub(crate) storage: Storage,
    pub(crate) uploads: Arc<Uploads>,
    pub(crate) cache: Option<Cache>,
}

/// A registry that listens, and serves once [`Server::serve`] runs.
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
    drain: Duration,
}

impl Server {
    /// Opens the storage and the address.
    ///
    /// # Errors
    /// The data folder, the credentials or the address can't be used.
    pub async fn bind(config: Config) -> anyhow::Result<Server> {
        let storage = Storage::open(&config.data_dir)?;
        let users = Users::load_or_create(&config.credentials_path())?;
        let uploads = Arc::new(Uploads::open(storage.clone())?);
        let cache = match &config.upstream {
            Some(upstream) => Some(Cache::new(upstream, storage.clone(), uploads.clone())?),
            None => None,
        };
        let listener = TcpListener::bind(config.listen).await.with_context(|| {
            format!("can't listen on {}; check `listen`, and that nothing else listens there", config.listen)
        })?;
        let drain = Duration::from_secs(config.drain_s);
        Ok(Server { listener, app: Arc::new(App { users, storage, uploads, cache }), drain })
    }

    /// The address that it listens on, with the port that the system chose for port 0.
    ///
    /// # Errors
    /// The system doesn't tell.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the shutdown; open transfers get a moment to end.
    ///
    /// # Errors
    /// The listener fails.
    pub async fn serve(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        tracing::info!(address = %self.local_addr()?, "registry listening");
        let router = Router::new()
            .route("/healthz", axum::routing::get(anyplace_service::healthz))
            .fallback(routes::dispatch)
            .with_state(self.app);
        let server =
            axum::serve(self.listener, router).with_graceful_shutdown(shutdown.clone().cancelled_owned());
        let deadline = async {
            shutdown.cancelled().await;
            tokio::time::sleep(self.drain).await;
        };
        tokio::select! {
            result = server => result.context("the registry's server failed"),
            () = deadline => Ok(()),
        }
    }
}

/// Runs a registry until the shutdown.
///
/// # Errors
/// It can't start, or its listener fails.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    Server::bind(config).await?.serve(shutdown).await
}
