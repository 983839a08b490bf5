//! A versioned map that is published as watch streams.
//!
//! A daemon computes what should be there and calls [`Feed::replace`]; the feed works out what changed, gives each
//! change a revision, and sends it to every watcher. A watcher that is slow, or comes back after a break, reads the
//! changes it missed from a bounded history, or else gets the whole map anew. Nothing is queued for a watcher, so a
//! slow one costs no memory.
//!
//! A change is also kept as what differs from the value before ([`Patch`]), once for all watchers that ask for that.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyplace_api::{Frame, PATCHES, Patch, WatchEvent, WatchQuery, Watcher};
use axum::{body::Body, http::header::CONTENT_TYPE, response::IntoResponse as _, response::Response};
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::unix_epoch;

/// Changes that are kept for watchers who come back. More than a location changes in a minute; a watcher that
/// missed more gets a snapshot.
const HISTORY: usize = 4_096;

/// Most bytes of patches that the history keeps; beyond, it is shorter. A global scheduler has a feed for each location.
const HISTORY_BYTES: usize = 512 << 10;

/// More changes at once than this are sent as whole values: making patches takes some 20 us each, in which nobody else
/// can change the map.
const PATCHED_AT_ONCE: usize = 256;

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
    /// Oldest first.
    history: VecDeque<Change>,
    /// Of the patches in it.
    history_bytes: usize,
}

/// A change of one key.
#[derive(Debug)]
struct Change {
    revision: u64,
    key: String,
    /// What differs from the value before, where there was one and that says it in less.
    patch: Option<Patch>,
}

/// What a watcher is sent.
#[derive(Debug, PartialEq)]
enum Sent<T> {
    Event(WatchEvent<T>),
    Patch(Patch),
}

impl<T> Default for Feed<T> {
    fn default() -> Self {
        let (entries, history) = (BTreeMap::new(), VecDeque::new());
        let state = State { epoch: unix_epoch(), revision: 0, entries, history, history_bytes: 0 };
        Self { state: Mutex::new(state), changed: watch::Sender::new(0) }
    }
}

impl<T: Clone> Feed<T> {
    /// One value now.
    pub fn get(&self, key: &str) -> Option<T> {
        self.lock().entries.get(key).cloned()
    }

    /// The map now.
    pub fn entries(&self) -> BTreeMap<String, T> {
        self.lock().entries.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Each change to the state is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone + PartialEq + Serialize> Feed<T> {
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
        let before = std::mem::replace(&mut state.entries, entries);
        let patched = changed.len() <= PATCHED_AT_ONCE;
        let changed =
            changed.into_iter().map(|key| (before.get(&key).filter(|_| patched).cloned(), key)).collect();
        self.publish(state, changed);
        true
    }

    /// Sets one value. Returns whether it changed.
    pub fn set(&self, key: impl Into<String>, value: T) -> bool {
        let (key, mut state) = (key.into(), self.lock());
        if state.entries.get(&key) == Some(&value) {
            return false;
        }
        let before = state.entries.insert(key.clone(), value);
        self.publish(state, vec![(before, key)]);
        true
    }

    /// Removes one value. Returns whether it was there.
    pub fn remove(&self, key: &str) -> bool {
        let mut state = self.lock();
        let removed = state.entries.remove(key).is_some();
        if removed {
            self.publish(state, vec![(None, key.to_string())]);
        }
        removed
    }

    /// Publishes changes of keys, with the values before where they may be patched.
    fn publish(&self, mut state: MutexGuard<'_, State<T>>, changes: Vec<(Option<T>, String)>) {
        for (before, key) in changes {
            state.revision += 1;
            let revision = state.revision;
            let patch = before.zip(state.entries.get(&key)).and_then(|(before, after)| {
                let (before, after) = (serde_json::to_vec(&before).ok()?, serde_json::to_vec(after).ok()?);
                Patch::between(revision, &key, &before, &after)
            });
            state.history_bytes += patch.as_ref().map_or(0, Patch::bytes);
            state.history.push_back(Change { revision, key, patch });
            while state.history.len() > HISTORY || state.history_bytes > HISTORY_BYTES {
                let Some(oldest) = state.history.pop_front() else { break };
                state.history_bytes -= oldest.patch.as_ref().map_or(0, Patch::bytes);
            }
        }
        let revision = state.revision;
        drop(state);
        self.changed.send_replace(revision);
    }

    /// What to send since a position, and the position after it; from nothing, or a position that can't be resumed, a
    /// reset and all entries.
    fn since(&self, query: WatchQuery) -> (Vec<Sent<T>>, WatchQuery) {
        let state = self.lock();
        let position = WatchQuery { epoch: Some(state.epoch), from_revision: Some(state.revision), ..query };
        let resumable = query.from_revision.filter(|from| {
            let oldest = state.history.front().map_or(state.revision, |change| change.revision - 1);
            query.epoch == Some(state.epoch) && (oldest..=state.revision).contains(from)
        });
        let mut sent = Vec::new();
        match resumable {
            Some(from) => {
                let start = state.history.partition_point(|change| change.revision <= from);
                let since = state.history.range(start..);
                // Of a key that is sent as a whole only the newest change counts: the value is read now.
                let mut whole: BTreeMap<&String, u64> = BTreeMap::new();
                for change in since.clone().filter(|change| !query.patches || change.patch.is_none()) {
                    whole.insert(&change.key, change.revision);
                }
                for Change { revision, key, patch } in since {
                    match (whole.get(key), patch) {
                        (None, Some(patch)) => sent.push(Sent::Patch(patch.clone())),
                        (Some(newest), _) if newest == revision => {
                            let (revision, key) = (*revision, key.clone());
                            sent.push(Sent::Event(match state.entries.get(&key) {
                                Some(value) => WatchEvent::Put { revision, key, value: value.clone() },
                                None => WatchEvent::Delete { revision, key },
                            }));
                        }
                        _ => {}
                    }
                }
            }
            None => {
                sent.push(Sent::Event(WatchEvent::Reset { epoch: state.epoch }));
                let revision = state.revision;
                sent.extend(state.entries.iter().map(|(key, value)| {
                    Sent::Event(WatchEvent::Put { revision, key: key.clone(), value: value.clone() })
                }));
            }
        }
        // A patch that comes last says so itself.
        if !matches!(sent.last(), Some(Sent::Patch(_))) {
            sent.push(Sent::Event(WatchEvent::Synced { revision: state.revision }));
        }
        (sent, position)
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
                    let (sent, position) = feed.since(query);
                    let bytes = Bytes::from(written(&sent, query.patches));
                    Some((Ok::<_, Infallible>(bytes), (feed, changed, position, false)))
                }
            },
        );
        let content_type = if query.patches { PATCHES } else { "application/x-ndjson" };
        ([(CONTENT_TYPE, content_type)], Body::from_stream(stream)).into_response()
    }
}

/// As frames or as lines.
fn written<T: Serialize>(sent: &[Sent<T>], framed: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, item) in sent.iter().enumerate() {
        match item {
            Sent::Patch(patch) => Frame::Patch(patch.clone(), index + 1 == sent.len()).write(&mut bytes),
            // Model types serialise without fail; an event that didn't would only be left out.
            Sent::Event(event) => {
                if let Ok(mut json) = serde_json::to_vec(event) {
                    if framed {
                        Frame::Event(json).write(&mut bytes);
                    } else {
                        json.push(b'\n');
                        bytes.append(&mut json);
                    }
                }
            }
        }
    }
    bytes
}

const fn heartbeat() -> Duration {
    Watcher::<()>::HEARTBEAT
}

#[cfg(test)]
mod tests;
