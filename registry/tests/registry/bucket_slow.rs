//! A bucket that takes seconds for some of what is asked, and never answers a little. What is asked of the registry takes its time, or is
//! answered with 503 and tried again; nothing that was acknowledged is lost, and pushes go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyplace_images::Credentials;
use anyplace_registry::{Config, GcStatus};
use anyplace_seed::Seed;
use reqwest::{Method, StatusCode};

use crate::storage_clients::Clients;
use crate::stores;
use crate::support::{LOOPBACK, Registry, code, header, noise};

/// Images that are pushed while the bucket is slow.
const PUSHED: usize = 1;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_takes_seconds_loses_nothing() {
    let (slow, mut seed) = (Arc::new(AtomicBool::new(false)), Seed::from_env());
    let store = stores::s3s_that_is_slow(slow.clone(), seed.fork()).await;
    let dir = tempfile::tempdir().unwrap();
    let storage = toml::from_str(&store.settings(store.address, "r")).unwrap();
    let registry =
        Registry::start_with(Config { storage, listen: LOOPBACK, ..Config::new(dir.path()) }).await;
    let layer = noise(1, 300_000);
    let blob = registry.put_blob("b", &layer).await;
    let (_, before) = registry.put_image("b", "before", "before").await;
    let credentials = Credentials::from_file(&dir.path().join("credentials")).unwrap();
    slow.store(true, Ordering::SeqCst);
    let clients = Clients::start(&registry.url(), &credentials, &mut seed);
    let begun = registry.request(Method::POST, "/v1/gc").json(&serde_json::json!({})).send().await.unwrap();
    assert!(begun.status() == 202 || begun.status() == 503, "{}", begun.text().await.unwrap());

    let blob = format!("/v2/b/blobs/{blob}");
    let mut answered = 0;
    while clients.pushed() < PUSHED || answered < 6 {
        for (path, expected) in [("/v2/b/manifests/before", &before), (blob.as_str(), &layer)] {
            let answer = registry.request(Method::GET, path).send().await.unwrap();
            match answer.status() {
                // A body breaks off where the bucket falls silent; none that comes whole is wrong.
                StatusCode::OK => match answer.bytes().await {
                    Ok(bytes) => assert_eq!(bytes, expected),
                    Err(error) => assert!(error.is_body() || error.is_decode(), "{error:?}"),
                },
                _ => {
                    assert_eq!(header(&answer, "retry-after"), "1", "{path}");
                    assert_eq!(code(answer).await, (503, "UNAVAILABLE".into()), "{path}");
                }
            }
            answered += 1;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    slow.store(false, Ordering::SeqCst);
    // What is still waiting for an answer gets one, and more is pushed.
    let until = clients.pushed() + 3;
    while clients.pushed() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let pushed = clients.stop().await;
    eprintln!("{} images pushed, {} uploads went on after no answer", pushed.images.len(), pushed.resumed);
    pushed.verify(&registry.url(), &credentials).await;
    loop {
        let status: GcStatus = crate::gc::get(&registry, "/v1/gc").await;
        if status.running.is_none() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let report = crate::gc::collect(&registry, false).await;
    assert_eq!((report.plan.links.count, report.plan.content.count), (0, 0), "{report:?}");
    pushed.verify(&registry.url(), &credentials).await;
    registry.stop().await;
}
