//! Kills a writing process with SIGKILL, again and again, and checks that no acknowledged write is lost.
//!
//! The child is this executable again. Each of its tasks, for n = 1, 2, ..., writes a pair of keys in one transaction
//! that also deletes the pair n - 3, and then prints the acknowledged n and revision. So at any moment a task's keys
//! are the pairs of its last three acknowledged n, or, if a write was done and not yet printed, of one further.
//!
//! SIGKILL shows what survives the loss of the process, not of power.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyplace_seed::Seed;
use anyplace_store::{EmbeddedStore, Store, StoreExt, Txn};
use futures_util::StreamExt;

const CHILD_STORE: &str = "ANYPLACE_KILL_TEST_STORE";
const ROUNDS: usize = 30;
const TASKS: u64 = 8;
const KEPT: u64 = 3;

#[test]
fn acknowledged_writes_survive_kills() {
    let mut seed = Seed::from_env();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("data/store");
    let mut checked = Checked::default();
    let mut acks = 0;
    for round in 0..ROUNDS {
        let mut child = Running::start(&path);
        // Some die while they open, or even create, the store; most at some write.
        let wanted = if seed.one_in(5) { 0 } else { 1 + seed.below(300) };
        let pause = Duration::from_micros(seed.below(if wanted == 0 { 40_000 } else { 3000 }));
        let mut lines = BufReader::new(child.0.stdout.take().unwrap());
        let mut round_acks = Vec::new();
        while (round_acks.len() as u64) < wanted {
            let Some(ack) = next_ack(&mut lines) else { panic!("round {round}: the child ended by itself") };
            round_acks.push(ack);
        }
        std::thread::sleep(pause);
        child.kill();
        // What was printed before the kill counts too.
        round_acks.extend(std::iter::from_fn(|| next_ack(&mut lines)));
        acks += round_acks.len();
        checked.round(round, &path, &round_acks);
    }
    eprintln!("{acks} acknowledged writes in {ROUNDS} rounds, revision {}", checked.revision);
    assert!(acks > ROUNDS, "the child hardly wrote anything");
}

/// The child's part; nothing when it is run as an ordinary test.
#[test]
fn child_writes_until_it_is_killed() {
    let Some(path) = std::env::var_os(CHILD_STORE) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = EmbeddedStore::open(&path).unwrap();
        let tasks: Vec<_> =
            (0..TASKS).map(|task| tokio::spawn(write_pairs(Arc::clone(&store), task))).collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

async fn write_pairs(store: Arc<EmbeddedStore>, task: u64) {
    let (pairs, _) = store.list_json::<u64>(&format!("left/{task}/")).await.unwrap();
    let mut n = pairs.iter().map(|(_, n, _)| *n).max().unwrap_or(0);
    loop {
        n += 1;
        let mut txn = Txn::new().when_absent(left(task, n));
        txn = txn.put_json(left(task, n), &n).unwrap().put_json(right(task, n), &n).unwrap();
        if n > KEPT {
            txn = txn.delete(left(task, n - KEPT)).delete(right(task, n - KEPT));
        }
        let outcome = store.txn(txn).await.unwrap();
        assert!(outcome.is_committed(), "{outcome:?}");
        // One write call, so that the line is whole or absent.
        let line = format!("ack {task} {n} {}\n", outcome.revision());
        std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
    }
}

fn left(task: u64, n: u64) -> String {
    format!("left/{task}/{n:06}")
}

fn right(task: u64, n: u64) -> String {
    format!("right/{task}/{n:06}")
}

struct Ack {
    task: u64,
    n: u64,
    revision: u64,
}

/// The next acknowledged write that the child printed; `None` at the end of its output.
fn next_ack(lines: &mut impl BufRead) -> Option<Ack> {
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).unwrap() == 0 || !line.ends_with('\n') {
            return None;
        }
        // The test harness prints lines of its own, the first of ours may follow one without a break.
        let Some((_, ack)) = line.split_once("ack ") else { continue };
        let mut numbers = ack.split_whitespace().map(|n| n.parse().unwrap());
        let mut number = || numbers.next().unwrap();
        return Some(Ack { task: number(), n: number(), revision: number() });
    }
}

/// The child; never outlives the test.
struct Running(Child);

impl Running {
    fn start(path: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_writes_until_it_is_killed", "--nocapture", "--test-threads=1"])
            .env(CHILD_STORE, path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        Self(child.unwrap())
    }

    fn kill(&mut self) {
        // On Unix this is SIGKILL.
        self.0.kill().unwrap();
        let status = self.0.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "it died before: {status}"
        );
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is known to be in the store.
#[derive(Default)]
struct Checked {
    revision: u64,
    /// Last n of each task.
    last: BTreeMap<u64, u64>,
}

impl Checked {
    fn round(&mut self, round: usize, path: &Path, acks: &[Ack]) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = EmbeddedStore::open(path).unwrap();
            let (kvs, revision) = store.list("").await.unwrap();
            let highest = acks.iter().map(|ack| ack.revision).max().unwrap_or(0);
            assert!(
                revision >= self.revision.max(highest),
                "round {round}: revision went back to {revision}"
            );

            let mut wanted = Vec::new();
            for task in 0..TASKS {
                let before = self.last.get(&task).copied().unwrap_or(0);
                let mine: Vec<u64> = acks.iter().filter(|ack| ack.task == task).map(|ack| ack.n).collect();
                assert_eq!(mine, (before + 1..=before + mine.len() as u64).collect::<Vec<_>>());
                let acked = before + mine.len() as u64;
                // One more may be done, though it was not printed.
                let done = store.get(&left(task, acked + 1)).await.unwrap().is_some();
                let last = acked + u64::from(done);
                wanted.extend((last.saturating_sub(KEPT)..last).map(|n| left(task, n + 1)));
                wanted.extend((last.saturating_sub(KEPT)..last).map(|n| right(task, n + 1)));
                self.last.insert(task, last);
            }
            wanted.sort();
            let keys: Vec<_> = kvs.iter().map(|kv| kv.key.clone()).collect();
            assert_eq!(keys, wanted, "round {round}");

            let found: BTreeMap<_, _> = kvs.iter().map(|kv| (kv.key.as_str(), kv)).collect();
            for kv in &kvs {
                let n: u64 = kv.json().unwrap();
                assert!(kv.key.ends_with(&format!("/{n:06}")), "round {round}: {kv:?}");
                let other = kv.key.replace("left", "right");
                assert_eq!(
                    found[other.as_str()].mod_revision,
                    kv.mod_revision,
                    "round {round}: half a transaction"
                );
            }
            for ack in acks {
                if let Some(kv) = found.get(left(ack.task, ack.n).as_str()) {
                    assert_eq!(kv.mod_revision, ack.revision, "round {round}");
                }
            }
            // The history since the last round has no hole.
            let mut stream = store.watch("left/", self.revision).await.unwrap();
            let mut at = self.revision;
            while at < revision {
                let event = stream.next().await.unwrap().unwrap();
                assert!(event.revision == at || event.revision == at + 1, "round {round}: hole after {at}");
                at = event.revision;
            }
            self.revision = revision;
        });
    }
}
