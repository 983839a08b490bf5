//! Clients that hardly read and upstreams that hardly send: each costs a cache a bounded part of its memory, and nobody
//! else anything.

use std::time::Duration;

use anyplace_images::{Credentials, Digest};
use axum::body::Bytes;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::Method;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;

use crate::fake::{Fake, Fault};
use crate::support::{Registry, cache_config, noise};

const MIB: usize = 1 << 20;
/// The largest pieces: eight of them fill the smallest memory.
const PIECE: usize = 8 * MIB;
/// More pieces than the memory has room for.
const PIECES: usize = 12;
/// What a test waits for something that should take no time; until then it would wait for ever.
const GENEROUS: Duration = Duration::from_secs(60);

async fn start(dir: &std::path::Path, fake: &Fake) -> Registry {
    let mut config = cache_config(dir, &[(&fake.url, dir)]);
    config.cache.memory_budget = "64MiB".parse().unwrap();
    Registry::start_with(config).await
}

fn blob(digest: &Digest) -> String {
    format!("/v2/app/blobs/{digest}")
}

/// Asks for a part of a blob, and reads the answer's head.
async fn begin(cache: &Registry, path: &str, first: usize, last: usize) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    // So that the system doesn't take for the client what the client doesn't.
    socket.set_recv_buffer_size(65_536).unwrap();
    let mut stream = socket.connect(cache.address).await.unwrap();
    let Credentials { user, password } = cache.credentials();
    let pair = BASE64_STANDARD.encode(format!("{user}:{password}"));
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Basic {pair}\r\nrange: bytes={first}-{last}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 206"), "{head}");
    stream
}

/// Reads so little that it is just not cut off, until it is told to read all.
async fn read_slowly(mut stream: TcpStream, mut go_on: watch::Receiver<bool>) -> Vec<u8> {
    let mut bytes = vec![0; PIECE];
    let mut read = 0;
    while read < PIECE {
        if !*go_on.borrow_and_update() {
            let _ = tokio::time::timeout(Duration::from_secs(1), go_on.changed()).await;
        }
        let end = if *go_on.borrow() { PIECE } else { PIECE.min(read + 16_384) };
        let more = stream.read(&mut bytes[read..end]).await.unwrap();
        assert!(more > 0, "it ended after {read} bytes");
        read += more;
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_hardly_read_keep_nothing_from_others() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let (layer, small) = (Bytes::from(noise(95, PIECES * PIECE)), Bytes::from(noise(96, 5_000)));
    fake.put_image("v1", &[layer.clone(), small.clone()], Some(PIECE));
    let cache = start(dir.path(), &fake).await;
    cache.request(Method::GET, "/v2/app/manifests/v1").send().await.unwrap();
    let path = blob(&Digest::of(&layer));
    let (faster, go_on) = watch::channel(false);
    let mut slow = Vec::new();
    for index in 0..PIECES {
        let (first, last) = (index * PIECE, (index + 1) * PIECE - 1);
        let begun = tokio::time::timeout(GENEROUS, begin(&cache, &path, first, last)).await;
        let begun = begun.unwrap_or_else(|_| panic!("client {index} got no answer beside slow ones"));
        slow.push(tokio::spawn(read_slowly(begun, go_on.clone())));
    }
    for (wanted, path) in [(&small, blob(&Digest::of(&small))), (&layer, path)] {
        let asked = async {
            let answer = cache.request(Method::GET, &path).send().await.unwrap();
            answer.bytes().await.unwrap()
        };
        assert!(tokio::time::timeout(GENEROUS, asked).await.unwrap() == *wanted, "{} bytes", wanted.len());
    }
    assert!(slow.iter().all(|slow| !slow.is_finished()));
    // They get theirs, right to the end.
    faster.send(true).unwrap();
    for (index, slow) in slow.into_iter().enumerate() {
        let bytes = slow.await.unwrap();
        assert!(bytes == layer[index * PIECE..(index + 1) * PIECE], "piece {index}");
    }
    cache.stop().await;
}

#[tokio::test]
async fn what_is_here_is_served_while_an_upstream_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let (layer, small) = (Bytes::from(noise(97, PIECES * PIECE)), Bytes::from(noise(98, 5_000)));
    fake.put_image("v1", &[layer.clone(), small.clone()], Some(PIECE));
    let cache = start(dir.path(), &fake).await;
    let get = async |cache: &Registry, path: &str| {
        cache.request(Method::GET, path).send().await.unwrap().bytes().await.unwrap()
    };
    get(&cache, "/v2/app/manifests/v1").await;
    let (path, small_path) = (blob(&Digest::of(&layer)), blob(&Digest::of(&small)));
    assert_eq!(get(&cache, &small_path).await, small);
    let one = cache.request(Method::GET, &path).header("range", "bytes=0-9").send().await.unwrap();
    assert_eq!(one.bytes().await.unwrap(), layer[..10]);
    // From here on, what is here is on disk only.
    cache.stop().await;
    let cache = start(dir.path(), &fake).await;
    fake.always(Fault::Silent);
    let before = fake.blob_requests();
    let asked: Vec<_> = (1..PIECES)
        .map(|index| {
            let range = format!("bytes={}-{}", index * PIECE, index * PIECE + 9);
            tokio::spawn(cache.request(Method::GET, &path).header("range", range).send())
        })
        .collect();
    while fake.blob_requests() == before {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let found = tokio::time::timeout(GENEROUS, get(&cache, &small_path)).await.unwrap();
    assert_eq!(found, small);
    assert!(asked.iter().all(|asked| !asked.is_finished()), "they were waited for");
    asked.iter().for_each(tokio::task::JoinHandle::abort);
    cache.stop().await;
}
