//! A part of an upload that is put together from ranges of the repository's blobs, and from bytes that come.
//!
//! `PATCH` with the content type [`MEDIA_TYPE`] and a `Content-Range`, as for any part. The body begins with a line of
//! JSON, `{"blobs": ["sha256:..."], "steps": [[120], [0, 4096, 65536]]}`: a step of one number takes so many bytes from
//! the rest of the body; one of three copies from a blob of the list, by its place there, from an offset, so many bytes.
//! To all else it is a part like any other: counted by quotas, acknowledged, hashed, and verified in the end.
//!
//! Only blobs of the upload's own repository, in this registry's own storage, and only for those who may read it: the
//! digest that ends an upload would tell them what they can't read. Ranges of one blob that lie close together are read
//! as one, since each costs a bucket a request. Everything is read, since it is hashed; what was read is written.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyplace_images::Digest;
use anyplace_registry_core::access::Action;
use axum::body::BodyDataStream;
use axum::extract::Request;
use axum::http::header::{CONTENT_RANGE, CONTENT_TYPE};
use axum::http::{HeaderName, StatusCode};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use serde::Deserialize;
use serde_json::json;

use super::{Session, append, broken_off, check_range};
use crate::access::Who;
use crate::blobs::bytes_of;
use crate::errors::{Answer, Refusal};
use crate::server::App;
use crate::storage::{Error, Storage};

/// The content type of such parts.
const MEDIA_TYPE: &str = "application/vnd.anyplace.upload.steps.v1";
/// Says that they are taken, and how many steps at most.
const STEPS_MAX_HEADER: HeaderName = HeaderName::from_static("anyplace-upload-steps-max");
/// Most steps of a part: each may cost a bucket a request.
const STEPS_MAX: usize = 10_000;
/// Most blobs that a part copies from.
const BLOBS_MAX: usize = 64;
/// Longest line of JSON: the most steps, with numbers of terabytes, are half of it.
const LINE_MAX_BYTES: usize = 1 << 20;
/// How long that line may take to come.
const LINE_TIMEOUT: Duration = Duration::from_secs(60);
/// Ranges that are so close are read as one: a bucket sends as much in the time that a request takes to begin.
const APART_MAX_BYTES: u64 = 64 << 10;

/// Less than this is copied out of what was read, which may be much more, and would stay in memory with it.
const SHARE_MIN_BYTES: usize = 32 << 10;

/// What the answers about an upload announce to who may use it.
pub(super) fn announced(request: &Request, name: &str) -> Option<(HeaderName, String)> {
    may_read(request, name).then(|| (STEPS_MAX_HEADER, STEPS_MAX.to_string()))
}

fn may_read(request: &Request, name: &str) -> bool {
    request.extensions().get::<Who>().is_some_and(|who| who.may(name, Action::Pull))
}

/// Whether a part is given by steps.
pub(super) fn are_in(request: &Request) -> bool {
    request.headers().get(CONTENT_TYPE).is_some_and(|value| value == MEDIA_TYPE)
}

/// Appends what the steps make to an upload, if its range says that it belongs there.
pub(super) async fn take(app: &Arc<App>, name: &str, id: &str, request: Request) -> Answer<Session> {
    if !may_read(&request, name) {
        let message = format!("copying from `{name}` needs the right to pull from it; send the bytes");
        return Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", message));
    }
    let (head, body) = request.into_parts();
    if !head.headers.contains_key(CONTENT_RANGE) {
        return Err(Refusal::upload_invalid(
            "a part by steps needs a Content-Range: START-END of the upload",
        ));
    }
    let mut rest = Rest { body: body.into_data_stream(), ready: Bytes::new() };
    let line = tokio::time::timeout(LINE_TIMEOUT, rest.line());
    let line = line.await.map_err(|_| Refusal::upload_invalid("the steps didn't come within 60 s"))??;
    let plan = Plan::parse(&line)?;
    plan.check_sources(&app.storage, name).await?;
    let session = app.uploads.resume(name, id).await?;
    let declared = check_range(app, name, id, &session, &head.headers, Some(plan.bytes()))?;
    let mut taken = app.access.quota(name);
    taken.keep();
    let copied = plan.copied_bytes();
    let content = assembled(app.storage.clone(), plan, rest);
    let session = append(app, &mut taken, session, content, declared).await?;
    app.counters.copied_bytes.fetch_add(copied, Ordering::Relaxed);
    Ok(session)
}

/// What a part is made of.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) blobs: Vec<Digest>,
    pub(crate) steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// So many bytes of the body.
    Take(u64),
    /// A range of a blob, which is named by its place in the list.
    Copy(usize, Range<u64>),
}

impl Step {
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Step::Take(bytes) => *bytes,
            Step::Copy(_, range) => range.end - range.start,
        }
    }
}

impl Plan {
    /// Reads the line of JSON: no step is empty, and all together have fewer than 2^64 bytes.
    pub(crate) fn parse(line: &[u8]) -> Answer<Plan> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Line {
            blobs: Vec<Digest>,
            steps: Vec<Vec<u64>>,
        }
        let invalid = |reason: String| Refusal::upload_invalid(format!("the steps: {reason}"));
        let Line { blobs, steps } = serde_json::from_slice(line).map_err(|e| invalid(e.to_string()))?;
        if blobs.len() > BLOBS_MAX || steps.len() > STEPS_MAX {
            let reason = format!("{} of {} blobs", steps.len(), blobs.len());
            let message = format!("{reason}; expected at most {STEPS_MAX} of at most {BLOBS_MAX}");
            return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message)
                .header(STEPS_MAX_HEADER, STEPS_MAX.to_string()));
        }
        let mut bytes = 0_u64;
        let mut read = |step: &Vec<u64>| {
            let step = match *step.as_slice() {
                [len] => Some(Step::Take(len)),
                [blob, offset, len] => {
                    let blob = usize::try_from(blob).ok().filter(|blob| *blob < blobs.len());
                    blob.zip(offset.checked_add(len)).map(|(blob, end)| Step::Copy(blob, offset..end))
                }
                _ => None,
            };
            let step = step.filter(|step| step.bytes() > 0)?;
            bytes = bytes.checked_add(step.bytes())?;
            Some(step)
        };
        let steps = steps.iter().map(|step| {
            let wrong = || invalid(format!("{step:?}, expected [LENGTH] or [BLOB, OFFSET, LENGTH]"));
            read(step).ok_or_else(wrong)
        });
        let steps = steps.collect::<Answer<Vec<Step>>>()?;
        Ok(Plan { blobs, steps })
    }

    fn bytes(&self) -> u64 {
        self.steps.iter().map(Step::bytes).sum()
    }

    fn copied_bytes(&self) -> u64 {
        self.steps.iter().filter(|step| matches!(step, Step::Copy(..))).map(Step::bytes).sum()
    }

    /// Refuses to copy what the repository doesn't have here, before anything is taken.
    async fn check_sources(&self, storage: &Storage, name: &str) -> Answer<()> {
        let mut sizes = Vec::with_capacity(self.blobs.len());
        for digest in &self.blobs {
            let Some(size) = storage.blob_size(name, digest).await? else {
                let message = format!("no blob {digest} in `{name}` to copy from; send the bytes");
                return Err(Refusal::new(StatusCode::CONFLICT, "BLOB_UNKNOWN", message)
                    .detail(json!({ "digest": digest })));
            };
            sizes.push(size);
        }
        for step in &self.steps {
            let Step::Copy(blob, range) = step else { continue };
            if let (Some(digest), Some(size)) = (self.blobs.get(*blob), sizes.get(*blob))
                && range.end > *size
            {
                let message = format!("{range:?} of {digest}, which has {size} bytes");
                return Err(Refusal::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", message));
            }
        }
        Ok(())
    }

    /// Where to stop reading for a copy: after those that follow in the same blob, and close by.
    fn window_end(&self, at: usize, blob: usize, range: &Range<u64>) -> u64 {
        let (mut end, mut taken) = (range.end, 0);
        for step in self.steps.iter().skip(at + 1) {
            match step {
                Step::Take(bytes) => taken += bytes,
                Step::Copy(next, range)
                    if *next == blob && range.start >= end && range.start - end <= APART_MAX_BYTES =>
                {
                    (end, taken) = (range.end, 0);
                }
                Step::Copy(..) => break,
            }
            // The store would wait for the client.
            if taken > APART_MAX_BYTES {
                break;
            }
        }
        end
    }
}

/// What of a body was not read.
struct Rest {
    body: BodyDataStream,
    ready: Bytes,
}

impl Rest {
    /// All up to the first line's end.
    async fn line(&mut self) -> Answer<Bytes> {
        let mut line = BytesMut::new();
        while let Some(chunk) = self.body.next().await {
            let mut chunk = chunk.map_err(broken_off)?;
            if let Some(end) = chunk.iter().position(|byte| *byte == b'\n') {
                self.ready = chunk.split_off(end + 1);
                line.extend_from_slice(&chunk[..end]);
                return Ok(line.freeze());
            }
            line.extend_from_slice(&chunk);
            if line.len() > LINE_MAX_BYTES {
                let message = format!("the steps have more than {LINE_MAX_BYTES} bytes");
                return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message));
            }
        }
        Err(Refusal::upload_invalid("the body ends within its first line, the steps"))
    }

    /// Some bytes, at most so many; none at the end.
    async fn some(&mut self, most: u64) -> Answer<Option<Bytes>> {
        while self.ready.is_empty() {
            match self.body.next().await {
                Some(chunk) => self.ready = chunk.map_err(broken_off)?,
                None => return Ok(None),
            }
        }
        Ok(Some(split(&mut self.ready, most)))
    }
}

fn split(bytes: &mut Bytes, most: u64) -> Bytes {
    bytes.split_to(bytes.len().min(usize::try_from(most).unwrap_or(usize::MAX)))
}

/// The content that the steps make.
fn assembled(storage: Storage, plan: Plan, rest: Rest) -> impl Stream<Item = Answer<Bytes>> {
    let assembly = Assembly { storage, plan, at: 0, done: 0, rest, window: None };
    stream::try_unfold(assembly, async |mut assembly| {
        let bytes = assembly.next().await?;
        Ok(bytes.map(|bytes| (bytes, assembly)))
    })
}

struct Assembly {
    storage: Storage,
    plan: Plan,
    /// The step that is at work, and how many bytes of it are done.
    at: usize,
    done: u64,
    rest: Rest,
    window: Option<Window>,
}

/// A range of a blob that is being read.
struct Window {
    blob: usize,
    range: Range<u64>,
    stream: BoxStream<'static, object_store::Result<Bytes>>,
    ready: Bytes,
}

impl Assembly {
    async fn next(&mut self) -> Answer<Option<Bytes>> {
        let Some(step) = self.plan.steps.get(self.at).cloned() else {
            return match self.rest.some(1).await? {
                None => Ok(None),
                Some(_) => Err(Refusal::upload_invalid("the body has more bytes than its steps take")),
            };
        };
        let bytes = match &step {
            Step::Take(len) => self.rest.some(len - self.done).await?.ok_or_else(|| {
                Refusal::upload_invalid("the content broke off: the body has fewer bytes than its steps take")
            })?,
            Step::Copy(blob, range) => self.copy(*blob, range.start + self.done..range.end).await?,
        };
        self.done += bytes.len() as u64;
        if self.done == step.bytes() {
            (self.at, self.done) = (self.at + 1, 0);
        }
        Ok(Some(bytes))
    }

    /// The first bytes of a range.
    async fn copy(&mut self, blob: usize, range: Range<u64>) -> Answer<Bytes> {
        let digest = &self.plan.blobs[blob];
        let window = match self.window.take() {
            Some(window) if window.blob == blob && window.range.contains(&range.start) => window,
            _ => {
                let within = range.start..self.plan.window_end(self.at, blob, &range);
                let opened = self.storage.open_content(digest, Some(within.clone())).await?;
                Window { blob, range: within, stream: bytes_of(opened), ready: Bytes::new() }
            }
        };
        let window = self.window.insert(window);
        loop {
            while window.ready.is_empty() {
                let next = window.stream.try_next().await;
                let next = next.map_err(|error| self.storage.failed_at("read", digest.as_str(), error))?;
                window.ready = next.ok_or_else(|| Error::damaged(digest, "it ends too early"))?;
            }
            let (skip, want) = (range.start - window.range.start, range.end - window.range.start);
            let bytes = split(&mut window.ready, if skip > 0 { skip } else { want });
            window.range.start += bytes.len() as u64;
            if skip == 0 {
                let small = bytes.len() < SHARE_MIN_BYTES;
                return Ok(if small { Bytes::copy_from_slice(&bytes) } else { bytes });
            }
        }
    }
}

#[cfg(test)]
mod tests;
