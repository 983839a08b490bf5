//! A versioned map that is published as watch streams.
//!
//! A daemon computes what should be there and calls [`Feed::replace`]; the feed works out what changed, gives each
//! change a revision, and sends it to every watcher. A watcher that is slow, or comes back after a break, reads the
//! changes it missed from a bounded history, or else gets the whole map anew. Nothing is queued for a watcher, so a
//! slow one costs no memory.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyplace_api::{WatchEvent, WatchQuery, Watcher};
use axum::{body::Body, http::header::CONTENT_TYPE, response::IntoResponse as _, response::Response};
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::unix_epoch;

/// Changes that are kept for watchers who come back. More than a location changes in a minute; a watcher that
/// missed more gets a snapshot.
const HISTORY: usize = 4_096;

/// A versioned map from keys to values. Share it in an `Arc`.
#[derive(Debug)]
pub struct Feed<T> {
    state: Mutex<State<T>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug)]
struct State<T> {
    epoch: u64,
    revision: u64,
    entries: BTreeMap<String, T>,
    /// Revision and key of each change, oldest first.
    history: VecDeque<(u64, String)>,
}

impl<T> Default for Feed<T> {
    fn default() -> Self {
        let state =
            State { epoch: unix_epoch(), revision: 0, entries: BTreeMap::new(), history: VecDeque::new() };
        Self { state: Mutex::new(state), changed: watch::Sender::new(0) }
    }
}

impl<T: Clone + PartialEq> Feed<T> {
    /// An empty feed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the map equal to `entries`. Returns whether anything changed.
    pub fn replace(&self, entries: BTreeMap<String, T>) -> bool {
        let mut state = self.lock();
        let changed: Vec<String> = entries
            .iter()
            .filter(|(key, value)| state.entries.get(*key) != Some(value))
            .map(|(key, _)| key)
            .chain(state.entries.keys().filter(|key| !entries.contains_key(*key)))
            .cloned()
            .collect();
        if changed.is_empty() {
            return false;
        }
        state.entries = entries;
        self.publish(state, changed);
        true
    }

    /// Sets one value. Returns whether it changed.
    pub fn set(&self, key: impl Into<String>, value: T) -> bool {
        let (key, mut state) = (key.into(), self.lock());
        if state.entries.get(&key) == Some(&value) {
            return false;
        }
        state.entries.insert(key.clone(), value);
        self.publish(state, vec![key]);
        true
    }

    /// Removes one value. Returns whether it was there.
    pub fn remove(&self, key: &str) -> bool {
        let mut state = self.lock();
        let removed = state.entries.remove(key).is_some();
        if removed {
            self.publish(state, vec![key.to_string()]);
        }
        removed
    }

    /// One value now.
    pub fn get(&self, key: &str) -> Option<T> {
        self.lock().entries.get(key).cloned()
    }

    /// The map now.
    pub fn entries(&self) -> BTreeMap<String, T> {
        self.lock().entries.clone()
    }

    fn publish(&self, mut state: MutexGuard<'_, State<T>>, keys: Vec<String>) {
        for key in keys {
            state.revision += 1;
            let revision = state.revision;
            state.history.push_back((revision, key));
            if state.history.len() > HISTORY {
                state.history.pop_front();
            }
        }
        let revision = state.revision;
        drop(state);
        self.changed.send_replace(revision);
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Each change to the state is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Events since a position, and the position after them; from nothing, or a position that can't be resumed,
    /// a reset and all entries.
    fn since(&self, query: WatchQuery) -> (Vec<WatchEvent<T>>, WatchQuery) {
        let state = self.lock();
        let position = WatchQuery { epoch: Some(state.epoch), from_revision: Some(state.revision) };
        let resumable = query.from_revision.filter(|from| {
            let oldest = state.history.front().map_or(state.revision, |(revision, _)| revision - 1);
            query.epoch == Some(state.epoch) && (oldest..=state.revision).contains(from)
        });
        let mut events = Vec::new();
        match resumable {
            Some(from) => {
                let start = state.history.partition_point(|(revision, _)| *revision <= from);
                // Only the newest change of a key counts: the value is read now.
                let newest: BTreeMap<&String, u64> =
                    state.history.range(start..).map(|(revision, key)| (key, *revision)).collect();
                let mut changes: Vec<_> = newest.into_iter().collect();
                changes.sort_unstable_by_key(|(_, revision)| *revision);
                for (key, revision) in changes {
                    let key = key.clone();
                    events.push(match state.entries.get(&key) {
                        Some(value) => WatchEvent::Put { revision, key, value: value.clone() },
                        None => WatchEvent::Delete { revision, key },
                    });
                }
            }
            None => {
                events.push(WatchEvent::Reset { epoch: state.epoch });
                let revision = state.revision;
                events.extend(state.entries.iter().map(|(key, value)| WatchEvent::Put {
                    revision,
                    key: key.clone(),
                    value: value.clone(),
                }));
            }
        }
        events.push(WatchEvent::Synced { revision: state.revision });
        (events, position)
    }
}

impl<T: Clone + PartialEq + Serialize + Send + Sync + 'static> Feed<T> {
    /// The response to a watch: streams until the client goes or the shutdown begins.
    pub fn response(self: &std::sync::Arc<Self>, query: WatchQuery, shutdown: CancellationToken) -> Response {
        let feed = self.clone();
        let changed = self.changed.subscribe();
        let stream = futures_util::stream::unfold(
            (feed, changed, query, true),
            move |(feed, mut changed, query, first)| {
                let shutdown = shutdown.clone();
                async move {
                    if !first {
                        tokio::select! {
                            // An error means the feed is gone, which the stream's own handle rules out.
                            _ = changed.changed() => {}
                            () = tokio::time::sleep(heartbeat()) => {}
                            () = shutdown.cancelled() => return None,
                        }
                    }
                    changed.mark_unchanged();
                    let (events, position) = feed.since(query);
                    let mut lines = Vec::new();
                    for event in events {
                        // Model types serialise without fail; a line that didn't would only be left out.
                        if serde_json::to_writer(&mut lines, &event).is_ok() {
                            lines.push(b'\n');
                        }
                    }
                    Some((Ok::<_, Infallible>(Bytes::from(lines)), (feed, changed, position, false)))
                }
            },
        );
        ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(stream)).into_response()
    }
}

const fn heartbeat() -> Duration {
    Watcher::<()>::HEARTBEAT
}

#[cfg(test)]
mod tests;
