//! Watches: order, completeness, resuming, compaction.

use std::sync::Arc;

use anyplace_store::{Error, EventKind, Store, StoreExt, Txn};

use crate::{next, soon, take, watch_error};

pub(crate) async fn resumes_from_any_revision(store: &Arc<dyn Store>) {
    let (_, start) = store.list("").await.unwrap();
    for n in 0..20_u64 {
        match n % 4 {
            3 => store.delete("w/0").await.unwrap(),
            _ => store.put(&format!("w/{}", n % 4), n.to_string()).await.unwrap(),
        };
        store.put("other", "").await.unwrap();
    }
    let mut stream = store.watch("w/", start).await.unwrap();
    let all = take(&mut stream, 20).await;
    for (n, event) in (0_u64..).zip(&all) {
        assert_eq!(event.revision, start + 1 + 2 * n);
        assert_eq!(event.kv.mod_revision, event.revision);
        assert!(!event.more);
        if n % 4 == 3 {
            assert_eq!((event.kind, event.kv.key.as_str()), (EventKind::Delete, "w/0"));
            assert_eq!((event.kv.create_revision, event.kv.version, event.kv.value.len()), (0, 0, 0));
        } else {
            assert_eq!(event.kind, EventKind::Put);
            assert_eq!(
                (event.kv.key.clone(), &event.kv.value),
                (format!("w/{}", n % 4), &n.to_string().into())
            );
            let version = if n % 4 == 0 { 1 } else { n / 4 + 1 };
            assert_eq!(event.kv.version, version);
        }
    }
    for from in start..=start + 40 {
        let mut stream = store.watch("w/", from).await.unwrap();
        let wanted: Vec<_> = all.iter().filter(|event| event.revision > from).cloned().collect();
        assert_eq!(take(&mut stream, wanted.len()).await, wanted);
    }
}

pub(crate) async fn live_and_history_join(store: &Arc<dyn Store>) {
    let from = store.put("l/0", "").await.unwrap();
    store.put("l/1", "").await.unwrap();
    let mut stream = store.watch("l/", from).await.unwrap();
    store.put("l/2", "").await.unwrap();
    assert_eq!(next(&mut stream).await.kv.key, "l/1");
    store.put("unrelated", "").await.unwrap();
    assert_eq!(next(&mut stream).await.kv.key, "l/2");
    let last = store.delete("l/2").await.unwrap();
    let event = next(&mut stream).await;
    assert_eq!((event.kind, event.revision), (EventKind::Delete, last));
}

pub(crate) async fn one_revision_stays_together(store: &Arc<dyn Store>) {
    let from = store.txn(Txn::new().put("o/x", "").put("o/y", "")).await.unwrap().revision();
    let mut live = store.watch("o/", from).await.unwrap();
    let mut part = store.watch("o/a", from).await.unwrap();
    let txn = Txn::new().put("o/b", "").put("n", "").delete_prefix("o/x").put("o/a", "").put("z", "");
    let revision = store.txn(txn).await.unwrap().revision();
    let events = take(&mut live, 3).await;
    let seen: Vec<_> =
        events.iter().map(|e| (e.kv.key.as_str(), e.kind, e.more, e.resume_revision())).collect();
    assert_eq!(
        seen,
        [
            ("o/b", EventKind::Put, true, from),
            ("o/x", EventKind::Delete, true, from),
            ("o/a", EventKind::Put, false, revision),
        ]
    );
    let event = next(&mut part).await;
    assert_eq!((event.kv.key.as_str(), event.more), ("o/a", false));
    let mut again = store.watch("o/", events[1].resume_revision()).await.unwrap();
    assert_eq!(take(&mut again, 3).await, events);
}

pub(crate) async fn compacted_history_is_an_error(store: &Arc<dyn Store>) {
    let (_, start) = store.list("").await.unwrap();
    let mut before = store.watch("", start).await.unwrap();
    for n in 0..10 {
        store.put(&format!("c/{}", n % 3), n.to_string()).await.unwrap();
    }
    let kvs = store.list("").await.unwrap();
    store.compact(start + 6).await.unwrap();
    assert_eq!(store.list("").await.unwrap(), kvs, "compaction keeps the current keys and the revision");

    // From `up_to - 1` an engine may still be able to resume, or not.
    for from in [0, start, start + 4] {
        let error = watch_error(&**store, "c/", from).await;
        assert!(matches!(error, Error::Compacted { oldest } if oldest <= start + 6), "{error}");
    }
    for from in start + 6..=start + 10 {
        let mut stream = store.watch("c/", from).await.unwrap();
        let revisions: Vec<_> =
            take(&mut stream, (start + 10 - from) as usize).await.iter().map(|e| e.revision).collect();
        assert_eq!(revisions, (from + 1..=start + 10).collect::<Vec<_>>());
    }
    // Compacting what is compacted is nothing.
    store.compact(start + 6).await.unwrap();
    store.compact(start + 2).await.unwrap();
    let error = store.compact(start + 11).await.unwrap_err();
    assert!(matches!(error, Error::FutureRevision { .. }), "{error}");

    // A watch that was open goes on.
    assert_eq!(take(&mut before, 10).await.len(), 10);
    store.put("c/9", "").await.unwrap();
    assert_eq!(next(&mut before).await.kv.key, "c/9");
}

pub(crate) async fn future_revision_is_an_error(store: &Arc<dyn Store>) {
    let current = store.put("a", "").await.unwrap();
    let error = watch_error(&**store, "", current + 1).await;
    assert!(matches!(error, Error::FutureRevision { asked, current: c } if asked == c + 1), "{error}");
    let error = watch_error(&**store, "", u64::MAX).await;
    assert!(matches!(error, Error::FutureRevision { .. }), "{error}");
}

/// Watches opened at any moment, by list and watch, see exactly the changes after their list.
pub(crate) async fn watchers_of_a_busy_store_miss_nothing(store: &Arc<dyn Store>) {
    const WRITERS: u64 = 4;
    const WRITES: u64 = 60;
    let (_, start) = store.list("").await.unwrap();
    let end = start + WRITERS * WRITES;
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = Arc::clone(store);
            tokio::spawn(async move {
                for n in 0..WRITES {
                    store.put(&format!("busy/{writer}"), n.to_string()).await.unwrap();
                }
            })
        })
        .collect();
    let mut watchers = Vec::new();
    while !writers.iter().all(|writer| writer.is_finished()) {
        let (_, from) = store.list("busy/").await.unwrap();
        let mut stream = store.watch("busy/", from).await.unwrap();
        watchers.push(tokio::spawn(async move {
            for revision in from + 1..=end {
                assert_eq!(next(&mut stream).await.revision, revision, "a watch from {from}");
            }
        }));
    }
    for task in writers.into_iter().chain(watchers) {
        soon("writers and watchers", task).await.unwrap();
    }
    // Nothing comes twice or out of nothing.
    let mut stream = store.watch("busy/", end).await.unwrap();
    store.put("busy/end", "").await.unwrap();
    assert_eq!(next(&mut stream).await.revision, end + 1);
}
