//! Uploads: in parts, resumed, cancelled, broken off, and across a kill -9 of the registry.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyplace_images::{Credentials, Digest};
use anyplace_model::Bytes;
use anyplace_registry::{Config, Server, UploadsConfig};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use reqwest::Method;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::killable::Killable;
use crate::support::{LOOPBACK, Registry, code, header, noise};

#[tokio::test]
async fn the_longest_part_is_what_the_settings_say() {
    let dir = tempfile::tempdir().unwrap();
    let config = |chunk_max| {
        let uploads = UploadsConfig { chunk_max: Bytes(chunk_max) };
        Config { listen: LOOPBACK, uploads, ..Config::new(dir.path()) }
    };
    let too_long = Server::bind(config(500_000_001)).await.err().unwrap();
    assert!(too_long.to_string().contains("uploads.chunk_max is"), "{too_long}");
    let registry = Registry::start_with(config(100_000)).await;
    let post = registry.request(Method::POST, "/v2/a/blobs/uploads/").send().await.unwrap();
    assert_eq!(header(&post, "oci-chunk-max-length"), "100000");
    let (location, bytes) = (header(&post, "location"), noise(6, 100_001));
    let patch = async |len: usize| {
        let request = registry.request(Method::PATCH, &location);
        let request = request.header("content-range", format!("0-{}", len - 1));
        request.body(bytes[..len].to_vec()).send().await.unwrap()
    };
    let refused = patch(100_001).await;
    assert_eq!(header(&refused, "oci-chunk-max-length"), "100000");
    assert_eq!(code(refused).await, (413, "SIZE_INVALID".into()));
    assert_eq!(patch(100_000).await.status(), 202);
    registry.stop().await;
}

async fn start(registry: &Registry, name: &str) -> String {
    let answer = registry.request(Method::POST, &format!("/v2/{name}/blobs/uploads/")).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    assert_eq!(header(&answer, "range"), "0-0");
    assert_eq!(header(&answer, "oci-chunk-max-length"), "500000000");
    header(&answer, "location")
}

#[tokio::test]
async fn parts_go_on_where_the_last_one_ended() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let bytes = noise(5, 3_000_000);
    let location = start(&registry, "a").await;
    let patch = async |range: &str, part: &[u8]| {
        let request = registry.request(Method::PATCH, &location).header("content-range", range);
        request.body(part.to_vec()).send().await.unwrap()
    };
    let first = patch("0-999999", &bytes[..1_000_000]).await;
    assert_eq!((first.status().as_u16(), header(&first, "range")), (202, "0-999999".into()));
    // A gap, a repeat, and lengths that disagree.
    for range in ["1000001-1000002", "0-1", "999999-1000000"] {
        let refused = patch(range, b"xx").await;
        assert_eq!(header(&refused, "range"), "0-999999");
        assert_eq!(header(&refused, "location"), location);
        assert_eq!(code(refused).await, (416, "BLOB_UPLOAD_INVALID".into()), "{range}");
    }
    assert_eq!(code(patch("1000000-1000005", b"xx").await).await, (400, "SIZE_INVALID".into()));
    assert_eq!(code(patch("x-y", b"xx").await).await, (400, "BLOB_UPLOAD_INVALID".into()));
    let status = registry.request(Method::GET, &location).send().await.unwrap();
    assert_eq!((status.status().as_u16(), header(&status, "range")), (204, "0-999999".into()));
    assert_eq!(patch("1000000-1999999", &bytes[1_000_000..2_000_000]).await.status(), 202);
    // Another repository can't see the upload.
    let elsewhere = location.replace("/v2/a/", "/v2/b/");
    let answer = registry.request(Method::GET, &elsewhere).send().await.unwrap();
    assert_eq!(code(answer).await, (404, "BLOB_UPLOAD_UNKNOWN".into()));
    let digest = Digest::of(&bytes);
    let last = registry.request(Method::PUT, &format!("{location}?digest={digest}"));
    let put = last.body(bytes[2_000_000..].to_vec()).send().await.unwrap();
    assert_eq!(put.status(), 201);
    assert_eq!(header(&put, "location"), format!("/v2/a/blobs/{digest}"));
    let get = registry.request(Method::GET, &format!("/v2/a/blobs/{digest}")).send().await.unwrap();
    assert_eq!(get.bytes().await.unwrap(), bytes);
    let again = registry.request(Method::GET, &location).send().await.unwrap();
    assert_eq!(code(again).await, (404, "BLOB_UPLOAD_UNKNOWN".into()));
    assert_eq!(uploads_left(dir.path()), 0);
    registry.stop().await;
}

#[tokio::test]
async fn wrong_content_is_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let wrong = Digest::of(b"expected");
    let path = format!("/v2/a/blobs/uploads/?digest={wrong}");
    let answer = registry.request(Method::POST, &path).body("found").send().await.unwrap();
    assert_eq!(code(answer).await, (400, "DIGEST_INVALID".into()));
    let location = start(&registry, "a").await;
    let answer = registry.request(Method::PUT, &location).body("found").send().await.unwrap();
    assert_eq!(code(answer).await, (400, "DIGEST_INVALID".into()));
    let put = registry.request(Method::PUT, &format!("{location}?digest={wrong}")).body("found");
    assert_eq!(code(put.send().await.unwrap()).await, (400, "DIGEST_INVALID".into()));
    let cancelled = start(&registry, "a").await;
    let answer = registry.request(Method::DELETE, &cancelled).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    let answer = registry.request(Method::DELETE, &cancelled).send().await.unwrap();
    assert_eq!(code(answer).await, (404, "BLOB_UPLOAD_UNKNOWN".into()));
    for digest in [&wrong, &Digest::of(b"found")] {
        assert!(!registry.blob_file(digest).exists());
    }
    assert_eq!(uploads_left(dir.path()), 0);
    registry.stop().await;
}

#[tokio::test]
async fn a_client_that_goes_away_can_resume() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let bytes = noise(6, 400_000);
    let location = start(&registry, "a").await;
    // By hand: declare everything, send half, and hang up.
    let Credentials { user, password } = registry.credentials();
    let mut stream = std::net::TcpStream::connect(registry.address).unwrap();
    let pair = base64_of(&format!("{user}:{password}"));
    write!(
        stream,
        "PATCH {location} HTTP/1.1\r\nhost: x\r\nauthorization: Basic {pair}\r\ncontent-length: 400000\r\n\r\n"
    )
    .unwrap();
    stream.write_all(&bytes[..200_000]).unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(stream);
    let status = registry.request(Method::GET, &location).send().await.unwrap();
    let range = header(&status, "range");
    let at: usize = range.strip_prefix("0-").unwrap().parse::<usize>().unwrap() + 1;
    assert_eq!(at, 200_000);
    let digest = Digest::of(&bytes);
    let put = registry.request(Method::PUT, &format!("{location}?digest={digest}"));
    assert_eq!(put.body(bytes[at..].to_vec()).send().await.unwrap().status(), 201);
    registry.stop().await;
}

#[tokio::test]
async fn an_upload_survives_kill_9_of_the_registry() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(7, 2_000_000);
    anyplace_service::install_crypto_provider();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut running = Killable::start(dir.path(), "").await;
    let auth = Credentials::from_file(&dir.path().join("credentials")).unwrap();
    let request =
        |method: Method, url: String| http.request(method, url).basic_auth(&auth.user, Some(&auth.password));
    let post = request(Method::POST, format!("{}/v2/a/blobs/uploads/", running.url)).send().await.unwrap();
    let location = header(&post, "location");
    let patch = request(Method::PATCH, format!("{}{location}", running.url));
    let patch = patch.header("content-range", "0-1199999").body(bytes[..1_200_000].to_vec());
    assert_eq!(patch.send().await.unwrap().status(), 202);
    running.kill();
    running = Killable::start(dir.path(), "").await;
    let status = request(Method::GET, format!("{}{location}", running.url)).send().await.unwrap();
    assert_eq!((status.status().as_u16(), header(&status, "range")), (204, "0-1199999".into()));
    let digest = Digest::of(&bytes);
    let put = request(Method::PUT, format!("{}{location}?digest={digest}", running.url));
    let put = put.header("content-range", "1200000-1999999").body(bytes[1_200_000..].to_vec());
    assert_eq!(put.send().await.unwrap().status(), 201);
    running.kill();
    running = Killable::start(dir.path(), "").await;
    let get = request(Method::GET, format!("{}/v2/a/blobs/{digest}", running.url)).send().await.unwrap();
    assert_eq!(get.bytes().await.unwrap(), bytes);
    running.kill();
}

/// Uploads that write to a folder at once; see the registry's `uploads`.
const WRITERS_MAX: usize = 128;
/// Threads that tokio has for what blocks.
const BLOCKING_THREADS_MAX: usize = 512;

/// Begins a part of an upload, and sends one byte of it.
async fn begin_part(registry: &Registry, location: &str) -> TcpStream {
    let Credentials { user, password } = registry.credentials();
    let pair = base64_of(&format!("{user}:{password}"));
    let head = format!(
        "PATCH {location} HTTP/1.1\r\nhost: x\r\nauthorization: Basic {pair}\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    let mut stream = TcpStream::connect(registry.address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(b"1\r\na\r\n").await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_uploads_keep_nobody_from_pushing() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let mut slow = Vec::new();
    for _ in 0..WRITERS_MAX {
        let location = start(&registry, "slow").await;
        let stream = begin_part(&registry, &location).await;
        slow.push((location, stream));
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let push = registry.put_blob("other", b"quick");
    tokio::time::timeout(Duration::from_secs(45), push).await.expect("a push waits for slow ones");
    // One of them had to leave. What it sent is there, and it goes on from that.
    let answers = slow.into_iter().map(|(location, mut stream)| {
        Box::pin(async move {
            let mut answer = vec![0; 4_096];
            let read = stream.read(&mut answer).await.unwrap();
            answer.truncate(read);
            (location, String::from_utf8(answer).unwrap().to_lowercase())
        })
    });
    let ((location, answer), _, others) = futures_util::future::select_all(answers).await;
    assert!(answer.starts_with("http/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    let digest = Digest::of(b"ab");
    let last = registry.request(Method::PUT, &format!("{location}?digest={digest}"));
    let last = last.header("content-range", "1-1").body("b").send().await.unwrap();
    assert_eq!(last.status(), 201, "{}", last.text().await.unwrap());
    drop(others);
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_an_upload_that_is_held_keeps_no_thread() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let bytes = noise(8, 300_000);
    let digest = registry.put_blob("a", &bytes).await;
    let location = start(&registry, "a").await;
    let held = begin_part(&registry, &location).await;
    let status = |_| registry.request(Method::GET, &location).send();
    let mut waiting: FuturesUnordered<_> = (0..BLOCKING_THREADS_MAX + 100).map(status).collect();
    assert!(tokio::time::timeout(Duration::from_secs(2), waiting.next()).await.is_err());
    let get = async {
        let path = format!("/v2/a/blobs/{digest}");
        registry.request(Method::GET, &path).send().await.unwrap().bytes().await.unwrap()
    };
    tokio::select! {
        answer = waiting.next() => panic!("a download waits for those who wait: {answer:?}"),
        got = get => assert_eq!(got, bytes),
    }
    drop((waiting, held));
    registry.stop().await;
}

fn uploads_left(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("uploads")).unwrap().count()
}

fn base64_of(text: &str) -> String {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.encode(text)
}
