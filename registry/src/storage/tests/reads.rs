//! What is asked of a bucket, where each question is a request.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyplace_images::Digest;
use anyplace_images::manifest::OCI_INDEX;
use anyplace_model::DurationMs;
use object_store::memory::InMemory;
use tokio_util::sync::CancellationToken;

use super::super::{NewManifest, Note};
use super::Bed;
use super::faulty::Faulty;
use crate::access::Audit;
use crate::access::accounts::{Accounts, Known, Team};
use crate::access::limits::Limits;
use crate::config::Config;
use crate::gc::{Collector, GcPhase};
use crate::references;
use crate::stored::Stored;

fn bucket() -> (Arc<Faulty>, Bed) {
    let store = Arc::new(Faulty::new(InMemory::new(), true));
    (store.clone(), Bed::faulty(store))
}

/// How often each key that begins so was read since the last time.
fn reads(store: &Faulty, prefix: &str) -> BTreeMap<String, usize> {
    let mut reads = BTreeMap::new();
    for key in std::mem::take(&mut *store.reads.lock().unwrap()) {
        if key.starts_with(prefix) {
            *reads.entry(key).or_default() += 1;
        }
    }
    reads
}

#[tokio::test]
async fn a_count_for_quotas_asks_only_for_contents_that_the_last_one_did_not_see() {
    let (store, bed) = bucket();
    let process = bed.open().await;
    let team = Team {
        name: "red".into(),
        repositories: vec!["red/**".parse().unwrap()],
        quota_bytes: Some(1 << 30),
        requests_per_s: None,
    };
    let mut known = Known::default();
    known.teams.insert("red".into(), team);
    let limits = Limits::new(DurationMs(0), DurationMs(0));
    let put = async |text: &str| {
        let digest = Digest::of(text.as_bytes());
        process.storage.put_link("red/app", &digest).await.unwrap();
        process.storage.put_content(&digest, text.to_owned().into()).await.unwrap();
        digest
    };
    let count = async || {
        reads(&store, "");
        limits.count(&process.storage, &process.uploads, &known).await.unwrap();
        (limits.used("red"), reads(&store, "blobs/").len())
    };
    for number in 100..120 {
        put(&format!("content {number}")).await;
    }
    assert_eq!(count().await, (20 * 11, 20));
    assert_eq!(count().await, (20 * 11, 0));
    let new = put("one more").await;
    assert_eq!(count().await, (20 * 11 + 8, 1));
    // What is gone counts no more, and is asked for when it is back.
    process.storage.remove_link("red/app", &new).await.unwrap();
    assert_eq!(count().await, (20 * 11, 0));
    put("one more").await;
    assert_eq!(count().await, (20 * 11 + 8, 1));
}

#[tokio::test(start_paused = true)]
async fn what_is_stored_is_not_counted_anew_at_each_start() {
    let (store, bed) = bucket();
    let process = bed.open().await;
    for number in 0..10 {
        let text = format!("content {number}");
        process.storage.put_content(&Digest::of(text.as_bytes()), text.into()).await.unwrap();
    }
    // Serves for an hour, and says how much it asked for.
    let serve = async || {
        let (process, stored) = (bed.open().await, Stored::default());
        let accounts = Accounts::load(process.storage.clone()).await.unwrap();
        reads(&store, "");
        let (hour, stop) = (Duration::from_secs(3_600), CancellationToken::new());
        let serving = stored.run_by_itself(&process.storage, &process.uploads, &accounts, &stop);
        assert!(tokio::time::timeout(hour, serving).await.is_err());
        assert!(stored.render().contains("\nanyplace_registry_stored_bytes 90\n"), "{}", stored.render());
        reads(&store, "blobs/").values().sum::<usize>()
    };
    assert_eq!((serve().await, serve().await), (10, 0));
    process.storage.put_note(Note::LastCount, &"no count").await.unwrap();
    assert_eq!((serve().await, serve().await), (10, 0));
}

#[tokio::test]
async fn a_collection_reads_each_tag_once() {
    let (store, bed) = bucket();
    let storage = bed.open().await.storage;
    let json = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[]}}"#);
    let digest = Digest::of(json.as_bytes());
    let manifest = NewManifest::of(references::read(None, json.as_bytes()).unwrap(), json.into());
    let tags: Vec<String> = (0..20).map(|number| format!("v{number}")).collect();
    let names: Vec<&str> = tags.iter().map(String::as_str).collect();
    storage.put_tagged_manifest("app", &digest, manifest, &names).await.unwrap();

    let folder = tempfile::tempdir().unwrap();
    let retention = toml::from_str("rules = [{ keep_younger_than = '30d' }]").unwrap();
    let config = Config { retention, ..Config::new(folder.path()) };
    let audit = Arc::new(Audit::open(folder.path()).unwrap());
    let collector = Collector::unchecked(storage.clone(), &config, audit, CancellationToken::new()).unwrap();
    reads(&store, "");
    let report = collector.collect(false).await.unwrap();
    assert_eq!((report.phase, report.error, report.plan.tags.count), (GcPhase::Done, None, 0));
    let reads = reads(&store, "repositories/app/_tags/");
    assert!(reads.len() == 20 && reads.values().all(|count| *count == 1), "{reads:?}");
}
