//! A registry over a garage cluster that loses nodes: one at a time, killed and sometimes wiped, while clients push and pull;
//! then two at once.

use std::time::{Duration, Instant};

use anyplace_images::Digest;
use anyplace_registry::Config;
use anyplace_seed::{Seed, rounds};
use reqwest::Method;

use crate::storage_clients::Clients;
use crate::stores::garage::{self, Garage, NODES};
use crate::support::{LOOPBACK, Registry, code, header};

/// Losses of one node, usually and in a whole campaign; one in so many wipes it, and the last.
const LOSSES: (usize, usize) = (3, 100);
const WIPE_ONE_IN: u64 = 3;
/// Images that clients push, and pull, while a node is away.
const IMAGES_MEANWHILE: usize = 2;
/// How long they may take on a busy machine.
const MEANWHILE_MAX: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_killed_nodes() {
    let Some(mut garage) = garage::start().await else { return };
    let mut seed = Seed::from_env();
    let dir = tempfile::tempdir().unwrap();
    let storage = toml::from_str(&garage.store.settings(garage.store.address, "r")).unwrap();
    let registry =
        Registry::start_with(Config { storage, listen: LOOPBACK, ..Config::new(dir.path()) }).await;
    let clients = Clients::start(&registry.url(), &registry.credentials(), &mut seed);
    more(&clients).await;
    let (losses, mut wipes) = (rounds(LOSSES.0, LOSSES.1), 0);
    for loss in 1..=losses {
        tokio::time::sleep(Duration::from_millis(seed.below(500))).await;
        let number = seed.index(NODES);
        let wiped = loss == losses || seed.one_in(WIPE_ONE_IN);
        if wiped {
            // The others must have all of it: what two nodes acknowledged is safe from the loss of one.
            garage.synced().await;
        }
        garage.nodes[number].kill();
        if wiped {
            wipes += 1;
            garage.nodes[number].wipe();
        }
        more(&clients).await;
        garage.back(number).await;
        garage.whole().await;
        if wiped {
            garage.synced().await;
        }
        let disk = if wiped { ", with its disk" } else { "" };
        eprintln!("loss {loss}: node {number}{disk}; {} images pushed", clients.pushed());
    }
    more(&clients).await;
    two_at_once(&mut garage, &registry, &mut seed).await;
    more(&clients).await;
    let pushed = clients.stop().await;
    eprintln!(
        "{losses} losses of one node, {wipes} of them with its disk, one of two; {} images pushed, {} uploads went on",
        pushed.images.len(),
        pushed.resumed
    );
    pushed.verify(&registry.url(), &registry.credentials()).await;
    registry.stop().await;
}

/// Waits until clients have pushed and pulled more.
async fn more(clients: &Clients) {
    let (begun, enough) = (Instant::now(), clients.pushed() + IMAGES_MEANWHILE);
    while clients.pushed() < enough {
        assert!(begun.elapsed() < MEANWHILE_MAX, "pushes and pulls don't go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Neither reads nor writes have enough nodes; all is back when the nodes are.
async fn two_at_once(garage: &mut Garage, registry: &Registry, seed: &mut Seed) {
    let (image, manifest) = registry.put_image("b", "t", "two nodes are enough, one is not").await;
    let blob = Digest::of(b"two nodes are enough, one is not");
    let stays = seed.index(NODES);
    let gone: Vec<usize> = (0..NODES).filter(|number| *number != stays).collect();
    for number in &gone {
        garage.nodes[*number].kill();
    }
    let asked = [
        (Method::GET, format!("/v2/b/manifests/{image}")),
        (Method::GET, format!("/v2/b/blobs/{blob}")),
        (Method::POST, "/v2/b/blobs/uploads/".to_owned()),
        (Method::DELETE, "/v2/b/manifests/t".to_owned()),
    ];
    for (method, path) in asked {
        let answer = registry.request(method, &path).timeout(MEANWHILE_MAX).send().await.unwrap();
        assert_eq!(header(&answer, "retry-after"), "1", "{path}: {answer:?}");
        assert_eq!(code(answer).await, (503, "UNAVAILABLE".into()), "{path}");
    }
    for number in &gone {
        garage.back(*number).await;
    }
    garage.whole().await;
    let answer = registry.request(Method::GET, "/v2/b/manifests/t").send().await.unwrap();
    assert_eq!(answer.bytes().await.unwrap(), manifest);
    registry.put_image("b", "u", "again").await;
}
