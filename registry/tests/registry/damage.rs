//! Content that a disk spoilt: said to be damaged or fetched again, and put right by whoever pushes it again.

use std::path::Path;

use anyplace_images::Digest;
use reqwest::Method;

use crate::support::{OCI_MANIFEST, Registry, code, noise};

/// Flips a bit of a stored file.
fn flip(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

async fn put_manifest(registry: &Registry, key: &str, bytes: &[u8]) {
    let request = registry.request(Method::PUT, &format!("/v2/app/manifests/{key}"));
    let answer = request.header("content-type", OCI_MANIFEST).body(bytes.to_vec()).send().await.unwrap();
    assert_eq!(answer.status(), 201);
}

#[tokio::test]
async fn a_damaged_manifest_is_not_served_and_a_push_puts_it_right() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let (digest, bytes) = registry.put_image("app", "v1", "layer").await;
    let get = async |key: &str| {
        registry.request(Method::GET, &format!("/v2/app/manifests/{key}")).send().await.unwrap()
    };
    flip(&registry.blob_file(&digest));
    for key in ["v1", digest.as_str()] {
        assert_eq!(code(get(key).await).await, (500, "UNKNOWN".into()), "{key}");
    }
    // The others are listed all the same.
    registry.put_image("app", "v2", "other").await;
    let tags = registry.request(Method::GET, "/v1/tags?repository=app").send().await.unwrap();
    assert_eq!(tags.json::<serde_json::Value>().await.unwrap().as_array().unwrap().len(), 2);
    put_manifest(&registry, "v1", &bytes).await;
    for key in ["v1", digest.as_str()] {
        assert_eq!(get(key).await.bytes().await.unwrap(), bytes, "{key}");
    }
    registry.stop().await;
}

#[tokio::test]
async fn a_cache_gets_a_damaged_manifest_from_its_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let cache = Registry::cache(&dir.path().join("cache"), &origin.url(), &origin.dir).await;
    let (digest, bytes) = origin.put_image("app", "v1", "layer").await;
    put_manifest(&cache, "own", &bytes).await;
    flip(&cache.blob_file(&digest));
    let path = format!("/v2/app/manifests/{digest}");
    let answer = cache.request(Method::GET, &path).send().await.unwrap();
    assert_eq!(answer.bytes().await.unwrap(), bytes);
    cache.stop().await;
    origin.stop().await;
}

#[tokio::test]
async fn pushing_a_damaged_blob_again_puts_it_right() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    for (seed, size) in [(71, 1_000), (72, 5_000_000)] {
        let bytes = noise(seed, size);
        let digest = registry.put_blob("app", &bytes).await;
        // In one request, and as most clients do.
        for resumable in [false, true] {
            flip(&registry.blob_file(&digest));
            if resumable {
                push(&registry, &digest, &bytes).await;
            } else {
                registry.put_blob("app", &bytes).await;
            }
            let path = format!("/v2/app/blobs/{digest}");
            let answer = registry.request(Method::GET, &path).send().await.unwrap();
            assert!(answer.bytes().await.unwrap() == bytes, "{size} {resumable}");
            assert_eq!(std::fs::read_dir(registry.dir.join("uploads")).unwrap().count(), 0);
        }
    }
    registry.stop().await;
}

async fn push(registry: &Registry, digest: &Digest, bytes: &[u8]) {
    let begun = registry.request(Method::POST, "/v2/app/blobs/uploads/").send().await.unwrap();
    let location = crate::support::header(&begun, "location");
    let sent = registry.request(Method::PATCH, &location).body(bytes.to_vec()).send().await.unwrap();
    let location = crate::support::header(&sent, "location");
    let and = if location.contains('?') { '&' } else { '?' };
    let put = registry.request(Method::PUT, &format!("{location}{and}digest={digest}"));
    assert_eq!(put.send().await.unwrap().status(), 201);
}
