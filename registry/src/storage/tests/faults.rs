//! Uploads on a store that fails: acknowledged bytes survive, uploads go on, nothing leads nowhere.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyplace_images::{Algorithm, Digest};
use anyplace_seed::Seed;
use futures_util::TryStreamExt as _;
use tokio_util::sync::CancellationToken;

use super::super::{ManifestEntry, NewManifest};
use super::{Bed, Opener, Process, noise};
use crate::config::Config;
use crate::gc;
use crate::scrub::{Repair, ScrubOutcome, Scrubber};
use crate::storage::Trashed;

/// Uploads in all; each has some tens of operations on the store.
const UPLOADS: u64 = 120;
/// One operation in so many fails, half of them after they were done.
const ONE_IN: u64 = 12;
/// Tries of one step. With one operation in twelve failing, a step of ten operations fails more often than not.
const TRIES: usize = 500;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_go_on_after_any_fault() {
    for conditional in [true, false] {
        let bed = Bed::memory(conditional);
        let mut seed = Seed::from_env();
        let Opener::Memory(store) = &bed.opener else { panic!("no memory") };
        store.seed(seed.below(u64::MAX));
        let mut process = bed.open().await;
        store.one_in.store(ONE_IN, Ordering::SeqCst);
        let mut kept = Vec::new();
        for upload in 0..UPLOADS / 2 {
            let bytes = noise(seed.below(u64::MAX), seed.below(bed.large() as u64) as usize);
            let digest = Digest::of(&bytes);
            push(&bed, &mut process, &mut seed, &bytes, &digest).await;
            if upload % 10 == 0 {
                let manifest = format!("{{\"blob\":\"{digest}\"}}").into_bytes();
                kept.push((put_manifest(&process, &manifest, &digest).await, digest, bytes));
            }
        }
        store.one_in.store(0, Ordering::SeqCst);
        assert!(store.faults.load(Ordering::SeqCst) > UPLOADS, "hardly any faults");
        // Every link leads to content that is whole, after a sweep of all that nothing leads to. What is older than
        // no time at all is a millisecond old at least; a last finish may have left its upload just now.
        tokio::time::sleep(Duration::from_millis(5)).await;
        process.storage.sweep(Duration::ZERO, Duration::ZERO).await.unwrap();
        let mut links = process.storage.links();
        while let Some(link) = links.try_next().await.unwrap() {
            let bytes = process.read(&link.digest, None).await;
            assert_eq!(Digest::of(&bytes), link.digest);
        }
        for (manifest, blob, bytes) in kept {
            assert!(process.storage.manifest("a/b", &manifest).await.unwrap().is_some());
            assert_eq!(process.read(&blob, None).await, bytes);
        }
        for prefix in ["uploads", "parts", "gc/deleting"] {
            assert_eq!(process.storage.listed(prefix).await.unwrap().len(), 0, "{prefix}");
        }
    }
}

/// Pushes as a client does that goes on where the registry says it is, with a new process now and then.
async fn push(bed: &Bed, process: &mut Process, seed: &mut Seed, bytes: &[u8], digest: &Digest) {
    let mut acknowledged = 0;
    let id = tries(async || process.uploads.start("a/b", Algorithm::Sha256).await.ok()).await;
    while acknowledged < bytes.len() as u64 {
        if seed.below(5) == 0 {
            *process = tries(async || bed.try_open().await.ok()).await;
        }
        let at = tries(async || Some(process.uploads.resume("a/b", &id).await.ok()?.size())).await;
        assert!(at >= acknowledged, "{acknowledged} bytes were acknowledged, {at} are there");
        let left = bytes.len() as u64 - at;
        if left == 0 {
            break;
        }
        let len = 1 + seed.below(left);
        if let Ok(now) = process.append(&id, &bytes[at as usize..(at + len) as usize]).await {
            assert_eq!(now, at + len);
            acknowledged = now;
        }
    }
    for _ in 0..TRIES {
        match process.finish(&id, digest).await {
            Ok(()) => return,
            // A finish whose answer was lost: the upload is over, and the content there.
            Err(_) => {
                if let Ok(Some(size)) = process.storage.blob_size("a/b", digest).await {
                    assert_eq!(size, bytes.len() as u64);
                    return;
                }
            }
        }
    }
    panic!("an upload can't be finished");
}

async fn put_manifest(process: &Process, bytes: &[u8], blob: &Digest) -> Digest {
    let digest = Digest::of(bytes);
    let entry = ManifestEntry {
        media_type: "a/b".to_owned(),
        size: bytes.len() as u64,
        subject: None,
        artifact_type: None,
        annotations: Default::default(),
    };
    let new =
        NewManifest { entry, bytes: bytes.to_vec().into(), blobs: vec![blob.clone()], manifests: Vec::new() };
    let missing = tries(async || process.storage.put_manifest("a/b", &digest, new.clone()).await.ok()).await;
    assert!(missing.is_empty(), "{missing:?}");
    digest
}

async fn tries<T>(step: impl AsyncFn() -> Option<T>) -> T {
    for _ in 0..TRIES {
        if let Some(done) = step().await {
            return done;
        }
    }
    panic!("{TRIES} tries failed")
}

#[tokio::test]
async fn a_store_that_is_down_is_an_error_and_loses_nothing() {
    let bed = Bed::memory(true);
    let Opener::Memory(store) = &bed.opener else { panic!("no memory") };
    let process = bed.open().await;
    let bytes = noise(9, bed.large());
    let id = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    process.append(&id, &bytes[..1000]).await.unwrap();
    store.down.store(true, Ordering::SeqCst);
    let refusal = process.append(&id, &bytes[1000..]).await.unwrap_err();
    assert!(format!("{refusal:?}").contains("the registry's storage can't"), "{refusal:?}");
    assert!(bed.try_open().await.is_err());
    store.down.store(false, Ordering::SeqCst);
    process.append(&id, &bytes[1000..]).await.unwrap();
    process.finish(&id, &Digest::of(&bytes)).await.unwrap();
    assert_eq!(process.read(&Digest::of(&bytes), None).await, bytes);
}

/// The clock stands still while anything can go on, so all reads that are begun at once are seen at once.
#[tokio::test(start_paused = true)]
async fn tags_of_a_manifest_that_goes_are_read_several_at_once() {
    let bed = Bed::memory(true);
    let Opener::Memory(store) = &bed.opener else { panic!("no memory") };
    let process = bed.open().await;
    let blob = Digest::of(b"blob");
    process.storage.put_link("a/b", &blob).await.unwrap();
    process.storage.put_content(&blob, b"blob".as_slice().into()).await.unwrap();
    let goes = put_manifest(&process, b"goes", &blob).await;
    let stays = put_manifest(&process, b"stays", &blob).await;
    for number in 0..100 {
        let digest = if number % 2 == 0 { &goes } else { &stays };
        process.storage.put_tag("a/b", &format!("v{number}"), digest).await.unwrap();
    }
    store.slow.store(true, Ordering::SeqCst);
    let removed = gc::delete_manifest(&process.storage, "a/b", &goes, Duration::from_secs(60)).await;
    assert_eq!(removed.unwrap().unwrap().len(), 50);
    assert_eq!(store.reading_max.load(Ordering::SeqCst), 16);
    let left = process.storage.tags("a/b").await.unwrap();
    assert_eq!(left.len(), 50);
    for tag in left {
        assert_eq!(process.storage.tag("a/b", &tag).await.unwrap().as_ref(), Some(&stays));
    }
    let trash = process.storage.trash("a/b").await.unwrap();
    let tags = trash.iter().filter(|item| matches!(item.what, Trashed::Tag { .. })).count();
    assert_eq!((trash.len(), tags), (51, 50));
}

#[tokio::test(start_paused = true)]
async fn a_scrub_puts_right_what_the_disk_lost() {
    let bed = Bed::memory(true);
    let Opener::Memory(store) = &bed.opener else { panic!("no memory") };
    let (process, digest) = (bed.open().await, Digest::of(b"blob"));
    process.storage.put_link("a/b", &digest).await.unwrap();
    process.storage.put_content(&digest, b"blob".as_slice().into()).await.unwrap();
    store.lost.store(true, Ordering::SeqCst);
    let (storage, disk) = (process.storage.clone(), store.clone());
    let repair: Repair = Box::new(move |_, digest| {
        let (storage, disk) = (storage.clone(), disk.clone());
        Box::pin(async move {
            disk.lost.store(false, Ordering::SeqCst);
            storage.put_content(&digest, b"blob".as_slice().into()).await.is_ok()
        })
    });
    let (config, stop) = (Config::new("unused"), CancellationToken::new());
    let scrubber = Arc::new(Scrubber::new(process.storage.clone(), &config, Some(repair), stop));
    scrubber.start().await.unwrap().unwrap();
    scrubber.ended().await;
    let report = scrubber.status().await.unwrap().last.unwrap();
    let outcomes: Vec<_> = report.wrong.named.iter().map(|finding| finding.outcome).collect();
    assert_eq!((outcomes, &report.problems), (vec![ScrubOutcome::Repaired], &Vec::new()), "{report:?}");
    assert_eq!(process.read(&digest, None).await, b"blob");
}
