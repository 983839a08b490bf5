//! The endpoints of the distribution specification, one by one.

use anyplace_images::Digest;
use reqwest::Method;

use crate::support::{OCI_MANIFEST, Registry, code, header, manifest, noise};

#[tokio::test]
async fn access_needs_the_password() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    for path in ["/v2/", "/v2/a/tags/list", "/v2/a/manifests/x", "/nowhere"] {
        let answer = registry.anonymous(Method::GET, path).send().await.unwrap();
        assert!(header(&answer, "www-authenticate").starts_with("Bearer realm="));
        assert_eq!(code(answer).await, (401, "UNAUTHORIZED".into()), "{path}");
        let wrong = registry.anonymous(Method::GET, path).basic_auth("anyplace", Some("x"));
        assert_eq!(wrong.send().await.unwrap().status(), 401);
    }
    let answer = registry.request(Method::GET, "/v2/").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(header(&answer, "docker-distribution-api-version"), "registry/2.0");
    registry.stop().await;
}

#[tokio::test]
async fn blobs_are_served_whole_and_in_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let bytes = noise(3, 1_000_000);
    let digest = registry.put_blob("team/app", &bytes).await;
    let path = format!("/v2/team/app/blobs/{digest}");
    let head = registry.request(Method::HEAD, &path).send().await.unwrap();
    assert_eq!(head.status(), 200);
    assert_eq!(header(&head, "content-length"), "1000000");
    assert_eq!(header(&head, "docker-content-digest"), digest.to_string());
    let get = registry.request(Method::GET, &path.replace(':', "%3A")).send().await.unwrap();
    assert_eq!(get.status(), 200);
    assert_eq!(get.bytes().await.unwrap(), bytes);
    for (range, expected, content_range) in [
        ("bytes=0-0", &bytes[..1], "bytes 0-0/1000000"),
        ("bytes=300000-699999", &bytes[300_000..700_000], "bytes 300000-699999/1000000"),
        ("bytes=999999-", &bytes[999_999..], "bytes 999999-999999/1000000"),
        ("bytes=-5", &bytes[999_995..], "bytes 999995-999999/1000000"),
    ] {
        let part = registry.request(Method::GET, &path).header("range", range).send().await.unwrap();
        assert_eq!(part.status(), 206, "{range}");
        assert_eq!(header(&part, "content-range"), content_range);
        assert_eq!(header(&part, "content-length"), expected.len().to_string());
        assert_eq!(part.bytes().await.unwrap(), expected, "{range}");
    }
    let none = registry.request(Method::GET, &path).header("range", "bytes=1000000-").send().await.unwrap();
    assert_eq!(header(&none, "content-range"), "bytes */1000000");
    assert_eq!(code(none).await.0, 416);
    let empty = registry.put_blob("team/app", b"").await;
    let get = registry.request(Method::GET, &format!("/v2/team/app/blobs/{empty}")).send().await.unwrap();
    assert_eq!((get.status().as_u16(), get.bytes().await.unwrap().len()), (200, 0));
    registry.stop().await;
}

#[tokio::test]
async fn blobs_belong_to_repositories_and_can_be_mounted_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let digest = registry.put_blob("one", b"content").await;
    let status = async |method: Method, path: String| {
        registry.request(method, &path).send().await.unwrap().status().as_u16()
    };
    assert_eq!(status(Method::HEAD, format!("/v2/two/blobs/{digest}")).await, 404);
    let wrong = format!("/v2/two/blobs/uploads/?mount={digest}&from=three");
    assert_eq!(status(Method::POST, wrong).await, 202);
    let mount = format!("/v2/two/blobs/uploads/?mount={digest}&from=one");
    let mounted = registry.request(Method::POST, &mount).send().await.unwrap();
    assert_eq!(mounted.status(), 201);
    assert_eq!(header(&mounted, "location"), format!("/v2/two/blobs/{digest}"));
    assert_eq!(status(Method::POST, format!("/v2/four/blobs/uploads/?mount={digest}")).await, 201);
    assert_eq!(status(Method::DELETE, format!("/v2/one/blobs/{digest}")).await, 202);
    assert_eq!(status(Method::GET, format!("/v2/one/blobs/{digest}")).await, 404);
    assert_eq!(status(Method::DELETE, format!("/v2/one/blobs/{digest}")).await, 404);
    let other = registry.request(Method::GET, &format!("/v2/two/blobs/{digest}")).send().await.unwrap();
    assert_eq!(other.bytes().await.unwrap(), "content");
    registry.stop().await;
}

#[tokio::test]
async fn manifests_are_byte_exact_by_tag_and_digest() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let (digest, bytes) = registry.put_image("a/b", "v1", "seed").await;
    for key in ["v1", digest.as_str()] {
        for method in [Method::GET, Method::HEAD] {
            let path = format!("/v2/a/b/manifests/{key}");
            let answer = registry.request(method.clone(), &path).send().await.unwrap();
            assert_eq!(answer.status(), 200);
            assert_eq!(header(&answer, "content-type"), OCI_MANIFEST);
            assert_eq!(header(&answer, "docker-content-digest"), digest.to_string());
            assert_eq!(header(&answer, "content-length"), bytes.len().to_string());
            let expected = if method == Method::HEAD { &[][..] } else { &bytes[..] };
            assert_eq!(answer.bytes().await.unwrap(), expected);
        }
    }
    // A tag moves; the old manifest stays by its digest until it is deleted, with the tags that lead to it.
    let (newer, _) = registry.put_image("a/b", "v1", "other").await;
    assert_ne!(newer, digest);
    registry.put_image("a/b", "old", "seed").await;
    let by_tag = registry.request(Method::HEAD, "/v2/a/b/manifests/v1").send().await.unwrap();
    assert_eq!(header(&by_tag, "docker-content-digest"), newer.to_string());
    let path = format!("/v2/a/b/manifests/{digest}");
    assert_eq!(registry.request(Method::GET, &path).send().await.unwrap().status(), 200);
    assert_eq!(registry.request(Method::DELETE, &path).send().await.unwrap().status(), 202);
    assert_eq!(registry.request(Method::DELETE, &path).send().await.unwrap().status(), 404);
    for gone in [&path, "/v2/a/b/manifests/old"] {
        let answer = registry.request(Method::GET, gone).send().await.unwrap();
        assert_eq!(code(answer).await, (404, "MANIFEST_UNKNOWN".into()));
    }
    assert_eq!(registry.request(Method::DELETE, "/v2/a/b/manifests/v1").send().await.unwrap().status(), 202);
    let tags: serde_json::Value =
        registry.request(Method::GET, "/v2/a/b/tags/list").send().await.unwrap().json().await.unwrap();
    assert_eq!(tags, serde_json::json!({ "name": "a/b", "tags": [] }));
    registry.stop().await;
}

#[tokio::test]
async fn manifests_of_each_type_keep_it() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let config = registry.put_blob("a", b"{}").await;
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    let index = "application/vnd.oci.image.index.v1+json";
    let list = "application/vnd.docker.distribution.manifest.list.v2+json";
    let image = String::from_utf8(manifest(&config, 2, &[])).unwrap();
    let missing = Digest::of(b"not here");
    let children = format!(
        "{{\"schemaVersion\":2,\"manifests\":[{{\"mediaType\":\"{OCI_MANIFEST}\",\"digest\":\"{missing}\",\"size\":8}}]}}"
    );
    let untyped = image.replace(&format!(" \"mediaType\":\"{OCI_MANIFEST}\",\n"), "");
    for (media_type, body) in [
        (
            docker,
            image.replace(
                &format!("\"mediaType\":\"{OCI_MANIFEST}\""),
                &format!("\"mediaType\":\"{docker}\""),
            ),
        ),
        (index, children.clone()),
        (list, children),
        (OCI_MANIFEST, untyped),
    ] {
        let put = registry.request(Method::PUT, "/v2/a/manifests/t").header("content-type", media_type);
        let put = put.body(body.clone()).send().await.unwrap();
        assert_eq!(put.status(), 201, "{media_type} {}", put.text().await.unwrap());
        let get = registry.request(Method::GET, "/v2/a/manifests/t").send().await.unwrap();
        assert_eq!(header(&get, "content-type"), media_type);
        assert_eq!(get.text().await.unwrap(), body);
    }
    registry.stop().await;
}

#[tokio::test]
async fn bad_manifests_are_refused_with_the_right_code() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let config = registry.put_blob("a", b"{}").await;
    let (missing, wrong) = (Digest::of(b"missing"), Digest::of(b"wrong"));
    let good = manifest(&config, 2, &[]);
    let incomplete = manifest(&config, 2, &[(&missing, 7)]);
    let old = b"{\"schemaVersion\":1}".to_vec();
    for (key, media_type, body, expected) in [
        ("t", OCI_MANIFEST, b"nonsense".to_vec(), (400, "MANIFEST_INVALID")),
        ("t", OCI_MANIFEST, old, (400, "MANIFEST_INVALID")),
        ("t", "text/plain", good.clone(), (400, "MANIFEST_INVALID")),
        ("t", OCI_MANIFEST, incomplete, (404, "MANIFEST_BLOB_UNKNOWN")),
        (".t", OCI_MANIFEST, good.clone(), (400, "MANIFEST_INVALID")),
        (wrong.as_str(), OCI_MANIFEST, good.clone(), (400, "DIGEST_INVALID")),
        ("sha256:12", OCI_MANIFEST, good.clone(), (400, "DIGEST_INVALID")),
        ("t", OCI_MANIFEST, vec![b' '; (4 << 20) + 1], (413, "MANIFEST_INVALID")),
    ] {
        let path = format!("/v2/a/manifests/{key}");
        let request = registry.request(Method::PUT, &path).header("content-type", media_type);
        let found = code(request.body(body).send().await.unwrap()).await;
        assert_eq!((found.0, found.1.as_str()), expected, "{key} {media_type}");
    }
    let none = registry.request(Method::GET, "/v2/a/manifests/t").send().await.unwrap();
    assert_eq!(code(none).await, (404, "MANIFEST_UNKNOWN".into()));
    registry.stop().await;
}

#[tokio::test]
async fn what_is_not_there_is_refused_with_the_right_code() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let digest = Digest::of(b"x");
    let id = "0".repeat(48);
    for (method, path, expected) in [
        (Method::GET, "/v3/".to_owned(), (404, "UNSUPPORTED")),
        (Method::GET, "/v2/Bad/tags/list".to_owned(), (400, "NAME_INVALID")),
        (Method::GET, "/v2/a/../b/tags/list".to_owned(), (404, "NAME_UNKNOWN")),
        (Method::GET, "/v2/a/%2e%2e/b/tags/list".to_owned(), (404, "NAME_UNKNOWN")),
        (Method::GET, "/v2/a%2f..%2fb/tags/list".to_owned(), (400, "NAME_INVALID")),
        (Method::GET, "/v2/a/tags/list".to_owned(), (404, "NAME_UNKNOWN")),
        (Method::GET, "/v2/a/manifests/v1".to_owned(), (404, "MANIFEST_UNKNOWN")),
        (Method::GET, format!("/v2/a/manifests/{digest}"), (404, "MANIFEST_UNKNOWN")),
        (Method::GET, "/v2/a/manifests/.bad".to_owned(), (404, "MANIFEST_UNKNOWN")),
        (Method::DELETE, "/v2/a/manifests/v1".to_owned(), (404, "MANIFEST_UNKNOWN")),
        (Method::GET, format!("/v2/a/blobs/{digest}"), (404, "BLOB_UNKNOWN")),
        (Method::GET, "/v2/a/blobs/sha256:12".to_owned(), (400, "DIGEST_INVALID")),
        (Method::GET, format!("/v2/a/blobs/uploads/{id}"), (404, "BLOB_UPLOAD_UNKNOWN")),
        (Method::PATCH, "/v2/a/blobs/uploads/..%2fx".to_owned(), (404, "UNSUPPORTED")),
        (Method::POST, "/v2/a/manifests/v1".to_owned(), (405, "UNSUPPORTED")),
        (Method::PUT, format!("/v2/a/blobs/{digest}"), (405, "UNSUPPORTED")),
    ] {
        let found = code(registry.request(method.clone(), &path).send().await.unwrap()).await;
        assert_eq!((found.0, found.1.as_str()), expected, "{method} {path}");
    }
    registry.stop().await;
}

#[tokio::test]
async fn tags_are_listed_sorted_and_in_pages() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    for tag in ["b", "a", "d", "c", "A", "0"] {
        registry.put_image("app", tag, "seed").await;
    }
    registry.put_image("app/other", "x", "seed").await;
    let page = async |query: &str| {
        let path = format!("/v2/app/tags/list{query}");
        let answer = registry.request(Method::GET, &path).send().await.unwrap();
        let link = header(&answer, "link");
        let body: serde_json::Value = answer.json().await.unwrap();
        let tags = body["tags"].as_array().unwrap().iter().map(|t| t.as_str().unwrap().to_owned());
        (tags.collect::<Vec<_>>().join(""), link)
    };
    assert_eq!(page("").await, ("0Aabcd".into(), String::new()));
    let next = "</v2/app/tags/list?n=2&last=A>; rel=\"next\"";
    assert_eq!(page("?n=2").await, ("0A".into(), next.into()));
    assert_eq!(page("?n=2&last=A").await.0, "ab");
    assert_eq!(page("?n=2&last=b").await, ("cd".into(), String::new()));
    assert_eq!(page("?n=0").await, (String::new(), String::new()));
    assert_eq!(page("?last=zz").await, (String::new(), String::new()));
    let reference = "app".parse().unwrap();
    assert_eq!(registry.client().list_tags(&reference).await.unwrap().len(), 6);
    registry.stop().await;
}

#[tokio::test]
async fn what_is_remembered_follows_other_writers() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Registry::start(dir.path()).await;
    let reader = Registry::start(dir.path()).await;
    let read = async |key: &str| {
        let path = format!("/v2/app/manifests/{key}");
        let answer = reader.request(Method::GET, &path).send().await.unwrap();
        (answer.status().as_u16(), answer.bytes().await.unwrap().to_vec())
    };
    let mut last = None;
    for round in 0..50 {
        let (digest, bytes) = writer.put_image("app", "t", &format!("seed {round}")).await;
        for _ in 0..3 {
            assert_eq!(read("t").await, (200, bytes.clone()), "{round}");
            assert_eq!(read(digest.as_str()).await, (200, bytes.clone()), "{round}");
        }
        last = Some(digest);
    }
    let digest = last.unwrap();
    writer.request(Method::DELETE, &format!("/v2/app/manifests/{digest}")).send().await.unwrap();
    assert_eq!((read("t").await.0, read(digest.as_str()).await.0), (404, 404));
    reader.stop().await;
    writer.stop().await;
}
