//! Kills the registry behind a cache, and the cache, while machines pull: no pull fails that had a healthy copy.
//!
//! A second registry has the same images and is never killed, so there is a copy of everything at any moment. The cache
//! comes back at its address, as a service does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyplace_images::{
    Client, Credentials, Digest, ImageSpec, NoProgress, Options, PullOptions, Reference, Source, Store, pack,
    push,
};
use anyplace_seed::{Seed, rounds};
use tokio_util::sync::CancellationToken;

use crate::killable::Killable;
use crate::support::{Registry, noise};

/// Kills, about half of them of the cache, usually and in a whole campaign.
const KILLS: (usize, usize) = (60, 1_000);
const IMAGES: u64 = 12;
const MACHINES: usize = 3;
/// Most of an image; all images are more than the cache may keep.
const FILE_BYTES: usize = 3_000_000;
/// Another address than that from which clients connect: their ports are never in the way of a server that comes back.
const FREE: &str = "127.0.0.2:0";
/// Ends a run in which nothing is pulled any more.
const STALLED: Duration = Duration::from_secs(120);

/// A machine: pulls images, by tag and by digest, and forgets them again.
struct Machine {
    store: Store,
    client: Client,
    images: Arc<BTreeMap<u64, Digest>>,
    seed: Seed,
    pulled: Arc<AtomicU64>,
    stop: CancellationToken,
}

impl Machine {
    async fn run(mut self) -> u64 {
        for round in 1_u64.. {
            if self.stop.is_cancelled() {
                break;
            }
            let image = 1 + self.seed.below(IMAGES);
            let digest = &self.images[&image];
            let by_tag = self.seed.one_in(2);
            let name = if by_tag { format!("app:v{image}") } else { format!("app@{digest}") };
            let reference: Reference = name.parse().unwrap();
            let pull = self.store.pull(&reference, &self.client, &PullOptions::default()).await;
            let pulled = pull.unwrap_or_else(|error| panic!("{reference} has a healthy copy: {error}"));
            assert_eq!(pulled.digest, *digest, "{reference}");
            drop(pulled);
            self.store.settle().await.unwrap();
            self.pulled.fetch_add(1, Ordering::Relaxed);
            let store = self.store.clone();
            let forget = move || {
                store.remove(&reference).unwrap();
                store.collect().unwrap();
                round % 16 == 0 && !store.verify().unwrap().damaged.is_empty()
            };
            assert!(!tokio::task::spawn_blocking(forget).await.unwrap(), "the store has something wrong");
        }
        self.client.stats().retries
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_pull_fails_that_has_a_healthy_copy() {
    anyplace_service::install_crypto_provider();
    let (mut seed, dir) = (Seed::from_env(), tempfile::tempdir().unwrap());
    let at = |name: &str| -> PathBuf {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    };
    let healthy = Registry::start(&at("healthy")).await;
    let mut origin = Killable::start_at(&at("origin"), FREE, "").await;
    let client_of = |url: &str, name: &str| {
        let credentials = Credentials::from_file(&dir.path().join(name).join("credentials")).unwrap();
        Client::new(url, Some(credentials)).unwrap()
    };
    let progress = NoProgress::shared();
    let mut images = BTreeMap::new();
    for image in 1..=IMAGES {
        let root = at(&format!("tree-{image}"));
        std::fs::write(root.join("data"), noise(seed.next(), FILE_BYTES)).unwrap();
        std::fs::write(root.join("small"), image.to_string()).unwrap();
        let source = Source::Directory { root, spec: ImageSpec::default() };
        let packed = pack(&source, &at("work"), &progress).await.unwrap();
        let reference: Reference = format!("app:v{image}").parse().unwrap();
        for client in [healthy.client(), client_of(&origin.url, "origin")] {
            push(&packed, &reference, &client, &progress).await.unwrap();
        }
        images.insert(image, packed.digest().unwrap().clone());
    }
    // The one that is killed is asked first.
    let upstream = |url: &str, name: &str| {
        let credentials = dir.path().join(name).join("credentials");
        format!("[[upstreams]]\nurl = '{url}'\ncredentials_file = '{}'\n", credentials.display())
    };
    let settings = format!(
        "[cache]\ntag_ttl_ms = 0\ndisk_budget = '16MiB'\npiece_bytes = '1MiB'\n{}{}",
        upstream(&origin.url, "origin"),
        upstream(&healthy.url(), "healthy")
    );
    let mut cache = Killable::start_at(&at("cache"), FREE, &settings).await;

    let (pulled, stop) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
    let images = Arc::new(images);
    let machines: Vec<_> = (0..MACHINES)
        .map(|machine| {
            let machine = Machine {
                store: Store::open(&at(&format!("store-{machine}")), Options::default()).unwrap(),
                // As machines pull: the registry that is named second is asked where the first is away for too long.
                client: client_of(&cache.url, "cache").or(healthy.client()),
                images: images.clone(),
                seed: seed.fork(),
                pulled: pulled.clone(),
                stop: stop.clone(),
            };
            tokio::spawn(machine.run())
        })
        .collect();
    let (kills, mut of_cache) = (rounds(KILLS.0, KILLS.1), 0);
    for kill in 0..kills {
        let (before, begun) = (pulled.load(Ordering::Relaxed), Instant::now());
        tokio::time::sleep(Duration::from_micros(seed.below(150_000))).await;
        let is_cache = seed.one_in(2);
        let running = if is_cache { &mut cache } else { &mut origin };
        running.kill();
        let killed = Instant::now();
        // Sometimes it stays away for a while.
        if seed.one_in(4) {
            tokio::time::sleep(Duration::from_millis(seed.below(400))).await;
        }
        let address = running.address.clone();
        if is_cache {
            of_cache += 1;
            cache = Killable::start_at(&at("cache"), &address, &settings).await;
            let incoming = std::fs::read_dir(dir.path().join("cache/cache/incoming")).unwrap();
            // What machines ask for again is on its way already; what is older than the kill should be gone.
            let stale = incoming.flatten().filter(|entry| {
                let modified = entry.metadata().and_then(|metadata| metadata.modified());
                modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > killed.elapsed()))
            });
            assert_eq!(stale.count(), 0, "kill {kill} left something");
        } else {
            origin = Killable::start_at(&at("origin"), &address, "").await;
        }
        // Something is pulled between two kills, so that what is asked for again has a chance.
        while pulled.load(Ordering::Relaxed) == before {
            assert!(machines.iter().all(|machine| !machine.is_finished()), "a pull failed at kill {kill}");
            assert!(begun.elapsed() < STALLED, "nothing is pulled after kill {kill}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    stop.cancel();
    let mut retries = 0;
    for machine in machines {
        retries += machine.await.unwrap();
    }
    eprintln!(
        "{kills} kills, {of_cache} of the cache; {} pulls, none failed, {retries} requests were repeated",
        pulled.load(Ordering::Relaxed)
    );
    assert!(retries > 0, "no kill hit a pull");
    cache.kill();
    origin.kill();
    healthy.stop().await;
}
