//! Leases. Times are only waited for, never asserted as upper bounds: machines may be slow.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyplace_store::{Error, EventKind, LeaseId, Store, StoreExt, Txn};

use crate::{next, take};

const LONG: Duration = Duration::from_secs(3600);

pub(crate) async fn expiry_deletes_all_keys_in_one_revision(store: &Arc<dyn Store>) {
    let ttl = Duration::from_secs(1);
    let granted = Instant::now();
    let lease = store.grant_lease(ttl).await.unwrap();
    let other = store.grant_lease(LONG).await.unwrap();
    assert_ne!(lease, other);
    let txn = Txn::new()
        .put_leased("e/a", "1", lease)
        .put_leased("e/b", "1", lease)
        .put_leased("e/c", "1", other)
        .put("e/d", "1");
    let from = store.txn(txn).await.unwrap().revision();
    let mut stream = store.watch("e/", from).await.unwrap();
    // Writes meanwhile give the store every occasion to expire the lease early.
    let busy = async {
        loop {
            store.put("noise", "").await.unwrap();
            tokio::time::sleep(ttl / 50).await;
        }
    };
    let events = tokio::select! {
        events = take(&mut stream, 2) => events,
        () = busy => unreachable!("writes for ever"),
    };
    assert!(granted.elapsed() >= ttl, "expired early");
    for (event, key) in events.iter().zip(["e/a", "e/b"]) {
        assert_eq!((event.kind, event.kv.key.as_str()), (EventKind::Delete, key));
        assert_eq!((event.revision, event.more), (events[0].revision, key == "e/a"));
    }
    let (kvs, _) = store.list("e/").await.unwrap();
    assert_eq!(kvs.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(), ["e/c", "e/d"]);
    assert_eq!(kvs[0].lease, Some(other));
    assert!(matches!(store.keep_alive(lease).await.unwrap_err(), Error::LeaseNotFound(l) if l == lease));
}

pub(crate) async fn kept_alive_stays(store: &Arc<dyn Store>) {
    let ttl = Duration::from_secs(2);
    let lease = store.grant_lease(ttl).await.unwrap();
    let start = Instant::now();
    store.txn(Txn::new().put_leased("k", "1", lease)).await.unwrap().revision();
    let mut last = start;
    while start.elapsed() < 2 * ttl {
        tokio::time::sleep(ttl / 20).await;
        let kept = store.keep_alive(lease).await;
        if last.elapsed() >= ttl {
            eprintln!("this machine stalled for the whole lease; nothing to be learnt");
            return;
        }
        kept.unwrap();
        last = Instant::now();
        let there = store.get("k").await.unwrap().is_some();
        assert!(there || last.elapsed() >= ttl, "deleted though its lease was kept alive");
    }
}

pub(crate) async fn revoking_deletes(store: &Arc<dyn Store>) {
    let lease = store.grant_lease(LONG).await.unwrap();
    let txn = Txn::new().put_leased("r/a", "1", lease).put_leased("r/b", "1", lease).put("r/c", "1");
    let from = store.txn(txn).await.unwrap().revision();
    let mut stream = store.watch("r/", from).await.unwrap();
    store.revoke_lease(lease).await.unwrap();
    let events = take(&mut stream, 2).await;
    assert!(events.iter().all(|e| e.kind == EventKind::Delete && e.revision == from + 1));
    assert_eq!(store.list("r/").await.unwrap().0.len(), 1);
    assert!(matches!(store.revoke_lease(lease).await.unwrap_err(), Error::LeaseNotFound(_)));
    assert!(matches!(store.keep_alive(lease).await.unwrap_err(), Error::LeaseNotFound(_)));

    // A lease without keys ends without a change.
    let empty = store.grant_lease(LONG).await.unwrap();
    store.revoke_lease(empty).await.unwrap();
    assert_eq!(store.list("").await.unwrap().1, from + 1);
    assert_ne!(empty, lease);
}

pub(crate) async fn put_without_lease_detaches(store: &Arc<dyn Store>) {
    let first = store.grant_lease(LONG).await.unwrap();
    let second = store.grant_lease(LONG).await.unwrap();
    let keys = ["t/detached", "t/moved", "t/renewed"];
    let txn = keys.into_iter().fold(Txn::new(), |txn, key| txn.put_leased(key, "1", first));
    let mut from = store.txn(txn).await.unwrap().revision();
    let txn = Txn::new()
        .put(keys[0], "2")
        .put_leased(keys[1], "2", second)
        .put_leased(keys[2], "2", first)
        .put_leased("t/reborn", "2", first);
    assert!(store.txn(txn).await.unwrap().is_committed());
    // Deleted and created again without the lease: another key as far as the lease goes.
    store.delete("t/reborn").await.unwrap();
    from = from.max(store.put("t/reborn", "3").await.unwrap());
    let mut stream = store.watch("t/", from).await.unwrap();
    store.revoke_lease(first).await.unwrap();
    let event = next(&mut stream).await;
    assert_eq!((event.kv.key.as_str(), event.kind, event.more), (keys[2], EventKind::Delete, false));
    let (kvs, _) = store.list("t/").await.unwrap();
    let left: Vec<_> = kvs.iter().map(|kv| (kv.key.as_str(), kv.lease)).collect();
    assert_eq!(left, [(keys[0], None), (keys[1], Some(second)), ("t/reborn", None)]);
}

pub(crate) async fn unknown_lease_is_refused(store: &Arc<dyn Store>) {
    let unknown = LeaseId(0x7777_7777);
    let revision = store.put("u", "1").await.unwrap();
    let txn = Txn::new().put("v", "1").put_leased("u", "2", unknown);
    assert!(matches!(store.txn(txn.clone()).await.unwrap_err(), Error::LeaseNotFound(l) if l == unknown));
    // A condition that does not hold comes first.
    assert!(!store.txn(txn.when_absent("u")).await.unwrap().is_committed());
    assert!(matches!(store.keep_alive(unknown).await.unwrap_err(), Error::LeaseNotFound(_)));
    assert!(matches!(store.grant_lease(Duration::ZERO).await.unwrap_err(), Error::LeaseTtl { .. }));
    assert_eq!(store.list("").await.unwrap().1, revision);
}
