//! Rows about pushing manifests.

use anyplace_images::manifest::{DOCKER_LIST, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX};
use anyplace_images::{Algorithm, Digest};
use serde_json::{Value, json};

use super::{Bed, digest_of};
use crate::support::OCI_MANIFEST;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image without layers.
async fn image(bed: &Bed, name: &str) -> Value {
    let config = bed.blob(name, OCI_CONFIG, b"{}").await;
    json!({ "schemaVersion": 2, "config": config, "layers": [] })
}

fn with(mut manifest: Value, key: &str, value: impl Into<Value>) -> Vec<u8> {
    manifest[key] = value.into();
    manifest.to_string().into_bytes()
}

fn absent(media_type: &str) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::of(b"absent"), "size": 6 })
}

#[tokio::test]
async fn a_push_says_where_it_is() {
    let bed = Bed::start().await;
    let body = image(&bed, "app").await.to_string().into_bytes();
    let digest = Digest::of(&body);
    for key in ["v1", digest.as_str()] {
        let put = bed.put_manifest("app", key, OCI_MANIFEST, &body).await;
        assert_eq!((put.status, put.header("location")), (201, format!("/v2/app/manifests/{digest}")));
        assert_eq!(put.header("docker-content-digest"), digest.to_string());
        assert_eq!(bed.get(&put.header("location")).await.body, body);
    }
    bed.stop().await;
}

#[tokio::test]
async fn every_type() {
    let bed = Bed::start().await;
    let image = image(&bed, "app").await;
    let index = json!({ "schemaVersion": 2, "manifests": [] });
    let artifact = json!({ "blobs": [], "x": [1, { "y": null }] });
    for (sent, own, body, expected) in [
        (OCI_MANIFEST, OCI_MANIFEST, &image, OCI_MANIFEST),
        (OCI_MANIFEST, "", &image, OCI_MANIFEST),
        (DOCKER_MANIFEST, DOCKER_MANIFEST, &image, DOCKER_MANIFEST),
        (OCI_INDEX, OCI_INDEX, &index, OCI_INDEX),
        (DOCKER_LIST, "", &index, DOCKER_LIST),
        ("", "", &index, OCI_INDEX),
        ("", "", &image, OCI_MANIFEST),
        ("", DOCKER_MANIFEST, &image, DOCKER_MANIFEST),
        ("application/vnd.example+json", "", &artifact, "application/vnd.example+json"),
        (
            "",
            "application/vnd.oci.artifact.manifest.v1+json",
            &artifact,
            "application/vnd.oci.artifact.manifest.v1+json",
        ),
    ] {
        let body =
            if own.is_empty() { body.to_string().into_bytes() } else { with(body.clone(), "mediaType", own) };
        let put = bed.put_manifest("app", "t", sent, &body).await;
        assert_eq!(put.status, 201, "{sent} {own} {put:?}");
        let get = bed.get("/v2/app/manifests/t").await;
        assert_eq!((get.header("content-type"), get.body), (expected.to_owned(), body));
    }
    bed.stop().await;
}

#[tokio::test]
async fn types_that_disagree() {
    let bed = Bed::start().await;
    let image = image(&bed, "app").await;
    for (sent, body) in [
        (DOCKER_MANIFEST, with(image.clone(), "mediaType", OCI_MANIFEST)),
        // An image's type, and the parts of none.
        (OCI_INDEX, image.to_string().into_bytes()),
        (OCI_MANIFEST, json!({ "schemaVersion": 2 }).to_string().into_bytes()),
        (OCI_MANIFEST, with(image.clone(), "schemaVersion", 1)),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", with(json!({}), "schemaVersion", 1)),
        (OCI_MANIFEST, with(image, "layers", json!([{ "digest": "sha256:12" }]))),
        (OCI_MANIFEST, b"no JSON".to_vec()),
        (OCI_MANIFEST, Vec::new()),
    ] {
        let put = bed.put_manifest("app", "t", sent, &body).await;
        assert_eq!(put.refusal(), (400, "MANIFEST_INVALID".to_owned()), "{sent}");
    }
    assert_eq!(bed.head("/v2/app/manifests/t").await.status, 404);
    bed.stop().await;
}

#[tokio::test]
async fn large_ones() {
    let bed = Bed::start().await;
    let image = image(&bed, "app").await;
    let mut body = with(image, "annotations", json!({ "padding": "A".repeat(4_000_000) }));
    body.resize(4 << 20, b' ');
    assert_eq!(bed.put_manifest("app", "t", OCI_MANIFEST, &body).await.status, 201);
    assert!(bed.get("/v2/app/manifests/t").await.body == body);
    body.push(b' ');
    let put = bed.put_manifest("app", "t", OCI_MANIFEST, &body).await;
    assert_eq!(put.refusal(), (413, "MANIFEST_INVALID".to_owned()));
    bed.stop().await;
}

#[tokio::test]
async fn missing_blobs() {
    let bed = Bed::start().await;
    let image = image(&bed, "app").await;
    for body in [
        with(image.clone(), "layers", json!([absent(LAYER)])),
        with(image.clone(), "config", absent(OCI_CONFIG)),
    ] {
        let put = bed.put_manifest("app", "t", OCI_MANIFEST, &body).await;
        assert_eq!(put.json()["errors"][0]["detail"][0]["digest"], Digest::of(b"absent").as_str());
        assert_eq!(put.refusal(), (404, "MANIFEST_BLOB_UNKNOWN".to_owned()));
    }
    // What another repository has isn't here.
    let put = bed.put_manifest("other", "t", OCI_MANIFEST, image.to_string().as_bytes()).await;
    assert_eq!(put.refusal(), (404, "MANIFEST_BLOB_UNKNOWN".to_owned()));
    assert_eq!(bed.head("/v2/app/manifests/t").await.status, 404);
    bed.stop().await;
}

#[tokio::test]
async fn sparse_indexes() {
    let bed = Bed::start().await;
    let (child, bytes) = bed.registry.put_image("app", "amd64", "seed").await;
    let present = json!({ "mediaType": OCI_MANIFEST, "digest": child, "size": bytes.len() });
    let body =
        json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [absent(OCI_MANIFEST), present] });
    let body = body.to_string().into_bytes();
    assert_eq!(bed.put_manifest("app", "all", OCI_INDEX, &body).await.status, 201);
    assert_eq!(bed.get("/v2/app/manifests/all").await.body, body);
    assert_eq!(bed.get(&format!("/v2/app/manifests/{child}")).await.body, bytes);
    bed.stop().await;
}

#[tokio::test]
async fn layers_that_lie_elsewhere() {
    let bed = Bed::start().await;
    let image = image(&bed, "app").await;
    let mut with_address = absent(LAYER);
    with_address["urls"] = json!(["https://example.com/layer"]);
    let layers = json!([
        with_address,
        absent("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
        absent("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
    ]);
    let put = bed.put_manifest("app", "t", OCI_MANIFEST, &with(image, "layers", layers)).await;
    assert_eq!(put.status, 201, "{put:?}");
    bed.stop().await;
}

#[tokio::test]
async fn digests_in_the_path() {
    let bed = Bed::start().await;
    let body = image(&bed, "app").await.to_string().into_bytes();
    for algorithm in Algorithm::ALL {
        let digest = digest_of(algorithm, &body);
        let put = bed.put_manifest("app", digest.as_str(), OCI_MANIFEST, &body).await;
        assert_eq!((put.status, put.header("docker-content-digest")), (201, digest.to_string()));
        let get = bed.get(&format!("/v2/app/manifests/{digest}")).await;
        assert_eq!((get.header("docker-content-digest"), &get.body), (digest.to_string(), &body));
        let wrong = digest_of(algorithm, b"other");
        let put = bed.put_manifest("app", wrong.as_str(), OCI_MANIFEST, &body).await;
        assert_eq!(put.refusal(), (400, "DIGEST_INVALID".to_owned()));
        assert_eq!(bed.head(&format!("/v2/app/manifests/{wrong}")).await.status, 404);
    }
    for none in ["sha256:baddigeststring", "sha512:00", "md5:d41d8cd98f00b204e9800998ecf8427e", "x:y"] {
        let put = bed.put_manifest("app", none, OCI_MANIFEST, &body).await;
        assert_eq!(put.refusal(), (400, "DIGEST_INVALID".to_owned()), "{none}");
        assert_eq!(bed.get(&format!("/v2/app/manifests/{none}")).await.status, 400, "{none}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn several_tags_in_one_push() {
    let bed = Bed::start().await;
    let body = image(&bed, "app").await.to_string().into_bytes();
    for algorithm in Algorithm::ALL {
        let digest = digest_of(algorithm, &body);
        let tags: Vec<String> = (0..12).map(|n| format!("{algorithm}-{n}")).collect();
        let query: Vec<String> = tags.iter().map(|tag| format!("tag={tag}")).collect();
        let key = format!("{digest}?{}&tag={algorithm}-0", query.join("&"));
        let put = bed.put_manifest("app", &key, OCI_MANIFEST, &body).await;
        assert_eq!(
            (put.status, put.header_values("oci-tag")),
            (201, tags.iter().map(String::as_str).collect())
        );
        for tag in &tags {
            let head = bed.head(&format!("/v2/app/manifests/{tag}")).await;
            assert_eq!(head.header("docker-content-digest"), digest.to_string(), "{tag}");
        }
    }
    // One bad tag, and nothing of it happens.
    let digest = Digest::of(&body);
    let put = bed.put_manifest("app", &format!("{digest}?tag=good&tag=.bad"), OCI_MANIFEST, &body).await;
    assert_eq!(put.refusal(), (400, "MANIFEST_INVALID".to_owned()));
    assert_eq!(bed.head("/v2/app/manifests/good").await.status, 404);
    bed.stop().await;
}

#[tokio::test]
async fn too_many_tags() {
    let bed = Bed::start().await;
    let body = image(&bed, "app").await.to_string().into_bytes();
    let query: Vec<String> = (0..101).map(|n| format!("tag=t{n}")).collect();
    let key = format!("{}?{}", Digest::of(&body), query.join("&"));
    let put = bed.put_manifest("app", &key, OCI_MANIFEST, &body).await;
    assert_eq!(put.refusal(), (414, "UNSUPPORTED".to_owned()));
    bed.stop().await;
}

#[tokio::test]
async fn subjects_may_be_absent() {
    let bed = Bed::start().await;
    let body = with(image(&bed, "app").await, "subject", absent(OCI_MANIFEST));
    let put = bed.put_manifest("app", Digest::of(&body).as_str(), OCI_MANIFEST, &body).await;
    assert_eq!((put.status, put.header("oci-subject")), (201, Digest::of(b"absent").to_string()));
    let put =
        bed.put_manifest("app", "t", OCI_MANIFEST, image(&bed, "app").await.to_string().as_bytes()).await;
    assert_eq!((put.status, put.header("oci-subject")), (201, String::new()));
    bed.stop().await;
}
