//! Bounds of teams: requests a second, and bytes in their repositories.
//!
//! Used bytes are counted now and then over all links (content that several repositories of a team share counts once)
//! and unfinished uploads. What comes in between is taken from the quota byte by byte ([`Taken`]), so that many pushes at
//! once don't each have the whole rest; what is deleted shows at the count after the collection that takes it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyplace_images::Digest;
use anyplace_model::DurationMs;
use anyplace_registry_core::access::Bucket;
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;

use super::accounts::{Known, Team};
use crate::errors::{Answer, Refusal};
use crate::storage::{Error, Result, Storage};
use crate::stored::fingerprint;
use crate::uploads::Uploads;

/// How often used bytes are counted anew.
pub(crate) const COUNT_EVERY: Duration = Duration::from_secs(600);

/// Sizes that are asked for at once.
const AT_ONCE: usize = 16;
/// Most sizes that are remembered, about 40 MiB; those beyond are asked for each time.
const SIZES_MAX: usize = 1 << 20;

/// Bytes of a team.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    /// In its repositories and unfinished uploads, as far as is known.
    held: u64,
    /// On their way in requests that run.
    coming: u64,
}

/// What teams have used.
pub(crate) struct Limits {
    started: Instant,
    buckets: Mutex<HashMap<String, Bucket>>,
    used: Mutex<BTreeMap<String, Used>>,
    /// Held by who counts: two at once would each take away what was counted before. Sizes of contents that the last count
    /// saw in a bucket, by fingerprints: they never change, and each takes a request.
    counting: tokio::sync::Mutex<HashMap<u64, u64>>,
    /// What helps a team that is over its quota.
    advice: String,
    /// Requests refused for their rate.
    pub(crate) rate_refused: AtomicU64,
    /// Pushes refused for the quota.
    pub(crate) quota_refused: AtomicU64,
}

impl Limits {
    /// With how long deletions can be undone, and how old has to be what a collection takes.
    pub(crate) fn new(window: DurationMs, grace: DurationMs) -> Limits {
        let advice = format!(
            "delete manifests by digest (a tag that is deleted leaves its manifest): the first collection after \
             {window} frees them. An operator frees them now, if they are older than {grace}, with `anyplace registry \
             trash --empty` and `anyplace registry gc`; drops unfinished uploads with `anyplace registry uploads \
             --drop`; or raises the quota with `anyplace registry team set`"
        );
        Limits {
            advice,
            counting: tokio::sync::Mutex::default(),
            started: Instant::now(),
            buckets: Mutex::default(),
            used: Mutex::default(),
            rate_refused: AtomicU64::new(0),
            quota_refused: AtomicU64::new(0),
        }
    }

    /// Lets a request of the team through, or says when to come again.
    pub(crate) fn request(&self, team: &Team) -> Answer<()> {
        let Some(rate) = team.requests_per_s else { return Ok(()) };
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        // A changed rate begins anew. As many buckets as teams, which operators make.
        let name = format!("{}/{rate}", team.name);
        let bucket = buckets.entry(name).or_insert_with(|| Bucket::new(rate, now_ms));
        bucket.take(now_ms).map_err(|wait_ms| {
            self.rate_refused.fetch_add(1, Ordering::Relaxed);
            let message = format!("team `{}` may send {rate} requests a second", team.name);
            Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message)
                .header(RETRY_AFTER, wait_ms.div_ceil(1_000).max(1).to_string())
        })
    }

    /// What a request takes from the quota of the team that owns the repository, where there is one.
    pub(super) fn taken(&self, owner: Option<&Team>) -> Taken<'_> {
        let from = owner.and_then(|team| {
            let quota = team.quota_bytes?;
            Some(Quota { limits: self, team: team.name.clone(), quota })
        });
        Taken { from, bytes: 0, kept: false }
    }

    /// Bytes that a team's repositories hold and what is on its way to them, as far as is known.
    pub(crate) fn used(&self, team: &str) -> u64 {
        let used = self.lock().get(team).copied().unwrap_or_default();
        used.held.saturating_add(used.coming)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Used>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what is stored.
    pub(crate) async fn count(&self, storage: &Storage, uploads: &Uploads, known: &Known) -> Result<()> {
        let mut sizes = self.counting.lock().await;
        let before = self.lock().clone();
        let with_quota = |repository: &str| known.owner(repository).filter(|team| team.quota_bytes.is_some());
        if known.teams.values().all(|team| team.quota_bytes.is_none()) {
            self.lock().clear();
            sizes.clear();
            return Ok(());
        }
        let mut contents: HashMap<String, HashSet<Digest>> = HashMap::new();
        let mut links = storage.links();
        while let Some(link) = links.try_next().await? {
            if let Some(team) = with_quota(&link.repository) {
                contents.entry(team.name.clone()).or_default().insert(link.digest);
            }
        }
        let mut held: BTreeMap<String, u64> = BTreeMap::new();
        for upload in uploads.unfinished().await? {
            if let Some(team) = with_quota(&upload.repository) {
                *held.entry(team.name.clone()).or_default() += upload.bytes;
            }
        }
        let mut asked = HashMap::new();
        for (team, digests) in contents {
            let known = &*sizes;
            let size = async |digest: Digest| {
                let content = fingerprint(&digest);
                let size = match known.get(&content) {
                    Some(size) => Some(*size),
                    None => storage.content_size(&digest).await?,
                };
                Ok::<_, Error>((content, size))
            };
            let mut found = stream::iter(digests).map(size).buffer_unordered(AT_ONCE);
            let mut bytes = 0;
            while let Some((content, size)) = found.try_next().await? {
                bytes += size.unwrap_or(0);
                if let Some(size) = size.filter(|_| !storage.is_in_folder() && asked.len() < SIZES_MAX) {
                    asked.insert(content, size);
                }
            }
            *held.entry(team).or_default() += bytes;
        }
        *sizes = asked;
        let mut used = self.lock();
        for (team, bytes) in &held {
            used.entry(team.clone()).or_default().held += bytes;
        }
        // What came meanwhile may or may not have been seen, and stays counted; the next count knows.
        for (team, used) in &mut *used {
            used.held = used.held.saturating_sub(before.get(team).map_or(0, |before| before.held));
        }
        Ok(())
    }
}

/// What one request takes from a quota, as it comes. It counts while this is there, and afterwards if it is kept.
pub(crate) struct Taken<'a> {
    /// None: there is no quota.
    from: Option<Quota<'a>>,
    bytes: u64,
    kept: bool,
}

struct Quota<'a> {
    limits: &'a Limits,
    team: String,
    quota: u64,
}

impl Taken<'_> {
    /// Whether there is a quota.
    pub(crate) fn counts(&self) -> bool {
        self.from.is_some()
    }

    /// Whether so many more bytes would fit.
    pub(crate) fn fits(&self, bytes: u64) -> Answer<()> {
        match &self.from {
            Some(from) => from.add(bytes, 0),
            None => Ok(()),
        }
    }

    /// Takes so many more, if they fit.
    pub(crate) fn take(&mut self, bytes: u64) -> Answer<()> {
        if let Some(from) = &self.from {
            from.add(bytes, bytes)?;
            self.bytes += bytes;
        }
        Ok(())
    }

    /// What was and will be taken stays counted.
    pub(crate) fn keep(&mut self) {
        self.kept = true;
    }

    /// Counts so many bytes no longer that an earlier request took and kept.
    pub(crate) fn give_back(&self, bytes: u64) {
        if let Some(Quota { limits, team, .. }) = &self.from
            && let Some(used) = limits.lock().get_mut(team)
        {
            used.held = used.held.saturating_sub(bytes);
        }
    }
}

impl Quota<'_> {
    /// Adds bytes to what is coming, if as many as are asked for fit.
    fn add(&self, asked: u64, bytes: u64) -> Answer<()> {
        let mut all = self.limits.lock();
        let used = all.entry(self.team.clone()).or_default();
        let sum = used.held.saturating_add(used.coming);
        if sum.saturating_add(asked) <= self.quota {
            used.coming += bytes;
            return Ok(());
        }
        drop(all);
        self.limits.quota_refused.fetch_add(1, Ordering::Relaxed);
        let (team, quota, advice) = (&self.team, self.quota, &self.limits.advice);
        let message = format!(
            "the repositories of team `{team}` hold {sum} bytes, with unfinished uploads and what the trash keeps, and \
             may hold {quota}; {advice}"
        );
        Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", message)
            .detail(json!({ "used_bytes": sum, "quota_bytes": quota })))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.bytes > 0
            && let Some(Quota { limits, team, .. }) = &self.from
        {
            let mut all = limits.lock();
            let used = all.entry(team.clone()).or_default();
            used.coming = used.coming.saturating_sub(self.bytes);
            if self.kept {
                used.held = used.held.saturating_add(self.bytes);
            }
        }
    }
}
