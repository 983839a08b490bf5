//! Tags from upstream: the upstream's answer counts for a moment, and for as long as the upstream can't be asked.
//!
//! A list has the tags of all upstreams, as any of them may be the one that a tag is pulled from. For one that can't be
//! asked, its tags stand in that were pulled.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyplace_images::{Digest, Reference};
use futures_util::future::join_all;

use super::{ASK_TIMEOUT, Cache, Failure, Inner, ONLY_ANSWER_TIMEOUT};
use crate::cache::counters::CacheCounters;
use crate::upstream::remote::{Kind, Remote};

/// Most tags whose last answer is kept in memory; all are dropped when there are more.
const SEEN_MAX: usize = 50_000;

/// What a tag means upstream.
#[derive(Debug)]
pub(crate) enum Resolved {
    /// Its manifest is here.
    Found(Digest),
    /// The upstream can't be asked; this is what the tag was when it last could. Its manifest is here.
    Stale(Digest),
    Absent,
    /// The upstream can't be asked, and there is nothing to stand in.
    Unreachable(Failure),
}

/// What came of asking for all tags.
#[derive(Clone)]
pub(crate) struct Listed {
    pub(crate) tags: Arc<BTreeSet<String>>,
    /// An upstream has the repository.
    pub(crate) is_known: bool,
    /// Why there may be more than those.
    pub(crate) failure: Option<Failure>,
}

/// What a tag was when it last could be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) digest: Digest,
    /// The upstream that said it; empty where an earlier version kept it.
    pub(super) from: String,
}

impl Kept {
    fn to_record(&self) -> String {
        format!("{} {}", self.digest, self.from)
    }

    pub(super) fn from_record(content: &[u8]) -> Option<Kept> {
        let text = std::str::from_utf8(content).ok()?;
        let (digest, from) = text.split_once(' ').unwrap_or((text, ""));
        Some(Kept { digest: digest.parse().ok()?, from: from.to_owned() })
    }
}

/// Answers about tags, and when they came.
#[derive(Default)]
pub(super) struct Seen(Mutex<HashMap<String, (Instant, Option<Kept>)>>);

impl Seen {
    fn fresh(&self, key: &str, ttl: Duration) -> Option<Option<Kept>> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (when, answer) = seen.get(key)?;
        (when.elapsed() < ttl).then(|| answer.clone())
    }

    fn insert(&self, key: String, answer: Option<Kept>) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= SEEN_MAX {
            seen.clear();
        }
        seen.insert(key, (Instant::now(), answer));
    }
}

impl Cache {
    /// What a tag means upstream.
    pub(crate) async fn resolve_tag(&self, repository: &str, tag: &str) -> Resolved {
        let inner = &self.inner;
        let key = tag_key(repository, tag);
        let answer = match inner.seen.fresh(&key, inner.tag_ttl) {
            Some(answer) => Ok(answer),
            None => {
                let asking = ask(inner.clone(), repository.to_owned(), tag.to_owned());
                inner.tag_flights.join(key.clone(), asking).await
            }
        };
        match answer {
            Ok(Some(kept)) => Resolved::Found(kept.digest),
            Ok(None) => Resolved::Absent,
            Err(failure) => match inner.last_seen(&key).await {
                Some(kept) if inner.manifest_here(repository, &kept.digest).await.is_some() => {
                    CacheCounters::one(&inner.counters.stale_tags);
                    Resolved::Stale(kept.digest)
                }
                _ => Resolved::Unreachable(failure),
            },
        }
    }

    /// The tags that the upstreams have.
    pub(crate) async fn tags(&self, repository: &str) -> Result<Listed, Failure> {
        let asking = list(self.inner.clone(), repository.to_owned());
        self.inner.list_flights.join(repository.to_owned(), asking).await
    }
}

/// Asks all upstreams for their tags.
async fn list(inner: Arc<Inner>, repository: String) -> Result<Listed, Failure> {
    let asked = inner.remotes.iter().map(async |remote| {
        let one = std::slice::from_ref(remote);
        let asked = inner.ask_any(Kind::List, one, &repository, |remote, reference| async move {
            let question = remote.client.list_tags(&reference);
            remote.ask(Kind::List, ONLY_ANSWER_TIMEOUT, question).await
        });
        (remote.client.registry().to_string(), asked.await)
    });
    let (mut tags, mut is_known, mut away, mut failure) = (BTreeSet::new(), false, Vec::new(), None);
    for (from, asked) in join_all(asked).await {
        match asked {
            Ok(listed) => {
                is_known = true;
                tags.extend(listed);
            }
            Err(Failure::Absent) => {}
            Err(worse) => {
                failure = failure.max(Some(worse));
                away.push(from);
            }
        }
    }
    if !away.is_empty() {
        let seen = tokio::task::spawn_blocking(move || inner.seen_at(&away, &repository)).await;
        tags.extend(seen.map_err(|e| Failure::here("reading tags", e))?);
    }
    Ok(Listed { tags: Arc::new(tags), is_known, failure })
}

/// Asks the upstreams what a tag means, and makes sure of its manifest.
async fn ask(inner: Arc<Inner>, repository: String, tag: String) -> Result<Option<Kept>, Failure> {
    let key = tag_key(&repository, &tag);
    let before = inner.last_seen(&key).await;
    let mut worst = Failure::Absent;
    for remote in &inner.remotes {
        let Some(mut reference) = remote.reference(&repository) else { continue };
        reference.tag = Some(tag.clone());
        let from = remote.client.registry().to_string();
        match ask_one(&inner, remote, &repository, &reference, before.is_some()).await {
            Ok(digest) => {
                let kept = Kept { digest, from };
                if before.as_ref() != Some(&kept) {
                    inner.keep_tag(key.clone(), &kept).await?;
                }
                inner.seen.insert(key, Some(kept.clone()));
                return Ok(Some(kept));
            }
            Err(failure) => {
                let is_absent = failure == Failure::Absent;
                worst = worst.max(failure);
                // An image doesn't become another registry's of the same name because its own can't be asked.
                if !is_absent && before.as_ref().is_some_and(|before| before.from == from) {
                    break;
                }
            }
        }
    }
    if worst != Failure::Absent {
        return Err(worst);
    }
    if before.is_some() {
        let (inner, key) = (inner.clone(), key.clone());
        let removed = tokio::task::spawn_blocking(move || inner.pieces.records.remove(&key));
        removed.await.map_err(|e| Failure::here("forgetting a tag", e))?;
    }
    inner.seen.insert(key, None);
    Ok(None)
}

/// One question where the tag is as before or wasn't known; the manifest comes before the tag that leads to it.
async fn ask_one(
    inner: &Arc<Inner>,
    remote: &Arc<Remote>,
    repository: &str,
    reference: &Reference,
    is_known: bool,
) -> Result<Digest, Failure> {
    if is_known {
        let asked = remote.ask(Kind::Tag, ASK_TIMEOUT, remote.client.head_manifest(reference)).await?;
        if let Some(digest) = asked.digest {
            inner.manifest(repository, &digest).await?;
            return Ok(digest);
        }
    }
    let question = remote.client.get_manifest(reference);
    let manifest = remote.ask(Kind::Manifest, ONLY_ANSWER_TIMEOUT, question).await?;
    let digest = manifest.digest.clone();
    inner.keep_manifest(repository, &digest, manifest).await?;
    Ok(digest)
}

impl Inner {
    /// What the upstream said last, also before a restart.
    async fn last_seen(self: &Arc<Inner>, key: &str) -> Option<Kept> {
        if let Some(Some(kept)) = self.seen.fresh(key, Duration::MAX) {
            return Some(kept);
        }
        let (inner, key) = (self.clone(), key.to_owned());
        let content = tokio::task::spawn_blocking(move || inner.pieces.records.get(&key)).await.ok()??;
        Kept::from_record(&content)
    }

    /// Blocking: the tags that were pulled from these registries.
    fn seen_at(&self, registries: &[String], repository: &str) -> Vec<String> {
        let (records, prefix) = (&self.pieces.records, tag_key(repository, ""));
        let is_theirs = |key: &Arc<str>| {
            let kept = records.get(key).and_then(|content| Kept::from_record(&content));
            kept.is_some_and(|kept| kept.from.is_empty() || registries.contains(&kept.from))
        };
        let keys = records.keys(&prefix).into_iter().filter(is_theirs);
        keys.filter_map(|key| Some(key.strip_prefix(&prefix)?.to_owned())).collect()
    }

    async fn keep_tag(self: &Arc<Inner>, key: String, kept: &Kept) -> Result<(), Failure> {
        let (inner, content) = (self.clone(), kept.to_record());
        let written = tokio::task::spawn_blocking(move || inner.pieces.put_record(&key, content.as_bytes()));
        written.await.map_err(|e| Failure::here("keeping a tag", e))
    }
}

pub(super) fn tag_key(repository: &str, tag: &str) -> String {
    format!("repositories/{repository}/_tags/{tag}")
}
