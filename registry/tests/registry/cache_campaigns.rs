//! Many seeded accidents: flipped bits on disk and on the wire, and kills, each followed by a look at all content.
//!
//! `ANYPLACE_SEED` replays a run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyplace_images::Digest;
use anyplace_seed::rounds;
use axum::body::Bytes;
use futures_util::{StreamExt as _, stream};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use reqwest::Method;

use crate::fake::{Fake, Fault};
use crate::killable::Killable;
use crate::support::{Registry, cache_config, noise};

/// Flips of a bit in a file of the cache, usually and in a whole campaign.
const DISK_FLIPS: (usize, usize) = (7_000, 10_000);
/// Files that are damaged before the cache is started again and asked for everything.
const FLIPS_AT_ONCE: usize = 350;
/// Flips of a bit in a blob on its way from the upstream.
const WIRE_FLIPS: (usize, usize) = (2_500, 8_000);
/// Flips of a bit in a manifest on its way from the upstream.
const MANIFEST_FLIPS: (usize, usize) = (500, 2_000);
/// Kills of a cache's process.
const KILLS: (usize, usize) = (200, 1_000);
/// Requests at once.
const AT_ONCE: usize = 32;

fn seeded() -> StdRng {
    let seed = std::env::var("ANYPLACE_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| rand::rng().random());
    println!("ANYPLACE_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// What an upstream has: paths and what they should give.
fn fill(fake: &Fake, blobs: usize) -> Vec<(String, Bytes)> {
    let mut expected = Vec::new();
    for index in 0..blobs as u64 {
        let bytes = Bytes::from(noise(1_000 + index, 300 + 37 * index as usize));
        expected.push((format!("/v2/app/blobs/{}", fake.put_blob(bytes.clone())), bytes));
    }
    // Some of several pieces, with and without a list; each with a manifest of its own.
    for index in 0..4 {
        let bytes = Bytes::from(noise(9_000 + index, (8 << 20) + 1_000_003));
        let tag = format!("v{index}");
        let digest =
            fake.put_image(&tag, std::slice::from_ref(&bytes), Some(1 << 20).filter(|_| index % 2 == 0));
        let manifest = fake.manifest(&tag);
        expected.push((format!("/v2/app/manifests/{tag}"), manifest.clone()));
        expected.push((format!("/v2/app/manifests/{digest}"), manifest));
        expected.push((format!("/v2/app/blobs/{}", Digest::of(&bytes)), bytes));
    }
    expected
}

/// Asks for everything, and compares.
async fn check(cache: &Arc<Registry>, expected: &[(String, Bytes)]) {
    let asked = stream::iter(expected.to_vec()).map(|(path, bytes)| {
        let cache = cache.clone();
        async move {
            let answer = cache.request(Method::GET, &path).send().await.unwrap();
            assert_eq!(answer.status(), 200, "{path}");
            assert!(answer.bytes().await.unwrap() == bytes, "{path}");
        }
    });
    asked.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await;
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flipped_bit_on_disk_is_caught_and_heals() {
    let mut rng = seeded();
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let expected = fill(&fake, 400);
    let settings = cache_config(dir.path(), &[(&fake.url, dir.path())]);
    let cache = Arc::new(Registry::start_with(settings.clone()).await);
    check(&cache, &expected).await;
    Arc::into_inner(cache).unwrap().stop().await;
    let (mut flipped, flips) = (0, rounds(DISK_FLIPS.0, DISK_FLIPS.1));
    while flipped < flips {
        let mut all = Vec::new();
        files(&dir.path().join("cache/data"), &mut all);
        files(&dir.path().join("cache/records"), &mut all);
        all.sort();
        let mut chosen = BTreeSet::new();
        while chosen.len() < FLIPS_AT_ONCE.min(all.len()).min(flips - flipped) {
            chosen.insert(rng.random_range(0..all.len()));
        }
        let mut blobs = BTreeSet::new();
        for path in chosen.iter().map(|index| &all[*index]) {
            let mut bytes = std::fs::read(path).unwrap();
            let bit = rng.random_range(0..bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            // In place, so that holes stay what they are.
            use std::os::unix::fs::FileExt as _;
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&bytes[bit / 8..=bit / 8], (bit / 8) as u64).unwrap();
            blobs.insert(path.file_name().unwrap().to_owned());
        }
        flipped += chosen.len();
        let cache = Arc::new(Registry::start_with(settings.clone()).await);
        check(&cache, &expected).await;
        let counters = cache.counters.clone().unwrap();
        let caught = counters.disk_corrupt.load(Ordering::Relaxed);
        // Each is caught, but for a blob whose list of pieces is damaged too: it goes as a whole.
        assert!(caught >= blobs.len() as u64, "{caught} of {} were caught", blobs.len());
        Arc::into_inner(cache).unwrap().stop().await;
        // All is healed: once more, nothing is found.
        let cache = Arc::new(Registry::start_with(settings.clone()).await);
        let sent = fake.sent();
        check(&cache, &expected).await;
        let counters = cache.counters.clone().unwrap();
        assert_eq!((counters.disk_corrupt.load(Ordering::Relaxed), fake.sent()), (0, sent));
        Arc::into_inner(cache).unwrap().stop().await;
    }
    println!("{flipped} flips on disk were caught");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flipped_bit_on_the_wire_is_caught_and_asked_for_again() {
    let mut rng = seeded();
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let cache = Arc::new(Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await);
    let (blob_flips, manifest_flips) =
        (rounds(WIRE_FLIPS.0, WIRE_FLIPS.1), rounds(MANIFEST_FLIPS.0, MANIFEST_FLIPS.1));
    let mut expected = Vec::new();
    for index in 0..blob_flips as u64 {
        let bytes = Bytes::from(noise(20_000 + index, 100 + (index as usize * 7) % 3_000));
        expected.push((format!("/v2/app/blobs/{}", fake.put_blob(bytes.clone())), bytes));
    }
    fake.next_of_each((0..blob_flips).map(|_| Fault::Flip(rng.random())));
    check(&cache, &expected).await;
    let counters = cache.counters.clone().unwrap();
    assert_eq!(counters.upstream_corrupt.load(Ordering::Relaxed), blob_flips as u64);
    let mut manifests = Vec::new();
    for index in 0..manifest_flips {
        let tag = format!("t{index}");
        let digest = fake.put_image(&tag, &[Bytes::from(index.to_string())], None);
        manifests.push((format!("/v2/app/manifests/{digest}"), fake.manifest(&tag)));
    }
    fake.next_of_each((0..manifest_flips).map(|_| Fault::Flip(rng.random())));
    check(&cache, &manifests).await;
    let caught = counters.upstream_corrupt.load(Ordering::Relaxed);
    assert_eq!(caught, (blob_flips + manifest_flips) as u64);
    println!("{caught} flips on the wire were caught");
    // What was kept is right.
    let upstream = fake.url.clone();
    drop(fake);
    expected.extend(manifests);
    Arc::into_inner(cache).unwrap().stop().await;
    let cache = Arc::new(Registry::start_with(cache_config(dir.path(), &[(&upstream, dir.path())])).await);
    check(&cache, &expected).await;
    assert_eq!(cache.counters.clone().unwrap().disk_corrupt.load(Ordering::Relaxed), 0);
    Arc::into_inner(cache).unwrap().stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_is_killed_serves_only_right_content_after() {
    let mut rng = seeded();
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let expected = fill(&fake, 60);
    anyplace_service::install_crypto_provider();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut compared = 0;
    // Small, so that pieces go as well as come.
    let settings = format!(
        "[cache]\ntag_ttl_ms = 0\ndisk_budget = '24MiB'\npiece_bytes = '1MiB'\n[[upstreams]]\nurl = '{}'\n",
        fake.url
    );
    let kills = rounds(KILLS.0, KILLS.1);
    for kill in 0..kills {
        let mut child = Killable::start(dir.path(), &settings).await;
        let url = child.url.clone();
        // Nothing of what the last one was fetching is left.
        assert_eq!(std::fs::read_dir(dir.path().join("cache/incoming")).unwrap().count(), 0);
        let credentials = std::fs::read_to_string(dir.path().join("credentials")).unwrap();
        let (user, password) = credentials.trim().split_once(':').unwrap();
        let after = Duration::from_micros(rng.random_range(0..60_000));
        let until = Instant::now() + after;
        let first = rng.random_range(0..expected.len());
        let asked = stream::iter((0..expected.len()).map(|step| {
            let (path, bytes) = &expected[(first + step * 7) % expected.len()];
            let request = http.get(format!("{url}{path}")).basic_auth(user, Some(password));
            async move {
                let answer = request.send().await.ok()?;
                let status = answer.status();
                // What breaks off is an error and never a short answer.
                let found = answer.bytes().await.ok()?;
                assert!(status == 200 && found == *bytes, "{status} {path} in run {kill}");
                Some(())
            }
        }));
        let mut asked = std::pin::pin!(asked.buffer_unordered(8));
        let killing = tokio::time::sleep_until(until.into());
        let mut killing = std::pin::pin!(killing);
        loop {
            tokio::select! {
                answered = asked.next() => match answered {
                    Some(answered) => compared += usize::from(answered.is_some()),
                    None => break,
                },
                () = &mut killing => break,
            }
        }
        child.kill();
        // The upstream's copy of what was asked for is still being sent to nobody; that is no fault.
    }
    println!("{kills} kills, {compared} answers were compared before them");
    let mut child = Killable::start(dir.path(), &settings).await;
    let url = child.url.clone();
    let credentials = std::fs::read_to_string(dir.path().join("credentials")).unwrap();
    let (user, password) = credentials.trim().split_once(':').unwrap();
    for (path, bytes) in &expected {
        let answer = http.get(format!("{url}{path}")).basic_auth(user, Some(password)).send().await.unwrap();
        assert!(answer.status() == 200 && answer.bytes().await.unwrap() == *bytes, "{path}");
    }
    child.kill();
}
