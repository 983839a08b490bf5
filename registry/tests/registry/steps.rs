//! Parts of uploads that copy ranges of the repository's blobs, as `docs/registry-api.md` has them: raw requests, on a
//! folder and on a bucket.

use anyplace_images::Digest;
use anyplace_registry::Config;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

use crate::access::{account, team};
use crate::killable::Killable;
use crate::stores;
use crate::support::{LOOPBACK, Registry, code, header, noise};

const MEDIA_TYPE: &str = "application/vnd.anyplace.upload.steps.v1";
const STEPS_MAX: &str = "anyplace-upload-steps-max";

/// A part by steps: its line, and the bytes that follow.
fn by_steps(request: RequestBuilder, range: &str, line: &Value, bytes: &[u8]) -> RequestBuilder {
    let body = [line.to_string().as_bytes(), b"\n", bytes].concat();
    request.header("content-type", MEDIA_TYPE).header("content-range", range).body(body)
}

async fn begin(registry: &Registry, name: &str) -> String {
    let answer = registry.request(Method::POST, &format!("/v2/{name}/blobs/uploads/")).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), header(&answer, STEPS_MAX)), (202, "10000".into()));
    header(&answer, "location")
}

async fn patch(registry: &Registry, location: &str, range: &str, line: &Value, bytes: &[u8]) -> Response {
    by_steps(registry.request(Method::PATCH, location), range, line, bytes).send().await.unwrap()
}

async fn offset(registry: &Registry, location: &str) -> String {
    let answer = registry.request(Method::GET, location).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), header(&answer, STEPS_MAX)), (204, "10000".into()));
    header(&answer, "range")
}

async fn finish(registry: &Registry, location: &str, expected: &[u8]) {
    let digest = Digest::of(expected);
    let put = registry.request(Method::PUT, &format!("{location}?digest={digest}")).send().await.unwrap();
    assert_eq!(put.status(), 201, "{}", put.text().await.unwrap());
    let got = registry.request(Method::GET, &header(&put, "location")).send().await.unwrap();
    assert!(got.bytes().await.unwrap() == expected);
}

/// Blobs of several parts of a bucket's objects, ranges across all, backward and forward, close and far, in two requests.
async fn copies(registry: &Registry) {
    let (one, two) = (noise(1, 20_000_000), noise(2, 700_000));
    let blobs = [registry.put_blob("a", &one).await, registry.put_blob("a", &two).await];
    let new = noise(3, 50_000);
    let location = begin(registry, "a").await;
    let line = json!({ "blobs": blobs, "steps": [
        [10], [0, 100, 5], [3], [0, 108, 1_000_000], [1, 0, 700_000], [0, 17_000_000, 3_000_000], [1], [0, 0, 90],
    ]});
    let first = [
        &new[..10],
        &one[100..105],
        &new[10..13],
        &one[108..1_000_108],
        &two,
        &one[17_000_000..],
        &new[13..14],
    ];
    let first = [first.concat(), one[..90].to_vec()].concat();
    let range = format!("0-{}", first.len() - 1);
    let answer = patch(registry, &location, &range, &line, &new[..14]).await;
    assert_eq!((answer.status().as_u16(), header(&answer, "range")), (202, range));
    // An ordinary part, and one more by steps.
    let at = first.len();
    let range = format!("{at}-{}", at + 999);
    let plain = registry.request(Method::PATCH, &location).header("content-range", range);
    assert_eq!(plain.body(new[14..1_014].to_vec()).send().await.unwrap().status(), 202);
    let range = format!("{}-{}", at + 1_000, at + 1_000 + 16_000_000 + 10 - 1);
    let line = json!({ "blobs": [blobs[0]], "steps": [[0, 123, 16_000_000], [10]] });
    let answer = patch(registry, &location, &range, &line, &new[..10]).await;
    assert_eq!(answer.status(), 202, "{}", answer.text().await.unwrap());
    let whole = [&first[..], &new[14..1_014], &one[123..16_000_123], &new[..10]].concat();
    finish(registry, &location, &whole).await;
    let metrics = registry.request(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    let copied = 5 + 1_000_000 + 700_000 + 3_000_000 + 90 + 16_000_000;
    assert!(metrics.contains(&format!("anyplace_registry_copied_bytes_total {copied}\n")), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_are_copied_in_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    copies(&registry).await;
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_are_copied_in_a_bucket() {
    let (dir, store) = (tempfile::tempdir().unwrap(), stores::s3s().await);
    let storage = toml::from_str(&store.settings(store.address, "r")).unwrap();
    let config = Config { storage, listen: LOOPBACK, ..Config::new(dir.path()) };
    let registry = Registry::start_with(config).await;
    copies(&registry).await;
    registry.stop().await;
}

#[tokio::test]
async fn what_cannot_be_copied_is_refused_and_the_upload_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let here = registry.put_blob("a", b"0123456789").await;
    let elsewhere = registry.put_blob("b", b"somewhere else").await;
    let location = begin(&registry, "a").await;
    let steps = |blob: &Digest, steps: Value| json!({ "blobs": [blob], "steps": steps });
    for (line, range, bytes, expected) in [
        // Of another repository, or nowhere; also where the range of it is empty of sense.
        (steps(&elsewhere, json!([[0, 0, 4]])), "0-3", "", (409, "BLOB_UNKNOWN")),
        (steps(&Digest::of(b"none"), json!([[1]])), "0-0", "x", (409, "BLOB_UNKNOWN")),
        (steps(&here, json!([[0, 7, 4]])), "0-3", "", (400, "SIZE_INVALID")),
        (steps(&here, json!([[0, 0, 4]])), "0-4", "", (400, "SIZE_INVALID")),
        (steps(&here, json!([[0, 0, 4]])), "1-4", "", (416, "BLOB_UPLOAD_INVALID")),
        (steps(&here, json!([[0, 0, 600_000_000]])), "0-599999999", "", (400, "SIZE_INVALID")),
        (steps(&here, json!([[0, 0]])), "0-3", "", (400, "BLOB_UPLOAD_INVALID")),
        (json!([]), "0-3", "", (400, "BLOB_UPLOAD_INVALID")),
        (steps(&here, json!(vec![[1]; 10_001])), "0-10000", "", (413, "SIZE_INVALID")),
    ] {
        let answer = patch(&registry, &location, range, &line, bytes.as_bytes()).await;
        assert_eq!(code(answer).await, (expected.0, expected.1.to_owned()), "{range} {line}");
        assert_eq!(offset(&registry, &location).await, "0-0", "{line}");
    }
    // Without a range, two of the same request would add up.
    let line = steps(&here, json!([[0, 0, 4]]));
    let request = registry.request(Method::PATCH, &location).header("content-type", MEDIA_TYPE);
    let answer = request.body(format!("{line}\n")).send().await.unwrap();
    assert_eq!(code(answer).await, (400, "BLOB_UPLOAD_INVALID".into()));
    // A line that never ends.
    let request = registry.request(Method::PATCH, &location).header("content-type", MEDIA_TYPE);
    let answer = request.header("content-range", "0-3").body(vec![b' '; 3 << 20]).send().await.unwrap();
    assert_eq!(code(answer).await, (413, "SIZE_INVALID".into()));
    // Too few bytes after the line: what came counts, as where any body breaks off. Too many, too.
    let line = steps(&here, json!([[0, 0, 4], [3]]));
    let answer = patch(&registry, &location, "0-6", &line, b"ab").await;
    assert_eq!(code(answer).await, (400, "BLOB_UPLOAD_INVALID".into()));
    assert_eq!(offset(&registry, &location).await, "0-5");
    let answer = patch(&registry, &location, "6-12", &line, b"abcd").await;
    assert_eq!(code(answer).await, (400, "BLOB_UPLOAD_INVALID".into()));
    assert_eq!(offset(&registry, &location).await, "0-12");
    finish(&registry, &location, b"0123ab0123abc").await;
    registry.stop().await;
}

/// Who may only push would learn from the digest that ends an upload what a blob holds.
#[tokio::test]
async fn only_who_may_pull_copies() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let blob = registry.put_blob("vision/app", b"a secret").await;
    let other = registry.put_blob("secret/plans", b"the plans").await;
    for (name, grants, may) in
        [("both", json!(["vision/**:pull,push"]), true), ("writer", json!(["vision/**:push"]), false)]
    {
        let secret = account(&registry, name, json!({ "grants": grants })).await;
        let request = |method, path: &str| registry.anonymous(method, path).basic_auth(name, Some(&secret));
        let answer = request(Method::POST, "/v2/vision/app/blobs/uploads/").send().await.unwrap();
        assert_eq!((answer.status().as_u16(), !header(&answer, STEPS_MAX).is_empty()), (202, may), "{name}");
        let location = header(&answer, "location");
        let line = json!({ "blobs": [blob], "steps": [[0, 0, 8]] });
        let answer = by_steps(request(Method::PATCH, &location), "0-7", &line, b"").send().await.unwrap();
        if may {
            assert_eq!(answer.status(), 202);
        } else {
            assert_eq!(code(answer).await, (403, "DENIED".into()));
        }
        let at = if may { "8-11" } else { "0-3" };
        let line = json!({ "blobs": [other], "steps": [[0, 0, 4]] });
        let answer = by_steps(request(Method::PATCH, &location), at, &line, b"").send().await.unwrap();
        assert_eq!(answer.status(), if may { 409 } else { 403 });
    }
    registry.stop().await;
}

#[tokio::test]
async fn copied_bytes_count_as_if_they_had_come() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let spec = json!({ "repositories": ["vision/**"], "quota_bytes": 1_000_000 });
    team(&registry, "vision", spec).await;
    let bytes = noise(9, 400_000);
    let blob = registry.put_blob("vision/app", &bytes).await;
    let location = begin(&registry, "vision/app").await;
    let line = |len: u64| json!({ "blobs": [blob], "steps": [[0, 0, len]] });
    assert_eq!(patch(&registry, &location, "0-399999", &line(400_000), b"").await.status(), 202);
    let over = patch(&registry, &location, "400000-600000", &line(200_001), b"").await;
    assert_eq!(code(over).await, (403, "DENIED".into()));
    assert_eq!(offset(&registry, &location).await, "0-399999");
    assert_eq!(patch(&registry, &location, "400000-599999", &line(200_000), b"").await.status(), 202);
    // A wrong digest gives them back.
    let wrong = registry.request(Method::PUT, &format!("{location}?digest={}", Digest::of(b"wrong")));
    assert_eq!(code(wrong.send().await.unwrap()).await, (400, "DIGEST_INVALID".into()));
    let location = begin(&registry, "vision/app").await;
    assert_eq!(patch(&registry, &location, "0-399999", &line(400_000), b"").await.status(), 202);
    registry.stop().await;
}

/// The bytes that were copied when the registry was killed count only if the part was acknowledged.
#[tokio::test]
async fn a_part_that_was_not_acknowledged_is_copied_again_after_a_kill() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let dir = tempfile::tempdir().unwrap();
    let mut child = Killable::start(dir.path(), "").await;
    let credentials = anyplace_images::Credentials::from_file(&dir.path().join("credentials")).unwrap();
    anyplace_service::install_crypto_provider();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = |method: Method, url: String| {
        http.request(method, url).basic_auth(&credentials.user, Some(&credentials.password))
    };
    let bytes = noise(4, 3_000_000);
    let blob = Digest::of(&bytes);
    let post = request(Method::POST, format!("{}/v2/a/blobs/uploads/?digest={blob}", child.url));
    assert_eq!(post.body(bytes.clone()).send().await.unwrap().status(), 201);
    let post = request(Method::POST, format!("{}/v2/a/blobs/uploads/", child.url)).send().await.unwrap();
    let location = header(&post, "location");
    let line = json!({ "blobs": [blob], "steps": [[0, 0, 1_000_000]] });
    let patch = request(Method::PATCH, format!("{}{location}", child.url));
    assert_eq!(by_steps(patch, "0-999999", &line, b"").send().await.unwrap().status(), 202);
    // The copy is done, and the registry waits for the last bytes of the part.
    let mut connection = tokio::net::TcpStream::connect(&child.address).await.unwrap();
    let line = json!({ "blobs": [blob], "steps": [[0, 1_000_000, 2_000_000], [10]] });
    let login = format!("{}:{}", credentials.user, credentials.password);
    let head = format!(
        "PATCH {location} HTTP/1.1\r\nhost: x\r\nauthorization: Basic {}\r\ncontent-type: {MEDIA_TYPE}\r\n\
         content-range: 1000000-3000009\r\ncontent-length: {}\r\n\r\n{line}\n",
        base64::Engine::encode(&base64::prelude::BASE64_STANDARD, login),
        line.to_string().len() + 11
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let upload = dir.path().join("uploads").join(location.rsplit('/').next().unwrap());
    while std::fs::metadata(&upload).unwrap().len() < 2_500_000 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    child.kill();
    assert_eq!(connection.read(&mut [0; 100]).await.unwrap_or(0), 0, "it was answered");
    let child = Killable::start(dir.path(), "").await;
    let status = request(Method::GET, format!("{}{location}", child.url)).send().await.unwrap();
    assert_eq!(header(&status, "range"), "0-999999");
    let patch = request(Method::PATCH, format!("{}{location}", child.url));
    let answer = by_steps(patch, "1000000-3000009", &line, b"0123456789").send().await.unwrap();
    assert_eq!(answer.status(), 202);
    let whole = Digest::of(&[&bytes[..], b"0123456789"].concat());
    let put = request(Method::PUT, format!("{}{location}?digest={whole}", child.url));
    assert_eq!(put.send().await.unwrap().status(), 201);
}
