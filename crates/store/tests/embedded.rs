//! What only the embedded engine promises: its file, its lock, its bounds.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyplace_store::{EmbeddedStore, Error, Limits, Store, StoreExt, Txn, WatchEvent, WatchStream};
use futures_util::StreamExt;

fn open_error(path: &Path) -> Error {
    match EmbeddedStore::open(path) {
        Ok(_) => panic!("{} must not open", path.display()),
        Err(error) => error,
    }
}

/// The next event. Fails a test that would hang.
async fn next(stream: &mut WatchStream) -> WatchEvent {
    let event = tokio::time::timeout(Duration::from_secs(120), stream.next()).await;
    event.expect("an event within two minutes").expect("the stream goes on").expect("no error")
}

#[tokio::test]
async fn second_opener_is_told_who_is_in_the_way() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("a/b/store");
    let store = EmbeddedStore::open(&path).unwrap();
    let error = open_error(&path);
    assert!(matches!(&error, Error::Locked { path: p } if *p == path), "{error}");
    assert!(error.to_string().contains("in use by another process"), "{error}");
    store.put("a", "1").await.unwrap();
    // A watch that somebody still holds does not keep the file locked.
    let mut watch = store.watch("", 0).await.unwrap();
    drop(store);
    let store = EmbeddedStore::open(&path).unwrap();
    assert_eq!(store.get("a").await.unwrap().unwrap().value, "1");
    assert!(watch.next().await.unwrap().is_ok(), "what was read before the store closed");
    assert!(matches!(watch.next().await.unwrap(), Err(Error::Closed)));
    assert!(watch.next().await.is_none());
}

#[test]
fn other_files_are_refused_and_left_alone() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("notes.txt");
    let text = "shopping list\n".repeat(1000);
    std::fs::write(&path, &text).unwrap();
    let error = open_error(&path);
    assert!(matches!(error, Error::Open { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_new_file_is_for_its_owner_only() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("store");
    drop(EmbeddedStore::open(&path).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn newer_layout_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("store");
    drop(EmbeddedStore::open(&path).unwrap());
    let db = redb::Database::open(&path).unwrap();
    let txn = db.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, u64>::new("meta");
    txn.open_table(meta).unwrap().insert("layout", 2).unwrap();
    txn.commit().unwrap();
    drop(db);
    let error = open_error(&path);
    assert!(matches!(error, Error::Layout { found: 2, expected: 1, .. }), "{error}");
}

#[tokio::test]
async fn everything_survives_reopening() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("store");
    let store = EmbeddedStore::open(&path).unwrap();
    let short = store.grant_lease(Duration::from_secs(5)).await.unwrap();
    let long = store.grant_lease(Duration::from_secs(3600)).await.unwrap();
    for n in 0..10 {
        store.put(&format!("k/{n}"), n.to_string()).await.unwrap();
    }
    let txn =
        Txn::new().put_leased("l/short", "1", short).put_leased("l/long", "1", long).delete_prefix("k/3");
    let last = store.txn(txn).await.unwrap().revision();
    store.compact(4).await.unwrap();
    let before = store.list("").await.unwrap();
    let mut stream = store.watch("", 4).await.unwrap();
    let mut events = Vec::new();
    while events.len() < 6 + 3 {
        events.push(next(&mut stream).await);
    }
    drop((store, stream));

    let store = EmbeddedStore::open(&path).unwrap();
    assert_eq!(store.list("").await.unwrap(), before);
    assert!(matches!(store.watch("", 3).await.err().unwrap(), Error::Compacted { oldest: 4 }));
    let mut stream = store.watch("", 4).await.unwrap();
    for event in events {
        assert_eq!(next(&mut stream).await, event);
    }
    // The short lease runs on, from its beginning, and the long one still has its key.
    let event = next(&mut stream).await;
    assert_eq!((event.kv.key.as_str(), event.revision), ("l/short", last + 1));
    store.revoke_lease(long).await.unwrap();
    assert_eq!(next(&mut stream).await.kv.key, "l/long");
    let next = store.grant_lease(Duration::from_secs(1)).await.unwrap();
    assert!(next > long, "lease ids are not reused");
}

#[tokio::test]
async fn history_is_bounded_by_revisions_and_bytes() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("store");
    let limits = Limits { history_revisions: 10, ..Limits::default() };
    let store = EmbeddedStore::open_with(&path, limits).unwrap();
    for n in 0..25_u64 {
        store.put("a", n.to_string()).await.unwrap();
    }
    assert!(matches!(store.watch("", 14).await.err().unwrap(), Error::Compacted { oldest: 15 }));
    let mut stream = store.watch("", 15).await.unwrap();
    for revision in 16..=25 {
        assert_eq!(next(&mut stream).await.revision, revision);
    }
    drop((store, stream));

    // Reopened with another bound: it counts what is there.
    let limits = Limits { history_bytes: 5000, ..Limits::default() };
    let store = EmbeddedStore::open_with(&path, limits).unwrap();
    for _ in 0..5 {
        store.put("a", vec![0; 2000]).await.unwrap();
    }
    assert!(matches!(store.watch("", 27).await.err().unwrap(), Error::Compacted { oldest: 28 }));
    assert!(store.watch("", 28).await.is_ok());
    // The newest revision stays, however large.
    store.put("a", vec![0; 50_000]).await.unwrap();
    assert!(store.watch("", 30).await.unwrap().next().await.unwrap().is_ok());
    assert!(matches!(store.watch("", 29).await.err().unwrap(), Error::Compacted { oldest: 30 }));
}

#[tokio::test]
async fn slow_watcher_is_cut_off_and_can_resume() {
    for limits in
        [Limits { watch_revisions: 8, ..Limits::default() }, Limits { watch_bytes: 900, ..Limits::default() }]
    {
        let home = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open_with(home.path().join("store"), limits).unwrap();
        let mut slow = store.watch("s/", 0).await.unwrap();
        let mut elsewhere = store.watch("elsewhere/", 0).await.unwrap();
        for n in 0..40_u64 {
            store
                .txn(Txn::new().put(format!("s/{n}/a"), vec![0; 46]).put(format!("s/{n}/b"), vec![0; 46]))
                .await
                .unwrap()
                .revision();
        }
        let mut seen: u64 = 0;
        let resume_from = loop {
            match slow.next().await.unwrap() {
                Ok(event) => {
                    seen += 1;
                    assert_eq!(event.revision, seen.div_ceil(2));
                }
                Err(Error::Lagged { resume_from }) => break resume_from,
                Err(error) => panic!("{error}"),
            }
        };
        assert!(slow.next().await.is_none());
        assert_eq!(resume_from, seen / 2, "whole transactions only");
        assert!((7..=9).contains(&resume_from), "bounded, but not to nothing: {resume_from}");
        let mut again = store.watch("s/", resume_from).await.unwrap();
        while seen < 80 {
            seen += 1;
            assert_eq!(next(&mut again).await.revision, seen.div_ceil(2));
        }
        // Who watches something quiet has no trouble.
        store.put("elsewhere/a", "").await.unwrap();
        assert_eq!(next(&mut elsewhere).await.revision, 41);
    }
}

/// More history than one page, with revisions of many events across the page's end.
#[tokio::test]
async fn long_history_is_read_in_pages() {
    let home = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(home.path().join("store")).unwrap();
    for n in 0..9 {
        let txn =
            (0..150).fold(Txn::new(), |txn, key| txn.put(format!("{}/{key:03}", key % 2), n.to_string()));
        assert!(store.txn(txn).await.unwrap().is_committed());
    }
    let mut stream = store.watch("1/", 1).await.unwrap();
    store.delete("1/001").await.unwrap();
    for revision in 2..=9 {
        for n in 0..75 {
            let event = next(&mut stream).await;
            assert_eq!((event.revision, event.more), (revision, n < 74));
            assert_eq!(event.kv.key, format!("1/{:03}", 2 * n + 1));
        }
    }
    assert_eq!(next(&mut stream).await.revision, 10);
}

/// Many transactions at once, also more bytes than the queue holds, all come through.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_over_its_bound_only_waits() {
    let home = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(home.path().join("store")).unwrap();
    let writes: Vec<_> = (0..100_u64)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.put(&format!("q/{n}"), vec![n as u8; 1 << 20]).await.unwrap() })
        })
        .collect();
    for write in writes {
        write.await.unwrap();
    }
    let (kvs, revision) = store.list("q/").await.unwrap();
    assert_eq!((kvs.len(), revision), (100, 100));
}
