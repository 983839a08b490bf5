//! Exports and imports, between both engines.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use anyplace_store::{EmbeddedStore, Error, Store, StoreExt, Txn, export, import};
use bytes::Bytes;
use common::Cluster;

const OF: &str = "global-scheduler";

fn embedded(home: &tempfile::TempDir, name: &str) -> Arc<EmbeddedStore> {
    EmbeddedStore::open(home.path().join(name)).unwrap()
}

async fn contents(store: &dyn Store) -> Vec<(String, Bytes)> {
    store.list("").await.unwrap().0.into_iter().map(|kv| (kv.key, kv.value)).collect()
}

async fn filled(home: &tempfile::TempDir) -> Arc<EmbeddedStore> {
    let store = embedded(home, "source");
    store.put("deployments/a", r#"{ "name":"a","spaces":  [1, 2] }"#).await.unwrap();
    store.put("raw", vec![0, 159, 146, 150]).await.unwrap();
    store.put("lines", "[1,\n2]").await.unwrap();
    store.put("empty", "").await.unwrap();
    store.put("padded", " 1 ").await.unwrap();
    for n in 0..1500 {
        store.put(&format!("many/{n:04}"), n.to_string()).await.unwrap();
    }
    store.put("large", vec![b'x'; 1 << 20]).await.unwrap();
    store
}

#[tokio::test]
async fn a_store_moves_to_etcd_and_back_byte_for_byte() {
    let Some(program) = common::program("3.5") else { return };
    let home = tempfile::tempdir().unwrap();
    let source = filled(&home).await;
    let wanted = contents(source.as_ref()).await;
    let lease = source.grant_lease(Duration::from_secs(3600)).await.unwrap();
    assert!(source.txn(Txn::new().put_leased("leader", "me", lease)).await.unwrap().is_committed());
    let file = export(source.as_ref(), OF).await.unwrap();

    let cluster = Cluster::start(program, 1, false, &[]).await;
    let etcd = cluster.store("moved").await;
    assert_eq!(import(etcd.as_ref(), OF, &file).await.unwrap(), wanted.len());
    assert_eq!(contents(etcd.as_ref()).await, wanted);
    let back = embedded(&home, "back");
    import(back.as_ref(), OF, &export(etcd.as_ref(), OF).await.unwrap()).await.unwrap();
    assert_eq!(contents(back.as_ref()).await, wanted);
}

#[tokio::test]
async fn what_is_no_whole_export_is_refused_and_nothing_written() {
    let home = tempfile::tempdir().unwrap();
    let source = filled(&home).await;
    let file = export(source.as_ref(), OF).await.unwrap();
    let target = embedded(&home, "target");
    let refused = async |file: &[u8], of: &str, words: &str| {
        let error = import(target.as_ref(), of, file).await.unwrap_err();
        assert!(matches!(error, Error::Import { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(contents(target.as_ref()).await, []);
    };
    refused(b"", OF, "the file is empty").await;
    refused(b"kind: Deployment\n", OF, "line 1: this is no export of a store").await;
    refused(
        &file,
        "location-scheduler",
        "this is the store of a global-scheduler, not of a location-scheduler",
    )
    .await;
    refused(&file[..file.len() - 1_000_000], OF, "the file ends before its last line").await;
    let position = file.windows(5).position(|window| window == b"\"name").unwrap();
    let mut changed = file.clone();
    changed[position + 1] ^= 1;
    refused(&changed, OF, "the file was changed since it was exported").await;
    let newer =
        String::from_utf8(file.clone()).unwrap().replacen("\"anyplace_store\":1", "\"anyplace_store\":2", 1);
    refused(newer.as_bytes(), OF, "the export has format 2").await;

    // What is in the store stays.
    target.put("mine", "1").await.unwrap();
    let error = import(target.as_ref(), OF, &file).await.unwrap_err();
    assert!(error.to_string().contains("the store isn't empty (1 keys, such as mine)"), "{error}");
    assert_eq!(contents(target.as_ref()).await.len(), 1);
}

#[tokio::test]
async fn an_import_that_broke_off_is_repeated_and_nobody_uses_its_half() {
    let home = tempfile::tempdir().unwrap();
    let file = export(filled(&home).await.as_ref(), OF).await.unwrap();
    let path = home.path().join("half");
    let half = EmbeddedStore::open(&path).unwrap();
    half.put("importing", OF).await.unwrap();
    half.put("many/0001", "half").await.unwrap();
    half.put("of an earlier try", "").await.unwrap();
    drop(half);
    let Err(error) = anyplace_store::open(path.clone(), None).await else { panic!("half a store opens") };
    assert!(error.to_string().contains("`anyplace admin import`"), "{error}");
    let half = EmbeddedStore::open(&path).unwrap();
    import(half.as_ref(), OF, &file).await.unwrap();
    drop(half);
    let whole = anyplace_store::open(path, None).await.unwrap();
    assert_eq!(contents(whole.as_ref()).await.len(), 1506);
    assert_eq!(whole.get("many/0001").await.unwrap().unwrap().value, "1");
}
