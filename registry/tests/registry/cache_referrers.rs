//! What is about an image, such as its signature, through a cache: there, or said to be unknown, and never silently not.

use std::collections::BTreeSet;

use anyplace_images::Digest;
use anyplace_images::manifest::OCI_INDEX;
use axum::body::Bytes;
use reqwest::Method;
use serde_json::{Value, json};

use crate::cache_faults::DockerRegistry;
use crate::support::{OCI_MANIFEST, Registry, cache_config, code, header, manifest};

/// A manifest of this type about an image whose config and layer the repository has.
fn about(subject: &Digest, image: &[u8], artifact_type: &str) -> Vec<u8> {
    let mut document: Value = serde_json::from_slice(image).unwrap();
    document["artifactType"] = artifact_type.into();
    document["subject"] = json!({ "mediaType": OCI_MANIFEST, "digest": subject, "size": image.len() });
    document["annotations"] = json!({ "of": artifact_type });
    document.to_string().into_bytes()
}

async fn put(registry: &Registry, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let request = registry.request(Method::PUT, &format!("/v2/app/manifests/{digest}"));
    let answer = request.header("content-type", OCI_MANIFEST).body(bytes.to_vec()).send().await.unwrap();
    assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
    digest
}

/// The digests that are listed, and whether there is a warning.
async fn listed(registry: &Registry, subject: &Digest, query: &str) -> (BTreeSet<String>, bool) {
    let path = format!("/v2/app/referrers/{subject}{query}");
    let answer = registry.request(Method::GET, &path).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
    let warned = header(&answer, "warning").starts_with("299 ");
    let index: Value = answer.json().await.unwrap();
    let digest = |descriptor: &Value| descriptor["digest"].as_str().unwrap().to_owned();
    (index["manifests"].as_array().unwrap().iter().map(digest).collect(), warned)
}

fn set(digests: &[&Digest]) -> BTreeSet<String> {
    digests.iter().map(|digest| digest.to_string()).collect()
}

#[tokio::test]
async fn a_cache_lists_its_upstreams_referrers_and_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let cache = Registry::cache(&dir.path().join("cache"), &origin.url(), &origin.dir).await;
    let (image, bytes) = origin.put_image("app", "v1", "layer").await;
    let (unsigned, _) = origin.put_image("app", "v2", "other").await;
    let signature = put(&origin, &about(&image, &bytes, "a/signature")).await;
    let sbom = put(&origin, &about(&image, &bytes, "a/sbom")).await;
    assert_eq!(listed(&cache, &image, "").await, (set(&[&signature, &sbom]), false));
    assert_eq!(listed(&cache, &image, "?artifactType=a/sbom").await, (set(&[&sbom]), false));
    assert_eq!(listed(&cache, &unsigned, "").await, (set(&[]), false));
    // A page after the other.
    let path = format!("/v2/app/referrers/{image}?n=1");
    let first = cache.request(Method::GET, &path).send().await.unwrap();
    let link = header(&first, "link");
    let next = link.split_once('<').unwrap().1.split_once('>').unwrap().0;
    let next = cache.request(Method::GET, next).send().await.unwrap();
    let (first, next): (Value, Value) = (first.json().await.unwrap(), next.json().await.unwrap());
    let pages = [&first, &next].map(|page| page["manifests"][0]["digest"].as_str().unwrap().to_owned());
    assert_eq!(BTreeSet::from(pages), set(&[&signature, &sbom]));
    assert_eq!(first["manifests"][0]["annotations"]["of"], first["manifests"][0]["artifactType"]);
    // What was pushed here is there too.
    let own = put(&cache, &about(&image, &bytes, "a/note")).await;
    assert_eq!(listed(&cache, &image, "").await, (set(&[&signature, &sbom, &own]), false));
    origin.stop().await;
    assert_eq!(listed(&cache, &image, "").await, (set(&[&signature, &sbom, &own]), true));
    // Nobody may take an image for unsigned because nobody could be asked.
    let answer = cache.request(Method::GET, &format!("/v2/app/referrers/{unsigned}")).send().await.unwrap();
    assert_eq!(code(answer).await.0, 503);
    cache.stop().await;
}

#[tokio::test]
async fn an_upstream_without_lists_has_them_under_a_tag() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = DockerRegistry::start(dir.path()).await;
    let (config, layer) = (Bytes::from_static(b"{}"), Bytes::from_static(b"layer"));
    for bytes in [&config, &layer] {
        upstream.put_blob("app", bytes).await;
    }
    let image = manifest(&Digest::of(&config), 2, &[(&Digest::of(&layer), layer.len())]);
    let digest = upstream.put_manifest("app", "v1", OCI_MANIFEST, image.clone()).await.unwrap();
    let signature = about(&digest, &image, "a/signature");
    let signed = upstream.put_manifest("app", "signature", OCI_MANIFEST, signature.clone()).await.unwrap();
    let descriptor = json!({
        "mediaType": OCI_MANIFEST, "digest": signed, "size": signature.len(), "artifactType": "a/signature",
    });
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor] });
    let tag = digest.as_str().replace(':', "-");
    upstream.put_manifest("app", &tag, OCI_INDEX, index.to_string()).await.unwrap();
    let cache_dir = dir.path().join("ours");
    let cache = Registry::start_with(cache_config(&cache_dir, &[(&upstream.url, dir.path())])).await;
    assert_eq!(listed(&cache, &digest, "").await, (set(&[&signed]), false));
    assert_eq!(listed(&cache, &signed, "").await, (set(&[]), false));
    drop(upstream);
    assert_eq!(listed(&cache, &digest, "").await, (set(&[&signed]), true));
    cache.stop().await;
}
