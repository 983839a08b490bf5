//! Lets tags and manifests go that rules don't keep, into the trash.
//!
//! The decision was made from what was read before. Behind the markers, each tag must still be the same push, and each
//! manifest as old as it was; when anything of the repository changed that matters, the rest waits for the next
//! collection. An index goes before what it names, so that nothing readable lacks a part.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use anyplace_images::Digest;
use anyplace_registry_core::plan::Going;
use anyplace_registry_core::reach::Node;
use anyplace_registry_core::retention::Decision;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::hold::{AT_ONCE, Hold, MARKED_MAX};
use super::run::Context;
use super::sweep::names;
use crate::storage::{Error, Marked, TagInfo, Trashed};

/// Deepest nesting of indexes that is put in order; deeper ones go in any order.
const DEPTH_MAX: usize = 32;

/// What a decision was made from.
pub(super) struct Basis {
    /// Pushed tags: digest, and when they were put.
    pub(super) tags: Tags,
    /// Manifests, and when they were put.
    pub(super) manifests: BTreeMap<Digest, (Node<Digest>, SystemTime)>,
}

/// Lets go what the decision says; the manifests that went are given back.
pub(super) async fn expel(
    cx: &Context<'_>,
    repository: &str,
    decision: &Decision<Digest>,
    basis: &Basis,
) -> anyhow::Result<BTreeSet<Digest>> {
    let tags = decision.tags.iter().filter(|(_, verdict)| !verdict.keep);
    let tags: Vec<(String, String)> =
        tags.map(|(tag, verdict)| (tag.clone(), verdict.reason.to_string())).collect();
    let manifests = decision.manifests.iter().filter(|(_, verdict)| !verdict.keep);
    let reasons: BTreeMap<&Digest, String> =
        manifests.map(|(digest, verdict)| (digest, verdict.reason.to_string())).collect();
    if cx.dry_run {
        cx.report(|report| {
            tags.iter().for_each(|(tag, reason)| report.plan.tags.push(named(repository, tag, reason)));
            let lines = reasons.iter().map(|(digest, reason)| named(repository, digest.as_str(), reason));
            lines.for_each(|line| report.plan.manifests.push(line));
        });
        return Ok(reasons.into_keys().cloned().collect());
    }
    for batch in tags.chunks(MARKED_MAX) {
        if cx.stop.is_cancelled() || !expel_tags(cx, repository, batch, basis).await? {
            return Ok(BTreeSet::new());
        }
    }
    let mut gone = BTreeSet::new();
    for level in levels(&reasons, basis) {
        for batch in level.chunks(MARKED_MAX) {
            let went = expel_manifests(cx, repository, batch, &reasons, basis).await?;
            let all = went.len() == batch.len();
            gone.extend(went);
            if !all || cx.stop.is_cancelled() {
                return Ok(gone);
            }
        }
    }
    Ok(gone)
}

/// Says whether all of them were as they had been, and went.
async fn expel_tags(
    cx: &Context<'_>,
    repository: &str,
    batch: &[(String, String)],
    basis: &Basis,
) -> anyhow::Result<bool> {
    let hold = Hold::open(cx, batch.iter().map(|(tag, _)| mark(repository, tag)).collect()).await?;
    let expel = async |(tag, reason): (String, String)| -> anyhow::Result<bool> {
        let put = cx.storage.tag_put(repository, &tag).await?;
        let digest = cx.storage.whole_tag(repository, &tag).await?;
        let same = digest.clone().zip(put) == basis.tags.get(&tag).cloned();
        #[cfg(test)]
        let same = same || crate::storage::mutant::is(crate::storage::mutant::Mutant::NoSecondDecision);
        let Some(digest) = digest.filter(|_| same) else { return Ok(false) };
        if !cx.window.is_zero() {
            let what = Trashed::Tag { tag: tag.clone(), digest: digest.clone() };
            cx.storage.put_trash(repository, &what).await?;
        }
        hold.delete(&mark(repository, &tag), cx.storage.delete_tag(repository, &tag)).await?;
        cx.record(repository, &tag, &digest);
        cx.report(|report| report.plan.tags.push(named(repository, &tag, &reason)));
        Ok(true)
    };
    let went =
        stream::iter(batch.to_vec()).map(expel).buffer_unordered(AT_ONCE).try_collect::<Vec<bool>>().await;
    hold.close(cx).await;
    Ok(went?.into_iter().all(|went| went))
}

/// A repository's tags, by name: what they lead to, and when they were put.
pub(super) type Tags = BTreeMap<String, (Digest, SystemTime)>;

/// Reads all tags of a repository; of those that are damaged, one error.
pub(super) async fn tags(cx: &Context<'_>, repository: &str) -> Result<(Tags, Option<Error>), Error> {
    let infos = cx.storage.tag_infos(repository).await?;
    let read = async |info: TagInfo| (cx.storage.tag(repository, &info.tag).await, info);
    let mut read = stream::iter(infos).map(read).buffer_unordered(AT_ONCE);
    let (mut tags, mut damaged) = (Tags::new(), None);
    while let Some((digest, info)) = read.next().await {
        match digest {
            Ok(Some(digest)) => drop(tags.insert(info.tag, (digest, info.put))),
            Ok(None) => {}
            Err(error) if error.is_damage() => damaged = Some(error),
            Err(error) => return Err(error),
        }
    }
    Ok((tags, damaged))
}

/// Removes tags whose manifest is gone: a delete that ended between its looks for tags leaves such, if a push of the same
/// manifest ran beside it.
pub(super) async fn expel_dangling(
    cx: &Context<'_>,
    repository: &str,
    dangling: &[String],
) -> anyhow::Result<()> {
    for batch in dangling.chunks(MARKED_MAX) {
        if cx.stop.is_cancelled() {
            break;
        }
        let hold = match cx.dry_run {
            true => None,
            false => Some(Hold::open(cx, batch.iter().map(|tag| mark(repository, tag)).collect()).await?),
        };
        let expel = async |tag: String| -> anyhow::Result<()> {
            // A push puts the manifest before the tag, and looks for the tag behind the marker.
            let Some(digest) = cx.storage.whole_tag(repository, &tag).await? else {
                return Ok(());
            };
            if cx.storage.has_manifest(repository, &digest).await? {
                return Ok(());
            }
            if let Some(hold) = &hold {
                if !cx.window.is_zero() {
                    let what = Trashed::Tag { tag: tag.clone(), digest: digest.clone() };
                    cx.storage.put_trash(repository, &what).await?;
                }
                let deletion = cx.storage.delete_tag(repository, &tag);
                hold.delete(&mark(repository, &tag), deletion).await?;
                cx.record(repository, &tag, &digest);
            }
            let reason = format!("its manifest {digest} is gone");
            cx.report(|report| report.plan.tags.push(named(repository, &tag, &reason)));
            Ok(())
        };
        let expelled =
            stream::iter(batch.to_vec()).map(expel).buffer_unordered(AT_ONCE).try_collect::<()>().await;
        if let Some(hold) = hold {
            hold.close(cx).await;
        }
        expelled?;
    }
    Ok(())
}

async fn expel_manifests(
    cx: &Context<'_>,
    repository: &str,
    batch: &[Digest],
    reasons: &BTreeMap<&Digest, String>,
    basis: &Basis,
) -> anyhow::Result<BTreeSet<Digest>> {
    let hold = Hold::open(cx, batch.iter().cloned().map(Marked::Digest).collect()).await?;
    let outcome = async {
        if changed(cx, repository, reasons, basis).await? {
            return Ok(BTreeSet::new());
        }
        let expel = async |digest: Digest| -> anyhow::Result<Option<Digest>> {
            // Who is putting it again has renewed its link.
            let link = cx.storage.link(repository, &digest).await?;
            let old = link.and_then(|put| cx.age_ms(put)).is_some_and(|age_ms| age_ms >= cx.grace_ms);
            #[cfg(test)]
            let old = old || crate::storage::mutant::is(crate::storage::mutant::Mutant::NoSecondDecision);
            let entry = match cx.storage.manifest_entry(repository, &digest).await {
                Err(error @ Error::Damaged { .. }) => {
                    cx.report(|report| report.problem(format!("{digest} stays in {repository}: {error}")));
                    None
                }
                entry => entry?,
            };
            let Some(entry) = entry.filter(|_| old) else { return Ok(None) };
            if !cx.window.is_zero() {
                let what = Trashed::Manifest { digest: digest.clone(), entry };
                cx.storage.put_trash(repository, &what).await?;
            }
            let marked = Marked::Digest(digest.clone());
            hold.delete(&marked, cx.storage.delete_manifest(repository, &digest)).await?;
            cx.record(repository, digest.as_str(), &digest);
            let reason = reasons.get(&digest).map_or("", String::as_str);
            cx.report(|report| report.plan.manifests.push(named(repository, digest.as_str(), reason)));
            Ok(Some(digest))
        };
        let went = stream::iter(batch.to_vec()).map(expel).buffer_unordered(AT_ONCE);
        went.try_filter_map(async |went| Ok(went)).try_collect().await
    };
    let outcome: anyhow::Result<BTreeSet<Digest>> = outcome.await;
    hold.close(cx).await;
    outcome
}

/// Whether the repository has something new that leads to what should go.
async fn changed(
    cx: &Context<'_>,
    repository: &str,
    reasons: &BTreeMap<&Digest, String>,
    basis: &Basis,
) -> anyhow::Result<bool> {
    #[cfg(test)]
    if crate::storage::mutant::is(crate::storage::mutant::Mutant::NoSecondDecision) {
        return Ok(false);
    }
    for info in cx.storage.manifests(repository).await? {
        let before = basis.manifests.get(&info.digest);
        if reasons.contains_key(&info.digest) {
            if info.pending.is_some() || before.is_none_or(|(_, put)| *put != info.put) {
                return Ok(true);
            }
        } else if before.is_none() {
            let Some(names) = names(cx, repository, &info.digest).await? else { return Ok(true) };
            if names.manifests.iter().any(|digest| reasons.contains_key(digest)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// What goes, in groups: what a manifest names comes in a later group than itself.
fn levels(reasons: &BTreeMap<&Digest, String>, basis: &Basis) -> Vec<Vec<Digest>> {
    let mut level: BTreeMap<&Digest, usize> = reasons.keys().map(|digest| (*digest, 0)).collect();
    for depth in 0..DEPTH_MAX {
        let at: Vec<&Digest> =
            level.iter().filter(|(_, at)| **at == depth).map(|(digest, _)| *digest).collect();
        for digest in at {
            for child in basis.manifests.get(digest).into_iter().flat_map(|(node, _)| &node.children) {
                if let Some(at) = level.get_mut(child) {
                    *at = depth + 1;
                }
            }
        }
    }
    let mut levels = vec![Vec::new(); DEPTH_MAX + 1];
    for (digest, at) in level {
        if let Some(level) = levels.get_mut(at) {
            level.push(digest.clone());
        }
    }
    levels
}

fn mark(repository: &str, tag: &str) -> Marked {
    Marked::Tag { repository: repository.to_owned(), tag: tag.to_owned() }
}

fn named(repository: &str, name: &str, reason: &str) -> Going {
    Going { repository: Some(repository.to_owned()), name: name.to_owned(), reason: reason.to_owned() }
}
