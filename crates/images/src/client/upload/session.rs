//! One blob's upload, from the first question to the closed session.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Response, StatusCode, Url};

use super::body::Part;
use super::copying::{self, Copying, STEPS_MAX_HEADER};
use super::{Content, PutOutcome};
use crate::client::auth::Grant;
use crate::client::retry::{Backoff, is_passing, retry_after};
use crate::client::{ANSWER_TIMEOUT, Client, Target, check, header};
use crate::error::{Error, Result};
use crate::progress::{Item, SharedProgress};
use crate::push::journal::Entry;
use crate::push::recipe::Step;
use crate::reference::digits;

/// Largest part of an upload: proxies in front of registries commonly stop at 500 MB.
const PART_MAX_BYTES: u64 = 500_000_000;
/// Up to this size a blob goes in one request, which costs a round trip less and little when it is repeated.
pub(super) const SMALL_MAX_BYTES: u64 = 1 << 20;
/// How often a session that the registry forgot is begun again.
const RESTARTS_MAX: u32 = 5;
/// Most repositories that are tried as the source of a mount: each costs a round trip.
const MOUNTS_MAX: usize = 4;

/// An upload at the registry.
struct Session {
    location: Url,
    /// Bytes that the registry acknowledged.
    offset: u64,
    part_max: u64,
    /// Most steps of a part that copies from blobs that are there, where the registry takes such parts.
    steps_max: Option<usize>,
    /// Whether it went on after a break, in this process or an earlier one.
    resumed: bool,
}

enum Begun {
    Session(Session),
    Mounted,
}

enum End {
    Done,
    /// The registry doesn't know the session any more.
    Lost,
}

pub(super) struct Upload<'a> {
    pub(super) client: &'a Client,
    pub(super) target: &'a Target,
    pub(super) content: Content<'a>,
    pub(super) mount_from: &'a [String],
    pub(super) item: &'a Item,
    pub(super) progress: &'a SharedProgress,
    pub(super) entry: Option<Entry>,
    pub(super) copying: Copying<'a>,
    pub(super) sent: Arc<AtomicU64>,
    pub(super) backoff: Backoff,
}

impl Upload<'_> {
    /// Brings the blob into the repository.
    pub(super) async fn run(&mut self) -> Result<PutOutcome> {
        let mut session = self.inherited().await?;
        let mut started = false;
        for _ in 0..=RESTARTS_MAX {
            let mut current = match session.take() {
                Some(session) => session,
                None => match self.begin().await? {
                    Begun::Session(session) => session,
                    Begun::Mounted => {
                        self.progress.skipped(self.item, self.content.size());
                        return Ok(PutOutcome::Skipped);
                    }
                },
            };
            if !started {
                self.progress.started(self.item, self.content.size());
                started = true;
            }
            self.remember(&current);
            if current.steps_max.is_some() {
                self.copying.prepare(self.content).await;
            }
            match self.drive(&mut current).await? {
                End::Done => {
                    self.progress.finished(self.item);
                    let sent = self.sent.load(Ordering::Relaxed);
                    return Ok(PutOutcome::Sent { sent, copied: self.copying.copied });
                }
                End::Lost => {
                    self.copying.forget();
                    tracing::debug!(digest = %self.content.digest(), "upload forgotten: beginning again");
                }
            }
        }
        Err(self.protocol(format!("it forgot the upload of {} {RESTARTS_MAX} times", self.content.digest())))
    }

    /// The session that an earlier process left, if the registry still knows it.
    async fn inherited(&mut self) -> Result<Option<Session>> {
        let Some(location) = self.entry.as_ref().and_then(Entry::location) else { return Ok(None) };
        let Ok(location) = Url::parse(&location) else { return Ok(None) };
        if location.origin() != self.target.base.origin() {
            return Ok(None);
        }
        let session = Session {
            location,
            offset: 0,
            part_max: self.entry.as_ref().map_or(PART_MAX_BYTES, Entry::part_max),
            steps_max: None,
            resumed: true,
        };
        let session = self.status(session).await?;
        if session.as_ref().is_some_and(|session| session.offset > 0) {
            self.client.inner.counters.resumed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(session)
    }

    /// Starts a session, unless the registry mounts the blob from elsewhere.
    async fn begin(&mut self) -> Result<Begun> {
        let sources: Vec<&str> = self
            .mount_from
            .iter()
            .map(String::as_str)
            .filter(|from| *from != self.target.repository)
            .take(MOUNTS_MAX)
            .collect();
        let mut begun = None;
        for from in sources {
            // A source that is absent or forbidden is no failure of the upload.
            let Ok(response) = self.post(Some(from)).await else { continue };
            if !response.status().is_success() {
                continue;
            }
            if let Some(earlier) = begun.take() {
                self.cancel(earlier).await;
            }
            if response.status() == StatusCode::CREATED {
                return Ok(Begun::Mounted);
            }
            begun = Some(self.session(&response)?);
        }
        if let Some(session) = begun {
            return Ok(Begun::Session(session));
        }
        let response = check(self.target, self.post(None).await?).await?;
        if response.status() == StatusCode::CREATED {
            return Ok(Begun::Mounted);
        }
        self.session(&response).map(Begun::Session)
    }

    /// Frees a session that isn't needed; the registry would do it some day.
    async fn cancel(&self, session: Session) {
        let http = &self.client.inner.http;
        let request = || Ok(http.delete(session.location.clone()).timeout(ANSWER_TIMEOUT));
        let _ = self.client.send_once(self.target, Grant::Push, request).await;
    }

    async fn post(&self, from: Option<&str>) -> Result<Response> {
        let mut url = self.target.url("blobs/uploads/")?;
        url.query_pairs_mut().append_pair("mount", self.content.digest().as_str());
        if let Some(from) = from {
            url.query_pairs_mut().append_pair("from", from);
        }
        let grant = from.map_or(Grant::Push, Grant::Mount);
        let http = &self.client.inner.http;
        let request = || Ok(http.post(url.clone()).header(CONTENT_LENGTH, 0).timeout(ANSWER_TIMEOUT));
        self.client.send(self.target, grant, request).await
    }

    fn session(&self, response: &Response) -> Result<Session> {
        let limit = |name| header(response.headers(), name).and_then(|text| text.parse::<u64>().ok());
        let least = limit("oci-chunk-min-length").unwrap_or(0);
        let most = limit("oci-chunk-max-length").unwrap_or(PART_MAX_BYTES);
        if least > PART_MAX_BYTES {
            let reason =
                format!("it takes no parts below {least} bytes; at most {PART_MAX_BYTES} are sent at once");
            return Err(self.protocol(reason));
        }
        let part_max = most.clamp(least.max(1), PART_MAX_BYTES);
        let location = self.location(&self.target.base, response)?;
        Ok(Session { location, offset: 0, part_max, steps_max: steps_max(response), resumed: false })
    }

    /// Sends what is missing, and closes the session.
    async fn drive(&mut self, session: &mut Session) -> Result<End> {
        let size = self.content.size();
        self.progress.moved(self.item, session.offset);
        loop {
            let closing = session.offset == size || size <= SMALL_MAX_BYTES.min(session.part_max);
            let rest = session.offset..session.offset + session.next_part(size);
            let steps = session.steps_max.filter(|_| !closing);
            let steps = steps.and_then(|most| self.copying.part(rest.clone(), most)).unwrap_or_default();
            let len = match steps.iter().map(Step::bytes).sum::<u64>() {
                _ if closing => size - session.offset,
                0 => rest.end - rest.start,
                len => len,
            };
            let copies = steps.iter().any(|step| matches!(step, Step::Copy { .. }));
            let outcome = self.part(session, len, closing, if copies { steps.as_slice() } else { &[] }).await;
            if copies {
                self.copying.tried(&outcome);
            }
            let before = session.offset;
            let refused = match outcome {
                Ok(response) if response.status().is_success() && closing => return Ok(End::Done),
                Ok(response) if response.status().is_success() => {
                    self.acknowledged(session, len, &response)?;
                    if copies {
                        self.copying.acknowledged(before..session.offset);
                        self.progress.moved(self.item, session.offset);
                    }
                    continue;
                }
                Ok(response) if is_passing(response.status().as_u16()) => {
                    let asked = retry_after(response.headers());
                    if !self.client.pause(&mut self.backoff, asked).await {
                        return check(self.target, response).await.map(|_| End::Lost);
                    }
                    None
                }
                Ok(response) => match response.status() {
                    status @ (StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE) => Some(status),
                    // The parts before and after a break don't belong together, or what was copied is not what a table
                    // said: all is sent again.
                    StatusCode::BAD_REQUEST if closing && (session.resumed || self.copying.copied > 0) => {
                        self.copying.give_up();
                        return Ok(End::Lost);
                    }
                    _ if copies => None,
                    _ => return check(self.target, response).await.map(|_| End::Lost),
                },
                Err(error) if error.is_passing() => {
                    if !self.client.pause(&mut self.backoff, None).await {
                        return Err(error);
                    }
                    None
                }
                Err(error) => return Err(error),
            };
            // The answer to a closing request may be what got lost.
            if closing
                && self.client.head_blob_at(self.target, self.content.digest(), Grant::Push).await?.is_some()
            {
                return Ok(End::Done);
            }
            if refused == Some(StatusCode::NOT_FOUND) {
                return Ok(End::Lost);
            }
            match self.status(session.copy()).await? {
                // Refused, and yet nothing new: going on would be refused for ever.
                Some(now) if refused.is_some() && now.offset == before => return Ok(End::Lost),
                Some(now) => *session = Session { resumed: true, ..now },
                None => return Ok(End::Lost),
            }
            if copies {
                self.copying.acknowledged(before..session.offset.max(before));
            }
            if session.offset != before {
                self.backoff.reset();
            }
            if session.offset > 0 {
                self.client.inner.counters.resumed.fetch_add(1, Ordering::Relaxed);
            }
            self.progress.moved(self.item, session.offset);
            self.remember(session);
        }
    }

    /// Adds `len` bytes from the session's offset, with or without closing it: sent, or by steps where there are any.
    async fn part(&self, session: &Session, len: u64, closing: bool, steps: &[Step]) -> Result<Response> {
        let http = &self.client.inner.http;
        let part = Part {
            content: self.content,
            skip: session.offset,
            len,
            item: self.item,
            progress: self.progress,
            sent: &self.sent,
            failure: Arc::default(),
        };
        let range = format!("{}-{}", session.offset, (session.offset + len).saturating_sub(1));
        let request = || {
            if !steps.is_empty() {
                let (line, sends) = self.copying.body(session.offset, steps);
                let bytes = line.len() as u64 + sends.iter().map(|send| send.end - send.start).sum::<u64>();
                let request = http.patch(session.location.clone()).header(CONTENT_LENGTH, bytes);
                let request = request.header(CONTENT_TYPE, copying::MEDIA_TYPE).header(CONTENT_RANGE, &range);
                return Ok(request.body(part.body_by(line, sends)));
            }
            let request = if closing {
                let mut location = session.location.clone();
                location.query_pairs_mut().append_pair("digest", self.content.digest().as_str());
                http.put(location)
            } else {
                http.patch(session.location.clone())
            };
            let request = request.header(CONTENT_LENGTH, len);
            if len == 0 {
                return Ok(request);
            }
            // A first request that closes at once is a monolithic upload, which has no range.
            let request =
                if closing && session.offset == 0 { request } else { request.header(CONTENT_RANGE, &range) };
            Ok(request.header(CONTENT_TYPE, "application/octet-stream").body(part.body()?))
        };
        let outcome = self.client.send_once(self.target, Grant::Push, request).await;
        // Where the content itself couldn't be read, that is the error, not the request that broke off.
        match part.take_failure() {
            Some(failure) if outcome.is_err() => Err(failure),
            _ => outcome,
        }
    }

    /// Takes over what the answer to a part says.
    fn acknowledged(&mut self, session: &mut Session, len: u64, response: &Response) -> Result<()> {
        let now = match header(response.headers(), RANGE.as_str()) {
            Some(range) => parse_range(&range).ok_or_else(|| {
                self.protocol(format!("its answer to a part has the Range `{range}`; expected 0-N"))
            })?,
            None => session.offset + len,
        };
        if now <= session.offset || now > self.content.size() {
            let (before, size) = (session.offset, self.content.size());
            return Err(self.protocol(format!("after {before} of {size} bytes and {len} more, it has {now}")));
        }
        session.location = self.location(&session.location, response)?;
        session.offset = now;
        self.backoff.reset();
        if now < self.content.size() {
            self.remember(session);
        }
        Ok(())
    }

    /// Asks the registry how much it has; none if it doesn't know the session.
    async fn status(&self, session: Session) -> Result<Option<Session>> {
        let http = &self.client.inner.http;
        let request = || Ok(http.get(session.location.clone()).timeout(ANSWER_TIMEOUT));
        let response = self.client.send(self.target, Grant::Push, request).await?;
        if response.status().is_client_error() && response.status() != StatusCode::TOO_MANY_REQUESTS {
            return match response.status() {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    check(self.target, response).await.map(|_| None)
                }
                _ => Ok(None),
            };
        }
        let response = check(self.target, response).await?;
        let range = header(response.headers(), RANGE.as_str());
        let offset = range.as_deref().and_then(parse_range).unwrap_or(0);
        if offset > self.content.size() {
            return Ok(None);
        }
        let location = match header(response.headers(), LOCATION.as_str()) {
            Some(_) => self.location(&session.location, &response)?,
            None => session.location,
        };
        let steps_max = steps_max(&response).or(session.steps_max);
        Ok(Some(Session { location, offset, steps_max, ..session }))
    }

    fn remember(&mut self, session: &Session) {
        if let Some(entry) = &mut self.entry {
            entry.remember(session.location.as_str(), session.part_max);
        }
    }

    /// Where the upload goes on.
    fn location(&self, from: &Url, response: &Response) -> Result<Url> {
        let location = header(response.headers(), LOCATION.as_str())
            .ok_or_else(|| self.protocol("its answer to an upload has no Location".to_owned()))?;
        let url = next_location(&self.target.base, from, &location);
        url.map_err(|reason| self.protocol(format!("its upload Location `{location}` {reason}")))
    }

    fn protocol(&self, reason: String) -> Error {
        Error::InvalidRegistry { what: format!("registry {}", self.target.name()), reason }
    }
}

impl Session {
    /// Length of the next part: as much as may be. That is never less than the registry's minimum, which the last
    /// part may fall short of.
    fn next_part(&self, size: u64) -> u64 {
        self.part_max.min(size - self.offset)
    }

    fn copy(&self) -> Session {
        Session { location: self.location.clone(), ..*self }
    }
}

/// Most steps of a part, where the registry takes such parts; one that sends and one that copies is the least.
fn steps_max(response: &Response) -> Option<usize> {
    header(response.headers(), STEPS_MAX_HEADER)?.parse().ok().filter(|most| *most >= 2)
}

/// Never another scheme, host or port, since the authorization would go there.
fn next_location(base: &Url, from: &Url, location: &str) -> std::result::Result<Url, String> {
    let url = from.join(location).map_err(|e| format!("is no URL ({e})"))?;
    if url.origin() != base.origin() {
        return Err("has another scheme, host or port".to_owned());
    }
    Ok(url)
}

/// Bytes that `0-N` acknowledges. Registries write `0-0` for none at all, and would for one: that one is sent again.
fn parse_range(text: &str) -> Option<u64> {
    let (first, last) = text.trim().trim_start_matches("bytes=").split_once('-')?;
    let last = digits(last.trim())?;
    let acknowledged = if last == 0 { 0 } else { last.checked_add(1)? };
    (first.trim() == "0").then_some(acknowledged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_stay_at_their_registry() {
        let base = Url::parse("https://10.1.0.10:5000/").unwrap();
        for (location, goes) in [
            ("/v2/app/blobs/uploads/1", true),
            ("https://10.1.0.10:5000/v2/app/blobs/uploads/1?state=x", true),
            ("http://10.1.0.10:5000/v2/app/blobs/uploads/1", false),
            ("https://10.1.0.10:5001/v2/app/blobs/uploads/1", false),
            ("https://10.1.0.10/v2/app/blobs/uploads/1", false),
            ("//10.1.0.11:5000/v2/app/blobs/uploads/1", false),
            ("https://", false),
        ] {
            assert_eq!(next_location(&base, &base, location).is_ok(), goes, "{location}");
        }
    }

    #[test]
    fn acknowledged_ranges_are_parsed() {
        for (text, expected) in [
            ("0-0", Some(0)),
            ("0-9", Some(10)),
            ("bytes=0-9", Some(10)),
            ("1-9", None),
            ("", None),
            ("0-x", None),
        ] {
            assert_eq!(parse_range(text), expected, "{text}");
        }
    }

    #[test]
    fn changed_ranges() {
        crate::mutations::lines("upload-ranges.txt", |text| {
            let Some(acknowledged) = parse_range(text) else { return };
            let last: u128 = text.rsplit('-').next().unwrap().trim().parse().unwrap();
            let expected = if last == 0 { 0 } else { last + 1 };
            assert_eq!((u128::from(acknowledged), text.contains('+')), (expected, false), "{text}");
        });
    }
}
