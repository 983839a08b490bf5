//! Online garbage collection: takes away what nothing needs while pushes, mounts and deletes go on.
//!
//! A collection has three parts (`run`): it reads each repository's manifests, lets go tags that lead nowhere and what
//! rules don't keep (`retain`),
//! and marks what the rest needs; it removes old links that nothing needs; it deletes content that has no link
//! (`sweep`). Each removal happens behind a marker (`hold`), after a second look; the protocol, and why it needs neither
//! locks nor conditional writes, is in `storage` and in `docs/decisions/0004-online-gc.md`.
//!
//! Deleted tags and manifests go to the trash first (`trash`) and keep what they need alive for a while.
//!
//! One collection runs at a time, by a lease in the store. Two at once would do no harm but twice the work, so it
//! is enough that the lease mostly works.

mod hold;
mod in_use;
mod report;
mod retain;
mod run;
mod settings;
mod sweep;
mod trash;

#[cfg(test)]
mod campaign;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use anyplace_registry_core::retention::Rule;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use crate::access::Audit;
use crate::config::Config;
use crate::storage::{Ages, Note, Storage};
pub use report::{GcPhase, GcReport, GcSeen, GcSpared, GcStatus};
use run::Context;
pub use settings::{GcConfig, RetentionConfig, RuleConfig};
pub(crate) use trash::{Missing, Named, delete_manifest, delete_tag, empty, undelete};

/// How long a lease is good for without being renewed.
const LEASE: Duration = Duration::from_secs(120);
/// How often it is renewed.
const LEASE_RENEWAL: Duration = Duration::from_secs(30);
/// How often the collector looks whether it is time, and for markers that are left over.
const CHECK_EVERY: Duration = Duration::from_secs(300);
/// When a failed collection is tried again, if not before.
const RETRY_AFTER: Duration = Duration::from_secs(3600);

/// What is to be done before a collection that took links away ends.
pub(crate) type Afterwards = Box<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// The collection that runs.
#[derive(Serialize, Deserialize)]
struct Lease {
    run: String,
}

/// Why no collection began.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotBegun {
    #[error("a collection runs already ({0}); see `anyplace registry gc --status`")]
    Busy(String),
    #[error(transparent)]
    Storage(#[from] crate::storage::Error),
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

/// The registry's collector.
pub(crate) struct Collector {
    storage: Storage,
    gc: GcConfig,
    retention: RetentionConfig,
    rules: Vec<Rule>,
    one: Arc<tokio::sync::Mutex<()>>,
    running: Mutex<Option<GcReport>>,
    last_dry_run: Mutex<Option<GcReport>>,
    totals: Totals,
    audit: Arc<Audit>,
    afterwards: OnceLock<Afterwards>,
    stop: CancellationToken,
}

/// Since the start.
#[derive(Default)]
struct Totals {
    collections: AtomicU64,
    failed: AtomicU64,
    links: AtomicU64,
    contents: AtomicU64,
    bytes: AtomicU64,
}

impl Totals {
    fn add(&self, report: &GcReport) {
        let failed = report.phase == GcPhase::Failed;
        let which = if failed { &self.failed } else { &self.collections };
        which.fetch_add(1, Ordering::Relaxed);
        self.links.fetch_add(report.plan.links.count, Ordering::Relaxed);
        self.contents.fetch_add(report.plan.content.count, Ordering::Relaxed);
        self.bytes.fetch_add(report.plan.bytes, Ordering::Relaxed);
    }
}

/// A collection that may go on.
struct Begun {
    report: GcReport,
    ages: Ages,
    one: OwnedMutexGuard<()>,
}

impl Collector {
    /// A collector that ends what it does soon after `stop`.
    pub(crate) fn new(
        storage: Storage,
        config: &Config,
        audit: Arc<Audit>,
        stop: CancellationToken,
    ) -> anyhow::Result<Collector> {
        config.gc.check()?;
        Collector::unchecked(storage, config, audit, stop)
    }

    /// One whose grace may be short, for stores whose time no test can set.
    pub(crate) fn unchecked(
        storage: Storage,
        config: &Config,
        audit: Arc<Audit>,
        stop: CancellationToken,
    ) -> anyhow::Result<Collector> {
        Ok(Collector {
            storage,
            gc: config.gc.clone(),
            retention: config.retention.clone(),
            rules: config.retention.rules()?,
            one: Arc::default(),
            running: Mutex::default(),
            last_dry_run: Mutex::default(),
            totals: Totals::default(),
            audit,
            afterwards: OnceLock::new(),
            stop,
        })
    }

    /// Sets what is to be done before a collection that took links away ends.
    pub(crate) fn do_afterwards(&self, afterwards: Afterwards) {
        let _ = self.afterwards.set(afterwards);
    }

    /// For `/metrics`.
    pub(crate) fn counters(&self) -> impl IntoIterator<Item = (&'static str, &'static str, &AtomicU64)> {
        let Totals { collections, failed, links, contents, bytes } = &self.totals;
        [
            ("gc_collections", "Collections that came to their end", collections),
            ("gc_failed", "Collections that failed", failed),
            ("gc_links", "Links that collections removed", links),
            ("gc_contents", "Contents that collections deleted", contents),
            ("gc_bytes", "Bytes that collections deleted", bytes),
        ]
    }

    /// How long deletions can be undone.
    pub(crate) fn window(&self) -> Duration {
        self.gc.undelete_window.to_std()
    }

    /// Collects whenever it is time, until the registry stops.
    pub(crate) async fn run_by_itself(&self) {
        let mut pause = CHECK_EVERY;
        while self.stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
            pause = CHECK_EVERY;
            match self.check().await {
                Ok(Some(report)) => log(&report),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "the collector couldn't look whether it is time"),
            }
        }
    }

    /// Removes what is left over, and collects if it is time.
    async fn check(&self) -> anyhow::Result<Option<GcReport>> {
        // Also for those that start later: what nobody looked at, they don't count.
        self.storage.now().await?;
        let stale = hold::remove_stale(&self.storage).await?;
        if stale > 0 {
            tracing::info!(stale, "removed markers of collections that didn't come to their end");
        }
        self.take_back_room().await;
        let every = self.gc.every.to_std();
        if every.is_zero() {
            return Ok(None);
        }
        if let Some((last, ended)) = self.storage.note::<GcReport>(Note::LastCollection).await? {
            let wait = if last.phase == GcPhase::Failed { every.min(RETRY_AFTER) } else { every };
            if self.storage.ages().await?.of_past(ended) < wait {
                return Ok(None);
            }
        }
        match self.collect(false).await {
            Ok(report) => Ok(Some(report)),
            // Another registry is at it.
            Err(NotBegun::Busy(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Begins a collection, and goes on with it in the background.
    pub(crate) async fn start(self: &Arc<Self>, dry_run: bool) -> Result<GcReport, NotBegun> {
        let begun = self.begin(dry_run).await?;
        let (this, report) = (self.clone(), begun.report.clone());
        tokio::spawn(async move { log(&this.go_on(begun).await) });
        Ok(report)
    }

    /// Collects. What went wrong on the way is in the report.
    pub(crate) async fn collect(&self, dry_run: bool) -> Result<GcReport, NotBegun> {
        let begun = self.begin(dry_run).await?;
        Ok(self.go_on(begun).await)
    }

    /// What it does, and did.
    pub(crate) async fn status(&self) -> crate::storage::Result<GcStatus> {
        let running = self.running.lock().ok().and_then(|report| report.clone());
        let last_dry_run = self.last_dry_run.lock().ok().and_then(|report| report.clone());
        let last = self.storage.note(Note::LastCollection).await?.map(|(report, _)| report);
        Ok(GcStatus { running, last, last_dry_run })
    }

    /// Waits until nothing is going on.
    pub(crate) async fn ended(&self) {
        let _one = self.one.lock().await;
    }

    /// Where a full disk has room again, for the next time.
    async fn take_back_room(&self) {
        if let Err(error) = self.storage.check_room().await {
            tracing::warn!(%error, "pushes are refused until this is mended");
        }
    }

    async fn begin(&self, dry_run: bool) -> Result<Begun, NotBegun> {
        let one = self.one.clone().try_lock_owned();
        let one = one.map_err(|_| NotBegun::Busy("in this registry".to_owned()))?;
        let ages = self.storage.ages().await?;
        let run = hex::encode(rand::random::<[u8; 8]>());
        if !dry_run {
            if let Some((lease, put)) = self.storage.note::<Lease>(Note::Lease).await?
                && ages.of_past(put) < LEASE
            {
                return Err(NotBegun::Busy(lease.run));
            }
            match self.storage.put_note(Note::Lease, &Lease { run: run.clone() }).await {
                // A collection may be what helps.
                Err(error @ crate::storage::Error::Full { .. }) => {
                    tracing::warn!(%error, "a collection begins without a lease");
                }
                put => put?,
            }
        }
        let started = Timestamp::try_from(ages.now()).context("the store's time is no time")?;
        let report = GcReport::new(run, dry_run, started);
        if let Ok(mut running) = self.running.lock() {
            *running = Some(report.clone());
        }
        Ok(Begun { report, ages, one })
    }

    async fn go_on(&self, begun: Begun) -> GcReport {
        let Begun { report, ages, one } = begun;
        let (run, dry_run) = (report.run.clone(), report.dry_run);
        let renewing = async {
            loop {
                tokio::time::sleep(LEASE_RENEWAL).await;
                if !dry_run
                    && let Err(error) = self.storage.put_note(Note::Lease, &Lease { run: run.clone() }).await
                {
                    tracing::warn!(%error, "the collector's lease can't be renewed");
                }
            }
        };
        // Who sees the end of a collection may push by the new counts; counting may take minutes, so the lease goes on.
        let working = async {
            let outcome = self.work(&report, ages).await;
            if !dry_run
                && self.freed()
                && !self.stop.is_cancelled()
                && let Some(afterwards) = self.afterwards.get()
            {
                afterwards().await;
            }
            outcome
        };
        let outcome = tokio::select! {
            biased;
            outcome = working => outcome,
            () = renewing => Ok(()),
        };
        let now = self.storage.now().await.ok().and_then(|now| Timestamp::try_from(now).ok());
        let finished = self.running.lock().ok().and_then(|mut running| running.take());
        let mut finished = finished.unwrap_or(report);
        finished.finished = now.or(Some(finished.started));
        (finished.phase, finished.error) = match outcome {
            Ok(()) if self.stop.is_cancelled() => (GcPhase::Stopped, None),
            Ok(()) => (GcPhase::Done, None),
            Err(error) => (GcPhase::Failed, Some(format!("{error:#}"))),
        };
        if !dry_run {
            self.totals.add(&finished);
        }
        if dry_run {
            if let Ok(mut last) = self.last_dry_run.lock() {
                *last = Some(finished.clone());
            }
            return finished;
        }
        let noted = async {
            self.storage.remove_note(Note::Lease).await?;
            // Who sees that it ended may begin the next one.
            drop(one);
            self.storage.put_note(Note::LastCollection, &finished).await
        };
        if let Err(error) = noted.await {
            tracing::warn!(%error, "the collector's report can't be kept");
        }
        self.take_back_room().await;
        finished
    }

    /// Whether what goes on has taken anything that counts for quotas.
    fn freed(&self) -> bool {
        let running = self.running.lock().ok();
        let running = running.as_ref().and_then(|running| running.as_ref());
        running.is_some_and(|report| report.plan.links.count > 0 || report.uploads_abandoned > 0)
    }

    async fn work(&self, report: &GcReport, ages: Ages) -> anyhow::Result<()> {
        let in_use = match self.rules.is_empty() {
            true => None,
            false => match in_use::fetch(&self.retention).await {
                Ok(in_use) => Some(in_use),
                Err(error) => {
                    let reason = format!(
                        "the images in use can't be had, so no rule lets anything go: {error:#}; check [retention]"
                    );
                    tracing::warn!(reason);
                    if let Ok(mut running) = self.running.lock()
                        && let Some(report) = &mut *running
                    {
                        report.retention_skipped = Some(reason);
                    }
                    None
                }
            },
        };
        let context = Context {
            storage: &self.storage,
            run: report.run.clone(),
            ages,
            grace_ms: self.gc.grace.0,
            window: self.window(),
            dry_run: report.dry_run,
            stop: &self.stop,
            audit: &self.audit,
            report: &self.running,
            rules: &self.rules,
            in_use,
            seed: rand::random(),
        };
        run::run(&context).await
    }
}

fn log(report: &GcReport) {
    let GcReport { run, phase, dry_run, .. } = report;
    let (links, content, bytes) = (report.plan.links.count, report.plan.content.count, report.plan.bytes);
    match &report.error {
        None => tracing::info!(run, dry_run, %phase, links, content, bytes, "collected"),
        Some(error) => tracing::error!(run, dry_run, error, links, content, bytes, "a collection failed"),
    }
}
