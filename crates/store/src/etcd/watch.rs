//! Watches.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, EventType, GetOptions, WatchOptions, WatchResponse, WatchStream as EtcdStream};
use futures_util::StreamExt as _;

use super::failure::Failure;
use super::{PAUSE, REQUEST, Shared, revision, signed, txn::prefix_end};
use crate::{Error, EventKind, Result, Revision, WatchEvent, WatchStream};

/// Longest pause between two tries to go on.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// A watch, which goes on at another member when one fails.
struct Watch {
    shared: Arc<Shared>,
    /// The first key, and the one after the last.
    range: (String, Vec<u8>),
    /// All changes up to here were delivered or are in `ready`.
    seen: Revision,
    ready: VecDeque<WatchEvent>,
    stream: Option<EtcdStream>,
    /// Who was asked for `stream`.
    member: usize,
    ended: bool,
}

pub(super) async fn open(shared: Arc<Shared>, prefix: &str, from: Revision) -> Result<WatchStream> {
    shared.check_history(prefix, from).await?;
    let start = shared.key(prefix);
    let end = prefix_end(&start);
    let mut watch = Watch {
        shared,
        range: (start, end),
        seen: from,
        ready: VecDeque::new(),
        stream: None,
        member: 0,
        ended: false,
    };
    watch.connect().await?;
    Ok(futures_util::stream::unfold(watch, async |mut watch| watch.next().await.map(|event| (event, watch)))
        .boxed())
}

impl Shared {
    /// Whether etcd reached a revision, and still has what came after it.
    async fn check_history(&self, prefix: &str, from: Revision) -> Result<()> {
        let asked = self.read(|mut kv| {
            let key = self.key(prefix);
            let options = GetOptions::new().with_count_only().with_revision(signed(from.max(1)));
            async move { kv.get(key, Some(options)).await }
        });
        match asked.await {
            Ok(_) => Ok(()),
            Err(Error::Compacted { .. }) => Err(Error::Compacted { oldest: self.oldest().await? }),
            Err(Error::FutureRevision { .. }) => {
                Err(Error::FutureRevision { asked: from, current: self.revision().await? })
            }
            Err(error) => Err(error),
        }
    }

    /// The lowest revision that a watch can resume from: etcd tells it to who asks for the first one.
    async fn oldest(&self) -> Result<Revision> {
        self.repeat(|client| async move {
            let options = WatchOptions::new().with_start_revision(1);
            let mut stream = client.watch_client().watch(self.layout.as_str(), Some(options)).await?;
            while let Some(answer) = stream.message().await? {
                if !answer.created() || answer.canceled() {
                    return Ok(revision(answer.compact_revision()));
                }
            }
            Err(etcd_client::Error::WatchError("a watch ended at once".to_owned()))
        })
        .await
    }
}

impl Watch {
    /// Opens the stream at the member that serves.
    async fn connect(&mut self) -> Result<()> {
        let (range, from) = (self.range.clone(), self.seen + 1);
        let (index, client) = self.shared.member().await?;
        match tokio::time::timeout(REQUEST, begin(client, range, from)).await {
            Ok(Ok(stream)) => {
                (self.stream, self.member) = (Some(stream), index);
                Ok(())
            }
            Ok(Err(error)) => {
                self.shared.suspect(index);
                Err(match Failure::of(error) {
                    Failure::Final(error) => error,
                    Failure::Passes(reason) | Failure::Undone(reason) => self.unavailable(reason),
                })
            }
            Err(_) => {
                self.shared.suspect(index);
                Err(self.unavailable(format!("no answer in {REQUEST:?}")))
            }
        }
    }

    fn unavailable(&self, reason: String) -> Error {
        Error::Unavailable { endpoints: self.shared.endpoints.clone(), reason }
    }

    async fn next(&mut self) -> Option<Result<WatchEvent>> {
        let mut pause = PAUSE;
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.ended {
                return None;
            }
            match self.receive().await {
                Ok(()) => {}
                Err(Error::Unavailable { reason, .. }) => {
                    tracing::debug!(reason, seen = self.seen, "a watch goes on at another member");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }

    /// Waits for the next answer, and makes it ready.
    async fn receive(&mut self) -> Result<()> {
        let Some(stream) = &mut self.stream else { return self.connect().await };
        let reason = match stream.message().await {
            Ok(Some(answer)) if answer.canceled() => {
                self.stream = None;
                if answer.compact_revision() > 0 {
                    return Err(Error::Compacted { oldest: revision(answer.compact_revision()) });
                }
                answer.cancel_reason().to_owned()
            }
            Ok(Some(answer)) => return self.take(&answer),
            Ok(None) => "the stream ended".to_owned(),
            Err(error) => match Failure::of(error) {
                Failure::Final(error) => return Err(error),
                Failure::Passes(reason) | Failure::Undone(reason) => reason,
            },
        };
        self.stream = None;
        self.shared.suspect(self.member);
        Err(self.unavailable(reason))
    }

    /// etcd sends all changes of a revision in one answer, unless it is asked to split them.
    fn take(&mut self, answer: &WatchResponse) -> Result<()> {
        let mut events = answer.events().iter().peekable();
        while let Some(event) = events.next() {
            let Some(kv) = event.kv() else { continue };
            let mut kv = self.shared.strip(kv)?;
            let kind = match event.event_type() {
                EventType::Put => EventKind::Put,
                EventType::Delete => EventKind::Delete,
            };
            if kind == EventKind::Delete {
                (kv.create_revision, kv.version, kv.lease) = (0, 0, None);
            }
            let at = kv.mod_revision;
            let more = events
                .peek()
                .and_then(|next| next.kv())
                .is_some_and(|next| revision(next.mod_revision()) == at);
            self.seen = self.seen.max(at);
            self.ready.push_back(WatchEvent { revision: at, kind, kv, more });
        }
        Ok(())
    }
}

async fn begin(
    client: &Client,
    range: (String, Vec<u8>),
    from: Revision,
) -> Result<EtcdStream, etcd_client::Error> {
    let options = WatchOptions::new().with_range(range.1).with_start_revision(signed(from));
    client.watch_client().max_decoding_message_size(usize::MAX).watch(range.0, Some(options)).await
}
