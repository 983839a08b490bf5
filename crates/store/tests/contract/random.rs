//! Random operations, compared with the oracle. A failure replays with the printed seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyplace_store::{Error, LeaseId, Store, Txn, TxnOutcome};

use crate::oracle::Oracle;
use crate::take;
use anyplace_seed::Seed;

const KEYS: [&str; 10] = ["a", "a/b", "a/c", "a/c/d", "b", "b/", "b/a", "b/b", "c", "ä"];
const PREFIXES: [&str; 6] = ["a/", "a", "b/", "b", "c", "x"];

/// A transaction that `validate` accepts: keys are put once, and not deleted too.
fn random_txn(seed: &mut Seed, revision_of: impl Fn(&str) -> u64, leases: &[LeaseId]) -> Txn {
    let mut txn = Txn::new();
    let pick = |seed: &mut Seed| KEYS[seed.below(KEYS.len() as u64) as usize];
    for _ in 0..seed.below(3) {
        let key = pick(seed);
        txn = match seed.below(6) {
            0 => txn.when_absent(key),
            1 => txn.when_exists(key),
            2 => txn.when_revision(key, revision_of(key) + 1),
            _ => txn.when_revision(key, revision_of(key)),
        };
    }
    for _ in 0..seed.below(5) {
        let key = pick(seed);
        let value = vec![seed.next() as u8; seed.below(40) as usize];
        let longer = match seed.below(8) {
            0 => txn.clone().delete(key),
            1 => txn.clone().delete_prefix(PREFIXES[seed.below(PREFIXES.len() as u64) as usize]),
            2..4 if !leases.is_empty() => {
                txn.clone().put_leased(key, value, leases[seed.below(leases.len() as u64) as usize])
            }
            _ => txn.clone().put(key, value),
        };
        match longer.validate() {
            Ok(()) => txn = longer,
            Err(error) => assert!(matches!(error, Error::DuplicateKey { .. })),
        }
    }
    txn
}

pub(crate) async fn sequential_against_the_oracle(store: &Arc<dyn Store>) {
    let mut seed = Seed::from_env();
    let (_, start) = store.list("").await.unwrap();
    let mut oracle = Oracle::new(start);
    let mut leases = Vec::new();
    for step in 0..1500 {
        match seed.below(20) {
            0 => leases.push(store.grant_lease(Duration::from_secs(3600)).await.unwrap()),
            1 if !leases.is_empty() => {
                let lease = leases.swap_remove(seed.below(leases.len() as u64) as usize);
                store.revoke_lease(lease).await.unwrap();
                oracle.revoke(lease);
            }
            2 if seed.one_in(4) => {
                let up_to = start + seed.below(oracle.revision - start + 1);
                store.compact(up_to).await.unwrap();
                oracle.compacted = oracle.compacted.max(up_to);
            }
            3..6 => {
                let prefix = if seed.one_in(4) { "" } else { KEYS[seed.below(KEYS.len() as u64) as usize] };
                let wanted = (oracle.list(prefix), oracle.revision);
                assert_eq!(store.list(prefix).await.unwrap(), wanted, "step {step}");
            }
            6..9 => {
                let key = KEYS[seed.below(KEYS.len() as u64) as usize];
                assert_eq!(store.get(key).await.unwrap().as_ref(), oracle.keys.get(key), "step {step}");
            }
            9 => {
                let prefix = if seed.one_in(4) { "" } else { PREFIXES[seed.below(6) as usize] };
                let from = start + seed.below(oracle.revision - start + 1);
                match store.watch(prefix, from).await {
                    Ok(mut stream) => {
                        assert!(from + 1 >= oracle.compacted, "step {step}: resumed from compacted {from}");
                        let wanted = oracle.events(prefix, from);
                        assert_eq!(take(&mut stream, wanted.len()).await, wanted, "step {step}");
                    }
                    Err(Error::Compacted { .. }) => assert!(from < oracle.compacted, "step {step}"),
                    Err(error) => panic!("step {step}: {error}"),
                }
            }
            _ => {
                let revision_of = |key: &str| oracle.keys.get(key).map_or(0, |kv| kv.mod_revision);
                let txn = random_txn(&mut seed, revision_of, &leases);
                let wanted = oracle.txn(&txn);
                assert_eq!(store.txn(txn.clone()).await.unwrap(), wanted, "step {step}: {txn:?}");
            }
        }
    }
    assert_eq!(store.list("").await.unwrap(), (oracle.list(""), oracle.revision));
}

/// Concurrent transactions must have happened in the order of their revisions: replayed in that order, the oracle
/// comes to the same outcomes, state and events.
pub(crate) async fn concurrent_against_the_oracle(store: &Arc<dyn Store>) {
    let mut seed = Seed::from_env();
    let (_, start) = store.list("").await.unwrap();
    let mut live = store.watch("", start).await.unwrap();
    let tasks: Vec<_> = (0..12)
        .map(|task| {
            let (store, mut seed) = (Arc::clone(store), seed.fork());
            tokio::spawn(async move {
                let mut done = Vec::new();
                for n in 0..50 {
                    let (kvs, _) = store.list("").await.unwrap();
                    let revisions: BTreeMap<_, _> =
                        kvs.into_iter().map(|kv| (kv.key, kv.mod_revision)).collect();
                    let revision_of = |key: &str| revisions.get(key).copied().unwrap_or(0);
                    // The last put changes something in any case, so that every commit has a revision of its own.
                    let txn =
                        random_txn(&mut seed, revision_of, &[]).put(format!("task/{task}"), n.to_string());
                    let outcome = store.txn(txn.clone()).await.unwrap();
                    done.push((txn, outcome));
                }
                done
            })
        })
        .collect();
    let (mut committed, mut conflicts) = (BTreeMap::new(), Vec::new());
    for task in tasks {
        for (txn, outcome) in task.await.unwrap() {
            match outcome {
                TxnOutcome::Committed { revision } => {
                    assert!(committed.insert(revision, txn).is_none(), "revision {revision} given out twice");
                }
                TxnOutcome::Conflict { revision, key } => conflicts.push((revision, key, txn)),
            }
        }
    }
    eprintln!("{} committed, {} conflicts", committed.len(), conflicts.len());

    let mut oracle = Oracle::new(start);
    let mut states = BTreeMap::from([(start, oracle.clone())]);
    for (revision, txn) in committed {
        assert_eq!(oracle.txn(&txn), TxnOutcome::Committed { revision }, "{txn:?}");
        states.insert(revision, oracle.clone());
    }
    for (revision, key, txn) in conflicts {
        assert_eq!(states[&revision].conflict(&txn), Some(key), "at revision {revision}: {txn:?}");
    }
    assert_eq!(store.list("").await.unwrap(), (oracle.list(""), oracle.revision));
    let wanted = oracle.events("", start);
    assert_eq!(take(&mut live, wanted.len()).await, wanted);
    let mut again = store.watch("", start).await.unwrap();
    assert_eq!(take(&mut again, wanted.len()).await, wanted);
}
