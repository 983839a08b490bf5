//! Rows about deleting, errors and warnings.

use anyplace_images::Digest;
use reqwest::Method;

use super::{Answer, Bed};
use crate::support::{OCI_MANIFEST, Registry};

#[tokio::test]
async fn deleting_a_tag() {
    let bed = Bed::start().await;
    let (digest, bytes) = bed.registry.put_image("app", "a", "seed").await;
    bed.registry.put_image("app", "b", "seed").await;
    assert_eq!(bed.delete("/v2/app/manifests/a").await.status, 202);
    assert_eq!(bed.get("/v2/app/manifests/a").await.refusal(), (404, "MANIFEST_UNKNOWN".to_owned()));
    assert_eq!(bed.delete("/v2/app/manifests/a").await.refusal(), (404, "MANIFEST_UNKNOWN".to_owned()));
    for key in ["b", digest.as_str()] {
        assert_eq!(bed.get(&format!("/v2/app/manifests/{key}")).await.body, bytes, "{key}");
    }
    assert_eq!(bed.get("/v2/app/tags/list").await.json()["tags"], serde_json::json!(["b"]));
    bed.stop().await;
}

#[tokio::test]
async fn deleting_a_manifest() {
    let bed = Bed::start().await;
    let (subject, _) = bed.registry.put_image("app", "a", "seed").await;
    bed.registry.put_image("app", "b", "seed").await;
    let (other, _) = bed.registry.put_image("app", "c", "other").await;
    let body = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [],
        "subject": { "mediaType": OCI_MANIFEST, "digest": subject, "size": 1 },
    });
    let body = body.to_string().into_bytes();
    let about = Digest::of(&body);
    bed.put_manifest("app", "about", "application/vnd.oci.image.index.v1+json", &body).await;
    let referrers = format!("/v2/app/referrers/{subject}");
    assert_eq!(bed.get(&referrers).await.json()["manifests"].as_array().unwrap().len(), 1);

    let path = format!("/v2/app/manifests/{about}");
    assert_eq!(bed.delete(&path).await.status, 202);
    assert_eq!(bed.delete(&path).await.refusal(), (404, "MANIFEST_UNKNOWN".to_owned()));
    assert_eq!(bed.get(&referrers).await.json()["manifests"].as_array().unwrap().len(), 0);
    assert_eq!(bed.delete(&format!("/v2/app/manifests/{subject}")).await.status, 202);
    for gone in ["a", "b", "about", subject.as_str()] {
        assert_eq!(bed.get(&format!("/v2/app/manifests/{gone}")).await.status, 404, "{gone}");
    }
    let kept = bed.head("/v2/app/manifests/c").await;
    assert_eq!(kept.header("docker-content-digest"), other.to_string());
    assert_eq!(bed.get("/v2/app/tags/list").await.json()["tags"], serde_json::json!(["c"]));
    bed.stop().await;
}

#[tokio::test]
async fn deleting_a_blob() {
    let bed = Bed::start().await;
    let digest = bed.registry.put_blob("one", b"content").await;
    bed.registry.put_blob("two", b"content").await;
    let path = format!("/v2/one/blobs/{digest}");
    assert_eq!(bed.delete(&path).await.status, 202);
    for answer in [bed.get(&path).await, bed.delete(&path).await] {
        assert_eq!(answer.refusal(), (404, "BLOB_UNKNOWN".to_owned()));
    }
    assert_eq!(bed.head(&path).await.status, 404);
    bed.assert_blob("two", &digest, b"content").await;
    // It can come back.
    bed.registry.put_blob("one", b"content").await;
    bed.assert_blob("one", &digest, b"content").await;
    bed.stop().await;
}

#[tokio::test]
async fn every_error_has_its_code() {
    let bed = Bed::start().await;
    let absent = Digest::of(b"absent");
    let upload = bed.begin("app", "").await;
    let image = |digest: &str| {
        format!("{{\"schemaVersion\":2,\"config\":{{\"digest\":\"{digest}\"}},\"layers\":[]}}").into_bytes()
    };
    let range = [("content-range", "5-9")];
    let typed = [("content-type", OCI_MANIFEST)];
    let found: Vec<(Answer, u16, &str)> = vec![
        (bed.get(&format!("/v2/app/blobs/{absent}")).await, 404, "BLOB_UNKNOWN"),
        (bed.ask(Method::PATCH, &upload, &range, "12345").await, 416, "BLOB_UPLOAD_INVALID"),
        (bed.get("/v2/app/blobs/uploads/0").await, 404, "BLOB_UPLOAD_UNKNOWN"),
        (bed.get("/v2/app/blobs/sha256:0").await, 400, "DIGEST_INVALID"),
        (bed.finish(&upload, &absent, b"x").await, 400, "DIGEST_INVALID"),
        (
            bed.ask(Method::PUT, "/v2/app/manifests/t", &typed, image(absent.as_str())).await,
            404,
            "MANIFEST_BLOB_UNKNOWN",
        ),
        (bed.ask(Method::PUT, "/v2/app/manifests/t", &typed, "x").await, 400, "MANIFEST_INVALID"),
        (bed.get("/v2/app/manifests/t").await, 404, "MANIFEST_UNKNOWN"),
        (bed.get("/v2/App/manifests/t").await, 400, "NAME_INVALID"),
        (bed.get("/v2/never/seen/tags/list").await, 404, "NAME_UNKNOWN"),
        (bed.ask(Method::PUT, "/v2/app/tags/list", &[], "").await, 405, "UNSUPPORTED"),
        (bed.get("/v1/").await, 404, "UNSUPPORTED"),
    ];
    for (answer, status, code) in found {
        assert_eq!(answer.header("content-type"), "application/json");
        let error = &answer.json()["errors"][0];
        assert!(error.get("detail").is_some(), "{error}");
        assert_eq!(answer.refusal(), (status, code.to_owned()));
    }
    let anonymous = bed.registry.anonymous(Method::GET, "/v2/").send().await.unwrap();
    assert_eq!(crate::support::code(anonymous).await, (401, "UNAUTHORIZED".to_owned()));
    bed.stop().await;
}

#[tokio::test]
async fn unknown_methods() {
    let bed = Bed::start().await;
    let (digest, upload) = (Digest::of(b"x"), bed.begin("app", "").await);
    for (path, allowed) in [
        ("/v2/".to_owned(), "GET, HEAD"),
        ("/v2/app/tags/list".to_owned(), "GET, HEAD"),
        ("/v2/app/manifests/t".to_owned(), "GET, HEAD, PUT, DELETE"),
        (format!("/v2/app/referrers/{digest}"), "GET, HEAD"),
        (format!("/v2/app/blobs/{digest}"), "GET, HEAD, DELETE"),
        ("/v2/app/blobs/uploads/".to_owned(), "POST"),
        (upload, "GET, PATCH, PUT, DELETE"),
    ] {
        for method in [Method::OPTIONS, Method::from_bytes(b"BREW").unwrap()] {
            let answer = bed.ask(method, &path, &[], "").await;
            assert_eq!(answer.header("allow"), allowed, "{path}");
            assert_eq!(answer.refusal(), (405, "UNSUPPORTED".to_owned()), "{path}");
        }
    }
    bed.stop().await;
}

#[tokio::test]
async fn names() {
    let bed = Bed::start().await;
    let long = format!("a/{}", "b".repeat(253));
    for name in ["a", "a/b/c/d", "a.b_c__d-e--f/0", "tags/list", "blobs/uploads", long.as_str()] {
        let digest = bed.registry.put_blob(name, b"content").await;
        bed.assert_blob(name, &digest, b"content").await;
    }
    let digest = Digest::of(b"content");
    let too_long = format!("{long}c");
    for name in [
        "A",
        "a..b",
        "a/",
        "/a",
        "a//b",
        "-a",
        "a_",
        "a___b",
        "a b",
        "a%00",
        "ä",
        "_a",
        "a/_b",
        too_long.as_str(),
    ] {
        let path = format!("/v2/{name}/blobs/{digest}");
        assert_eq!(bed.get(&path).await.refusal(), (400, "NAME_INVALID".to_owned()), "{name}");
        let post = bed.ask(Method::POST, &format!("/v2/{name}/blobs/uploads/"), &[], "").await;
        assert_eq!(post.refusal(), (400, "NAME_INVALID".to_owned()), "{name}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn names_of_tags() {
    let bed = Bed::start().await;
    let (_, bytes) = bed.registry.put_image("app", "a", "seed").await;
    let long = "x".repeat(128);
    for tag in ["latest", "_", "1.0.0-rc.1", "A_b.c-d", long.as_str()] {
        assert_eq!(bed.put_manifest("app", tag, OCI_MANIFEST, &bytes).await.status, 201, "{tag}");
        assert_eq!(bed.get(&format!("/v2/app/manifests/{tag}")).await.body, bytes, "{tag}");
    }
    let too_long = format!("{long}x");
    for tag in [".a", "-a", "a+b", "a%20b", "ä", too_long.as_str()] {
        let put = bed.put_manifest("app", tag, OCI_MANIFEST, &bytes).await;
        assert_eq!(put.refusal(), (400, "MANIFEST_INVALID".to_owned()), "{tag}");
        let get = bed.get(&format!("/v2/app/manifests/{tag}")).await;
        assert_eq!(get.refusal(), (404, "MANIFEST_UNKNOWN".to_owned()), "{tag}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn a_cache_warns_when_it_cannot_ask() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let cache = Registry::cache(&dir.path().join("cache"), &origin.url(), &origin.dir).await;
    let (_, bytes) = origin.put_image("app", "v1", "seed").await;
    let ask = async || {
        let answer = cache.request(Method::GET, "/v2/app/manifests/v1").send().await.unwrap();
        let warning = crate::support::header(&answer, "warning");
        assert_eq!(answer.bytes().await.unwrap(), bytes);
        warning
    };
    assert_eq!(ask().await, "");
    origin.stop().await;
    let warning = ask().await;
    let text = warning.strip_prefix("299 - \"").and_then(|rest| rest.strip_suffix('"')).unwrap();
    assert!(text.contains("can't be asked") && text.is_ascii() && !text.contains('"'), "{warning}");
    cache.stop().await;
}
