//! What uploads have to do on every store.

use std::time::Duration;

use anyplace_images::{Algorithm, Digest};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use super::{Bed, noise};

pub(super) async fn chunks_in_turn_of_two_processes(bed: &Bed) {
    let bytes = noise(2, bed.large());
    for algorithm in Algorithm::ALL {
        let processes = [bed.open().await, bed.open().await];
        // Hashed by one algorithm, finished by both.
        let id = processes[0].uploads.start("a/b", Algorithm::Sha256).await.unwrap();
        let cuts = [0, 10, 20, bed.part_bytes + 7, bed.part_bytes + 8, bytes.len() - 3, bytes.len()];
        for (turn, cut) in cuts.windows(2).enumerate() {
            let process = &processes[turn % 2];
            let session = process.uploads.resume("a/b", &id).await.unwrap();
            assert_eq!(session.size(), cut[0] as u64);
            drop(session);
            assert_eq!(process.append(&id, &bytes[cut[0]..cut[1]]).await.unwrap(), cut[1] as u64);
        }
        let digest = algorithm.digest(&bytes);
        // Not in another repository.
        assert!(processes[0].uploads.resume("a", &id).await.is_err());
        processes[1].finish(&id, &digest).await.unwrap();
        assert!(processes[0].uploads.resume("a/b", &id).await.is_err());
        assert_eq!(processes[0].storage.blob_size("a/b", &digest).await.unwrap(), Some(bytes.len() as u64));
        assert_eq!(processes[0].read(&digest, None).await, bytes);
        let part = bed.part_bytes as u64;
        for range in [0..1, 5..15, part - 5..part + 20, part * 4 + 12_000..bytes.len() as u64] {
            let expected = &bytes[range.start as usize..range.end as usize];
            assert_eq!(processes[1].read(&digest, Some(range)).await, expected);
        }
    }
    assert_eq!(bed.open().await.storage.listed("uploads").await.unwrap().len(), 0);
}

pub(super) async fn small_uploads(bed: &Bed) {
    let process = bed.open().await;
    for size in [0, 1, 1_000, bed.part_bytes - 1, bed.part_bytes, bed.part_bytes + 1] {
        let bytes = noise(3 + size as u64, size);
        let digest = Digest::of(&bytes);
        for round in 0..2 {
            let session = process.uploads.start_whole(Algorithm::Sha256).await.unwrap();
            let chunks = bytes.chunks(30_000).map(|chunk| Ok::<_, String>(Bytes::copy_from_slice(chunk)));
            let body = stream::iter(chunks.collect::<Vec<_>>());
            let declared = (round == 0).then_some(size as u64);
            let session = process.uploads.append(session, body, declared).await.unwrap();
            assert_eq!(session.size(), size as u64);
            process.uploads.finish(session, "a/b", &digest).await.unwrap();
            assert_eq!(process.storage.blob_size("a/b", &digest).await.unwrap(), Some(size as u64));
            if size > 0 {
                assert_eq!(process.read(&digest, None).await, bytes);
            }
        }
    }
    // No upload is left, and no object of the first rounds, which the second ones replaced, after a sweep.
    assert_eq!(process.storage.listed("uploads").await.unwrap().len(), 0);
    let limit = if bed.is_folder() { 0 } else { 2 };
    for tries in 0.. {
        process.storage.sweep(Duration::from_secs(3600), Duration::ZERO).await.unwrap();
        let left = process.storage.listed("data").await.unwrap().len();
        if left == limit {
            break;
        }
        assert!(tries < 500, "{left} objects, expected {limit}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(super) async fn more_objects_than_content_may_have(bed: &Bed) {
    if bed.is_folder() {
        return;
    }
    let process = bed.open_for(3).await.unwrap();
    let bytes = noise(6, bed.part_bytes * 3);
    let id = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    for part in bytes.chunks(bed.part_bytes) {
        process.append(&id, part).await.unwrap();
    }
    let refused = process.append(&id, b"more").await.unwrap_err();
    assert!(format!("{refused:?}").contains("send longer ones"), "{refused:?}");
    // What was acknowledged is there, and can be finished.
    let digest = Digest::of(&bytes);
    process.finish(&id, &digest).await.unwrap();
    assert_eq!(process.read(&digest, None).await, bytes);
}

pub(super) async fn wrong_and_cancelled_uploads(bed: &Bed) {
    let process = bed.open().await;
    let (bytes, wrong) = (noise(4, 100_000), Digest::of(b"something else"));
    let id = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    process.append(&id, &bytes).await.unwrap();
    assert!(process.finish(&id, &wrong).await.is_err());
    assert!(process.uploads.resume("a/b", &id).await.is_err());
    assert_eq!(process.storage.content_size(&wrong).await.unwrap(), None);
    assert_eq!(process.storage.content_size(&Digest::of(&bytes)).await.unwrap(), None);
    let id = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    process.append(&id, &bytes).await.unwrap();
    let session = process.uploads.resume("a/b", &id).await.unwrap();
    process.uploads.discard(session).await;
    assert!(process.uploads.resume("a/b", &id).await.is_err());
    for bad in ["", "x", &"0".repeat(48), &id[..47], "../../../../../../../../../../../../etc/passwd0000"] {
        assert!(process.uploads.resume("a/b", bad).await.is_err());
    }
    // Nobody can go on with this one, so nothing is left of it.
    let session = process.uploads.start_whole(Algorithm::Sha256).await.unwrap();
    let body = stream::iter([Ok(Bytes::from_static(b"half")), Err("gone")]);
    assert!(process.uploads.append(session, body, Some(8)).await.is_err());
    for tries in 0.. {
        if process.storage.listed("uploads").await.unwrap().is_empty() {
            break;
        }
        assert!(tries < 500, "an upload is left");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(super) async fn one_of_two_writers_wins(bed: &Bed) {
    let bytes = noise(5, 200_000);
    let processes = [bed.open().await, bed.open().await];
    let id = processes[0].uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    if bed.is_folder() {
        // In a folder there is a lock, and the second waits for the first.
        let first = processes[0].uploads.resume("a/b", &id).await.unwrap();
        let second = processes[1].uploads.resume("a/b", &id);
        let waited = tokio::time::timeout(Duration::from_millis(100), second).await;
        assert!(waited.is_err());
        drop(first);
        assert_eq!(processes[1].append(&id, &bytes).await.unwrap(), 200_000);
    } else {
        let body = |bytes: &[u8]| stream::iter([Ok::<_, String>(Bytes::copy_from_slice(bytes))]);
        let first = processes[0].uploads.resume("a/b", &id).await.unwrap();
        let second = processes[1].uploads.resume("a/b", &id).await.unwrap();
        processes[1].uploads.append(second, body(&bytes), None).await.unwrap();
        let lost = processes[0].uploads.append(first, body(&bytes[..10]), None).await;
        assert!(format!("{:?}", lost.err().unwrap()).contains("another request is writing"));
        assert_eq!(processes[0].uploads.resume("a/b", &id).await.unwrap().size(), 200_000);
    }
    processes[0].finish(&id, &Digest::of(&bytes)).await.unwrap();
}

pub(super) async fn clients_that_go_away(bed: &Bed) {
    let process = bed.open().await;
    let bytes = noise(6, bed.part_bytes + 100_000);
    let id = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    // The body breaks off.
    let session = process.uploads.resume("a/b", &id).await.unwrap();
    let body = stream::iter([Ok(Bytes::copy_from_slice(&bytes[..50_000])), Err("gone")]);
    assert!(process.uploads.append(session, body, Some(bytes.len() as u64)).await.is_err());
    assert_eq!(process.uploads.resume("a/b", &id).await.unwrap().size(), 50_000);
    // The request is dropped: what it had is acknowledged all the same.
    let session = process.uploads.resume("a/b", &id).await.unwrap();
    let rest = stream::iter([Ok::<_, String>(Bytes::copy_from_slice(&bytes[50_000..]))]);
    let body = rest.chain(stream::pending());
    let appending = process.uploads.append(session, body, None);
    assert!(tokio::time::timeout(Duration::from_millis(300), appending).await.is_err());
    for tries in 0.. {
        let size = process.uploads.resume("a/b", &id).await.unwrap().size();
        if size == bytes.len() as u64 {
            break;
        }
        // It may have been cut off before it handed all on.
        if size == 50_000 && tries > 200 {
            process.append(&id, &bytes[50_000..]).await.unwrap();
        }
        assert!(tries < 1_000, "{size}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    process.finish(&id, &Digest::of(&bytes)).await.unwrap();
    assert_eq!(process.read(&Digest::of(&bytes), None).await, bytes);
}

pub(super) async fn sweeps_take_only_what_is_nobodys(bed: &Bed) {
    let process = bed.open().await;
    let bytes = noise(7, bed.large());
    let digest = Digest::of(&bytes);
    let id = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    process.append(&id, &bytes).await.unwrap();
    process.finish(&id, &digest).await.unwrap();
    let open = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    process.append(&open, &bytes).await.unwrap();
    let cancelled = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    process.append(&cancelled, &bytes).await.unwrap();
    let session = process.uploads.resume("a/b", &cancelled).await.unwrap();
    process.uploads.discard(session).await;
    // Stores that count in seconds call what is younger than one of no age.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let day = Duration::from_secs(24 * 3600);
    assert_eq!(process.storage.sweep(day, day).await.unwrap().objects, 0);
    let swept = process.storage.sweep(day, Duration::ZERO).await.unwrap();
    let expected = if bed.is_folder() { 0 } else { bytes.len() as u64 };
    assert_eq!((swept.uploads, swept.bytes), (0, expected));
    assert_eq!(process.read(&digest, None).await, bytes);
    assert_eq!(process.uploads.resume("a/b", &open).await.unwrap().size(), bytes.len() as u64);
    process.finish(&open, &Algorithm::Sha512.digest(&bytes)).await.unwrap();
    // What is deleted is swept later, where content is not files.
    process.storage.delete_content(&digest).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let swept = process.storage.sweep(day, Duration::ZERO).await.unwrap();
    assert_eq!(swept.bytes, expected);
    assert_eq!(process.read(&Algorithm::Sha512.digest(&bytes), None).await, bytes);
    // An upload that nobody went on with.
    if !bed.is_folder() {
        let left = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
        process.append(&left, &bytes).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        let swept = process.storage.sweep(Duration::ZERO, Duration::ZERO).await.unwrap();
        assert_eq!((swept.uploads, swept.bytes), (1, expected));
        assert!(process.uploads.resume("a/b", &left).await.is_err());
    }
}
