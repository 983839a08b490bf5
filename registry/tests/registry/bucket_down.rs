//! A bucket that is away: nothing listens where it was, or something that says nothing. Whatever is asked of the registry
//! gets an answer that says so and that clients try again, and nothing is lost.

use std::net::SocketAddr;
use std::time::Duration;

use anyplace_images::Digest;
use anyplace_registry::Config;
use futures_util::future::join_all;
use reqwest::Method;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::stores;
use crate::support::{LOOPBACK, OCI_MANIFEST, Registry, code, header, noise};

/// How long a client waits for an answer. The registry promises one within 32 s: it tries again for 15 s, with pauses of at
/// most 2 s, and the last try may last 15 s.
const ANSWER_MAX: Duration = Duration::from_secs(50);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_is_away_is_said_to_be_and_loses_nothing() {
    let (store, dir) = (stores::s3s().await, tempfile::tempdir().unwrap());
    let gate = Gate::before(store.address).await;
    let storage = toml::from_str(&store.settings(gate.address, "r")).unwrap();
    let registry =
        Registry::start_with(Config { storage, listen: LOOPBACK, ..Config::new(dir.path()) }).await;
    let open = registry.request(Method::POST, "/v2/a/blobs/uploads/").send().await.unwrap();
    let (open, part) = (header(&open, "location"), noise(1, 100_000));
    let patched = registry.request(Method::PATCH, &open).body(part.clone()).send().await.unwrap();
    assert_eq!(patched.status(), 202);

    for away in [Mode::Refusing, Mode::Silent] {
        // Not read yet, so not remembered.
        let (image, bytes) = registry.put_image("a", "t", &format!("{away:?}")).await;
        let blob = Digest::of(format!("{away:?}").as_bytes());
        gate.switch(away);
        let asked = [
            (Method::GET, "/v2/a/manifests/t".to_owned(), vec![]),
            (Method::GET, format!("/v2/a/manifests/{image}"), vec![]),
            (Method::HEAD, format!("/v2/a/manifests/{image}"), vec![]),
            (Method::PUT, "/v2/a/manifests/new".to_owned(), bytes.clone()),
            (Method::DELETE, "/v2/a/manifests/t".to_owned(), vec![]),
            (Method::DELETE, format!("/v2/a/manifests/{image}"), vec![]),
            (Method::GET, format!("/v2/a/blobs/{blob}"), vec![]),
            (Method::HEAD, format!("/v2/a/blobs/{blob}"), vec![]),
            (Method::DELETE, format!("/v2/a/blobs/{blob}"), vec![]),
            (Method::POST, "/v2/a/blobs/uploads/".to_owned(), vec![]),
            (Method::POST, format!("/v2/b/blobs/uploads/?mount={blob}&from=a"), vec![]),
            (Method::GET, open.clone(), vec![]),
            (Method::PATCH, open.clone(), b"more".to_vec()),
            (Method::PUT, format!("{open}?digest={blob}"), vec![]),
            (Method::DELETE, open.clone(), vec![]),
            (Method::GET, "/v2/a/tags/list".to_owned(), vec![]),
            (Method::GET, format!("/v2/a/referrers/{image}"), vec![]),
            (Method::GET, "/v1/repositories".to_owned(), vec![]),
        ];
        let answers = asked.into_iter().map(async |(method, path, body)| {
            let what = format!("{away:?}: {method} {path}");
            let request = registry.request(method.clone(), &path).header("content-type", OCI_MANIFEST);
            let answer = request.body(body).timeout(ANSWER_MAX).send().await;
            let answer = answer.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(answer.status(), 503, "{what}");
            assert_eq!(header(&answer, "retry-after"), "1", "{what}");
            if method != Method::HEAD {
                assert_eq!(code(answer).await, (503, "UNAVAILABLE".into()), "{what}");
            }
        });
        join_all(answers).await;

        gate.switch(Mode::Open);
        let pulled = registry.request(Method::GET, "/v2/a/manifests/t").send().await.unwrap();
        assert_eq!(pulled.bytes().await.unwrap(), bytes);
        let pulled = registry.request(Method::GET, &format!("/v2/a/blobs/{blob}")).send().await.unwrap();
        assert_eq!(pulled.bytes().await.unwrap(), format!("{away:?}"));
    }
    // What was acknowledged is there, and goes on.
    let status = registry.request(Method::GET, &open).send().await.unwrap();
    assert_eq!((status.status().as_u16(), header(&status, "range")), (204, "0-99999".into()));
    let whole = [part, b"more".to_vec()].concat();
    let put = registry.request(Method::PUT, &format!("{open}?digest={}", Digest::of(&whole)));
    assert_eq!(put.body("more").send().await.unwrap().status(), 201);
    registry.stop().await;
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Open,
    /// Nothing listens.
    Refusing,
    /// Connections are taken, and nothing comes of them.
    Silent,
}

/// Stands before a server.
struct Gate {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    task: tokio::task::JoinHandle<()>,
}

impl Gate {
    async fn before(server: SocketAddr) -> Gate {
        let mut listener = Some(TcpListener::bind(LOOPBACK).await.unwrap());
        let address = listener.as_ref().unwrap().local_addr().unwrap();
        let (mode, mut now) = watch::channel(Mode::Open);
        let task = tokio::spawn(async move {
            loop {
                let state = *now.borrow_and_update();
                if state == Mode::Refusing {
                    listener = None;
                    now.changed().await.unwrap();
                    continue;
                }
                if listener.is_none() {
                    listener = Some(TcpListener::bind(address).await.unwrap());
                }
                tokio::select! {
                    accepted = listener.as_ref().unwrap().accept() => {
                        let (client, _) = accepted.unwrap();
                        tokio::spawn(pass(client, server, now.clone()));
                    }
                    changed = now.changed() => changed.unwrap(),
                }
            }
        });
        Gate { address, mode, task }
    }

    fn switch(&self, mode: Mode) {
        self.mode.send(mode).unwrap();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection; when the gate shuts, it breaks, or stays and is silent.
async fn pass(mut client: TcpStream, server: SocketAddr, mut now: watch::Receiver<Mode>) {
    if *now.borrow_and_update() == Mode::Open {
        let mut server = TcpStream::connect(server).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut client, &mut server) => return,
            _ = now.changed() => {}
        }
    }
    let _ = now.wait_for(|mode| *mode != Mode::Silent).await;
}
