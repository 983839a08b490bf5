//! Connections: a bound on their number, and an end in order.

use std::path::Path;
use std::time::Duration;

use anyplace_images::{Credentials, Digest};
use anyplace_registry::{Config, Server};
use reqwest::Method;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::support::{Registry, noise};

/// What the registry takes at once; see its `connections`.
const CONNECTIONS_MAX: usize = 4_096;
/// The longest head of a request.
const HEAD_MAX_BYTES: usize = 48 << 10;

/// A server that is told to stop while it works.
struct Stopping {
    address: std::net::SocketAddr,
    authorization: String,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Stopping {
    async fn start(dir: &Path, drain_s: u64) -> Stopping {
        let config = Config { listen: "127.0.0.1:0".parse().unwrap(), drain_s, ..Config::new(dir) };
        let server = Server::bind(config).await.unwrap();
        let (address, shutdown) = (server.local_addr().unwrap(), CancellationToken::new());
        let task = tokio::spawn(server.serve(shutdown.clone()));
        let Credentials { user, password } = Credentials::from_file(&dir.join("credentials")).unwrap();
        use base64::Engine as _;
        let pair = base64::prelude::BASE64_STANDARD.encode(format!("{user}:{password}"));
        Stopping { address, authorization: format!("authorization: Basic {pair}\r\n"), shutdown, task }
    }

    /// Sends a request's head.
    async fn send(&self, head: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{head} HTTP/1.1\r\nhost: x\r\n{}", self.authorization);
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    /// The head of the answer to a request without a body.
    async fn ask(&self, head: &str) -> String {
        let mut stream = self.send(head).await;
        stream.write_all(b"connection: close\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer).to_lowercase()
    }

    /// Stops it, and waits until it says that it is draining.
    async fn begin_to_stop(&self) {
        self.shutdown.cancel();
        while !self.ask("GET /healthz").await.starts_with("http/1.1 503") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn location(answer: &str) -> String {
    let line = answer.lines().find_map(|line| line.strip_prefix("location: "));
    line.unwrap_or_else(|| panic!("no location: {answer}")).to_owned()
}

#[tokio::test]
async fn a_shutdown_lets_an_upload_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Stopping::start(dir.path(), 600).await;
    let location = location(&server.ask("POST /v2/app/blobs/uploads/").await);
    let bytes = noise(81, 40_000_000);
    let mut upload = server.send(&format!("PATCH {location}")).await;
    upload.write_all(b"content-length: 40000000\r\n\r\n").await.unwrap();
    // More than the sockets hold, so the request has begun when this returns.
    upload.write_all(&bytes[..39_999_999]).await.unwrap();
    server.begin_to_stop().await;
    assert!(server.ask("GET /healthz").await.contains("draining"));
    let refused = server.ask("GET /v2/").await;
    assert!(refused.starts_with("http/1.1 503") && refused.contains("retry-after: 1"), "{refused}");
    assert!(refused.contains("toomanyrequests"), "{refused}");
    // The upload may be asked about, and ends; then the server does.
    upload.write_all(&bytes[39_999_999..]).await.unwrap();
    let mut answer = Vec::new();
    upload.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).to_lowercase();
    assert!(answer.starts_with("http/1.1 202") && answer.contains("range: 0-39999999"), "{answer}");
    server.task.await.unwrap().unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
    // Whoever comes next goes on from there.
    let registry = Registry::start(dir.path()).await;
    let digest = Digest::of(&bytes);
    let put = registry.request(Method::PUT, &format!("{location}?digest={digest}")).send().await.unwrap();
    assert_eq!(put.status(), 201);
    registry.stop().await;
}

#[tokio::test]
async fn a_shutdown_ends_what_the_drain_has_no_time_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = Stopping::start(dir.path(), 1).await;
    let location = location(&server.ask("POST /v2/app/blobs/uploads/").await);
    let mut upload = server.send(&format!("PATCH {location}")).await;
    upload.write_all(b"content-length: 2000000\r\n\r\n").await.unwrap();
    upload.write_all(&noise(82, 1_000_000)).await.unwrap();
    // One that rests, and one that never asks.
    let resting = TcpStream::connect(server.address).await.unwrap();
    server.begin_to_stop().await;
    server.task.await.unwrap().unwrap();
    let mut answer = Vec::new();
    let _ = upload.read_to_end(&mut answer).await;
    assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    drop(resting);
}

#[tokio::test]
async fn a_shutdown_with_nothing_to_do_is_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Stopping::start(dir.path(), 600).await;
    // Kept alive by the client, and not used.
    let mut resting = server.send("GET /v2/").await;
    resting.write_all(b"\r\n").await.unwrap();
    let mut answer = [0; 12];
    resting.read_exact(&mut answer).await.unwrap();
    server.shutdown.cancel();
    server.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_head_without_an_end_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let server = Stopping::start(dir.path(), 0).await;
    let long = "a".repeat(HEAD_MAX_BYTES - 2_000);
    assert!(server.ask(&format!("GET /v2/ HTTP/1.1\r\nx: {long}\r\ny:")).await.starts_with("http/1.1 200"));
    let mut endless = server.send("GET /v2/").await;
    endless.write_all(b"x: ").await.unwrap();
    endless.write_all(&[b'a'; HEAD_MAX_BYTES]).await.unwrap();
    let mut answer = Vec::new();
    let _ = endless.read_to_end(&mut answer).await;
    assert!(answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
    server.shutdown.cancel();
    server.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn connections_over_the_bound_are_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = Stopping::start(dir.path(), 0).await;
    // The server raises the limit on open files when it begins to serve.
    assert!(server.ask("GET /v2/").await.starts_with("http/1.1 200"));
    let mut held = Vec::new();
    while held.len() < CONNECTIONS_MAX {
        held.push(TcpStream::connect(server.address).await.unwrap());
    }
    let refused = server.ask("GET /v2/").await;
    assert!(refused.starts_with("http/1.1 503") && refused.contains("toomanyrequests"), "{refused}");
    let body = refused.split("\r\n\r\n").nth(1).unwrap();
    assert!(serde_json::from_str::<serde_json::Value>(body).is_ok(), "{body}");
    held.clear();
    // Their places are free as soon as the server has seen that they are gone.
    let metrics = loop {
        let answer = server.ask("GET /metrics").await;
        if answer.starts_with("http/1.1 200") {
            break answer;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let count =
        metrics.lines().find_map(|line| line.strip_prefix("anyplace_registry_connections_refused_total "));
    assert!(count.unwrap().parse::<u64>().unwrap() >= 1, "{metrics}");
    server.shutdown.cancel();
    server.task.await.unwrap().unwrap();
}
