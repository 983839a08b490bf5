//! Clients that are still sending when they are refused: they get to see why.

use std::path::Path;
use std::time::Duration;

use anyplace_images::Credentials;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::Registry;

/// More than the sockets on both sides hold, so that a connection which ends under it is noticed.
const BODY_BYTES: usize = 32 << 20;
/// For a registry that doesn't answer at all.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Sends the whole request before it looks for an answer; the answer's head, in lower case.
async fn send_all(registry: &Registry, head: &str, body: &[u8]) -> String {
    let mut stream = TcpStream::connect(registry.address).await.unwrap();
    let head = format!("{head}host: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap_or_else(|e| panic!("{head}: the connection ended: {e}"));
    answer(&mut stream).await
}

async fn answer(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    tokio::time::timeout(ANSWER_MAX, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&answer).to_lowercase()
}

fn login(dir: &Path) -> String {
    let Credentials { user, password } = Credentials::from_file(&dir.join("credentials")).unwrap();
    format!("authorization: Basic {}\r\n", BASE64_STANDARD.encode(format!("{user}:{password}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_everything_first_sees_the_refusal() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let login = login(dir.path());
    let begun = format!("POST /v2/app/blobs/uploads/ HTTP/1.1\r\n{login}");
    let begun = send_all(&registry, &begun, b"").await;
    let location = begun.lines().find_map(|line| line.strip_prefix("location: ")).unwrap().to_owned();
    let manifest = "content-type: application/vnd.oci.image.manifest.v1+json\r\n";
    let last = BODY_BYTES - 1;
    for (request, status) in [
        (format!("PATCH {location} HTTP/1.1\r\n{login}content-range: 9-{}\r\n", last + 9), 416),
        (format!("PUT {location} HTTP/1.1\r\n{login}"), 400),
        (format!("PUT {location}?digest=sha256:12 HTTP/1.1\r\n{login}"), 400),
        (format!("PATCH /v2/app/blobs/uploads/none HTTP/1.1\r\n{login}"), 404),
        (format!("PATCH {location} HTTP/1.1\r\ncontent-range: 0-{last}\r\n"), 401),
        (format!("POST /v2/app/blobs/uploads/?digest=sha256:{} HTTP/1.1\r\n", "0".repeat(64)), 401),
        (format!("PUT /v2/app/manifests/v1 HTTP/1.1\r\n{manifest}"), 401),
        (format!("PUT /v2/app/manifests/v1 HTTP/1.1\r\n{login}{manifest}"), 413),
        (format!("PUT /v2/app/manifests/no~tag HTTP/1.1\r\n{login}{manifest}"), 400),
        (format!("PUT /v2/App/manifests/v1 HTTP/1.1\r\n{login}{manifest}"), 400),
        (format!("POST /v2/app/tags/list HTTP/1.1\r\n{login}"), 405),
    ] {
        let answer = send_all(&registry, &request, &vec![0; BODY_BYTES]).await;
        assert!(answer.starts_with(&format!("http/1.1 {status} ")), "{request}\n{answer}");
    }
    // The upload is where it was.
    let upload = send_all(&registry, &format!("GET {location} HTTP/1.1\r\n{login}"), b"").await;
    assert!(upload.contains("\r\nrange: 0-0\r\n"), "{upload}");
    registry.stop().await;
}

/// It sends nothing until it has leave, and a refusal is no leave.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_first_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let mut stream = TcpStream::connect(registry.address).await.unwrap();
    let head = format!(
        "PUT /v2/app/manifests/v1 HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {BODY_BYTES}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = answer(&mut stream).await;
    assert!(answer.starts_with("http/1.1 401 "), "{answer}");
    registry.stop().await;
}
