//! Keys, lists, helpers.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyplace_store::{Store, StoreExt, Txn, TxnOutcome};
use bytes::Bytes;

pub(crate) async fn revisions_and_versions(store: &Arc<dyn Store>) {
    let (_, start) = store.list("").await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), None);

    assert_eq!(store.put("a", "1").await.unwrap(), start + 1);
    assert_eq!(store.put("a", "2").await.unwrap(), start + 2);
    let kv = store.get("a").await.unwrap().unwrap();
    assert_eq!((kv.key.as_str(), &kv.value), ("a", &Bytes::from("2")));
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (start + 1, start + 2, 2));
    assert_eq!(kv.lease, None);

    // Writing the same value again is a change all the same.
    assert_eq!(store.put("a", "2").await.unwrap(), start + 3);

    assert_eq!(store.delete("a").await.unwrap(), start + 4);
    assert_eq!(store.get("a").await.unwrap(), None);

    // A new incarnation begins its version again.
    let txn = Txn::new().put("a", "").put("b", vec![0, 255]);
    assert_eq!(store.txn(txn).await.unwrap(), TxnOutcome::Committed { revision: start + 5 });
    let kv = store.get("a").await.unwrap().unwrap();
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (start + 5, start + 5, 1));
    assert_eq!(kv.value, Bytes::new());
    assert_eq!(store.get("b").await.unwrap().unwrap().value, Bytes::from(vec![0, 255]));
}

pub(crate) async fn lists_are_ordered_and_by_prefix(store: &Arc<dyn Store>) {
    for key in ["p/b", "p", "p/a", "p0", "q", "p/ä", "p/a/x", "o"] {
        store.put(key, key.to_owned()).await.unwrap();
    }
    let keys = async |prefix: &str| {
        let (kvs, _) = store.list(prefix).await.unwrap();
        assert!(kvs.iter().all(|kv| kv.value == kv.key));
        kvs.into_iter().map(|kv| kv.key).collect::<Vec<_>>()
    };
    assert_eq!(keys("p/").await, ["p/a", "p/a/x", "p/b", "p/ä"]);
    assert_eq!(keys("p").await, ["p", "p/a", "p/a/x", "p/b", "p/ä", "p0"]);
    assert_eq!(keys("").await, ["o", "p", "p/a", "p/a/x", "p/b", "p/ä", "p0", "q"]);
    assert_eq!(keys("r").await, [""; 0]);

    assert!(store.txn(Txn::new().delete_prefix("p/")).await.unwrap().is_committed());
    assert_eq!(keys("").await, ["o", "p", "p0", "q"]);
}

/// Two keys are always written together; no list may see them differ.
pub(crate) async fn lists_are_snapshots(store: &Arc<dyn Store>) {
    let writer = tokio::spawn({
        let store = Arc::clone(store);
        async move {
            for n in 0..200 {
                let n = n.to_string();
                let txn = Txn::new().put("pair/left", n.clone()).put("pair/right", n);
                assert!(store.txn(txn).await.unwrap().is_committed());
            }
        }
    });
    let mut last = 0;
    while !writer.is_finished() {
        let (kvs, revision) = store.list("pair/").await.unwrap();
        assert!(revision >= last, "the revision of a list went back from {last} to {revision}");
        last = revision;
        if let [left, right] = kvs.as_slice() {
            assert_eq!((&left.value, left.mod_revision), (&right.value, right.mod_revision));
            assert_eq!(
                left.mod_revision, revision,
                "only the pair is written, so its revision is the store's"
            );
        } else {
            assert!(kvs.is_empty(), "both or none");
        }
    }
    writer.await.unwrap();
}

pub(crate) async fn json_helpers(store: &Arc<dyn Store>) {
    let revision = store.put_json("j/a", &vec![1, 2]).await.unwrap();
    assert_eq!(store.get_json::<Vec<u8>>("j/a").await.unwrap(), Some((vec![1, 2], revision)));
    assert_eq!(store.get_json::<Vec<u8>>("j/b").await.unwrap(), None);

    let txn = Txn::new().when_revision("j/a", revision).put_json("j/b", "text").unwrap();
    let second = store.txn(txn).await.unwrap().revision();
    let (values, at) = store.list_json::<serde_json::Value>("j/").await.unwrap();
    assert_eq!(at, second);
    assert_eq!(
        values,
        [("j/a".to_owned(), serde_json::json!([1, 2]), revision), ("j/b".to_owned(), "text".into(), second)]
    );

    let error = store.get_json::<u32>("j/b").await.unwrap_err();
    assert!(error.to_string().contains("j/b"), "names the key: {error}");
}

pub(crate) async fn concurrent_increments_lose_nothing(store: &Arc<dyn Store>) {
    const TASKS: u64 = 16;
    const INCREMENTS: u64 = 20;
    let start = store.put_json("counter", &0_u64).await.unwrap();
    let tasks = (0..TASKS).map(|_| {
        let store = Arc::clone(store);
        tokio::spawn(async move {
            let mut revisions = Vec::new();
            while revisions.len() < INCREMENTS as usize {
                let (value, revision) = store.get_json::<u64>("counter").await.unwrap().unwrap();
                let txn = Txn::new().when_revision("counter", revision).put_json("counter", &(value + 1));
                match store.txn(txn.unwrap()).await.unwrap() {
                    TxnOutcome::Committed { revision } => revisions.push(revision),
                    TxnOutcome::Conflict { key, .. } => assert_eq!(key, "counter"),
                }
            }
            revisions
        })
    });
    let mut revisions = BTreeSet::new();
    for task in tasks.collect::<Vec<_>>() {
        for revision in task.await.unwrap() {
            assert!(revisions.insert(revision), "revision {revision} was given out twice");
        }
    }
    let total = TASKS * INCREMENTS;
    assert_eq!(store.get_json::<u64>("counter").await.unwrap(), Some((total, start + total)));
    assert_eq!(revisions, (start + 1..=start + total).collect());
}

pub(crate) async fn lists_beside_writes_are_of_one_moment(store: &Arc<dyn Store>) {
    const KEYS: u64 = 60;
    /// Between two keys that change, so that a list takes as long as a few writes.
    const STILL: u64 = 100;
    const WRITES: u64 = 200;
    const READERS: u64 = 4;
    let still = bytes::Bytes::from(vec![0xff; 200]);
    for key in 0..KEYS {
        let txn = (0..STILL)
            .fold(Txn::new(), |txn, number| txn.put(format!("moment/{key:02}/{number:03}"), still.clone()));
        committed(store, txn).await;
    }
    let write = |number: u64| {
        let value = vec![number as u8; 200];
        (0..KEYS).fold(Txn::new(), |txn, key| txn.put(format!("moment/{key:02}"), value.clone()))
    };
    committed(store, write(0)).await;
    let readers = (0..READERS).map(|_| {
        let (store, still) = (Arc::clone(store), still.clone());
        tokio::spawn(async move {
            loop {
                let (found, _) = store.list("moment/").await.unwrap();
                assert_eq!(found.len() as u64, KEYS * (1 + STILL));
                let changing = &found[0].value;
                for pair in &found {
                    let expected = if pair.key.len() == found[0].key.len() { changing } else { &still };
                    assert_eq!(&pair.value, expected, "{}", pair.key);
                }
                if u64::from(changing[0]) == WRITES {
                    return;
                }
            }
        })
    });
    let readers = readers.collect::<Vec<_>>();
    for number in 1..=WRITES {
        committed(store, write(number)).await;
    }
    for reader in readers {
        reader.await.unwrap();
    }
}

async fn committed(store: &Arc<dyn Store>, txn: Txn) {
    let outcome = store.txn(txn).await.unwrap();
    assert!(matches!(outcome, TxnOutcome::Committed { .. }), "{outcome:?}");
}
