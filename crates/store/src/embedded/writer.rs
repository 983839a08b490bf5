//! The one thread that writes: group commit, expiry of leases, bounds of the history.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use redb::Database;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Limits;
use super::batch::{Applied, Batch};
use super::layout::Counters;
use super::lease::Leases;
use super::watch::Hub;
use crate::{Error, LeaseId, Result, Revision, Txn, TxnOutcome};

/// Most commands in one commit. More would only delay the first one's answer: by then fsync is a small part.
const MAX_BATCH: usize = 1024;

/// No more commands join a commit of this size.
const MAX_BATCH_BYTES: usize = 8 << 20;

/// A write that waits for the writer.
pub(super) enum Command {
    Txn(Txn, oneshot::Sender<Result<TxnOutcome>>),
    Grant(Duration, oneshot::Sender<Result<LeaseId>>),
    Revoke(LeaseId, oneshot::Sender<Result<()>>),
    Compact(Revision, oneshot::Sender<Result<()>>),
}

/// A command in the queue, with the room that it takes there.
pub(super) struct Queued {
    pub(super) command: Command,
    pub(super) size_bytes: usize,
    pub(super) _room: OwnedSemaphorePermit,
}

/// Answers a command once its fate is known.
type Answer = Box<dyn FnOnce(Option<&Arc<redb::Error>>)>;

pub(super) struct Writer {
    db: Arc<Database>,
    hub: Arc<Hub>,
    leases: Arc<Leases>,
    counters: Counters,
    /// Bytes of history by revision, oldest first.
    history: VecDeque<(Revision, usize)>,
    history_bytes: usize,
    limits: Limits,
    /// Set by the first failure of redb, after which the file's state is unknown until it is opened again.
    failed: Option<Arc<redb::Error>>,
}

impl Writer {
    pub(super) fn new(
        db: Arc<Database>,
        hub: Arc<Hub>,
        leases: Arc<Leases>,
        counters: Counters,
        history: VecDeque<(Revision, usize)>,
        limits: Limits,
    ) -> Self {
        let history_bytes = history.iter().map(|(_, bytes)| bytes).sum();
        Self { db, hub, leases, counters, history, history_bytes, limits, failed: None }
    }

    /// Works until all senders are gone and the queue is empty.
    pub(super) fn run(mut self, commands: &Receiver<Queued>) {
        while let Some(batch) = self.collect(commands) {
            let expired = self.leases.take_expired(Instant::now());
            if batch.is_empty() && expired.is_empty() {
                continue;
            }
            // Room in the queue is free again once the answers are out, so that what waits stays bounded.
            let (commands, rooms): (Vec<_>, Vec<_>) = batch.into_iter().map(|q| (q.command, q._room)).unzip();
            self.commit(commands, expired);
            drop(rooms);
        }
        self.hub.close();
    }

    /// Waits for the next commands, or for a lease to expire. `None`: the store is closed.
    fn collect(&self, commands: &Receiver<Queued>) -> Option<Vec<Queued>> {
        let first = match self.leases.next_deadline() {
            Some(deadline) if self.failed.is_none() => {
                match commands.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(command) => command,
                    Err(RecvTimeoutError::Timeout) => return Some(Vec::new()),
                    Err(RecvTimeoutError::Disconnected) => return None,
                }
            }
            _ => commands.recv().ok()?,
        };
        let mut size_bytes = first.size_bytes;
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH && size_bytes < MAX_BATCH_BYTES {
            let Ok(next) = commands.try_recv() else { break };
            size_bytes += next.size_bytes;
            batch.push(next);
        }
        Some(batch)
    }

    /// Applies the commands and answers them all.
    fn commit(&mut self, commands: Vec<Command>, expired: Vec<LeaseId>) {
        let mut answers = Vec::with_capacity(commands.len());
        let mut commands = commands.into_iter();
        if self.failed.is_none()
            && let Err(error) = self.try_commit(&mut commands, expired, &mut answers)
        {
            tracing::error!(%error, "store failed, no more writes until it is opened again");
            self.failed = Some(Arc::new(error));
            self.hub.close();
        }
        answers.extend(commands.map(refuse));
        for answer in answers {
            answer(self.failed.as_ref());
        }
    }

    fn try_commit(
        &mut self,
        commands: &mut impl Iterator<Item = Command>,
        expired: Vec<LeaseId>,
        answers: &mut Vec<Answer>,
    ) -> Result<(), redb::Error> {
        let txn = self.db.begin_write()?;
        let mut batch = Batch::new(&txn, self.counters)?;
        let (mut granted, mut ended) = (Vec::new(), Vec::new());
        for lease in expired {
            tracing::debug!(%lease, "lease expired");
            // Refused only where the lease was revoked meanwhile.
            let _ = batch.revoke(lease)?;
        }
        for command in commands {
            let (answer, applied) = match command {
                Command::Txn(txn, reply) => stage(reply, batch.txn(txn)),
                Command::Compact(up_to, reply) => stage(reply, batch.compact(up_to)),
                Command::Grant(ttl, reply) => {
                    let applied = batch.grant(ttl);
                    granted.extend(applied.iter().flatten().map(|id| (*id, ttl)));
                    stage(reply, applied)
                }
                Command::Revoke(lease, reply) => {
                    ended.push(lease);
                    stage(reply, batch.revoke(lease))
                }
            };
            answers.push(answer);
            applied?;
        }
        self.bound_history(&mut batch)?;
        let Some((counters, changes)) = batch.finish()? else {
            txn.abort()?;
            return Ok(());
        };
        txn.commit()?;
        self.counters = counters;
        for (lease, ttl) in granted {
            self.leases.insert(lease, ttl);
        }
        for lease in ended {
            self.leases.remove(lease);
        }
        for change in changes {
            self.hub.publish(change.revision, &change.events);
        }
        Ok(())
    }

    /// Compacts what exceeds the bounds. If the batch fails after this, the counts no longer matter.
    fn bound_history(&mut self, batch: &mut Batch<'_>) -> Result<(), redb::Error> {
        for change in batch.changes() {
            self.history.push_back((change.revision, change.bytes));
            self.history_bytes += change.bytes;
        }
        let compacted = batch.compacted();
        let mut up_to = compacted;
        while let Some((revision, bytes)) = self.history.front().copied() {
            let over = self.history.len() > self.limits.history_revisions.max(1)
                || (self.history_bytes > self.limits.history_bytes && self.history.len() > 1);
            if revision > compacted && !over {
                break;
            }
            self.history.pop_front();
            self.history_bytes -= bytes;
            up_to = up_to.max(revision);
        }
        // Never ahead of the store, so never refused.
        let _ = batch.compact(up_to)?;
        Ok(())
    }
}

/// Prepares the answer to a command. It is sent after the commit, which decides whether `applied` came true.
fn stage<T: 'static>(
    reply: oneshot::Sender<Result<T>>,
    applied: Applied<T>,
) -> (Answer, Result<(), redb::Error>) {
    let (result, applied) = match applied {
        Ok(result) => (result, Ok(())),
        Err(error) => (Err(Error::Closed), Err(error)),
    };
    let answer = move |failed: Option<&Arc<redb::Error>>| {
        // Fails where the caller no longer waits.
        let _ = reply.send(match failed {
            Some(error) => Err(Error::Engine(Arc::clone(error) as _)),
            None => result,
        });
    };
    (Box::new(answer), applied)
}

/// The answer to a command that was not applied.
fn refuse(command: Command) -> Answer {
    match command {
        Command::Txn(_, reply) => stage(reply, Ok(Err(Error::Closed))).0,
        Command::Grant(_, reply) => stage(reply, Ok(Err(Error::Closed))).0,
        Command::Revoke(_, reply) | Command::Compact(_, reply) => stage(reply, Ok(Err(Error::Closed))).0,
    }
}
