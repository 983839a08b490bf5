//! Watch streams: one JSON object a line (NDJSON). A stream begins with `reset` and a snapshot, or, when the
//! client resumes from a revision of the same epoch whose history is still there, with the changes since. Lines
//! follow as things change; `synced` marks the end of the snapshot and comes again as a heartbeat.

use std::time::Duration;

use futures_util::StreamExt;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Client, ClientError};

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
}

/// The longest line that is accepted; a spec is far smaller.
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
    lines: Option<Lines>,
    retry: Duration,
    item: std::marker::PhantomData<fn() -> T>,
}

struct Lines {
    body: futures_util::stream::BoxStream<'static, Result<bytes::Bytes, reqwest::Error>>,
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
            lines: None,
            retry: FIRST_RETRY,
            item: std::marker::PhantomData,
        }
    }

    /// The next event. Waits as long as it takes, reconnecting with growing pauses; `on_error` is told why.
    /// Cancel-safe: an event is either returned or comes again.
    pub async fn next(&mut self, mut on_error: impl FnMut(&ClientError)) -> WatchEvent<T> {
        loop {
            match self.try_next().await {
                Ok(event) => {
                    self.retry = FIRST_RETRY;
                    return event;
                }
                Err(error) => {
                    self.lines = None;
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
        if self.lines.is_none() {
            let response = tokio::time::timeout(SILENCE, self.client.open(&self.path, &self.position))
                .await
                .map_err(|_| self.client.silent(&self.path))??;
            let body = response.bytes_stream().boxed();
            self.lines = Some(Lines { body, buffer: Vec::new(), scanned: 0 });
        }
        let result = match self.lines.as_mut() {
            Some(lines) => tokio::time::timeout(SILENCE, lines.next()).await,
            None => return Err(self.client.silent(&self.path)),
        };
        let line = match result {
            Ok(Ok(line)) => line,
            Ok(Err(message)) => {
                self.lines = None;
                return Err(self.client.broken(&self.path, message));
            }
            Err(_) => {
                self.lines = None;
                return Err(self.client.silent(&self.path));
            }
        };
        let event: WatchEvent<T> = serde_json::from_slice(&line).map_err(|error| {
            self.lines = None;
            self.client.broken(&self.path, error.to_string())
        })?;
        match &event {
            // A snapshot that breaks off half-way must start again, so no position until `synced`.
            WatchEvent::Reset { epoch } => {
                self.position = WatchQuery { epoch: Some(*epoch), from_revision: None }
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
}

impl Lines {
    async fn next(&mut self) -> Result<Vec<u8>, String> {
        loop {
            if let Some(offset) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let end = self.scanned + offset;
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                self.scanned = 0;
                return Ok(line);
            }
            self.scanned = self.buffer.len();
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(format!("a line is longer than {MAX_LINE_BYTES} bytes"));
            }
            match self.body.next().await {
                Some(Ok(chunk)) => self.buffer.extend_from_slice(&chunk),
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("the server ended the stream".into()),
            }
        }
    }
}
