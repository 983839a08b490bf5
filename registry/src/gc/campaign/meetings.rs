//! Meetings that the seeds of the campaign hardly ever bring about, arranged turn by turn.

use super::*;

/// Stops a collector's process at this turn, for longer than its markers count, while another process cleans up and a
/// client pushes what was about to be deleted. Says whether that is lost; none if the collector had ended by then.
async fn stopped_at(turn: u32) -> Option<bool> {
    let store = Stepped::new();
    let (stopped, other) = (process(&store, false).await, process(&store, false).await);
    let digest = Digest::of(b"late");
    for content in [&b"late"[..], b"other"] {
        stopped.storage.put_content(&Digest::of(content), content.into()).await.unwrap();
        stopped.storage.put_link("a", &Digest::of(content)).await.unwrap();
    }
    store.pass(2 * DAY).await;
    store.set_calm(false);
    let mut collection = std::pin::pin!(stopped.collector.collect(false));
    for _ in 0..turn {
        if futures_util::poll!(collection.as_mut()).is_ready() {
            return None;
        }
    }
    store.set_calm(true);
    store.pass(SETTLED).await;
    super::super::hold::remove_stale(&other.storage).await.unwrap();
    if other.storage.put_link("a", &digest).await.unwrap() == Linked::Gone {
        other.storage.put_content(&digest, Bytes::from_static(b"late")).await.unwrap();
    }
    store.set_calm(false);
    let _ = collection.await;
    store.set_calm(true);
    Some(other.storage.blob_size("a", &digest).await.unwrap().is_none())
}

#[test]
fn a_collector_that_was_stopped_deletes_nothing_behind_a_marker_that_is_gone() {
    let lost = |mutant| {
        mutant::set(mutant);
        let at = |turn| paused().block_on(stopped_at(turn));
        let outcomes: Vec<bool> = (1..).map_while(at).collect();
        mutant::set(None);
        assert!(outcomes.len() > 50, "{}", outcomes.len());
        outcomes.into_iter().filter(|lost| *lost).count()
    };
    assert_eq!(lost(None), 0);
    assert!(lost(Some(Mutant::NoDeadline)) > 0, "the test doesn't show what the deadline is for");
}

/// Sets the store's clock back by ten years at this turn of a collection, and pushes what it is about to delete. Says
/// whether that is lost; none if the collection had ended by then.
async fn set_back_at(turn: u32) -> Option<bool> {
    let store = Stepped::new();
    let (collecting, other) = (process(&store, false).await, process(&store, false).await);
    let digest = Digest::of(b"late");
    for content in [&b"late"[..], b"other"] {
        other.storage.put_content(&Digest::of(content), content.into()).await.unwrap();
        other.storage.put_link("a", &Digest::of(content)).await.unwrap();
    }
    store.pass(2 * DAY).await;
    store.set_calm(false);
    let mut collection = std::pin::pin!(collecting.collector.collect(false));
    for _ in 0..turn {
        if futures_util::poll!(collection.as_mut()).is_ready() {
            return None;
        }
    }
    store.set_calm(true);
    store.set_clock(-10 * 365 * DAY.as_millis() as i64);
    other.storage.now().await.unwrap();
    let acknowledged = match other.storage.put_link("a", &digest).await {
        Ok(Linked::Gone) => other.storage.put_content(&digest, Bytes::from_static(b"late")).await.is_ok(),
        // A marker was there for too long.
        linked => linked.is_ok(),
    };
    store.set_calm(false);
    let _ = collection.await;
    store.set_calm(true);
    Some(acknowledged && other.storage.blob_size("a", &digest).await.unwrap().is_none())
}

#[test]
fn a_push_under_a_clock_that_was_set_back_is_not_old() {
    let lost = |mutant| {
        mutant::set(mutant);
        let outcomes: Vec<bool> = (1..).map_while(|turn| paused().block_on(set_back_at(turn))).collect();
        mutant::set(None);
        assert!(outcomes.len() > 50, "{}", outcomes.len());
        outcomes.into_iter().filter(|lost| *lost).count()
    };
    assert_eq!(lost(None), 0);
    assert!(lost(Some(Mutant::NoLookAtClock)) > 0, "the test doesn't show what the look is for");
}

/// A push of a manifest that is there, and a delete of it, in an order of this seed: whether a tag leads nowhere.
async fn push_beside_a_delete(seed: u64) -> bool {
    let (store, dice) = (Stepped::new(), Dice::new(seed));
    let storage = process(&store, false).await.storage;
    let json = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#;
    let (bytes, digest) = (Bytes::from_static(json.as_bytes()), Digest::of(json.as_bytes()));
    let manifest = NewManifest::of(references::read(None, &bytes).unwrap(), bytes);
    storage.put_tagged_manifest("a", &digest, manifest.clone(), &["old"]).await.unwrap();
    let mut runner = Runner::new(store, dice);
    let (pusher, deleter, which) = (storage.clone(), storage.clone(), digest.clone());
    let push = async move {
        assert!(pusher.put_tagged_manifest("a", &which, manifest, &["new"]).await.unwrap().is_empty());
    };
    let which = digest.clone();
    let delete = async move {
        super::super::delete_manifest(&deleter, "a", &which, Duration::ZERO).await.unwrap();
    };
    runner.add(false, push, || {});
    runner.add(false, delete, || {});
    runner.run(false).await;
    let tags = storage.tags("a").await.unwrap();
    !tags.is_empty() && !storage.has_manifest("a", &digest).await.unwrap()
}

#[test]
fn a_push_beside_a_delete_leaves_no_tag_that_leads_nowhere() {
    let dangling = |mutant| {
        mutant::set(mutant);
        let seeds = (0..1_000_u64).filter(|seed| paused().block_on(push_beside_a_delete(*seed)));
        let count = seeds.count();
        mutant::set(None);
        count
    };
    assert_eq!(dangling(None), 0);
    for mutant in [Mutant::NoLookAfterTags, Mutant::NoSecondTags] {
        assert!(dangling(Some(mutant)) > 0, "the test doesn't show what {mutant:?} leaves out");
    }
}

/// A delete that a crash ends after `end` turns, with a push of the same manifest after `begin` of them: whether a tag leads
/// nowhere then, and whether one does after a collection. None if the delete had ended by then.
async fn crash_of_a_delete_at(begin: u32, end: u32) -> Option<(bool, bool)> {
    let store = Stepped::new();
    let (deleting, other) = (process(&store, false).await, process(&store, false).await);
    let json = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#;
    let (bytes, digest) = (Bytes::from_static(json.as_bytes()), Digest::of(json.as_bytes()));
    let manifest = NewManifest::of(references::read(None, &bytes).unwrap(), bytes);
    other.storage.put_tagged_manifest("a", &digest, manifest.clone(), &["old"]).await.unwrap();
    {
        let deletion = super::super::delete_manifest(&deleting.storage, "a", &digest, WINDOW);
        let mut deletion = std::pin::pin!(deletion);
        for turn in 0..end {
            if turn == begin {
                other.storage.put_tagged_manifest("a", &digest, manifest.clone(), &["new"]).await.unwrap();
            }
            store.set_calm(false);
            if futures_util::poll!(deletion.as_mut()).is_ready() {
                return None;
            }
            store.set_calm(true);
        }
    }
    let dangles = async || {
        let tags = other.storage.tags("a").await.unwrap();
        !tags.is_empty() && !other.storage.has_manifest("a", &digest).await.unwrap()
    };
    let before = dangles().await;
    let report = other.collector.collect(false).await.unwrap();
    assert_eq!((report.phase, report.plan.tags.count), (GcPhase::Done, u64::from(before)), "{report:?}");
    let after = dangles().await;
    if before {
        // The tag was to go into the trash with its manifest, and comes back with it.
        super::super::undelete(&other.storage, "a", super::super::Named::Tag("new")).await.unwrap();
        assert!(other.storage.has_manifest("a", &digest).await.unwrap());
    }
    Some((before, after))
}

#[test]
fn a_delete_that_ends_in_the_middle_leaves_no_tag_that_leads_nowhere() {
    let at = |begin, end| paused().block_on(crash_of_a_delete_at(begin, end));
    let outcomes =
        (0..).map_while(|begin| Some((begin, at(begin, begin + 1)?))).flat_map(|(begin, first)| {
            std::iter::once(first).chain((begin + 2..).map_while(move |end| at(begin, end)))
        });
    let outcomes: Vec<_> = outcomes.collect();
    assert!(outcomes.iter().any(|(before, _)| *before), "no such tag in {} crashes", outcomes.len());
    assert!(outcomes.iter().all(|(_, after)| !after), "{outcomes:?}");
}
