//! What every engine of the store must do. A new engine adds a function that opens an empty store of it, and a line
//! `contract!(engine)`.
//!
//! The cases assume nothing about the first revision (etcd begins at 1, the embedded engine at 0), only about how
//! revisions move on.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

mod cases;
#[path = "../common/mod.rs"]
mod common;
mod conditions;
mod leases;
mod oracle;
mod random;
mod watches;

use std::any::Any;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyplace_store::{EmbeddedStore, Error, Store, WatchEvent, WatchStream};
use common::Cluster;
use futures_util::StreamExt;

/// An empty store, and what it needs to live.
struct Fixture {
    store: Arc<dyn Store>,
    _home: Box<dyn Any + Send>,
}

async fn embedded() -> Option<Fixture> {
    let home = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(home.path().join("data").join("store")).unwrap();
    Some(Fixture { store, _home: Box::new(home) })
}

async fn etcd(version: &str) -> Option<Fixture> {
    let cluster = Cluster::start(common::program(version)?, 1, false, &[]).await;
    let store = cluster.store("contract").await;
    Some(Fixture { store, _home: Box::new(cluster) })
}

async fn etcd_3_4() -> Option<Fixture> {
    etcd("3.4").await
}

async fn etcd_3_5() -> Option<Fixture> {
    etcd("3.5").await
}

/// Fails a test that would hang. Far above what any case takes, so it measures nothing.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(120), future).await {
        Ok(done) => done,
        Err(_) => panic!("nothing happened for two minutes while waiting for {what}"),
    }
}

async fn next(stream: &mut WatchStream) -> WatchEvent {
    soon("a watch event", stream.next()).await.expect("the stream goes on").expect("no error")
}

async fn take(stream: &mut WatchStream, count: usize) -> Vec<WatchEvent> {
    let mut events = Vec::with_capacity(count);
    while events.len() < count {
        events.push(next(stream).await);
    }
    events
}

async fn watch_error(store: &dyn Store, prefix: &str, from: u64) -> Error {
    match store.watch(prefix, from).await {
        Ok(_) => panic!("a watch from {from} must fail"),
        Err(error) => error,
    }
}

macro_rules! contract {
    ($engine:ident) => {
        contract!($engine:
            cases: revisions_and_versions, lists_are_ordered_and_by_prefix, lists_are_snapshots, json_helpers,
                concurrent_increments_lose_nothing, lists_beside_writes_are_of_one_moment;
            conditions: conflict_changes_nothing, conflict_names_the_first_key, no_change_takes_no_revision,
                overlapping_changes_are_refused, limits_are_enforced;
            watches: resumes_from_any_revision, live_and_history_join, one_revision_stays_together,
                compacted_history_is_an_error, future_revision_is_an_error, watchers_of_a_busy_store_miss_nothing;
            leases: expiry_deletes_all_keys_in_one_revision, kept_alive_stays, revoking_deletes,
                put_without_lease_detaches, unknown_lease_is_refused;
            random: sequential_against_the_oracle, concurrent_against_the_oracle;
        );
    };
    ($engine:ident: $($module:ident: $($case:ident),+;)+) => {
        mod $engine {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    let Some(fixture) = crate::$engine().await else { return };
                    crate::$module::$case(&fixture.store).await;
                }
            )+)+
        }
    };
}

contract!(embedded);
contract!(etcd_3_4);
contract!(etcd_3_5);
