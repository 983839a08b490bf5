//! What only etcd promises: a cluster that loses members, TLS, and what is refused at the start.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyplace_seed::Seed;
use anyplace_store::{Error, EtcdConfig, EtcdStore, Store, StoreExt, Txn};
use common::Cluster;
use futures_util::StreamExt;

/// Far above what any case takes.
const SOON: Duration = Duration::from_secs(180);

async fn refused(config: &EtcdConfig) -> Error {
    match EtcdStore::open(config).await {
        Ok(_) => panic!("{config:?} must not open"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_the_reason() {
    let Some(program) = common::program("3.4") else { return };
    let cluster = Cluster::start(program.clone(), 1, false, &[]).await;
    let store = cluster.store("ours").await;
    // Somebody else's keys.
    let mut client = etcd_client::Client::connect(cluster.config("x").endpoints, None).await.unwrap();
    client.put("theirs/registry/pods", "1", None).await.unwrap();
    let error = refused(&cluster.config("theirs")).await.to_string();
    assert!(
        error
            .contains("etcd.prefix theirs is used by something else (etcd has the key theirs/registry/pods)"),
        "{error}"
    );
    assert_eq!(client.get("theirs/registry/pods", None).await.unwrap().kvs()[0].value(), b"1");
    assert!(client.get("theirs/layout", None).await.unwrap().kvs().is_empty());
    // Another version's layout.
    client.put("newer/layout", "2", None).await.unwrap();
    let error = refused(&cluster.config("newer")).await.to_string();
    assert!(error.contains("etcd.prefix newer has layout 2, this program reads layout 1"), "{error}");
    // What is damaged by hand is said so, and other stores aren't touched.
    store.put("a", "1").await.unwrap();
    assert_eq!(cluster.store("other").await.list("").await.unwrap().0, []);
    assert_eq!(store.list("").await.unwrap().0.len(), 1);
    drop(cluster);

    let cluster = Cluster::start_unprepared(program, &["--max-txn-ops=128"]).await;
    let error = refused(&cluster.config("ours")).await.to_string();
    assert!(error.contains("start it with --max-txn-ops=1024"), "{error}");
}

#[tokio::test]
async fn a_full_etcd_says_what_to_do() {
    let Some(program) = common::program("3.4") else { return };
    let cluster = Cluster::start(program, 1, false, &["--quota-backend-bytes=2097152"]).await;
    let store = cluster.store("full").await;
    let mut count = 0;
    let error = loop {
        match store.put(&format!("k/{count}"), vec![7; 200_000]).await {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
        assert!(count < 1000, "it takes more than its quota");
    };
    assert!(matches!(error, Error::Full), "{error}");
    assert!(error.to_string().contains("--quota-backend-bytes"), "{error}");
    assert_eq!(store.list("k/").await.unwrap().0.len(), count, "what is there can be read");
}

#[tokio::test]
async fn who_is_nobody_is_refused_by_tls() {
    let Some(program) = common::program("3.4") else { return };
    let cluster = Cluster::start(program, 1, true, &[]).await;
    let config = cluster.config("tls");
    cluster.store("tls").await.put("a", "1").await.unwrap();
    let nobody = EtcdConfig { cert_file: None, key_file: None, ..config.clone() };
    let error = refused(&nobody).await;
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    let missing = EtcdConfig { ca_file: Some("/nowhere/ca.pem".into()), ..config };
    assert!(refused(&missing).await.to_string().starts_with("etcd.ca_file /nowhere/ca.pem: "));
}

/// Three members with TLS, of which at most one at a time is killed or frozen: every write that was acknowledged is
/// there, none happened twice, and a watch sees each change once, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_three_loses_members_and_nothing_else() {
    let Some(program) = common::program("3.5") else { return };
    let mut seed = Seed::from_env();
    let mut cluster =
        Cluster::start(program, 3, true, &["--heartbeat-interval=50", "--election-timeout=500"]).await;
    let store = cluster.store("three").await;
    let (_, start) = store.list("").await.unwrap();
    let mut watch = store.watch("n/", start).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(count(Arc::clone(&store), Arc::clone(&done)));
    for _ in 0..anyplace_seed::rounds(6, 60) {
        let index = seed.below(3) as usize;
        if seed.one_in(2) {
            cluster.kill(index);
            tokio::time::sleep(Duration::from_millis(200 + seed.below(1500))).await;
            cluster.restart(index);
        } else {
            cluster.freeze(index, true);
            tokio::time::sleep(Duration::from_millis(200 + seed.below(3000))).await;
            cluster.freeze(index, false);
        }
        // A majority has to catch up before the next one goes, or writes rightly stop.
        let caught_up = async { while store.put("calm", "").await.is_err() {} };
        tokio::time::timeout(SOON, caught_up).await.expect("the cluster serves again");
        tokio::time::sleep(Duration::from_millis(seed.below(1000))).await;
    }
    done.store(true, Ordering::Relaxed);
    let written = tokio::time::timeout(SOON, writer).await.expect("the writer ends").unwrap();
    assert!(written > 50, "hardly anything was written: {written}");
    let (kvs, _) = store.list("n/").await.unwrap();
    assert_eq!(kvs.len() as u64, written, "each number once");
    for number in 0..written {
        let event = tokio::time::timeout(SOON, watch.next()).await.expect("an event").unwrap().unwrap();
        assert_eq!(event.kv.key, format!("n/{number:08}"), "in order, none missing, none twice");
    }
}

/// Counts up, each number a key of its own and a transaction that the one before must precede. Who doesn't know what
/// became of a write reads before it goes on, as the store's callers do.
async fn count(store: Arc<EtcdStore>, done: Arc<AtomicBool>) -> u64 {
    let mut next = 0_u64;
    while !done.load(Ordering::Relaxed) {
        let key = format!("n/{next:08}");
        let txn = Txn::new().when_absent(&key).put(&key, "").put("last", next.to_string());
        match store.txn(txn).await {
            Ok(outcome) => {
                // A write whose outcome was unknown may have happened after it was looked for.
                let _ = outcome;
                next += 1;
            }
            Err(Error::OutcomeUnknown { .. }) => {
                let there = loop {
                    match store.get(&key).await {
                        Ok(found) => break found.is_some(),
                        Err(Error::Unavailable { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                };
                next += u64::from(there);
            }
            Err(Error::Unavailable { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    next
}

/// A watch that nobody reads while history is compacted says so; the list goes on.
#[tokio::test]
async fn a_watch_that_slept_too_long_is_told() {
    let Some(program) = common::program("3.5") else { return };
    let mut cluster = Cluster::start(program, 1, false, &[]).await;
    let store = cluster.store("sleep").await;
    let from = store.put("s/0", "").await.unwrap();
    let mut watch = store.watch("s/", from).await.unwrap();
    // The stream breaks with the member; history goes before it is opened again.
    cluster.kill(0);
    cluster.restart(0);
    let mut last = from;
    for n in 0..20 {
        last = loop {
            match store.put(&format!("s/{n}"), "").await {
                Ok(revision) => break revision,
                Err(Error::OutcomeUnknown { .. } | Error::Unavailable { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        };
    }
    store.compact(last).await.unwrap();
    let error = tokio::time::timeout(SOON, watch.next()).await.expect("an end").unwrap().unwrap_err();
    assert!(matches!(error, Error::Compacted { oldest } if oldest == last), "{error}");
    assert!(watch.next().await.is_none());
    assert_eq!(store.list("s/").await.unwrap().0.len(), 20);
    assert!(store.watch("s/", last).await.is_ok());
}
