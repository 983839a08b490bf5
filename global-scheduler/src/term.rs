//! Which of several global schedulers leads, and since when.
//!
//! A term begins with each start, and with each change of the one that leads. Its number is kept under `term`, and every
//! transaction of a term has the condition that this key hasn't changed since. So whoever was paused, and wakes in a
//! later term, writes nothing more, whatever its clock or its lease say. The number grows over all terms, and is told to
//! the locations with everything that they should have: what an earlier term decided is void.
//!
//! Over etcd, `leader` says who leads. Its lease only decides how soon another one tries; nothing depends on it being
//! held by one alone.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use anyplace_service::unix_epoch;
use anyplace_store::{Error, EventKind, LeaseId, Revision, Store, StoreExt as _, Txn, TxnOutcome};
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Key of the term's number.
pub(crate) const TERM: &str = "term";
const LEADER: &str = "leader";
/// A leader that is gone or paused for so long is replaced.
const LEASE: Duration = Duration::from_secs(5);
/// Between two looks at a store that fails.
const PAUSE: Duration = Duration::from_millis(500);

/// A term of this process.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Term {
    /// Its number: microseconds since 1970 at its beginning, or one more than that of the term before.
    pub(crate) number: u64,
    /// Of the key `term`: the condition of each write.
    pub(crate) revision: Revision,
}

/// Who leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leader {
    /// How clients reach it.
    pub(crate) advertise: String,
    /// Tells processes apart.
    process: u64,
}

impl Leader {
    pub(crate) fn new(advertise: String) -> Self {
        Self { advertise, process: unix_epoch() ^ (u64::from(std::process::id()) << 40) }
    }
}

/// A term in which this process leads until its lease ends.
#[derive(Debug)]
pub(crate) struct Lead {
    pub(crate) term: Term,
    lease: LeaseId,
}

/// The next term's number, and the condition that it is the next.
async fn next(store: &dyn Store) -> anyhow::Result<(u64, Txn)> {
    let last: Option<(u64, Revision)> = store.get_json(TERM).await.context("reading the term")?;
    let (last, revision) = last.unwrap_or_default();
    let number = unix_epoch().max(last.saturating_add(1));
    Ok((number, Txn::new().when_revision(TERM, revision).put_json(TERM, &number)?))
}

/// Begins a term where nobody else can have the store.
pub(crate) async fn begin(store: &dyn Store) -> anyhow::Result<Term> {
    let (number, txn) = next(store).await?;
    match store.txn(txn).await.context("writing the term")? {
        TxnOutcome::Committed { revision } => Ok(Term { number, revision }),
        TxnOutcome::Conflict { .. } => anyhow::bail!("another process writes to the store; stop it"),
    }
}

/// Waits until this process leads; `seen` is told who does meanwhile. None after the shutdown.
pub(crate) async fn win(
    store: &dyn Store,
    me: &Leader,
    seen: &watch::Sender<Option<Leader>>,
    shutdown: &CancellationToken,
) -> Option<Lead> {
    loop {
        let outcome = tokio::select! {
            outcome = attempt(store, me, seen) => outcome,
            () = shutdown.cancelled() => return None,
        };
        match outcome {
            Ok(Some(lead)) => {
                seen.send_replace(None);
                return Some(lead);
            }
            Ok(None) => continue,
            Err(error) => tracing::warn!(error = format!("{error:#}"), "the election goes on"),
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = shutdown.cancelled() => return None,
        }
    }
}

/// Tries to lead; if another one does, waits until it doesn't.
async fn attempt(
    store: &dyn Store,
    me: &Leader,
    seen: &watch::Sender<Option<Leader>>,
) -> anyhow::Result<Option<Lead>> {
    if let Some((leader, revision)) = store.get_json::<Leader>(LEADER).await? {
        if seen.send_replace(Some(leader.clone())).as_ref() != Some(&leader) {
            tracing::info!(leader = leader.advertise, "another global scheduler leads; this one stands by");
        }
        let mut watch = store.watch(LEADER, revision).await?;
        while let Some(event) = watch.next().await {
            let event = event?;
            if event.kv.key == LEADER && event.kind == EventKind::Delete {
                break;
            }
        }
        return Ok(None);
    }
    let (number, txn) = next(store).await?;
    let lease = store.grant_lease(LEASE).await?;
    let txn = txn.when_absent(LEADER).put_json_leased(LEADER, me, lease)?;
    match store.txn(txn).await {
        Ok(TxnOutcome::Committed { revision }) => {
            tracing::info!(term = number, "this global scheduler leads");
            return Ok(Some(Lead { term: Term { number, revision }, lease }));
        }
        Ok(TxnOutcome::Conflict { .. }) => {}
        // The lease takes the key with it, should it be there.
        Err(error) => {
            let _ = store.revoke_lease(lease).await;
            return Err(error.into());
        }
    }
    store.revoke_lease(lease).await?;
    Ok(None)
}

/// Keeps the lease until `end`, which it ends when the lease can't be kept; then gives the lease up.
pub(crate) async fn keep(store: &dyn Store, lead: &Lead, end: &CancellationToken) {
    let mut kept = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LEASE / 5) => {}
            () = end.cancelled() => break,
        }
        let asked = Instant::now();
        let answer = tokio::select! {
            answer = tokio::time::timeout(LEASE, store.keep_alive(lead.lease)) => answer,
            () = end.cancelled() => break,
        };
        match answer {
            Ok(Ok(())) => kept = asked,
            Ok(Err(Error::LeaseNotFound(_))) => {
                tracing::warn!("the lease is gone: this global scheduler no longer leads");
                break;
            }
            Ok(Err(error)) => tracing::warn!(%error, "the lease can't be kept; it is tried again"),
            Err(_) => tracing::warn!("the store doesn't answer; it is asked again"),
        }
        if kept.elapsed() > LEASE {
            tracing::warn!("the lease has ended by this clock: this global scheduler no longer leads");
            break;
        }
    }
    end.cancel();
    // Another one need not wait for it to expire.
    let _ = tokio::time::timeout(PAUSE, store.revoke_lease(lead.lease)).await;
}
