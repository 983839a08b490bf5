//! Conditions, and what a transaction may hold.

use std::sync::Arc;

use anyplace_store::{
    Error, LeaseId, MAX_KEY_BYTES, MAX_TXN_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES, Store, StoreExt, Txn,
    TxnOutcome,
};

pub(crate) async fn conflict_changes_nothing(store: &Arc<dyn Store>) {
    let first = store.put("a", "1").await.unwrap();
    let second = store.put("b", "1").await.unwrap();
    let before = store.list("").await.unwrap();

    let conflict = |key: &str| TxnOutcome::Conflict { revision: second, key: key.to_owned() };
    let write = || Txn::new().put("a", "2").put("c", "2").delete("b");
    assert_eq!(store.txn(write().when_absent("a")).await.unwrap(), conflict("a"));
    assert_eq!(store.txn(write().when_revision("a", second)).await.unwrap(), conflict("a"));
    assert_eq!(store.txn(write().when_revision("c", first)).await.unwrap(), conflict("c"));
    assert_eq!(store.txn(write().when_exists("c")).await.unwrap(), conflict("c"));
    assert_eq!(store.list("").await.unwrap(), before);

    let all = write().when_absent("c").when_revision("a", first).when_exists("b").when_revision("c", 0);
    assert_eq!(store.txn(all).await.unwrap(), TxnOutcome::Committed { revision: second + 1 });
    let (kvs, revision) = store.list("").await.unwrap();
    assert_eq!(revision, second + 1);
    assert_eq!(kvs.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    assert!(kvs.iter().all(|kv| kv.mod_revision == revision && kv.value == "2"));
}

pub(crate) async fn conflict_names_the_first_key(store: &Arc<dyn Store>) {
    let revision = store.put("there", "1").await.unwrap();
    let txn = Txn::new().when_exists("there").when_absent("gone").when_exists("x").when_exists("y");
    let wanted = TxnOutcome::Conflict { revision, key: "x".to_owned() };
    assert_eq!(store.txn(txn.put("z", "")).await.unwrap(), wanted);
}

pub(crate) async fn no_change_takes_no_revision(store: &Arc<dyn Store>) {
    let revision = store.put("a", "1").await.unwrap();
    let unchanged = TxnOutcome::Committed { revision };
    assert_eq!(store.txn(Txn::new()).await.unwrap(), unchanged);
    assert_eq!(store.txn(Txn::new().when_exists("a")).await.unwrap(), unchanged);
    let txn = Txn::new().delete("b").delete_prefix("c/").delete("b");
    assert_eq!(store.txn(txn).await.unwrap(), unchanged);
    assert_eq!(store.list("").await.unwrap().1, revision);
    assert_eq!(store.put("a", "2").await.unwrap(), revision + 1);
}

pub(crate) async fn overlapping_changes_are_refused(store: &Arc<dyn Store>) {
    store.put("d/a", "1").await.unwrap();
    let before = store.list("").await.unwrap();
    let overlapping = [
        Txn::new().put("d/a", "2").put("d/a", "3"),
        Txn::new().put("d/a", "2").delete("d/a"),
        Txn::new().delete("d/a").put("d/a", "2"),
        Txn::new().delete_prefix("d/").put("d/a", "2"),
        Txn::new().put("x", "2").delete_prefix(""),
    ];
    for txn in overlapping {
        let error = store.txn(txn.clone()).await.unwrap_err();
        assert!(matches!(error, Error::DuplicateKey { .. }), "{txn:?} gave {error}");
    }
    assert_eq!(store.list("").await.unwrap(), before);
    // Side by side is fine, and so is deleting twice.
    let txn = Txn::new().delete_prefix("d/").delete("d/a").put("d", "2").put("e", "2");
    assert_eq!(store.txn(txn).await.unwrap().revision(), before.1 + 1);
    assert_eq!(store.get("d/a").await.unwrap(), None);
}

pub(crate) async fn limits_are_enforced(store: &Arc<dyn Store>) {
    let before = store.list("").await.unwrap();
    let refused = async |txn: Txn| store.txn(txn).await.unwrap_err();
    let long_key = "k".repeat(MAX_KEY_BYTES + 1);

    assert!(matches!(refused(Txn::new().put("", "1")).await, Error::KeyEmpty));
    assert!(matches!(refused(Txn::new().delete("")).await, Error::KeyEmpty));
    assert!(matches!(refused(Txn::new().when_absent("").put("a", "")).await, Error::KeyEmpty));
    assert!(matches!(refused(Txn::new().put(&long_key, "1")).await, Error::KeyTooLong { len: 1025, .. }));
    assert!(matches!(refused(Txn::new().delete_prefix(&long_key)).await, Error::KeyTooLong { .. }));
    let value = vec![1; MAX_VALUE_BYTES + 1];
    assert!(matches!(refused(Txn::new().put("a", value)).await, Error::ValueTooLarge { .. }));
    let half = vec![1; MAX_TXN_BYTES / 2];
    let txn = Txn::new().put("ok", "1").put("a", half.clone()).put("b", half);
    assert!(matches!(refused(txn).await, Error::TxnTooLarge { .. }));
    let many = (0..=MAX_TXN_OPS).fold(Txn::new(), |txn, n| txn.put(n.to_string(), ""));
    assert!(matches!(refused(many).await, Error::TooManyOps { .. }));
    assert_eq!(store.list("").await.unwrap(), before);

    // What is exactly at a limit works.
    let key = "k".repeat(MAX_KEY_BYTES);
    store.put(&key, vec![7; MAX_VALUE_BYTES]).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap().unwrap().value, vec![7; MAX_VALUE_BYTES]);
    let many = (0..MAX_TXN_OPS).fold(Txn::new(), |txn, n| txn.put(format!("m/{n}"), ""));
    assert!(store.txn(many).await.unwrap().is_committed());
    assert_eq!(store.list("m/").await.unwrap().0.len(), MAX_TXN_OPS);

    // A transaction that is refused late changes nothing either.
    let txn = Txn::new().put("late/a", "1").put_leased("late/b", "1", LeaseId(u64::MAX >> 1));
    assert!(matches!(refused(txn).await, Error::LeaseNotFound(_)));
    assert!(store.list("late/").await.unwrap().0.is_empty());
}
