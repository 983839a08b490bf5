//! Start and end of the registry.

use std::fs::Permissions;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use anyplace_model::Bytes;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::access::{self, Access};
use crate::cache::counters::CacheCounters;
use crate::config::Config;
use crate::counters::{Counters, Kind};
use crate::gc::{Afterwards, Collector};
use crate::remembered::Remembered;
use crate::scrub::{Repair, Scrubber};
use crate::storage::Storage;
use crate::stored::Stored;
use crate::uploads::{CHUNK_MAX_BYTES, Uploads};
use crate::upstream::Cache;
use crate::{admin, connections, routes};

/// The key of tokens, in the data folder where content is kept there.
const TOKEN_KEY: &str = "access/token-key";
/// How long a collection or a scrub may take to come to a stop.
const BACKGROUND_STOPS_WITHIN: Duration = Duration::from_secs(10);

/// What all endpoints share.
pub(crate) struct App {
    pub(crate) access: Arc<Access>,
    pub(crate) storage: Storage,
    pub(crate) uploads: Arc<Uploads>,
    /// The longest part of an upload.
    pub(crate) chunk_max_bytes: u64,
    pub(crate) cache: Option<Cache>,
    pub(crate) remembered: Remembered,
    pub(crate) counters: Arc<Counters>,
    pub(crate) stored: Stored,
    pub(crate) collector: Arc<Collector>,
    pub(crate) scrubber: Arc<Scrubber>,
    /// Cancelled when the shutdown begins: what runs ends, nothing new starts.
    pub(crate) draining: CancellationToken,
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
        make_private(&config.data_dir)?;
        let storage = Storage::open(&config).await?;
        let access = Access::open(
            config.access.clone(),
            &config.credentials_path(),
            &config.data_dir,
            &config.gc,
            &storage,
        )
        .await?;
        let uploads = Arc::new(Uploads::open(storage.clone())?);
        let (chunk_max_bytes, chunk_min_bytes) = (config.uploads.chunk_max.0, uploads.part_min_bytes());
        anyhow::ensure!(
            (chunk_min_bytes..=CHUNK_MAX_BYTES).contains(&chunk_max_bytes),
            "uploads.chunk_max is {}; expected {} to {}",
            config.uploads.chunk_max,
            Bytes(chunk_min_bytes),
            Bytes(CHUNK_MAX_BYTES)
        );
        let cache = Cache::open(&config).await?;
        if let Some(cache) = cache.clone().filter(|_| on_one_disk(&config.data_dir)) {
            storage.ask_for_room(Box::new(move |bytes| cache.evict(bytes)));
        }
        let listener = TcpListener::bind(config.listen).await.with_context(|| {
            format!("can't listen on {}; check `listen`, and that nothing else listens there", config.listen)
        })?;
        let (remembered, counters, draining) =
            (Remembered::default(), Arc::default(), CancellationToken::new());
        let collector =
            Arc::new(Collector::new(storage.clone(), &config, access.audit.clone(), draining.clone())?);
        let app = Arc::new_cyclic(|app: &Weak<App>| {
            let repair = cache.is_some().then(|| repair(app.clone()));
            let scrubber = Scrubber::new(storage.clone(), &config, repair, draining.clone());
            let (access, scrubber) = (Arc::new(access), Arc::new(scrubber));
            let stored = Stored::default();
            collector.do_afterwards(recount(access.clone(), storage.clone(), uploads.clone()));
            App {
                access,
                storage,
                uploads,
                chunk_max_bytes,
                cache,
                remembered,
                counters,
                stored,
                collector,
                scrubber,
                draining,
            }
        });
        Ok(Server { listener, app, drain: Duration::from_secs(config.drain_s) })
    }

    /// What its cache counts, if it has one.
    pub fn cache_counters(&self) -> Option<Arc<CacheCounters>> {
        self.app.cache.as_ref().map(|cache| cache.counters().clone())
    }

    /// The address that it listens on, with the port that the system chose for port 0.
    ///
    /// # Errors
    /// The system doesn't tell.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the shutdown; what runs then may end within the drain's time.
    ///
    /// # Errors
    /// The listener fails.
    pub async fn serve(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        tracing::info!(address = %self.local_addr()?, "registry listening");
        let draining = self.app.draining.clone();
        let counters = self.app.counters.clone();
        let (access, storage, uploads) =
            (self.app.access.clone(), self.app.storage.clone(), self.app.uploads.clone());
        let (collector, scrubber) = (self.app.collector.clone(), self.app.scrubber.clone());
        let app = self.app.clone();
        let counting = from_fn_with_state(self.app.clone(), count);
        let managing = access::http::routes().merge(admin::routes()).route_layer(counting);
        let router = Router::new()
            .route("/healthz", get(healthz))
            .route("/metrics", get(metrics))
            .merge(managing)
            .fallback(routes::dispatch)
            .with_state(self.app);
        let serving = connections::serve(self.listener, router, counters, draining.clone(), self.drain);
        let keeping_up = access.run(storage, uploads, draining.clone());
        let background = async {
            let App { stored, storage, uploads, access, draining, .. } = &*app;
            let counting = stored.run_by_itself(storage, uploads, &access.accounts, draining);
            tokio::join!(collector.run_by_itself(), scrubber.run_by_itself(), counting);
            std::future::pending::<()>().await;
        };
        let told = async {
            shutdown.cancelled().await;
            draining.cancel();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = serving => {}
            () = told => {}
            ((), ()) = async { (keeping_up.await, std::future::pending().await) } => {}
            () = background => {}
        }
        // They stop soon after the shutdown began; what they leave in a hurry, the next ones clean.
        let ended = async { tokio::join!(collector.ended(), scrubber.ended()) };
        let _ = tokio::time::timeout(BACKGROUND_STOPS_WITHIN, ended).await;
        Ok(())
    }
}

/// Makes the data folder, and keeps others out of it: what is below has no modes of its own. Where they could read it
/// until now, the key of tokens is made anew.
fn make_private(folder: &Path) -> anyhow::Result<()> {
    let private = || -> std::io::Result<bool> {
        let was_open = match std::fs::metadata(folder) {
            Ok(there) => there.permissions().mode() & 0o077 != 0,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                std::fs::create_dir_all(folder)?;
                false
            }
            Err(error) => return Err(error),
        };
        std::fs::set_permissions(folder, Permissions::from_mode(0o700))?;
        if !was_open {
            return Ok(false);
        }
        match std::fs::remove_file(folder.join(TOKEN_KEY)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    };
    let renewed = private().with_context(|| {
        let path = folder.display();
        format!("can't make {path} private; check data_dir, and that it belongs to the user that runs this")
    })?;
    if renewed {
        tracing::warn!(
            folder = %folder.display(),
            "others could read the data folder, and so the key of tokens: it is private now, and the key is a new one"
        );
    }
    Ok(())
}

/// Whether what the cache keeps takes room of what is pushed.
fn on_one_disk(data_dir: &Path) -> bool {
    let disk = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).ok();
    disk(data_dir) == disk(&data_dir.join("cache"))
}

async fn healthz(State(app): State<Arc<App>>) -> (StatusCode, &'static str) {
    match app.draining.is_cancelled() {
        false => (StatusCode::OK, "ok\n"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
    }
}

/// Counts a request that `routes` doesn't see.
async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (method, begun) = (request.method().clone(), Instant::now());
    let response = next.run(request).await;
    app.counters.requests.count(Kind::Manage, &method, response.status(), begun.elapsed());
    response
}

async fn metrics(State(app): State<Arc<App>>) -> String {
    let cache = app.cache.as_ref().map(|cache| cache.counters().render() + &cache.use_of_room());
    let mut more: Vec<_> = app.access.counters().into_iter().collect();
    more.extend(app.uploads.counters());
    more.extend(app.collector.counters());
    more.extend(app.scrubber.counters());
    app.counters.render(&more) + &app.stored.render() + &cache.unwrap_or_default()
}

/// Gets damaged content from the cache's upstreams.
fn repair(app: Weak<App>) -> Repair {
    Box::new(move |repository, digest| {
        let app = app.clone();
        Box::pin(async move {
            let Some(app) = app.upgrade() else { return false };
            let Some(cache) = &app.cache else { return false };
            if cache.adopt(&app, &repository, &digest).await.is_ok() {
                return true;
            }
            match cache.manifest(&repository, &digest).await {
                Ok(manifest) if digest.same_of(&manifest.bytes) == digest => {
                    app.storage.put_content(&digest, manifest.bytes).await.is_ok()
                }
                _ => false,
            }
        })
    })
}

/// Counts what teams use.
fn recount(access: Arc<Access>, storage: Storage, uploads: Arc<Uploads>) -> Afterwards {
    Box::new(move || {
        let (access, storage, uploads) = (access.clone(), storage.clone(), uploads.clone());
        Box::pin(async move { access.count(&storage, &uploads).await })
    })
}

/// Runs a registry until the shutdown.
///
/// # Errors
/// It can't start, or its listener fails.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    keep_freed_buffers();
    Server::bind(config).await?.serve(shutdown).await
}

/// Buffers of connections come and go by the thousand a second, each of some 100 KiB: by default the allocator maps and
/// unmaps each, and every page of it is a fault. An upload then costs 0.2 CPU-s a GiB more (of 1.4).
fn keep_freed_buffers() {
    #[cfg(target_env = "gnu")]
    for (parameter, bytes) in [(libc::M_MMAP_THRESHOLD, 8 << 20), (libc::M_TRIM_THRESHOLD, 32 << 20)] {
        // SAFETY: it takes numbers only.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}
