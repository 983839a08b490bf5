//! Takes away links that nothing needs, and content that has no link.
//!
//! Candidates come from what was read before; whether they go is decided again behind their markers.

use std::collections::{BTreeSet, HashSet};

use anyplace_images::Digest;
use anyplace_registry_core::plan::{Going, LinkFacts, LinkFate, judge_link};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::hold::{AT_ONCE, Hold, MARKED_MAX};
use super::run::Context;
use crate::references::{self, Names};
use crate::storage::{Content, Marked, Trashed};

/// Links of one repository that may go.
struct Claim<'a> {
    repository: &'a str,
    /// Not yet decided.
    open: BTreeSet<Digest>,
    /// Needed, as it turned out.
    needed: Vec<Digest>,
    /// Manifests whose names are already out of `open`.
    known: HashSet<Digest>,
    /// A manifest couldn't be read, so nothing goes.
    unclear: bool,
}

/// Removes those of these links that may go, and gives the others back.
pub(super) async fn links(
    cx: &Context<'_>,
    repository: &str,
    candidates: BTreeSet<Digest>,
) -> anyhow::Result<Vec<Digest>> {
    let mut claim =
        Claim { repository, open: candidates, needed: Vec::new(), known: HashSet::new(), unclear: false };
    // The long part, while nobody has to wait.
    claim.learn(cx).await?;
    let mut young = Vec::new();
    while !claim.open.is_empty() && !claim.unclear && !cx.stop.is_cancelled() {
        let batch: BTreeSet<Digest> = claim.open.iter().take(MARKED_MAX).cloned().collect();
        let hold = Hold::open(cx, batch.iter().cloned().map(Marked::Digest).collect()).await?;
        let outcome = remove(cx, &mut claim, &batch, &hold).await;
        hold.close(cx).await;
        young.extend(outcome?);
        claim.open.retain(|digest| !batch.contains(digest));
    }
    cx.report(|report| {
        report.spared.needed += claim.needed.len() as u64;
        report.spared.young += young.len() as u64;
        match claim.unclear {
            true => report.spared.unclear += claim.open.len() as u64,
            // It was stopped.
            false => report.spared.needed += claim.open.len() as u64,
        }
    });
    Ok(claim.needed.into_iter().chain(young).chain(claim.open).collect())
}

/// Behind the markers: looks once more, removes, and gives back what is too young.
async fn remove(
    cx: &Context<'_>,
    claim: &mut Claim<'_>,
    batch: &BTreeSet<Digest>,
    hold: &Hold,
) -> anyhow::Result<Vec<Digest>> {
    claim.learn_again(cx).await?;
    let (repository, unclear) = (claim.repository, claim.unclear);
    let open: Vec<Digest> = batch.iter().filter(|digest| claim.open.contains(digest)).cloned().collect();
    let decide = async |digest: Digest| -> anyhow::Result<(Digest, LinkFate)> {
        let put = cx.storage.link(repository, &digest).await?;
        let Some(put) = put else { return Ok((digest, LinkFate::Goes)) };
        let age_ms = cx.age_ms(put);
        #[cfg(test)]
        let age_ms = match crate::storage::mutant::is(crate::storage::mutant::Mutant::NoSecondLook) {
            true => Some(u64::MAX),
            false => age_ms,
        };
        let fate = judge_link(LinkFacts { age_ms, needed: false, unclear }, cx.grace_ms);
        if fate == LinkFate::Goes {
            hold.delete(&Marked::Digest(digest.clone()), cx.storage.remove_link(repository, &digest)).await?;
            cx.report(|report| report.plan.links.push(going(repository, &digest, fate)));
        }
        Ok((digest, fate))
    };
    let decided: Vec<_> = stream::iter(open).map(decide).buffered(AT_ONCE).try_collect().await?;
    Ok(decided.into_iter().filter(|(_, fate)| *fate != LinkFate::Goes).map(|(digest, _)| digest).collect())
}

impl Claim<'_> {
    async fn learn_again(&mut self, cx: &Context<'_>) -> anyhow::Result<()> {
        #[cfg(test)]
        if crate::storage::mutant::is(crate::storage::mutant::Mutant::NoSecondReading) {
            return Ok(());
        }
        self.learn(cx).await
    }

    /// Reads the manifests that aren't known yet, and takes what they need out of the candidates.
    async fn learn(&mut self, cx: &Context<'_>) -> anyhow::Result<()> {
        // Manifests before the trash: a deletion puts into the trash first. Back from the trash, links are renewed.
        let infos = cx.storage.manifests(self.repository).await?;
        // One that can't be understood brings nothing back, so it keeps nothing.
        let trash = cx.storage.trash(self.repository).await?;
        let mut unknown = BTreeSet::new();
        let trashed = trash.into_iter().filter_map(|item| match item.what {
            Trashed::Manifest { digest, .. } => Some(digest),
            Trashed::Tag { .. } => None,
        });
        for digest in infos.into_iter().map(|info| info.digest).chain(trashed) {
            self.take_out(&digest);
            if !self.known.contains(&digest) {
                unknown.insert(digest);
            }
        }
        let mut read = stream::iter(unknown)
            .map(async |digest| (names(cx, self.repository, &digest).await, digest))
            .buffer_unordered(AT_ONCE);
        let mut found = Vec::new();
        while let Some((names, digest)) = read.next().await {
            match names? {
                Some(names) => found.extend(names.blobs),
                None => self.unclear = true,
            }
            self.known.insert(digest);
        }
        drop(read);
        found.iter().for_each(|digest| self.take_out(digest));
        Ok(())
    }

    fn take_out(&mut self, digest: &Digest) {
        if self.open.remove(digest) {
            self.needed.push(digest.clone());
        }
    }
}

/// What a manifest names; none if it can't be read, which the report then says.
pub(super) async fn names(
    cx: &Context<'_>,
    repository: &str,
    digest: &Digest,
) -> anyhow::Result<Option<Names>> {
    let problem = match cx.storage.read_content(digest).await {
        Ok(Some(bytes)) => match references::names(&bytes) {
            Ok(names) => return Ok(Some(names)),
            Err(reason) => reason,
        },
        Ok(None) => "its content is missing".to_owned(),
        Err(error @ crate::storage::Error::Damaged { .. }) => error.to_string(),
        Err(error) => return Err(error.into()),
    };
    cx.report(|report| {
        report.problem(format!(
            "nothing is collected in {repository}: its manifest {digest} can't be read ({problem}); push it again \
             or delete it"
        ));
    });
    Ok(None)
}

/// Deletes content that has no link.
pub(super) async fn contents(cx: &Context<'_>, candidates: Vec<Content>) -> anyhow::Result<()> {
    for batch in candidates.chunks(MARKED_MAX) {
        if cx.stop.is_cancelled() {
            break;
        }
        let marked = batch.iter().map(|content| Marked::Digest(content.digest.clone())).collect();
        let hold = Hold::open(cx, marked).await?;
        let delete = async |content: Content| -> anyhow::Result<()> {
            let links = cx.storage.links_of(&content.digest).await?;
            #[cfg(test)]
            let links = match crate::storage::mutant::is(crate::storage::mutant::Mutant::NoSecondLinks) {
                true => Vec::new(),
                false => links,
            };
            if links.is_empty() {
                let marked = Marked::Digest(content.digest.clone());
                if hold.delete(&marked, cx.storage.delete_content(&content.digest)).await? {
                    cx.report(|report| condemn(&mut report.plan, &content));
                }
            }
            Ok(())
        };
        let outcome =
            stream::iter(batch.to_vec()).map(delete).buffer_unordered(AT_ONCE).try_collect::<()>().await;
        hold.close(cx).await;
        outcome?;
    }
    Ok(())
}

/// A link's line in the plan.
pub(super) fn going(repository: &str, digest: &Digest, reason: impl ToString) -> Going {
    Going { repository: Some(repository.to_owned()), name: digest.to_string(), reason: reason.to_string() }
}

/// A content's line in the plan.
pub(super) fn condemn(plan: &mut anyplace_registry_core::plan::Plan, content: &Content) {
    plan.bytes += content.size;
    let reason = "no repository has a link to it".to_owned();
    plan.content.push(Going { repository: None, name: content.digest.to_string(), reason });
}
