//! One collection, from the list of repositories to the last content without a link.
//!
//! Memory: the names of the repositories, the manifests and tags of one repository, [`CANDIDATES_MAX`] candidates, and two
//! [`Marks`] of a fixed size.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use anyplace_images::Digest;
use anyplace_registry_core::marks::Marks;
use anyplace_registry_core::plan::{LinkFacts, LinkFate, judge_link};
use anyplace_registry_core::reach::Node;
use anyplace_registry_core::retention::{self, InUse, Rule, Tag};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio_util::sync::CancellationToken;

use super::hold::{self, AT_ONCE};
use super::report::{GcPhase, GcReport};
use super::retain::{self, Basis, Tags};
use super::sweep;
use crate::access::{self, Audit};
use crate::storage::{Ages, Link, Storage, Trashed};

/// Candidates that are kept at once; about 10 MiB.
const CANDIDATES_MAX: usize = 1 << 16;
/// Age at which a put of a manifest that isn't over was ended by a crash.
const PENDING_MAX: Duration = Duration::from_secs(24 * 3600);
/// An upload that nobody went on with for so long is given up.
const ABANDONED_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// Data of a bucket that has been nobody's for so long is deleted.
const UNUSED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// What a collection works with.
pub(super) struct Context<'a> {
    pub(super) storage: &'a Storage,
    /// Its name.
    pub(super) run: String,
    /// Ages when it began.
    pub(super) ages: Ages,
    pub(super) grace_ms: u64,
    pub(super) window: Duration,
    pub(super) dry_run: bool,
    pub(super) stop: &'a CancellationToken,
    pub(super) audit: &'a Audit,
    pub(super) report: &'a Mutex<Option<GcReport>>,
    pub(super) rules: &'a [Rule],
    /// None: it can't be had.
    pub(super) in_use: Option<InUse<Digest>>,
    /// Decides what is confused where memory doesn't suffice.
    pub(super) seed: u64,
}

impl Context<'_> {
    /// Milliseconds from then to the start of the collection; none if it was after.
    pub(super) fn age_ms(&self, put: SystemTime) -> Option<u64> {
        self.ages.of(put).map(|age| age.as_millis() as u64)
    }

    /// Changes the report.
    pub(super) fn report(&self, change: impl FnOnce(&mut GcReport)) {
        if let Ok(mut report) = self.report.lock()
            && let Some(report) = &mut *report
        {
            change(report);
        }
    }

    /// Writes to the audit record what a rule deleted: a tag or a manifest.
    pub(super) fn record(&self, repository: &str, reference: &str, digest: &Digest) {
        self.audit.record(&access::Event {
            at: access::moment(),
            account: access::RETENTION.to_owned(),
            team: None,
            action: "delete-manifest".to_owned(),
            subject: repository.to_owned(),
            reference: Some(reference.to_owned()),
            digest: Some(digest.to_string()),
        });
    }

    fn is_old(&self, put: SystemTime, limit: Duration) -> bool {
        self.age_ms(put).is_some_and(|age_ms| u128::from(age_ms) >= limit.as_millis())
    }
}

/// Runs it.
pub(super) async fn run(cx: &Context<'_>) -> anyhow::Result<()> {
    if !cx.dry_run {
        let stale = hold::remove_stale(cx.storage).await.context("removing stale markers")?;
        cx.report(|report| report.stale_removed += stale);
    }
    let (mut needed, mut unclear) = (Marks::new(cx.seed), BTreeSet::new());
    let mut repositories = cx.storage.repositories().await.context("listing repositories")?;
    repositories.sort_unstable();
    cx.report(|report| report.seen.repositories = repositories.len() as u64);
    for repository in &repositories {
        if cx.stop.is_cancelled() {
            return Ok(());
        }
        let clear = read(cx, repository, &mut needed).await;
        if !clear.with_context(|| format!("reading the manifests of {repository}"))? {
            unclear.insert(repository.clone());
        }
        cx.report(|report| report.seen.repositories_read += 1);
    }
    cx.report(|report| report.phase = GcPhase::Links);
    let linked = links(cx, &needed, &unclear).await.context("looking for links that nothing needs")?;
    drop(needed);
    cx.report(|report| report.phase = GcPhase::Content);
    if !cx.stop.is_cancelled() {
        contents(cx, &linked).await.context("looking for content without links")?;
    }
    if !cx.dry_run && !cx.stop.is_cancelled() {
        let swept = cx.storage.sweep(ABANDONED_AFTER, UNUSED_AFTER).await;
        let swept = swept.context("removing what unfinished uploads left")?;
        cx.report(|report| {
            report.uploads_abandoned += swept.uploads;
            report.swept_bytes += swept.bytes;
        });
    }
    Ok(())
}

/// Reads a repository: lets go what rules say, and marks what the rest needs. Says whether all could be read.
async fn read(cx: &Context<'_>, repository: &str, needed: &mut Marks) -> anyhow::Result<bool> {
    let infos = cx.storage.manifests(repository).await?;
    let (trash, damaged) = cx.storage.trash_and_damaged(repository).await?;
    let (expired, trash): (Vec<_>, Vec<_>) =
        trash.into_iter().partition(|item| cx.is_old(item.deleted, cx.window));
    let (expired_damaged, damaged): (Vec<_>, Vec<_>) =
        damaged.into_iter().partition(|item| cx.is_old(item.deleted, cx.window));
    let expired = expired.into_iter().map(|item| item.id);
    for id in expired.chain(expired_damaged.into_iter().map(|item| item.id)) {
        cx.report(|report| report.trash_emptied += 1);
        if !cx.dry_run {
            cx.storage.remove_trash(repository, &id).await?;
        }
    }
    // It can't be undone, whatever it was, so it keeps nothing; the others keep what they need.
    for item in damaged {
        cx.report(|report| {
            report.problem(format!(
                "`repositories/{repository}/_trash/{}` is damaged ({}): that deletion can't be undone; it goes when its time \
                 is over",
                item.id, item.reason
            ));
        });
    }
    let mut clear = true;
    let mut digests: BTreeSet<Digest> = infos.iter().map(|info| info.digest.clone()).collect();
    cx.report(|report| report.seen.manifests += digests.len() as u64);
    // After the trash, so that a tag that came back meanwhile is in one of them; and after the manifests, so that most of
    // those that lead nowhere do.
    let (tags, damaged_tag) = retain::tags(cx, repository).await?;
    let whole = infos.iter().filter(|info| info.pending.is_none());
    let whole: BTreeSet<&Digest> = whole.map(|info| &info.digest).collect();
    let (tags, dangling): (Tags, Tags) =
        tags.into_iter().partition(|(_, (digest, _))| whole.contains(digest));
    retain::expel_dangling(cx, repository, &dangling.into_keys().collect::<Vec<_>>()).await?;
    let mut basis = Basis { tags, manifests: BTreeMap::new() };
    digests.extend(trash.iter().filter_map(|item| match &item.what {
        Trashed::Manifest { digest, .. } => Some(digest.clone()),
        Trashed::Tag { .. } => None,
    }));
    let mut nodes = BTreeMap::new();
    let mut reading = stream::iter(digests)
        .map(async |digest| (sweep::names(cx, repository, &digest).await, digest))
        .buffer_unordered(AT_ONCE);
    while let Some((names, digest)) = reading.next().await {
        needed.insert(&[repository, digest.as_str()]);
        match names? {
            Some(names) => {
                names.blobs.iter().for_each(|blob| needed.insert(&[repository, blob.as_str()]));
                let node = Node { digest: digest.clone(), children: names.manifests, subject: names.subject };
                nodes.insert(digest, node);
            }
            None => clear = false,
        }
    }
    drop(reading);
    for info in infos {
        match (info.pending, nodes.remove(&info.digest)) {
            (Some(id), _) => {
                if !cx.dry_run && cx.is_old(info.put, PENDING_MAX) {
                    cx.report(|report| report.stale_removed += 1);
                    cx.storage.remove_pending(repository, &info.digest, &id).await?;
                }
            }
            (None, Some(node)) => {
                basis.manifests.insert(info.digest, (node, info.put));
            }
            (None, None) => {}
        }
    }
    if !clear || cx.rules.is_empty() {
        return Ok(clear);
    }
    if let Some(error) = damaged_tag {
        cx.report(|report| {
            report.problem(format!(
                "no rule lets anything go in {repository}: {error}; push the tag again, or delete it"
            ));
        });
    } else {
        retain(cx, repository, basis, trash.into_iter().map(|item| item.what).collect()).await?;
    }
    Ok(clear)
}

/// Lets go what rules say.
async fn retain(cx: &Context<'_>, repository: &str, basis: Basis, trash: Vec<Trashed>) -> anyhow::Result<()> {
    let Some(in_use) = &cx.in_use else { return Ok(()) };
    let mut pinned: BTreeSet<Digest> = BTreeSet::new();
    for item in trash {
        if let Trashed::Tag { digest, .. } = item {
            pinned.insert(digest);
        }
    }
    let age = |put| cx.age_ms(put).unwrap_or_default();
    let view = retention::Repository {
        name: repository.to_owned(),
        tags: basis
            .tags
            .iter()
            .map(|(name, (digest, put))| Tag {
                name: name.clone(),
                digest: digest.clone(),
                age_ms: age(*put),
            })
            .collect(),
        manifests: basis
            .manifests
            .values()
            .map(|(node, put)| retention::Manifest {
                node: node.clone(),
                age_ms: age(*put),
                pinned: pinned.contains(&node.digest),
            })
            .collect(),
    };
    let decision = retention::decide(cx.rules, &view, in_use, cx.grace_ms);
    retain::expel(cx, repository, &decision, &basis).await.map(drop)
}

/// Removes links that nothing needs, and marks the digests of the others.
async fn links(cx: &Context<'_>, needed: &Marks, unclear: &BTreeSet<String>) -> anyhow::Result<Marks> {
    let mut linked = Marks::new(cx.seed.wrapping_add(1));
    let mut candidates: BTreeMap<String, BTreeSet<Digest>> = BTreeMap::new();
    let (mut count, mut listed) = (0, cx.storage.links());
    while let Some(link) = listed.try_next().await? {
        if cx.stop.is_cancelled() {
            return Ok(linked);
        }
        let Link { repository, digest, put } = link;
        let facts = LinkFacts {
            age_ms: cx.age_ms(put),
            needed: needed.contains(&[&repository, digest.as_str()]),
            unclear: unclear.contains(&repository),
        };
        let fate = judge_link(facts, cx.grace_ms);
        cx.report(|report| {
            report.seen.links += 1;
            match fate {
                LinkFate::Young => report.spared.young += 1,
                LinkFate::Unclear => report.spared.unclear += 1,
                LinkFate::Needed | LinkFate::Goes => {}
            }
        });
        if fate != LinkFate::Goes {
            linked.insert(&[digest.as_str()]);
            continue;
        }
        candidates.entry(repository).or_default().insert(digest);
        count += 1;
        if count >= CANDIDATES_MAX {
            sweep_links(cx, std::mem::take(&mut candidates), &mut linked).await?;
            count = 0;
        }
    }
    sweep_links(cx, candidates, &mut linked).await?;
    Ok(linked)
}

async fn sweep_links(
    cx: &Context<'_>,
    candidates: BTreeMap<String, BTreeSet<Digest>>,
    linked: &mut Marks,
) -> anyhow::Result<()> {
    for (repository, digests) in candidates {
        if cx.dry_run {
            cx.report(|report| {
                let lines = digests.iter().map(|digest| sweep::going(&repository, digest, LinkFate::Goes));
                lines.for_each(|line| report.plan.links.push(line));
            });
            continue;
        }
        let spared = sweep::links(cx, &repository, digests).await?;
        spared.iter().for_each(|digest| linked.insert(&[digest.as_str()]));
    }
    Ok(())
}

/// Deletes content that has no link.
async fn contents(cx: &Context<'_>, linked: &Marks) -> anyhow::Result<()> {
    let (mut candidates, mut listed) = (Vec::new(), cx.storage.contents());
    while let Some(content) = listed.try_next().await? {
        if cx.stop.is_cancelled() {
            return Ok(());
        }
        cx.report(|report| report.seen.content += 1);
        if linked.contains(&[content.digest.as_str()]) {
            continue;
        }
        if cx.dry_run {
            cx.report(|report| sweep::condemn(&mut report.plan, &content));
            continue;
        }
        candidates.push(content);
        if candidates.len() >= CANDIDATES_MAX {
            sweep::contents(cx, std::mem::take(&mut candidates)).await?;
        }
    }
    sweep::contents(cx, candidates).await
}
