use std::sync::Arc;

use anyplace_api::Client;
use anyplace_seed::Seed;
use axum::{Router, extract::State as Shared, routing::get};

use super::*;
use crate::Query;

type Map = BTreeMap<String, u32>;

fn map(entries: &[(&str, u32)]) -> Map {
    entries.iter().map(|(key, value)| ((*key).to_string(), *value)).collect()
}

/// The oracle: a map that does what is sent says.
fn apply(seen: &mut Map, sent: Vec<Sent<u32>>) {
    for sent in sent {
        let Sent::Event(event) = sent else { panic!("nobody asked for {sent:?}") };
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
    let (events, _) = feed.since(WatchQuery { from_revision: Some(1), ..position });
    assert!(
        matches!(events[0], Sent::Event(WatchEvent::Reset { .. })),
        "history that is gone gives a snapshot"
    );
    let (events, _) = feed.since(WatchQuery { epoch: Some(1), ..position });
    assert!(matches!(events[0], Sent::Event(WatchEvent::Reset { .. })), "another epoch gives a snapshot");
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

type Numbers = BTreeMap<String, Vec<f64>>;

/// The oracle: a map that does what the events say, as their reader would.
fn keep(seen: &mut Numbers, event: WatchEvent<Vec<f64>>) {
    match event {
        WatchEvent::Reset { .. } => seen.clear(),
        WatchEvent::Put { key, value, .. } => drop(seen.insert(key, value)),
        WatchEvent::Delete { key, .. } => drop(seen.remove(&key)),
        WatchEvent::Synced { .. } => {}
    }
}

/// A long value of which little changes, with numbers of which the last digit tells whether they are read as they were
/// written.
fn numbers(seed: &mut Seed) -> Vec<f64> {
    let mut numbers: Vec<f64> = (0..60).map(|number| f64::from(number) * 1e3 / 7.0).collect();
    for _ in 0..seed.below(3) {
        let index = seed.index(numbers.len());
        numbers[index] = seed.below(1_000_000) as f64 / 7.0;
    }
    numbers
}

#[tokio::test]
async fn patched_watchers_end_up_with_the_same_map_also_if_they_have_forgotten_or_something_else() {
    crate::install_crypto_provider();
    let mut seed = Seed::from_env();
    let feed = Arc::new(Feed::<Vec<f64>>::new());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let shutdown = CancellationToken::new();
    let route = get({
        let shutdown = shutdown.clone();
        move |Shared(feed): Shared<Arc<Feed<Vec<f64>>>>, Query(query): Query<WatchQuery>| async move {
            feed.response(query, shutdown)
        }
    });
    let router = Router::new().route("/watch", route).with_state(feed.clone());
    let server = tokio::spawn(crate::serve(address, router, shutdown.clone()));
    while tokio::net::TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let client = Client::new(&format!("http://{address}"), None).unwrap();
    let mut watcher = Watcher::<Vec<f64>>::new(client.clone(), "/watch");
    let mut plain = Watcher::<Vec<f64>>::new(client, "/watch");
    let (mut seen, mut seen_plain) = (Numbers::new(), Numbers::new());
    for round in 0..400 {
        for _ in 0..seed.below(4) {
            let key = format!("k{}", seed.below(6));
            let _ = if seed.one_in(10) { feed.remove(&key) } else { feed.set(key, numbers(&mut seed)) };
        }
        if round == 200 {
            assert_eq!(watcher.misfits(), 0, "all was as it was written");
        }
        if round >= 200 && seed.one_in(20) {
            // What is here differs from what the server takes it to be.
            if let Some(mut entry) = seen.first_entry() {
                entry.insert(vec![0.5]);
            }
            if let Some(key) = feed.entries().into_keys().next() {
                let mut numbers = numbers(&mut seed);
                numbers.push(f64::from(round) / 3.0);
                feed.set(key, numbers);
            }
        }
        while seen != feed.entries() {
            let texts = |key: &str| serde_json::to_vec(seen.get(key)?).ok();
            let event = watcher.next_patched(texts, |error| panic!("round {round}: {error}")).await;
            keep(&mut seen, event);
        }
        while seen_plain != feed.entries() {
            keep(&mut seen_plain, plain.next(|error| panic!("round {round}: {error}")).await);
        }
    }
    assert!(watcher.misfits() > 0, "the wrong ones were noticed");
    shutdown.cancel();
    server.await.unwrap().unwrap();
}

#[test]
fn what_differs_is_sent_instead_of_the_value_and_only_to_who_asks() {
    let feed = Feed::<String>::new();
    let long = "x".repeat(500);
    feed.set("a", long.clone());
    let (_, plain) = feed.since(WatchQuery::default());
    let patched = WatchQuery { patches: true, ..plain };
    feed.set("a", format!("{long}1"));
    feed.set("a", format!("{long}2"));
    let kinds = |query| {
        let sent = feed.since(query).0;
        let kind = |sent: &Sent<String>| match sent {
            Sent::Patch(patch) => format!("patch {}", patch.revision),
            Sent::Event(WatchEvent::Put { revision, .. }) => format!("put {revision}"),
            Sent::Event(WatchEvent::Synced { revision }) => format!("synced {revision}"),
            other => format!("{other:?}"),
        };
        sent.iter().map(kind).collect::<Vec<_>>()
    };
    assert_eq!(kinds(patched), ["patch 2", "patch 3"]);
    assert_eq!(kinds(plain), ["put 3", "synced 3"]);
    // A key that went and came back has no value before.
    feed.remove("a");
    feed.set("a", long);
    feed.set("b", "y".into());
    assert_eq!(kinds(patched), ["put 5", "put 6", "synced 6"]);
}

#[test]
fn large_patches_make_the_history_shorter() {
    let feed = Feed::<String>::new();
    let value = |letter: &str| format!("{}{}", "=".repeat(2_000), letter.repeat(900));
    for round in 0..1_000 {
        feed.set("a", value(["x", "y"][round % 2]));
    }
    let state = feed.lock();
    let kept: usize = state.history.iter().map(|change| change.patch.as_ref().map_or(0, Patch::bytes)).sum();
    assert_eq!(kept, state.history_bytes);
    assert!((HISTORY_BYTES - 1_000..=HISTORY_BYTES).contains(&kept), "{kept}");
    assert!((400..HISTORY).contains(&state.history.len()), "{}", state.history.len());
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
        apply(&mut seen, vec![Sent::Event(watcher.next(|_| {}).await)]);
    }
    feed.set("b", 2);
    while seen != map(&[("a", 1), ("b", 2)]) {
        apply(&mut seen, vec![Sent::Event(watcher.next(|_| {}).await)]);
    }
    first.cancel();
    server.await.unwrap().unwrap();
    feed.remove("a");
    let second = CancellationToken::new();
    let server = start(second.clone());
    while seen != map(&[("b", 2)]) {
        apply(&mut seen, vec![Sent::Event(watcher.next(|_| {}).await)]);
    }
    second.cancel();
    server.await.unwrap().unwrap();
}
