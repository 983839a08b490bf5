//! What one repository, or one upstream, can do to another's content in a cache: nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyplace_images::Digest;
use anyplace_images::manifest::{DOCKER_LIST, OCI_INDEX};
use axum::body::Bytes;
use reqwest::Method;
use serde_json::json;

use crate::cache_faults::DockerRegistry;
use crate::fake::{Fake, list};
use crate::support::{OCI_MANIFEST, Registry, cache_config, code, manifest, noise};

const MIB: usize = 1 << 20;

async fn get(cache: &Registry, path: &str) -> reqwest::Response {
    cache.request(Method::GET, path).send().await.unwrap()
}

fn blob(repository: &str, digest: &Digest) -> String {
    format!("/v2/{repository}/blobs/{digest}")
}

#[tokio::test]
async fn naming_another_repositorys_blob_does_not_open_it() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = DockerRegistry::start(dir.path()).await;
    let (config, public) = (Bytes::from_static(b"{}"), Bytes::from_static(b"public"));
    let secret = Bytes::from(noise(601, 100_000));
    let secret_digest = upstream.put_blob("secret/repo", &secret).await;
    upstream.put_blob("secret/repo", &config).await;
    let image = |layer: &Bytes| manifest(&Digest::of(&config), 2, &[(&Digest::of(layer), layer.len())]);
    upstream.put_manifest("secret/repo", "v1", OCI_MANIFEST, image(&secret)).await.unwrap();
    for bytes in [&config, &public] {
        upstream.put_blob("evil/repo", bytes).await;
    }
    let base = upstream.put_manifest("evil/repo", "base", OCI_MANIFEST, image(&public)).await.unwrap();
    let cache_dir = dir.path().join("ours");
    let cache = Registry::start_with(cache_config(&cache_dir, &[(&upstream.url, dir.path())])).await;
    get(&cache, "/v2/secret/repo/manifests/v1").await;
    assert_eq!(get(&cache, &blob("secret/repo", &secret_digest)).await.bytes().await.unwrap(), secret);
    // What an upstream doesn't look at in what it takes.
    let named = json!([{ "mediaType": "a/b", "digest": secret_digest, "size": secret.len() }]);
    let listed = |size: usize| json!([{ "mediaType": OCI_MANIFEST, "digest": base, "size": size }]);
    let base_size = image(&public).len();
    let mut with_blobs: serde_json::Value = serde_json::from_slice(&image(&public)).unwrap();
    with_blobs["blobs"] = named.clone();
    let index = |media_type: &str| json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": listed(base_size), "layers": named });
    let tries =
        [(OCI_INDEX, index(OCI_INDEX)), (DOCKER_LIST, index(DOCKER_LIST)), (OCI_MANIFEST, with_blobs)];
    let mut taken = 0;
    for (media_type, text) in tries {
        let put = upstream.put_manifest("evil/repo", "x", media_type, text.to_string()).await;
        let Ok(digest) = put else { continue };
        taken += 1;
        let asked = cache.request(Method::GET, &format!("/v2/evil/repo/manifests/{digest}"));
        assert_eq!(asked.header("accept", media_type).send().await.unwrap().status(), 200);
        let path = blob("evil/repo", &secret_digest);
        assert_eq!(upstream.get(&path).await.status(), 404);
        for method in [Method::GET, Method::HEAD] {
            let answer = cache.request(method.clone(), &path).send().await.unwrap();
            assert_eq!(answer.status(), 404, "{method} {media_type}");
        }
    }
    assert!(taken > 0, "the upstream took none of them");
    assert_eq!(get(&cache, &blob("secret/repo", &secret_digest)).await.bytes().await.unwrap(), secret);
    cache.stop().await;
}

#[tokio::test]
async fn a_wrong_list_from_one_upstream_is_not_anothers() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (Fake::start().await, Fake::start().await);
    let (layer, forged) = (Bytes::from(noise(611, 9 * MIB)), Bytes::from(noise(612, 9 * MIB)));
    let digest = Digest::of(&layer);
    good.put_image("good", std::slice::from_ref(&layer), Some(MIB));
    good.put_blob_only("good/app", &digest, layer.clone());
    bad.put_image_with("evil", std::slice::from_ref(&layer), &[Some(list(&forged, MIB))]);
    bad.put_blob_only("evil/app", &digest, forged.clone());
    let order = [(good.url.as_str(), dir.path()), (bad.url.as_str(), dir.path())];
    let cache = Registry::start_with(cache_config(dir.path(), &order)).await;
    get(&cache, "/v2/evil/app/manifests/evil").await;
    // Those who pull from it get what it says.
    assert!(get(&cache, &blob("evil/app", &digest)).await.bytes().await.unwrap() == forged);
    get(&cache, "/v2/good/app/manifests/good").await;
    assert!(get(&cache, &blob("good/app", &digest)).await.bytes().await.unwrap() == layer);
    // Now it is known what the blob is, for all.
    assert!(get(&cache, &blob("evil/app", &digest)).await.bytes().await.unwrap() == layer);
    cache.stop().await;
}

#[tokio::test]
async fn a_wrong_size_of_a_small_blob_is_not_anothers() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let layer = Bytes::from(noise(621, 100_000));
    let digest = Digest::of(&layer);
    fake.put_image("good", std::slice::from_ref(&layer), None);
    let text = manifest(&Digest::of(b"{}"), 2, &[(&digest, 5)]);
    fake.put_manifest("evil", text);
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    get(&cache, "/v2/evil/app/manifests/evil").await;
    assert_eq!(code(get(&cache, &blob("evil/app", &digest)).await).await, (502, "DIGEST_INVALID".into()));
    get(&cache, "/v2/good/app/manifests/good").await;
    assert!(get(&cache, &blob("good/app", &digest)).await.bytes().await.unwrap() == layer);
    cache.stop().await;
}

#[tokio::test]
async fn a_layer_that_another_repository_brought_is_served_without_the_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let base = Bytes::from(noise(631, 9 * MIB));
    fake.put_image("one", std::slice::from_ref(&base), Some(MIB));
    fake.put_image("two", &[base.clone(), Bytes::from_static(b"more")], Some(MIB));
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    get(&cache, "/v2/app/one/manifests/one").await;
    assert!(get(&cache, &blob("app/one", &Digest::of(&base))).await.bytes().await.unwrap() == base);
    // A machine that has the layer already asks for the manifest only.
    get(&cache, "/v2/app/two/manifests/two").await;
    while fake.content.blob_heads.load(Ordering::SeqCst) < 5 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let sent = fake.sent();
    drop(fake);
    assert!(get(&cache, &blob("app/two", &Digest::of(&base))).await.bytes().await.unwrap() == base);
    assert_eq!(get(&cache, &blob("app/three", &Digest::of(&base))).await.status(), 503);
    assert_eq!(sent, base.len() as u64);
    cache.stop().await;
}
