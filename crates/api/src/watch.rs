//! Watch streams: one JSON object a line (NDJSON). A stream begins with `reset` and a snapshot, or, when the
//! client resumes from a revision of the same epoch whose history is still there, with the changes since. Lines
//! follow as things change; `synced` marks the end of the snapshot and comes again as a heartbeat.
//!
//! A client that keeps the values can have what differs instead of the value as a whole ([`crate::Patch`]). Where that
//! doesn't fit what it has, it asks again for whole values, from where it was.

use std::time::Duration;

use futures_util::StreamExt;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Client, ClientError, Frame, PATCHES, Patch};

/// One line of a watch stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WatchEvent<T> {
    /// Forget everything: a snapshot follows.
    Reset {
        /// Names this run of the history; revisions of different epochs can't be compared.
        epoch: u64,
    },
    /// The value of a key.
    Put {
        /// Revision of the change.
        revision: u64,
        /// Key.
        key: String,
        /// Value.
        value: T,
    },
    /// A key is gone.
    Delete {
        /// Revision of the change.
        revision: u64,
        /// Key.
        key: String,
    },
    /// Everything up to this revision has been sent.
    Synced {
        /// The revision to resume from.
        revision: u64,
    },
}

/// Query of a watch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchQuery {
    /// Epoch of `from_revision`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Send what is newer than this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_revision: Option<u64>,
    /// Send frames, with what differs where that is known.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub patches: bool,
}

/// The longest line or frame that is accepted; a spec is far smaller.
const MAX_LINE_BYTES: usize = 4 << 20;
/// Without a line for so long the stream is taken for dead; servers send `synced` every [`Watcher::HEARTBEAT`].
const SILENCE: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(2);

/// A watch that reconnects by itself and resumes where it was. Dropping it ends it.
pub struct Watcher<T> {
    client: Client,
    path: String,
    position: WatchQuery,
    stream: Option<Stream>,
    /// What a frame said beside what was returned last.
    next: Option<WatchEvent<T>>,
    retry: Duration,
    /// A patch didn't fit: the next stream has whole values.
    misfit: bool,
    misfits: u64,
}

struct Stream {
    body: futures_util::stream::BoxStream<'static, Result<bytes::Bytes, reqwest::Error>>,
    /// Frames, or lines.
    framed: bool,
    buffer: Vec<u8>,
    /// How much of the buffer is known to hold no line end.
    scanned: usize,
}

impl<T: DeserializeOwned> Watcher<T> {
    /// How often servers send a `synced` line while nothing changes.
    pub const HEARTBEAT: Duration = Duration::from_secs(1);

    /// Watches `path` of the client's server. Nothing is sent until [`Self::next`].
    pub fn new(client: Client, path: impl Into<String>) -> Self {
        Self {
            client,
            path: path.into(),
            position: WatchQuery::default(),
            stream: None,
            next: None,
            retry: FIRST_RETRY,
            misfit: false,
            misfits: 0,
        }
    }

    /// The next event. Waits as long as it takes, reconnecting with growing pauses; `on_error` is told why.
    /// Cancel-safe: an event is either returned or comes again.
    pub async fn next(&mut self, on_error: impl FnMut(&ClientError)) -> WatchEvent<T> {
        self.next_of(None, on_error).await
    }

    /// The same, where `text` is the JSON text of the value that a key has here, as this version writes it; then less is
    /// sent.
    pub async fn next_patched(
        &mut self,
        text: impl Fn(&str) -> Option<Vec<u8>> + Send + Sync,
        on_error: impl FnMut(&ClientError),
    ) -> WatchEvent<T> {
        self.next_of(Some(&text), on_error).await
    }

    async fn next_of(
        &mut self,
        text: Option<Texts<'_>>,
        mut on_error: impl FnMut(&ClientError),
    ) -> WatchEvent<T> {
        loop {
            match self.try_next_of(text).await {
                Ok(event) => {
                    self.retry = FIRST_RETRY;
                    return event;
                }
                Err(error) => {
                    on_error(&error);
                    tokio::time::sleep(self.retry).await;
                    self.retry = (self.retry * 2).min(LAST_RETRY);
                }
            }
        }
    }

    /// The next event, or the error that ended the stream; the next call reconnects and resumes.
    ///
    /// # Errors
    /// The server can't be reached, refuses, falls silent, or sends something else than a watch stream.
    pub async fn try_next(&mut self) -> Result<WatchEvent<T>, ClientError> {
        self.try_next_of(None).await
    }

    /// The same, and `text` is as for [`Self::next_patched`].
    ///
    /// # Errors
    /// The server can't be reached, refuses, falls silent, or sends something else than a watch stream.
    pub async fn try_next_patched(
        &mut self,
        text: impl Fn(&str) -> Option<Vec<u8>> + Send + Sync,
    ) -> Result<WatchEvent<T>, ClientError> {
        self.try_next_of(Some(&text)).await
    }

    /// How often what differs didn't fit what is here, so that values were sent as a whole.
    pub const fn misfits(&self) -> u64 {
        self.misfits
    }

    async fn try_next_of(&mut self, text: Option<Texts<'_>>) -> Result<WatchEvent<T>, ClientError> {
        let event = match self.next.take() {
            Some(event) => event,
            None => {
                let result = self.receive(text).await;
                if result.is_err() {
                    self.stream = None;
                }
                result?
            }
        };
        match &event {
            // A snapshot that breaks off half-way must start again, so no position until `synced`.
            WatchEvent::Reset { epoch } => {
                self.position = WatchQuery { epoch: Some(*epoch), ..WatchQuery::default() }
            }
            WatchEvent::Synced { revision } => self.position.from_revision = Some(*revision),
            WatchEvent::Put { revision, .. } | WatchEvent::Delete { revision, .. } => {
                if let Some(position) = &mut self.position.from_revision {
                    // One revision may hold several changes: resume before it until `synced` says it is complete.
                    *position = (*position).max(revision.saturating_sub(1));
                }
            }
        }
        Ok(event)
    }

    async fn receive(&mut self, text: Option<Texts<'_>>) -> Result<WatchEvent<T>, ClientError> {
        loop {
            let stream = match &mut self.stream {
                Some(stream) => stream,
                None => {
                    let patches = text.is_some() && !std::mem::take(&mut self.misfit);
                    let query = WatchQuery { patches, ..self.position };
                    let response = tokio::time::timeout(SILENCE, self.client.open(&self.path, &query))
                        .await
                        .map_err(|_| self.client.silent(&self.path))??;
                    let content_type = response.headers().get(reqwest::header::CONTENT_TYPE);
                    let framed = content_type.is_some_and(|it| it == PATCHES);
                    let body = response.bytes_stream().boxed();
                    self.stream.insert(Stream { body, framed, buffer: Vec::new(), scanned: 0 })
                }
            };
            let frame = tokio::time::timeout(SILENCE, stream.next())
                .await
                .map_err(|_| self.client.silent(&self.path))?
                .map_err(|message| self.client.broken(&self.path, message))?;
            let parsed = match frame {
                Frame::Event(json) => serde_json::from_slice(&json),
                Frame::Patch(patch, last) => {
                    let before = text.and_then(|text| text(&patch.key));
                    let Some(value) = before.and_then(|before| patch.apply(&before)) else {
                        // Resumes before this change, with whole values.
                        (self.stream, self.misfit) = (None, true);
                        self.misfits += 1;
                        continue;
                    };
                    let Patch { revision, key, .. } = patch;
                    self.next = last.then_some(WatchEvent::Synced { revision });
                    serde_json::from_slice(&value).map(|value| WatchEvent::Put { revision, key, value })
                }
            };
            return parsed.map_err(|error| {
                self.next = None;
                self.client.broken(&self.path, error.to_string())
            });
        }
    }
}

/// The text of a key's value.
type Texts<'a> = &'a (dyn Fn(&str) -> Option<Vec<u8>> + Send + Sync);

impl Stream {
    /// The next frame; of lines, each is an event's.
    async fn next(&mut self) -> Result<Frame, String> {
        loop {
            if self.framed {
                if let Some((frame, length)) = Frame::read(&self.buffer, MAX_LINE_BYTES)? {
                    self.buffer.drain(..length);
                    return Ok(frame);
                }
            } else if let Some(line) = self.line()? {
                return Ok(Frame::Event(line));
            }
            match self.body.next().await {
                Some(Ok(chunk)) => self.buffer.extend_from_slice(&chunk),
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("the server ended the stream".into()),
            }
        }
    }

    fn line(&mut self) -> Result<Option<Vec<u8>>, String> {
        if let Some(offset) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
            let end = self.scanned + offset;
            let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
            line.pop();
            self.scanned = 0;
            return Ok(Some(line));
        }
        self.scanned = self.buffer.len();
        if self.buffer.len() > MAX_LINE_BYTES {
            return Err(format!("a line is longer than {MAX_LINE_BYTES} bytes"));
        }
        Ok(None)
    }
}
