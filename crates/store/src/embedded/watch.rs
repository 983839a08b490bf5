//! Watches: first from the history in the file, then live from the writer.
//!
//! A watcher is registered with the hub before it reads the history, at the revision that the hub has then: history
//! up to that revision, live events above it, so nothing is missed or seen twice.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures_util::{StreamExt, stream};
use redb::Database;
use tokio::sync::mpsc;

use super::{Limits, read};
use crate::{Error, Result, Revision, WatchEvent, WatchStream};

/// Hands the writer's changes to the watchers.
pub(super) struct Hub {
    limits: Limits,
    state: Mutex<State>,
}

struct State {
    /// Revision up to which events were handed out.
    published: Revision,
    watchers: Vec<Watcher>,
    closed: bool,
}

struct Watcher {
    prefix: String,
    queue: mpsc::Sender<Delivery>,
    gauge: Arc<Gauge>,
}

/// What both ends of a watcher's queue see.
#[derive(Default)]
struct Gauge {
    queued_bytes: AtomicUsize,
    lagged: AtomicBool,
}

/// The events of one revision for one watcher.
struct Delivery {
    revision: Revision,
    events: Vec<WatchEvent>,
    bytes: usize,
}

struct Tail {
    queue: mpsc::Receiver<Delivery>,
    gauge: Arc<Gauge>,
    /// Revision from which on `queue` has everything.
    start: Revision,
}

impl Hub {
    pub(super) fn new(revision: Revision, limits: Limits) -> Self {
        let state = State { published: revision, watchers: Vec::new(), closed: false };
        Self { limits, state: Mutex::new(state) }
    }

    /// Hands out the events of one revision. Never waits: a watcher without room is cut off.
    pub(super) fn publish(&self, revision: Revision, events: &[WatchEvent]) {
        let mut state = self.lock();
        state.published = revision;
        state.watchers.retain(|watcher| watcher.offer(revision, events, &self.limits));
    }

    /// Ends all watches, now and from now on.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.watchers.clear();
    }

    fn register(&self, prefix: &str) -> Result<Tail> {
        let (sender, queue) = mpsc::channel(self.limits.watch_revisions);
        let gauge = Arc::new(Gauge::default());
        let watcher = Watcher { prefix: prefix.to_owned(), queue: sender, gauge: Arc::clone(&gauge) };
        let mut state = self.lock();
        if state.closed {
            return Err(Error::Closed);
        }
        state.watchers.retain(|watcher| !watcher.queue.is_closed());
        state.watchers.push(watcher);
        Ok(Tail { queue, gauge, start: state.published })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher {
    /// Whether the watcher is still there, and keeps up.
    fn offer(&self, revision: Revision, events: &[WatchEvent], limits: &Limits) -> bool {
        let mut events: Vec<WatchEvent> =
            events.iter().filter(|event| event.kv.key.starts_with(&self.prefix)).cloned().collect();
        let Some((last, others)) = events.split_last_mut() else { return !self.queue.is_closed() };
        others.iter_mut().for_each(|event| event.more = true);
        last.more = false;
        let bytes = events.iter().map(|event| event.kv.key.len() + event.kv.value.len()).sum();
        let queued = self.gauge.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        // Even the largest transaction must pass where nothing else waits.
        let fits = queued == 0 || queued + bytes <= limits.watch_bytes;
        if fits && self.queue.try_send(Delivery { revision, events, bytes }).is_ok() {
            return true;
        }
        if !self.queue.is_closed() {
            tracing::warn!(prefix = %self.prefix, revision, queued_bytes = queued, "watcher lags, cut off");
        }
        // Before the sender is dropped, which is what the reader notices.
        self.gauge.lagged.store(true, Ordering::Release);
        false
    }
}

/// Opens a watch; see [`Store::watch`](crate::Store::watch).
pub(super) async fn open(db: &Arc<Database>, hub: &Hub, prefix: &str, from: Revision) -> Result<WatchStream> {
    let tail = hub.register(prefix)?;
    let mut watch = Watch {
        db: Arc::downgrade(db),
        prefix: prefix.to_owned(),
        seen: from,
        delivered: from,
        ready: VecDeque::new(),
        tail,
        ended: false,
    };
    // Also where there is no history to read: says whether `from` is a revision that can be resumed from.
    watch.read_history().await?;
    Ok(stream::unfold(watch, |mut watch| async move {
        let item = watch.next().await?;
        Some((item, watch))
    })
    .boxed())
}

struct Watch {
    /// Weak, so that a forgotten watch does not keep the file open.
    db: Weak<Database>,
    prefix: String,
    /// Everything up to here is delivered or in `ready`.
    seen: Revision,
    /// Everything up to here is delivered.
    delivered: Revision,
    ready: VecDeque<WatchEvent>,
    tail: Tail,
    ended: bool,
}

impl Watch {
    async fn next(&mut self) -> Option<Result<WatchEvent>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.delivered = self.delivered.max(event.resume_revision());
                return Some(Ok(event));
            }
            if self.ended {
                return None;
            }
            self.delivered = self.delivered.max(self.seen);
            let more =
                if self.seen < self.tail.start { self.read_history().await } else { self.receive().await };
            if let Err(error) = more {
                self.ended = true;
                return Some(Err(error));
            }
        }
    }

    async fn read_history(&mut self) -> Result<()> {
        let db = self.db.upgrade().ok_or(Error::Closed)?;
        let (prefix, from, up_to) = (self.prefix.clone(), self.seen, self.tail.start);
        let page = read::blocking(move || read::history(&db, &prefix, from, up_to)).await?;
        self.seen = page.seen;
        self.ready = page.events;
        Ok(())
    }

    async fn receive(&mut self) -> Result<()> {
        let Some(delivery) = self.tail.queue.recv().await else {
            return Err(if self.tail.gauge.lagged.load(Ordering::Acquire) {
                Error::Lagged { resume_from: self.delivered }
            } else {
                Error::Closed
            });
        };
        self.tail.gauge.queued_bytes.fetch_sub(delivery.bytes, Ordering::Relaxed);
        // `from` may be ahead of what was published when the watch was registered.
        if delivery.revision > self.seen {
            self.seen = delivery.revision;
            self.ready.extend(delivery.events);
        }
        Ok(())
    }
}
