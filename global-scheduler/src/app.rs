//! What all handlers and the reconcile loop share.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyplace_api::{Client, DeploymentView, ErrorCode, JobView, Problem};
use anyplace_service::{Failure, Feed, TokenHash, unix_epoch};
use anyplace_store::{Error as StoreError, Store, TxnOutcome};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    batch::Batch,
    choice::Ledgers,
    publish,
    records::Tombstone,
    term::{TERM, Term},
    world::World,
};

/// How long expired tokens are remembered, so that they are told that they expired.
const EXPIRED_TOKEN_KEPT: SignedDuration = SignedDuration::from_hours(30 * 24);
/// How long the numbers of something deleted are remembered: longer than any location stays away with its remains.
const TOMBSTONE_KEPT: SignedDuration = SignedDuration::from_hours(30 * 24);

/// The global scheduler.
pub(crate) struct App {
    pub(crate) config: Config,
    store: Arc<dyn Store>,
    /// The present term: each write has the condition that no later one has begun.
    pub(crate) term: Term,
    world: Mutex<World>,
    writing: tokio::sync::Mutex<()>,
    pub(crate) wake: Notify,
    pub(crate) started: Instant,
    /// Whether every location that was alive has reported or has had a lease's time for it.
    pub(crate) settled: watch::Sender<bool>,
    pub(crate) admin: TokenHash,
    /// For logs.
    pub(crate) http: Client,
    pub(crate) deployments: Arc<Feed<DeploymentView>>,
    pub(crate) jobs: Arc<Feed<JobView>>,
    pub(crate) shutdown: CancellationToken,
}

/// Proof that no one else writes. Reports don't need it: they change what is observed, in memory.
pub(crate) struct Writer<'a> {
    app: &'a App,
    _guard: tokio::sync::MutexGuard<'a, ()>,
}

impl App {
    pub(crate) async fn load(
        store: Arc<dyn Store>,
        term: Term,
        config: Config,
        admin: &str,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Arc<Self>> {
        let mut world = World::load(store.as_ref()).await?;
        world.job_limits = config.jobs.limits();
        world.ledgers = Ledgers::starting_at(unix_epoch() / 1_000);
        let app = Arc::new(Self {
            http: Client::new("http://127.0.0.1", None)?,
            config,
            store,
            term,
            world: Mutex::new(world),
            writing: tokio::sync::Mutex::new(()),
            wake: Notify::new(),
            started: Instant::now(),
            settled: watch::Sender::new(false),
            admin: TokenHash::of(admin),
            deployments: Arc::default(),
            jobs: Arc::default(),
            shutdown,
        });
        app.forget_the_old().await.map_err(|Failure(problem)| anyhow::anyhow!("{problem}"))?;
        app.complete_vips().await.map_err(|Failure(problem)| anyhow::anyhow!("{problem}"))?;
        Ok(app)
    }

    /// Everything stored, at one revision.
    pub(crate) async fn export(&self) -> anyhow::Result<Vec<u8>> {
        Ok(anyplace_store::export(self.store.as_ref(), crate::STORE_OF).await?)
    }

    /// The state in memory. Held for moments only, never across an await.
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        // Each change to the world is complete before anything that could panic.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn writer(&self) -> Writer<'_> {
        Writer { app: self, _guard: self.writing.lock().await }
    }

    /// Publishes everything anew, from one moment's world.
    pub(crate) fn publish(&self) {
        publish::all(self, &self.world());
    }

    async fn forget_the_old(&self) -> Result<(), Failure> {
        let (writer, now) = (self.writer().await, Timestamp::now());
        let (mut tokens, mut tombstones) = (Vec::new(), Vec::new());
        {
            let world = self.world();
            let expired =
                |at: Option<Timestamp>| at.is_some_and(|at| now.duration_since(at) > EXPIRED_TOKEN_KEPT);
            tokens.extend(
                world
                    .tokens
                    .iter()
                    .filter(|(_, token)| expired(token.expires_at))
                    .map(|(key, _)| key.clone()),
            );
            let old = |stone: &Tombstone| now.duration_since(stone.deleted_at) > TOMBSTONE_KEPT;
            tombstones
                .extend(world.tombstones.iter().filter(|(_, stone)| old(stone)).map(|(key, _)| key.clone()));
        }
        for hash in tokens {
            let mut batch = Batch::default();
            batch.delete_token(hash);
            writer.commit(batch).await?;
        }
        for key in tombstones {
            let mut batch = Batch::default();
            batch.put_tombstone(key, None)?;
            writer.commit(batch).await?;
        }
        Ok(())
    }

    /// Waits until what is published is complete: right after a start, locations that haven't reported yet would
    /// be missing from the routes of the others. Bounded by a lease, and by the patience of a watcher.
    pub(crate) async fn wait_until_settled(&self) -> Result<(), Failure> {
        const PATIENCE: Duration = Duration::from_secs(4);
        let mut settled = self.settled.subscribe();
        let wait = tokio::time::timeout(PATIENCE, settled.wait_for(|settled| *settled));
        let outcome = tokio::select! {
            outcome = wait => outcome.is_ok(),
            () = self.shutdown.cancelled() => false,
        };
        if outcome {
            return Ok(());
        }
        Err(Problem::new(
            ErrorCode::Unavailable,
            "the global scheduler has just started and waits for locations",
        )
        .fix("try again in a second")
        .into())
    }
}

impl Writer<'_> {
    /// Writes to the store, then changes the world. Both, or an error and neither.
    pub(crate) async fn commit(&self, batch: Batch) -> Result<(), Failure> {
        if batch.is_empty() {
            return Ok(());
        }
        let (txn, changes) = batch.seal(&self.app.world())?;
        let txn = txn.when_revision(TERM, self.app.term.revision);
        match self.app.store.txn(txn).await {
            Ok(TxnOutcome::Committed { revision }) => {
                let mut world = self.app.world();
                changes.into_iter().for_each(|change| change(&mut world, revision));
                Ok(())
            }
            Ok(TxnOutcome::Conflict { key, .. }) if key == TERM => {
                Err(self.step_down("a later term has begun: this global scheduler no longer leads"))
            }
            Ok(TxnOutcome::Conflict { .. }) => {
                Err(Problem::new(ErrorCode::Conflict, "it was changed by someone else in the meantime")
                    .fix("look at it again, and repeat")
                    .into())
            }
            // The memory may be behind the store now. What may still be under way ends with the term.
            Err(error @ StoreError::OutcomeUnknown { .. }) => Err(self.step_down(&error.to_string())),
            Err(error @ (StoreError::Unavailable { .. } | StoreError::Full)) => {
                Err(Problem::new(ErrorCode::Unavailable, error.to_string()).fix("then repeat").into())
            }
            Err(error) => Err(anyhow::Error::new(error).context("writing to the store").into()),
        }
    }

    /// Ends the term: everything is read anew before anything else is written.
    fn step_down(&self, reason: &str) -> Failure {
        tracing::warn!(reason, "the term ends");
        self.app.shutdown.cancel();
        Problem::new(ErrorCode::NotLeading, format!("whether it was done is unknown: {reason}"))
            .fix("look at it in a moment, and repeat if it isn't done")
            .into()
    }
}
