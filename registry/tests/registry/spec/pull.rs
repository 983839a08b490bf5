//! Rows about pulling.

use anyplace_images::Digest;
use reqwest::Method;

use super::Bed;
use crate::support::{OCI_MANIFEST, Registry, cache_config, noise};

#[tokio::test]
async fn the_base_says_that_this_is_a_registry() {
    let bed = Bed::start().await;
    for path in ["/v2/", "/v2"] {
        let answer = bed.get(path).await;
        assert_eq!(
            (answer.status, answer.header("docker-distribution-api-version")),
            (200, "registry/2.0".into())
        );
    }
    bed.stop().await;
}

#[tokio::test]
async fn manifests_come_as_they_were_pushed() {
    let bed = Bed::start().await;
    let (digest, bytes) = bed.registry.put_image("team/app", "v1", "seed").await;
    for key in ["v1", digest.as_str()] {
        let answer = bed.get(&format!("/v2/team/app/manifests/{key}")).await;
        assert_eq!((answer.status, &answer.body), (200, &bytes));
        assert_eq!(answer.header("content-type"), OCI_MANIFEST);
        assert_eq!(answer.header("content-length"), bytes.len().to_string());
        assert_eq!(answer.header("docker-content-digest"), digest.to_string());
        assert_eq!(answer.header("etag"), format!("\"{digest}\""));
    }
    bed.stop().await;
}

#[tokio::test]
async fn heads_are_like_gets_without_a_body() {
    let bed = Bed::start().await;
    let (manifest, _) = bed.registry.put_image("app", "v1", "seed").await;
    let blob = bed.registry.put_blob("app", b"content").await;
    for path in [
        "/v2/app/manifests/v1".to_owned(),
        format!("/v2/app/manifests/{manifest}"),
        format!("/v2/app/blobs/{blob}"),
    ] {
        let (head, get) = (bed.head(&path).await, bed.get(&path).await);
        assert_eq!((head.status, head.body.len()), (200, 0));
        for name in ["content-length", "content-type", "docker-content-digest", "etag"] {
            assert_eq!(head.header(name), get.header(name), "{path} {name}");
            assert_ne!(head.header(name), "", "{path} {name}");
        }
    }
    bed.stop().await;
}

#[tokio::test]
async fn what_is_absent_is_404() {
    let bed = Bed::start().await;
    let (other, _) = bed.registry.put_image("other", "v1", "seed").await;
    let absent = Digest::of(b"absent");
    let blob = Digest::of(b"seed");
    for (path, code) in [
        ("/v2/app/manifests/v1".to_owned(), "MANIFEST_UNKNOWN"),
        ("/v2/other/manifests/v2".to_owned(), "MANIFEST_UNKNOWN"),
        (format!("/v2/other/manifests/{absent}"), "MANIFEST_UNKNOWN"),
        // What another repository has isn't here.
        (format!("/v2/app/manifests/{other}"), "MANIFEST_UNKNOWN"),
        (format!("/v2/app/blobs/{blob}"), "BLOB_UNKNOWN"),
        (format!("/v2/other/blobs/{absent}"), "BLOB_UNKNOWN"),
    ] {
        assert_eq!(bed.get(&path).await.refusal(), (404, code.to_owned()), "{path}");
        assert_eq!(bed.head(&path).await.status, 404, "{path}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn the_type_is_the_pushed_one_whatever_is_accepted() {
    let bed = Bed::start().await;
    let (_, bytes) = bed.registry.put_image("app", "v1", "seed").await;
    for accept in ["application/vnd.oci.image.index.v1+json", "*/*", OCI_MANIFEST, "text/plain"] {
        let answer = bed.ask(Method::GET, "/v2/app/manifests/v1", &[("accept", accept)], "").await;
        assert_eq!(
            (answer.status, answer.header("content-type")),
            (200, OCI_MANIFEST.to_owned()),
            "{accept}"
        );
        assert_eq!(answer.body, bytes);
    }
    bed.stop().await;
}

#[tokio::test]
async fn ranges_of_blobs() {
    let bed = Bed::start().await;
    // Over several of the parts that large files are served in.
    let bytes = noise(31, 3_000_000);
    let digest = bed.registry.put_blob("app", &bytes).await;
    let path = format!("/v2/app/blobs/{digest}");
    for (range, first, last) in [
        ("bytes=0-0", 0, 0),
        ("bytes=500-1499", 500, 1_499),
        ("bytes=1048570-2097160", 1_048_570, 2_097_160),
        ("bytes=2999999-", 2_999_999, 2_999_999),
        ("bytes=100000-", 100_000, 2_999_999),
        ("bytes=-500", 2_999_500, 2_999_999),
        ("bytes=-9000000", 0, 2_999_999),
        ("bytes=2999000-5000000", 2_999_000, 2_999_999),
    ] {
        let answer = bed.ask(Method::GET, &path, &[("range", range)], "").await;
        assert_eq!(answer.status, 206, "{range}");
        assert_eq!(answer.header("content-range"), format!("bytes {first}-{last}/3000000"));
        assert_eq!(answer.header("content-length"), (last - first + 1).to_string());
        assert_eq!(answer.header("docker-content-digest"), digest.to_string());
        assert!(answer.body == bytes[first..=last], "{range}");
    }
    let whole = bed.get(&path).await;
    assert_eq!((whole.status, whole.header("accept-ranges")), (200, "bytes".to_owned()));
    // Several ranges, or another unit: all of it, as HTTP allows.
    for range in ["bytes=0-1,5-6", "lines=1-2"] {
        let answer = bed.ask(Method::GET, &path, &[("range", range)], "").await;
        assert_eq!((answer.status, answer.body.len()), (200, bytes.len()), "{range}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn ranges_that_cannot_be() {
    let bed = Bed::start().await;
    let digest = bed.registry.put_blob("app", &noise(32, 2_048)).await;
    for range in ["bytes=2048-", "bytes=5000-10000", "bytes=500-0", "bytes=-0"] {
        let answer = bed.ask(Method::GET, &format!("/v2/app/blobs/{digest}"), &[("range", range)], "").await;
        assert_eq!(answer.header("content-range"), "bytes */2048", "{range}");
        assert_eq!(answer.refusal(), (416, "SIZE_INVALID".to_owned()), "{range}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn a_range_of_other_content_gets_everything() {
    let bed = Bed::start().await;
    let digest = bed.registry.put_blob("app", b"0123456789").await;
    let path = format!("/v2/app/blobs/{digest}");
    for (tag, status) in [(format!("\"{digest}\""), 206), ("\"other\"".to_owned(), 200)] {
        let headers = [("range", "bytes=2-4"), ("if-range", tag.as_str())];
        assert_eq!(bed.ask(Method::GET, &path, &headers, "").await.status, status, "{tag}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn known_content_is_not_sent_again() {
    let bed = Bed::start().await;
    let (manifest, _) = bed.registry.put_image("app", "v1", "seed").await;
    let blob = bed.registry.put_blob("app", b"content").await;
    for (path, digest) in [
        ("/v2/app/manifests/v1".to_owned(), &manifest),
        (format!("/v2/app/manifests/{manifest}"), &manifest),
        (format!("/v2/app/blobs/{blob}"), &blob),
    ] {
        let tag = format!("\"other\", \"{digest}\"");
        for method in [Method::GET, Method::HEAD] {
            let answer = bed.ask(method, &path, &[("if-none-match", &tag)], "").await;
            assert_eq!((answer.status, answer.body.len()), (304, 0), "{path}");
            assert_eq!(answer.header("etag"), format!("\"{digest}\""));
        }
        let answer = bed.ask(Method::GET, &path, &[("if-none-match", "\"other\"")], "").await;
        assert_eq!(answer.status, 200);
    }
    // The tag moves: what the client has is old.
    bed.registry.put_image("app", "v1", "newer").await;
    let old = format!("\"{manifest}\"");
    let answer = bed.ask(Method::GET, "/v2/app/manifests/v1", &[("if-none-match", &old)], "").await;
    assert_eq!(answer.status, 200);
    bed.stop().await;
}

#[tokio::test]
async fn paths_may_be_percent_encoded() {
    let bed = Bed::start().await;
    let digest = bed.registry.put_blob("team/app", b"content").await;
    let encoded = digest.to_string().replace(':', "%3A");
    for path in [format!("/v2/team/app/blobs/{encoded}"), format!("/v2/team%2Fapp/blobs/{digest}")] {
        assert_eq!(bed.get(&path).await.body, b"content", "{path}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn an_empty_blob() {
    let bed = Bed::start().await;
    let digest = bed.registry.put_blob("app", b"").await;
    let path = format!("/v2/app/blobs/{digest}");
    for answer in [bed.get(&path).await, bed.head(&path).await] {
        assert_eq!((answer.status, answer.body.len()), (200, 0));
        assert_eq!(answer.header("content-length"), "0");
    }
    assert_eq!(bed.ask(Method::GET, &path, &[("range", "bytes=0-")], "").await.status, 416);
    bed.stop().await;
}

#[tokio::test]
async fn a_mirror_is_told_which_registry_is_meant() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let (digest, bytes) = origin.put_image("library/app", "v1", "seed").await;
    let mut config = cache_config(&dir.path().join("mirror"), &[(&origin.url(), &origin.dir)]);
    config.upstreams[0].namespace = Some("registry.example".to_owned());
    let bed = Bed { registry: Registry::start_with(config).await, dir };
    for key in ["v1", digest.as_str()] {
        let answer = bed.get(&format!("/v2/library/app/manifests/{key}?ns=registry.example")).await;
        assert_eq!((answer.status, &answer.body), (200, &bytes), "{key}");
        assert_eq!(answer.header("oci-namespace"), "registry.example");
    }
    let layer = bed.get(&format!("/v2/library/app/blobs/{}?ns=registry.example", Digest::of(b"seed"))).await;
    assert_eq!(
        (layer.body.as_slice(), layer.header("oci-namespace")),
        (&b"seed"[..], "registry.example".into())
    );
    // A registry that it doesn't stand in for: it is asked for what it has itself.
    let answer = bed.get("/v2/library/app/manifests/v1?ns=other.example").await;
    assert_eq!((answer.status, answer.header("oci-namespace")), (404, String::new()));
    bed.stop().await;
    origin.stop().await;
}
