//! The pull-through cache, with real registries on both sides.

use std::sync::atomic::Ordering;

use anyplace_images::{Error, NoProgress, Options, PullOptions, Reference, Store};
use reqwest::Method;

use crate::support::{Proxy, Registry, code, header, is_root, noise, source, tree};

#[tokio::test]
async fn many_misses_make_one_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let bytes = noise(11, 5_000_000);
    let digest = origin.put_blob("app", &bytes).await;
    let proxy = Proxy::to(&origin).await;
    let cache = Registry::cache(&dir.path().join("cache"), &proxy.url, &origin.dir).await;
    let path = format!("/v2/app/blobs/{digest}");
    let asked: Vec<_> = (0..16).map(|_| tokio::spawn(cache.request(Method::GET, &path).send())).collect();
    for answer in asked {
        let answer = answer.await.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.bytes().await.unwrap(), bytes);
    }
    assert_eq!(proxy.blob_fetches.load(Ordering::SeqCst), 1);
    assert_eq!(std::fs::read_dir(cache.dir.join("uploads")).unwrap().count(), 0);
    cache.stop().await;
    origin.stop().await;
}

#[tokio::test]
async fn a_cache_serves_on_when_its_upstream_is_gone() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tree");
    std::fs::create_dir(&root).unwrap();
    tree(&root);
    let origin = Registry::start(&dir.path().join("origin")).await;
    let progress = NoProgress::shared();
    let packed = anyplace_images::pack(&source(&root), &dir.path().join("work"), &progress).await.unwrap();
    let reference: Reference = "team/app:v1".parse().unwrap();
    anyplace_images::push(&packed, &reference, &origin.client(), &progress).await.unwrap();
    let cache = Registry::cache(&dir.path().join("cache"), &origin.url(), &origin.dir).await;
    let store = Store::open(&dir.path().join("store-1"), Options::default()).unwrap();
    store.pull(&reference, &cache.client(), &PullOptions::default()).await.unwrap();
    origin.stop().await;

    let store = Store::open(&dir.path().join("store-2"), Options::default()).unwrap();
    let image = store.pull(&reference, &cache.client(), &PullOptions::default()).await.unwrap();
    assert_eq!(Some(&image.digest), packed.digest());
    // What was never here says what is wrong; what is pushed now is taken, and served.
    let never = "team/app:v2".parse().unwrap();
    let error = store.pull(&never, &cache.client(), &PullOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("upstream can't be asked"), "{error}");
    let own: Reference = "team/own:v1".parse().unwrap();
    anyplace_images::push(&packed, &own, &cache.client(), &progress).await.unwrap();
    store.pull(&own, &cache.client(), &PullOptions::default()).await.unwrap();
    cache.stop().await;
}

#[tokio::test]
async fn tags_follow_the_upstream_and_pushes_stay() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let cache = Registry::cache(&dir.path().join("cache"), &origin.url(), &origin.dir).await;
    let digest_of = async |registry: &Registry, tag: &str| {
        let path = format!("/v2/app/manifests/{tag}");
        header(&registry.request(Method::HEAD, &path).send().await.unwrap(), "docker-content-digest")
    };
    let (first, _) = origin.put_image("app", "v1", "first").await;
    assert_eq!(digest_of(&cache, "v1").await, first.to_string());
    let (second, bytes) = origin.put_image("app", "v1", "second").await;
    assert_eq!(digest_of(&cache, "v1").await, second.to_string());
    let get = cache.request(Method::GET, "/v2/app/manifests/v1").send().await.unwrap();
    assert_eq!(get.bytes().await.unwrap(), bytes);
    let (own, _) = cache.put_image("app", "own", "third").await;
    assert_eq!(digest_of(&cache, "own").await, own.to_string());
    assert_eq!(digest_of(&origin, "own").await, "");
    let tags: serde_json::Value =
        cache.request(Method::GET, "/v2/app/tags/list").send().await.unwrap().json().await.unwrap();
    assert_eq!(tags["tags"], serde_json::json!(["own", "v1"]));
    let none = cache.request(Method::GET, "/v2/app/manifests/none").send().await.unwrap();
    assert_eq!(code(none).await, (404, "MANIFEST_UNKNOWN".into()));
    // A deleted tag is gone here too, as long as the upstream can be asked.
    origin.request(Method::DELETE, "/v2/app/manifests/v1").send().await.unwrap();
    assert_eq!(digest_of(&cache, "v1").await, "");
    cache.stop().await;
    origin.stop().await;
}

#[tokio::test]
async fn a_manifest_may_name_blobs_that_only_the_upstream_has() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let cache = Registry::cache(&dir.path().join("cache"), &origin.url(), &origin.dir).await;
    let (_, manifest) = origin.put_image("app", "v1", "base").await;
    let put = cache.request(Method::PUT, "/v2/app/manifests/mine").body(manifest.clone());
    let put = put.header("content-type", crate::support::OCI_MANIFEST).send().await.unwrap();
    assert_eq!(put.status(), 201);
    origin.stop().await;
    let layer = anyplace_images::Digest::of(b"base");
    let get = cache.request(Method::GET, &format!("/v2/app/blobs/{layer}")).send().await.unwrap();
    assert_eq!(get.bytes().await.unwrap(), "base");
    cache.stop().await;
}

#[tokio::test]
async fn corrupt_content_from_upstream_is_refused_and_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let cache = Registry::cache(&dir.path().join("cache"), &origin.url(), &origin.dir).await;
    let mut bytes = noise(12, 500_000);
    let digest = origin.put_blob("app", &bytes).await;
    bytes[250_000] ^= 1;
    std::fs::write(origin.blob_file(&digest), &bytes).unwrap();
    let path = format!("/v2/app/blobs/{digest}");
    let answer = cache.request(Method::GET, &path).send().await.unwrap();
    assert_eq!(code(answer).await, (502, "DIGEST_INVALID".into()));
    assert!(!cache.blob_file(&digest).exists());
    assert_eq!(std::fs::read_dir(cache.dir.join("uploads")).unwrap().count(), 0);
    // Once the upstream is right again, so is the cache.
    bytes[250_000] ^= 1;
    std::fs::write(origin.blob_file(&digest), &bytes).unwrap();
    let answer = cache.request(Method::GET, &path).send().await.unwrap();
    assert_eq!(answer.bytes().await.unwrap(), bytes);

    let (manifest, text) = origin.put_image("app", "v1", "x").await;
    let damaged = String::from_utf8(text).unwrap().replace("size", "sise");
    std::fs::write(origin.blob_file(&manifest), damaged).unwrap();
    let answer = cache.request(Method::GET, &format!("/v2/app/manifests/{manifest}")).send().await.unwrap();
    assert_eq!(code(answer).await, (503, "UNAVAILABLE".into()));
    assert!(!cache.blob_file(&manifest).exists());
    // A manifest, the origin verifies itself, and doesn't serve it.
    let reference = format!("app@{manifest}").parse().unwrap();
    let error = origin.client().get_manifest(&reference).await.unwrap_err();
    assert!(matches!(error, Error::Registry { status: 500, .. }), "{error}");
    cache.stop().await;
    origin.stop().await;
}
