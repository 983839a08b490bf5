use std::sync::Arc;

use anyplace_api::Client;
use axum::{Router, extract::State as Shared, routing::get};

use super::*;
use crate::Query;

type Map = BTreeMap<String, u32>;

fn map(entries: &[(&str, u32)]) -> Map {
    entries.iter().map(|(key, value)| ((*key).to_string(), *value)).collect()
}

/// The oracle: a map that does what the events say.
fn apply(seen: &mut Map, events: Vec<WatchEvent<u32>>) {
    for event in events {
        match event {
            WatchEvent::Reset { .. } => seen.clear(),
            WatchEvent::Put { key, value, .. } => drop(seen.insert(key, value)),
            WatchEvent::Delete { key, .. } => drop(seen.remove(&key)),
            WatchEvent::Synced { .. } => {}
        }
    }
}

#[test]
fn a_watcher_that_resumes_anywhere_ends_up_with_the_same_map() {
    let feed = Feed::new();
    let (mut resumed, mut position) = (Map::new(), WatchQuery::default());
    for step in 0..10_000_u32 {
        let key = format!("k{}", step * 7 % 13);
        let _ = if step % 3 == 0 { feed.remove(&key) } else { feed.set(key, step) };
        // Comes back after breaks of all lengths, some longer than the history.
        if step % 97 == 0 || step == 9_999 {
            let (events, next) = feed.since(position);
            apply(&mut resumed, events);
            position = next;
            assert_eq!(resumed, feed.entries(), "step {step}");
        }
    }
    let (events, _) = feed.since(WatchQuery { epoch: position.epoch, from_revision: Some(1) });
    assert!(matches!(events[0], WatchEvent::Reset { .. }), "history that is gone gives a snapshot");
    let (events, _) = feed.since(WatchQuery { epoch: Some(1), from_revision: position.from_revision });
    assert!(matches!(events[0], WatchEvent::Reset { .. }), "another epoch gives a snapshot");
    let (events, _) = feed.since(position);
    assert_eq!(events.len(), 1, "nothing new is only `synced`");
}

#[test]
fn replacing_by_the_same_changes_nothing() {
    let feed = Feed::new();
    assert!(feed.replace(map(&[("a", 1), ("b", 2)])));
    assert!(!feed.replace(map(&[("a", 1), ("b", 2)])));
    assert!(feed.replace(map(&[("b", 2)])));
    assert_eq!(feed.entries(), map(&[("b", 2)]));
}

#[tokio::test]
async fn a_watcher_sees_changes_through_http_and_survives_the_end_of_its_server() {
    crate::install_crypto_provider();
    let feed = Arc::new(Feed::<u32>::new());
    feed.set("a", 1);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let start = |shutdown: CancellationToken| {
        let route = get({
            let shutdown = shutdown.clone();
            move |Shared(feed): Shared<Arc<Feed<u32>>>, Query(query): Query<WatchQuery>| async move {
                feed.response(query, shutdown)
            }
        });
        let router = Router::new().route("/watch", route).with_state(feed.clone());
        tokio::spawn(crate::serve(address, router, shutdown))
    };
    let first = CancellationToken::new();
    let server = start(first.clone());
    let mut watcher = Watcher::<u32>::new(Client::new(&format!("http://{address}"), None).unwrap(), "/watch");
    let mut seen = Map::new();
    while seen != map(&[("a", 1)]) {
        apply(&mut seen, vec![watcher.next(|_| {}).await]);
    }
    feed.set("b", 2);
    while seen != map(&[("a", 1), ("b", 2)]) {
        apply(&mut seen, vec![watcher.next(|_| {}).await]);
    }
    first.cancel();
    server.await.unwrap().unwrap();
    feed.remove("a");
    let second = CancellationToken::new();
    let server = start(second.clone());
    while seen != map(&[("b", 2)]) {
        apply(&mut seen, vec![watcher.next(|_| {}).await]);
    }
    second.cancel();
    server.await.unwrap().unwrap();
}
