//! Pieces: what a range costs, what many machines cost, what goes and what stays.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyplace_images::Digest;
use axum::body::Bytes;
use reqwest::Method;

use crate::fake::{Fake, Fault, list};
use crate::support::{Registry, cache_config, code, noise};

const MIB: usize = 1 << 20;

fn config(dir: &std::path::Path, upstreams: &[&str]) -> anyplace_registry::Config {
    let upstreams: Vec<_> = upstreams.iter().map(|url| (*url, dir)).collect();
    cache_config(dir, &upstreams)
}

async fn get(cache: &Registry, path: &str, range: Option<(usize, usize)>) -> reqwest::Response {
    let mut request = cache.request(Method::GET, path);
    if let Some((first, last)) = range {
        request = request.header("range", format!("bytes={first}-{last}"));
    }
    request.send().await.unwrap()
}

async fn fetch(cache: &Registry, path: &str, range: Option<(usize, usize)>) -> Bytes {
    let answer = get(cache, path, range).await;
    assert_eq!(answer.status(), if range.is_some() { 206 } else { 200 }, "{path}");
    answer.bytes().await.unwrap()
}

fn blob(repository: &str, digest: &Digest) -> String {
    format!("/v2/{repository}/blobs/{digest}")
}

/// Bytes that a folder takes on disk.
fn on_disk(folder: &std::path::Path) -> u64 {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        sum += match meta.is_dir() {
            true => on_disk(&entry.path()),
            false => std::os::unix::fs::MetadataExt::blocks(&meta) * 512,
        };
    }
    sum
}

#[tokio::test]
async fn a_range_costs_its_pieces_only() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let layer = Bytes::from(noise(21, 20 * MIB + 77));
    fake.put_image("v1", std::slice::from_ref(&layer), Some(MIB));
    let cache = Registry::start_with(config(dir.path(), &[&fake.url])).await;
    fetch(&cache, "/v2/app/manifests/v1", None).await;
    let path = blob("app", &Digest::of(&layer));
    for (first, last) in [(5 * MIB + 10, 5 * MIB + 20), (5 * MIB, 6 * MIB - 1), (5 * MIB + 1, 6 * MIB - 2)] {
        assert_eq!(fetch(&cache, &path, Some((first, last))).await, layer[first..=last]);
    }
    assert_eq!(fake.sent(), MIB as u64);
    // Across a border, and the short piece at the end.
    for (first, last) in [(7 * MIB - 1, 7 * MIB), (20 * MIB, 20 * MIB + 76)] {
        assert_eq!(fetch(&cache, &path, Some((first, last))).await, layer[first..=last]);
    }
    assert_eq!(fake.sent(), 3 * MIB as u64 + 77);
    assert_eq!(fetch(&cache, &path, None).await, layer);
    assert_eq!(fake.sent(), layer.len() as u64);
    assert_eq!(fetch(&cache, &path, None).await, layer);
    assert_eq!(fake.sent(), layer.len() as u64);
    let counters = cache.counters.clone().unwrap();
    assert_eq!(counters.misses.load(Ordering::Relaxed), 21);
    assert!(counters.memory_hits.load(Ordering::Relaxed) >= 20);
    // After a restart, without the upstream, from disk.
    drop(fake);
    cache.stop().await;
    let cache = Registry::start_with(config(dir.path(), &["http://127.0.0.1:9"])).await;
    fetch(&cache, "/v2/app/manifests/v1", None).await;
    assert_eq!(fetch(&cache, &path, None).await, layer);
    let counters = cache.counters.clone().unwrap();
    assert_eq!(counters.disk_hits.load(Ordering::Relaxed), 21);
    assert_eq!(counters.stale_tags.load(Ordering::Relaxed), 1);
    cache.stop().await;
}

#[tokio::test]
async fn a_blob_without_a_list_is_fetched_whole_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let layer = Bytes::from(noise(22, 11 * MIB + 5));
    let digest = fake.put_blob(layer.clone());
    let mut settings = config(dir.path(), &[&fake.url]);
    settings.cache.piece_bytes = "1MiB".parse().unwrap();
    let cache = Arc::new(Registry::start_with(settings.clone()).await);
    let path = blob("app", &digest);
    let asked: Vec<_> = (0..8)
        .map(|index| {
            let (cache, path, layer) = (cache.clone(), path.clone(), layer.clone());
            tokio::spawn(async move {
                let (first, last) = (index * MIB + 3, index * MIB + 2_000_000);
                assert_eq!(fetch(&cache, &path, Some((first, last))).await, layer[first..=last]);
            })
        })
        .collect();
    for asked in asked {
        asked.await.unwrap();
    }
    assert_eq!((fake.sent(), fake.blob_requests()), (layer.len() as u64, 12));
    let counters = cache.counters.clone().unwrap();
    assert_eq!(counters.whole_fetches.load(Ordering::Relaxed), 1);
    // That the repository has it is remembered too.
    drop(fake);
    Arc::into_inner(cache).unwrap().stop().await;
    settings.upstreams[0].url = "http://127.0.0.1:9".to_owned();
    let cache = Registry::start_with(settings).await;
    assert_eq!(fetch(&cache, &path, None).await, layer);
    let other = get(&cache, &blob("other", &digest), None).await;
    assert_eq!(other.status(), 503);
    cache.stop().await;
}

#[tokio::test]
async fn a_hundred_machines_cost_the_origin_one() {
    const MACHINES: usize = 100;
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let layers = [noise(31, 9 * MIB), noise(32, 8 * MIB + 1), noise(33, 300_000)].map(Bytes::from);
    let size: usize = layers.iter().map(Bytes::len).sum();
    // One layer with a list, one without, one small.
    let lists = [Some(list(&layers[0], MIB)), None, None];
    fake.put_image_with("v1", &layers, &lists);
    // Two tiers: the machines ask their location, that asks the region, that the origin.
    let (region, location) = (dir.path().join("region"), dir.path().join("location"));
    let mut settings = config(&region, &[&fake.url]);
    settings.cache.tag_ttl_ms = 60_000;
    let region = Registry::start_with(settings).await;
    let mut settings = cache_config(&location, &[(&region.url(), &region.dir)]);
    settings.cache.tag_ttl_ms = 60_000;
    let location = Arc::new(Registry::start_with(settings).await);
    let machines: Vec<_> = (0..MACHINES)
        .map(|machine| {
            let (location, layers) = (location.clone(), layers.clone());
            tokio::spawn(async move {
                fetch(&location, "/v2/app/manifests/v1", None).await;
                // Not all take all, so that the test moves half a gigabyte less.
                let skipped = if machine % 4 < 2 { None } else { Some(1) };
                for (_, layer) in layers.iter().enumerate().filter(|(index, _)| Some(*index) != skipped) {
                    let path = blob("app", &Digest::of(layer));
                    if machine % 2 == 0 {
                        assert_eq!(fetch(&location, &path, None).await, layer);
                    } else {
                        // As our own client does: several ranges.
                        let half = layer.len() / 2;
                        assert_eq!(
                            fetch(&location, &path, Some((half, layer.len() - 1))).await,
                            layer[half..]
                        );
                        assert_eq!(fetch(&location, &path, Some((0, half - 1))).await, layer[..half]);
                    }
                }
            })
        })
        .collect();
    for machine in machines {
        machine.await.unwrap();
    }
    let (egress, ratio) = (fake.sent(), fake.sent() as f64 / size as f64);
    assert!(ratio <= 1.05, "the origin sent {egress} bytes of an image of {size}: {ratio:.3}");
    assert_eq!(fake.content.manifest_requests.load(Ordering::SeqCst), 1);
    Arc::into_inner(location).unwrap().stop().await;
    region.stop().await;
}

#[tokio::test]
async fn a_wrong_list_costs_time_and_not_content() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let layer = Bytes::from(noise(41, 10 * MIB));
    let other = noise(42, 10 * MIB);
    // Another repository's manifest says wrong pieces of the same blob; a third one a wrong size.
    fake.put_image_with("evil", std::slice::from_ref(&layer), &[Some(list(&other, MIB))]);
    let digest = Digest::of(&layer);
    let cache = Registry::start_with(config(dir.path(), &[&fake.url])).await;
    fetch(&cache, "/v2/evil/manifests/evil", None).await;
    assert_eq!(fetch(&cache, &blob("evil", &digest), Some((100, 200))).await, layer[100..=200]);
    let counters = cache.counters.clone().unwrap();
    assert_eq!(counters.whole_fetches.load(Ordering::Relaxed), 1);
    fake.put_image("good", std::slice::from_ref(&layer), Some(MIB));
    fetch(&cache, "/v2/good/manifests/good", None).await;
    let sent = fake.sent();
    assert_eq!(fetch(&cache, &blob("good", &digest), None).await, layer);
    assert_eq!(fake.sent(), sent);
    // Lists that can't be are not taken at all.
    let layers = [noise(43, 9 * MIB), noise(44, 9 * MIB)].map(Bytes::from);
    fake.put_image_with("odd", &layers, &[Some("1048576:AAAA".into()), Some("0:".into())]);
    fetch(&cache, "/v2/odd/manifests/odd", None).await;
    for layer in &layers {
        assert_eq!(fetch(&cache, &blob("odd", &Digest::of(layer)), None).await, layer);
    }
    assert_eq!(counters.refused_lists.load(Ordering::Relaxed), 2);
    let size_of_another = noise(45, 9 * MIB);
    let manifest = serde_json::json!({ "schemaVersion": 2, "layers": [
        { "mediaType": "x", "digest": fake.put_blob(size_of_another), "size": 5 }
    ]});
    let wrong: Digest = manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
    fake.put_manifest("short", manifest.to_string());
    fetch(&cache, "/v2/short/manifests/short", None).await;
    let answer = get(&cache, &blob("short", &wrong), None).await;
    assert_eq!(code(answer).await, (502, "DIGEST_INVALID".into()));
    cache.stop().await;
}

#[tokio::test]
async fn eviction_under_load_keeps_the_budget_and_the_content() {
    const CLIENTS: usize = 12;
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let layers: Vec<_> = (0..6).map(|seed| Bytes::from(noise(50 + seed, 8 * MIB + 1000))).collect();
    fake.put_image("v1", &layers, Some(MIB));
    let mut settings = config(dir.path(), &[&fake.url]);
    settings.cache.disk_budget = Some("20MiB".parse().unwrap());
    settings.cache.memory_budget = "64MiB".parse().unwrap();
    let cache = Arc::new(Registry::start_with(settings).await);
    fetch(&cache, "/v2/app/manifests/v1", None).await;
    let layers = Arc::new(layers);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (cache, layers) = (cache.clone(), layers.clone());
            tokio::spawn(async move {
                for step in 0..10 {
                    let layer = &layers[(client * 5 + step * 7) % layers.len()];
                    let first = (client * 977 + step * 3 * MIB) % (layer.len() - 1);
                    let last = (first + 2 * MIB).min(layer.len() - 1);
                    let path = blob("app", &Digest::of(layer));
                    assert_eq!(fetch(&cache, &path, Some((first, last))).await, layer[first..=last]);
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    let used = on_disk(&dir.path().join("cache"));
    assert!(used <= 20 * MIB as u64, "{used} bytes on disk");
    let counters = cache.counters.clone().unwrap();
    assert!(counters.evicted_pieces.load(Ordering::Relaxed) > 0);
    assert_eq!(counters.disk_corrupt.load(Ordering::Relaxed), 0);
    // A blob that has to be whole and doesn't fit is refused, with the reason, and takes nothing with it.
    let large = fake.put_blob(noise(60, 18 * MIB));
    let before = counters.evicted_pieces.load(Ordering::Relaxed);
    let answer = get(&cache, &blob("app", &large), None).await;
    let status = answer.status();
    let text = answer.text().await.unwrap();
    assert!(status == 503 && text.contains("disk_budget"), "{status} {text}");
    assert_eq!(counters.refused_large.load(Ordering::Relaxed), 1);
    assert_eq!(counters.evicted_pieces.load(Ordering::Relaxed), before);
    fake.always(Fault::None);
    Arc::into_inner(cache).unwrap().stop().await;
}

#[tokio::test]
async fn a_fetch_goes_on_when_the_first_to_ask_goes_away() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let layer = Bytes::from(noise(71, 10 * MIB));
    let digest = fake.put_blob(layer.clone());
    let cache = Registry::start_with(config(dir.path(), &[&fake.url])).await;
    let asked = tokio::spawn(cache.request(Method::GET, &blob("app", &digest)).send());
    while fake.blob_requests() == 0 {
        tokio::task::yield_now().await;
    }
    asked.abort();
    assert_eq!(fetch(&cache, &blob("app", &digest), None).await, layer);
    assert_eq!(fake.sent(), layer.len() as u64);
    cache.stop().await;
}
