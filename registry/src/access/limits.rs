//! Bounds of teams: requests a second, and bytes in their repositories.
//!
//! Used bytes are counted now and then over all links (content that several repositories of a team share counts once),
//! and what is pushed in between is added at once; deletions show at the next count.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyplace_images::Digest;
use anyplace_registry_core::access::Bucket;
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use futures_util::TryStreamExt as _;
use serde_json::json;

use super::accounts::{Known, Team};
use crate::errors::{Answer, Refusal};
use crate::storage::{Result, Storage};

/// How often used bytes are counted anew.
pub(crate) const COUNT_EVERY: Duration = Duration::from_secs(600);

/// What teams have used.
pub(crate) struct Limits {
    started: Instant,
    buckets: Mutex<HashMap<String, Bucket>>,
    used: Mutex<BTreeMap<String, u64>>,
    /// Requests refused for their rate.
    pub(crate) rate_refused: AtomicU64,
    /// Pushes refused for the quota.
    pub(crate) quota_refused: AtomicU64,
}

impl Limits {
    pub(crate) fn new() -> Limits {
        Limits {
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

    /// Lets a push of so many bytes into the team's repositories through.
    pub(crate) fn push(&self, team: &Team, bytes: u64) -> Answer<()> {
        let Some(quota) = team.quota_bytes else { return Ok(()) };
        let used = self.used(&team.name);
        if used.saturating_add(bytes) <= quota {
            return Ok(());
        }
        self.quota_refused.fetch_add(1, Ordering::Relaxed);
        let message = format!(
            "the repositories of team `{}` hold {used} bytes, and may hold {quota}; delete tags, or have an operator \
             raise it with `anyplace registry team set`",
            team.name
        );
        Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", message)
            .detail(json!({ "used_bytes": used, "quota_bytes": quota })))
    }

    /// Bytes that a team's repositories hold, as far as is known.
    pub(crate) fn used(&self, team: &str) -> u64 {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).get(team).copied().unwrap_or(0)
    }

    /// Adds what was pushed.
    pub(crate) fn pushed(&self, team: &Team, bytes: u64) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        *used.entry(team.name.clone()).or_default() += bytes;
    }

    /// Counts what is stored.
    pub(crate) async fn count(&self, storage: &Storage, known: &Known) -> Result<()> {
        let before = self.used.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut contents: HashMap<String, HashSet<Digest>> = HashMap::new();
        let mut links = storage.links();
        while let Some(link) = links.try_next().await? {
            if let Some(team) = known.owner(&link.repository).filter(|team| team.quota_bytes.is_some()) {
                contents.entry(team.name.clone()).or_default().insert(link.digest);
            }
        }
        let mut used = BTreeMap::new();
        for (team, digests) in contents {
            let mut bytes = 0;
            for digest in digests {
                bytes += storage.content_size(&digest).await?.unwrap_or(0);
            }
            used.insert(team, bytes);
        }
        let mut now = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        // What was pushed meanwhile may or may not have been seen; the next count knows.
        for (team, bytes) in &*now {
            let pushed = bytes - before.get(team).unwrap_or(&0).min(bytes);
            if pushed > 0 {
                *used.entry(team.clone()).or_default() += pushed;
            }
        }
        *now = used;
        Ok(())
    }
}
