//! Kills a registry with SIGKILL, again and again, while clients push to it and pull from it.
//!
//! SIGKILL shows what survives the loss of the process, not of power.

use std::fs::File;
use std::time::{Duration, SystemTime};

use anyplace_images::Credentials;
use anyplace_seed::{Seed, rounds};

use crate::killable::Killable;
use crate::storage_clients::Clients;
use crate::stores::{self, Store};

/// Kills of a registry on a folder, usually and in a whole campaign.
const KILLS: (usize, usize) = (300, 1_000);
/// On a bucket: S3 in this process is slower than a disk.
const BUCKET_KILLS: (usize, usize) = (50, 1_000);
/// And on programs in Python and JavaScript, which take turns with everything else.
const SLOW_KILLS: (usize, usize) = (12, 40);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_folder_acknowledged_survives_kills() {
    campaign(rounds(KILLS.0, KILLS.1), None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_bucket_acknowledged_survives_kills() {
    let store = stores::s3s().await;
    campaign(rounds(BUCKET_KILLS.0, BUCKET_KILLS.1), Some(store)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_moto_acknowledged_survives_kills() {
    let Some(store) = stores::moto().await else { return };
    campaign(rounds(SLOW_KILLS.0, SLOW_KILLS.1), Some(store)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_azurite_acknowledged_survives_kills() {
    let Some(store) = stores::azurite().await else { return };
    campaign(rounds(SLOW_KILLS.0, SLOW_KILLS.1), Some(store)).await;
}

async fn campaign(kills: usize, bucket: Option<Store>) {
    anyplace_service::install_crypto_provider();
    let mut seed = Seed::from_env();
    let home = tempfile::tempdir().unwrap();
    let settings = bucket
        .as_ref()
        .map_or(String::new(), |store| format!("[storage]\n{}", store.settings(store.address, "r")));
    let mut child = Killable::start(home.path(), &settings).await;
    let credentials = Credentials::from_file(&home.path().join("credentials")).unwrap();
    let clients = Clients::start(&child.url, &credentials, &mut seed);
    for _ in 0..kills {
        tokio::time::sleep(Duration::from_millis(seed.below(120))).await;
        child.kill();
        child = Killable::start(home.path(), &settings).await;
        clients.moved(&child.url);
        clients.check();
    }
    let pushed = clients.stop().await;
    child.kill();
    child = Killable::start(home.path(), &settings).await;
    eprintln!(
        "{kills} kills, {} images pushed, {} uploads went on after one",
        pushed.images.len(),
        pushed.resumed
    );
    assert!(pushed.resumed > 0 || kills < 50, "the clients hardly did anything");
    pushed.verify(&child.url, &credentials).await;
    child.kill();
    if bucket.is_none() {
        // Files that were being written are not content. Once no request can be writing them, a start removes them.
        for entry in std::fs::read_dir(home.path().join("tmp")).unwrap() {
            let old = SystemTime::now() - Duration::from_secs(2 * 3_600);
            File::options().write(true).open(entry.unwrap().path()).unwrap().set_modified(old).unwrap();
        }
        child = Killable::start(home.path(), &settings).await;
        assert_eq!(std::fs::read_dir(home.path().join("tmp")).unwrap().count(), 0);
        child.kill();
    }
}
