//! Interleavings of collections with everything that clients do, by seed.
//!
//! Each seed runs the real code of storage, trash and collector, for two registry processes on one store, with
//! every request to the store as a turn that a seeded runner gives (`stepped`). Clients push, mount, ask and skip, delete
//! and undelete; processes end in the middle; hours pass, and the store's clock is set, in the middle of anything. What clients were told is kept
//! apart (`model`), and compared with the store: whatever was acknowledged and not deleted is there with all its parts,
//! and after quiet collections nothing is there that nothing needs.
//!
//! `ANYPLACE_SEED=n` runs one seed.

mod clients;
mod meetings;
mod model;
mod stepped;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyplace_images::Digest;
use anyplace_model::DurationMs;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::clients::{Client, Image, MANIFESTS, REPOSITORIES, TAGS, images};
use self::model::Model;
use self::stepped::{Dice, Runner, Stepped};
use super::{Collector, GcConfig, GcPhase, RetentionConfig, RuleConfig};
use crate::access::Audit;
use crate::config::Config;
use crate::references;
use crate::storage::mutant::{self, Mutant};
use crate::storage::{Linked, NewManifest, Note, Place, Storage};

/// Interleavings.
const SEEDS: u64 = 10_000;
/// Interleavings within which a mutant has to be noticed.
const MUTANT_SEEDS: u64 = 5_000;
const GRACE: Duration = Duration::from_secs(24 * 3600);
const WINDOW: Duration = Duration::from_secs(7 * 24 * 3600);
/// When what crashes left at the store is stale.
const SETTLED: Duration = Duration::from_secs(20 * 60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// What happened in some seeds, so that a campaign that does nothing shows.
#[derive(Default)]
struct Totals {
    requests: AtomicU64,
    turns: AtomicU64,
    crashes: AtomicU64,
    jumps: AtomicU64,
    settings: AtomicU64,
    collections: AtomicU64,
    links: AtomicU64,
    content: AtomicU64,
    expelled: AtomicU64,
    needed: AtomicU64,
}

impl Totals {
    fn add(&self, report: &super::GcReport) {
        self.collections.fetch_add(1, Ordering::Relaxed);
        self.links.fetch_add(report.plan.links.count, Ordering::Relaxed);
        self.content.fetch_add(report.plan.content.count, Ordering::Relaxed);
        self.expelled.fetch_add(report.plan.tags.count + report.plan.manifests.count, Ordering::Relaxed);
        self.needed.fetch_add(report.spared.needed, Ordering::Relaxed);
    }
}

/// A registry process.
struct Process {
    storage: Storage,
    collector: Rc<Collector>,
}

async fn process(store: &Stepped, rules: bool) -> Process {
    let place = Place::Bucket(Arc::new(store.inner().clone()));
    let storage = Storage::over(Arc::new(store.clone()), place, GRACE / 4).await.unwrap();
    let rule = |tags: Option<&str>, untagged, keep_last| RuleConfig {
        repositories: vec!["**".parse().unwrap()],
        tags: tags.map(|tags| vec![tags.parse().unwrap()]),
        untagged,
        keep_last,
        keep_younger_than: None,
    };
    let rules = match rules {
        true => vec![rule(Some("t*"), false, Some(1)), rule(None, true, Some(0))],
        false => Vec::new(),
    };
    let config = Config {
        gc: GcConfig {
            grace: DurationMs(GRACE.as_millis() as u64),
            undelete_window: DurationMs(WINDOW.as_millis() as u64),
            ..GcConfig::default()
        },
        retention: RetentionConfig { rules, ..RetentionConfig::default() },
        ..Config::new("unused")
    };
    let record = tempfile::tempdir().unwrap();
    let audit = Arc::new(Audit::open(record.path()).unwrap());
    let collector = Collector::new(storage.clone(), &config, audit, CancellationToken::new()).unwrap();
    Process { storage, collector: Rc::new(collector) }
}

/// One seed, from an empty store to one in which nothing is left that nothing needs.
async fn interleave(seed: u64, totals: &Totals) {
    let (store, dice) = (Stepped::new(), Dice::new(seed));
    let rules = dice.one_in(2);
    let (model, images): (Rc<RefCell<Model>>, _) = (Rc::default(), Rc::new(images()));
    let mut runner = Runner::new(store.clone(), dice.clone());
    let (began, turns) = (Instant::now(), runner.turns.clone());
    let processes = [process(&store, rules).await, process(&store, rules).await];
    let client = |id: usize, process: &Process| Client {
        id,
        storage: process.storage.clone(),
        model: model.clone(),
        turns: turns.clone(),
        began,
        dice: dice.clone(),
        images: images.clone(),
    };
    // What was there before: old, in part deleted.
    let first = client(0, &processes[0]);
    for _ in 0..2 + dice.below(4) {
        first.act().await;
    }
    for _ in 0..dice.below(6) {
        first.prepare().await;
    }
    // Within the window, and after it.
    store.pass(if dice.one_in(2) { 2 * DAY } else { 8 * DAY }).await;

    for id in 1..=2 + dice.below(2) {
        let client = client(id, &processes[id % 2]);
        let (acts, model, turns) = (1 + dice.below(3), model.clone(), turns.clone());
        let work = async move {
            for _ in 0..acts {
                client.act().await;
            }
        };
        runner.add(false, work, move || {
            model.borrow_mut().end(id, false, *turns.borrow());
        });
    }
    let reports = Rc::new(RefCell::new(Vec::new()));
    for process in &processes[dice.below(4) / 3..] {
        let (collector, storage, reports) =
            (process.collector.clone(), process.storage.clone(), reports.clone());
        let (runs, ended) = (1 + dice.below(3), turns.clone());
        let work = async move {
            for _ in 0..runs {
                // The lease may fail to keep two apart.
                let _ = storage.remove_note(Note::Lease).await;
                let Ok(report) = collector.collect(false).await else { continue };
                tracing::debug!(turn = *ended.borrow(), ?report, "collected");
                reports.borrow_mut().push(report);
            }
        };
        runner.add(true, work, || {});
    }
    let rough = !dice.one_in(3);
    // Where it may be set, collections may spare what they could take.
    runner.sets_clock = dice.one_in(4);
    runner.looking = processes.iter().map(|process| process.storage.clone()).collect();
    runner.run(rough).await;
    store.set_clock(0);
    for report in reports.borrow().iter() {
        let disturbed = runner.jumps + runner.settings > 0;
        assert!(disturbed || report.phase == GcPhase::Done, "a collection failed: {:?}", report.error);
        totals.add(report);
    }
    totals.turns.fetch_add(*turns.borrow(), Ordering::Relaxed);
    totals.crashes.fetch_add(runner.crashes, Ordering::Relaxed);
    totals.jumps.fetch_add(runner.jumps, Ordering::Relaxed);
    totals.settings.fetch_add(runner.settings, Ordering::Relaxed);

    let check = Check { model: &model, images: &images, began, rules };
    // Who starts knows only what somebody looked at.
    processes[0].storage.now().await.unwrap();
    let quiet = process(&store, rules).await;
    check.promises(&quiet.storage).await;
    if runner.crashes == 0 && runner.jumps == 0 {
        check.tags(&quiet.storage).await;
    }
    for (time, last) in [(SETTLED, false), (9 * DAY, false), (9 * DAY, false), (9 * DAY, true)] {
        store.pass(time).await;
        let _ = quiet.storage.remove_note(Note::Lease).await;
        let report = quiet.collector.collect(false).await.unwrap();
        assert_eq!(report.phase, GcPhase::Done, "{report:?}");
        check.promises(&quiet.storage).await;
        check.tags(&quiet.storage).await;
        if time == SETTLED {
            check.deletions(&client(99, &quiet)).await;
        }
        if last {
            assert_eq!(quiet.storage.markers().await.unwrap(), []);
            // What is dated ahead stays until then.
            if runner.settings == 0 {
                check.nothing_left(&quiet.storage).await;
            }
        }
    }
    totals.requests.fetch_add(store.requests(), Ordering::Relaxed);
}

/// Compares the store with what clients were told.
struct Check<'a> {
    model: &'a RefCell<Model>,
    images: &'a [Image],
    began: Instant,
    rules: bool,
}

impl Check<'_> {
    /// Whatever was acknowledged and not deleted is there, with all its parts.
    #[allow(clippy::await_holding_refcell_ref, reason = "the clients have ended; only reads are left")]
    async fn promises(&self, storage: &Storage) {
        let now_ms = self.began.elapsed().as_millis() as u64;
        let young = |at_ms: u64| now_ms - at_ms < GRACE.as_millis() as u64;
        let model = self.model.borrow();
        for ((repository, digest), history) in &model.blobs {
            if let Some(put) = history.certain()
                && now_ms - put.at_ms < GRACE.as_millis() as u64 / 2
            {
                let size = storage.blob_size(repository, digest).await.unwrap();
                assert!(size.is_some(), "the blob {digest} of {repository} was acknowledged, and is gone");
            }
        }
        let certain = |repository: &'static str, image: &Image| {
            model.manifests.get(&(repository, image.digest.clone())).and_then(|history| history.certain())
        };
        for repository in REPOSITORIES {
            let mut required: BTreeMap<usize, u64> = BTreeMap::new();
            for (index, image) in self.images.iter().enumerate() {
                if let Some(put) = certain(repository, image)
                    && (!self.rules || young(put.at_ms))
                {
                    required.insert(index, put.span.begin);
                }
            }
            for tag in TAGS {
                let Some(put) = model.tags.get(&(repository, tag)).and_then(|history| history.certain())
                else {
                    continue;
                };
                if self.rules && tag.starts_with('t') && !young(put.at_ms) {
                    continue;
                }
                let index = self.images.iter().position(|image| image.digest == put.value).unwrap();
                let Some(manifest) = certain(repository, &self.images[index]) else { continue };
                let found = storage.tag(repository, tag).await.unwrap();
                assert_eq!(found.as_ref(), Some(&put.value), "the tag {tag} of {repository}");
                required.insert(index, manifest.span.begin);
                for child in &self.images[index].children {
                    if let Some(put) = certain(repository, &self.images[*child])
                        && put.span.end < manifest.span.end
                        // Rules may let it go while it waits for an index for longer than the grace.
                        && manifest.at_ms.saturating_sub(put.at_ms) < GRACE.as_millis() as u64 / 2
                    {
                        required.insert(*child, put.span.begin);
                    }
                }
            }
            for (index, since) in required {
                let image = &self.images[index];
                let there = storage.manifest(repository, &image.digest).await.unwrap();
                let (_, bytes) = there.unwrap_or_else(|| panic!("manifest {index} of {repository} is gone"));
                assert_eq!(bytes, image.bytes);
                for blob in &image.blobs {
                    let bytes = clients::blob(*blob);
                    let digest = Digest::of(&bytes);
                    let history = model.blobs.get(&(repository, digest.clone()));
                    if history.is_some_and(|history| history.deleted_since(since)) {
                        continue;
                    }
                    let linked = storage.blob_size(repository, &digest).await.unwrap();
                    assert!(linked.is_some(), "manifest {index} of {repository} lacks the blob {blob}");
                    assert_eq!(storage.read_content(&digest).await.unwrap(), Some(bytes));
                }
            }
        }
    }

    /// No tag leads nowhere.
    async fn tags(&self, storage: &Storage) {
        for (repository, tag) in REPOSITORIES.iter().flat_map(|it| TAGS.map(|tag| (it, tag))) {
            if let Some(digest) = storage.tag(repository, tag).await.unwrap() {
                let there = storage.has_manifest(repository, &digest).await.unwrap();
                assert!(there, "the tag {tag} of {repository} leads nowhere");
            }
        }
    }

    /// What was deleted within the window comes back whole.
    async fn deletions(&self, client: &Client) {
        for repository in REPOSITORIES {
            for index in 0..MANIFESTS {
                let image = &self.images[index];
                let clean = {
                    let model = self.model.borrow();
                    let at = (repository, image.digest.clone());
                    let deleted = model.manifests.get(&at).is_some_and(|history| history.cleanly_deleted());
                    let whole = image.blobs.iter().all(|blob| {
                        let at = (repository, Digest::of(&clients::blob(*blob)));
                        model.blobs.get(&at).is_none_or(|history| history.deletes.is_empty())
                    });
                    let put_at = model.manifests.get(&at).and_then(|h| h.puts.iter().map(|p| p.at_ms).max());
                    let now = self.began.elapsed().as_millis() as u64;
                    let within = put_at.is_some_and(|at| now - at < WINDOW.as_millis() as u64);
                    deleted && whole && within && !self.rules
                };
                if clean {
                    client.undelete(repository, index).await;
                    let there = client.storage.manifest(repository, &image.digest).await.unwrap();
                    assert!(
                        there.is_some(),
                        "manifest {index} of {repository} was deleted, and can't come back"
                    );
                }
            }
        }
    }

    /// Nothing is there that nothing needs.
    async fn nothing_left(&self, storage: &Storage) {
        let mut needed: BTreeSet<(String, Digest)> = BTreeSet::new();
        for repository in storage.repositories().await.unwrap() {
            assert_eq!(storage.trash(&repository).await.unwrap(), [], "trash of {repository}");
            for info in storage.manifests(&repository).await.unwrap() {
                assert_eq!(info.pending, None, "a put of {} in {repository} is left over", info.digest);
                let bytes = storage.read_content(&info.digest).await.unwrap();
                let names = references::names(&bytes.expect("a manifest without content")).unwrap();
                let known: &'static str = REPOSITORIES.into_iter().find(|name| *name == repository).unwrap();
                for blob in names.blobs {
                    let exempt = self
                        .model
                        .borrow()
                        .blobs
                        .get(&(known, blob.clone()))
                        .is_some_and(|history| !history.deletes.is_empty());
                    let there = storage.blob_size(&repository, &blob).await.unwrap();
                    assert!(exempt || there.is_some(), "{} of {repository} lacks {blob}", info.digest);
                    needed.insert((repository.clone(), blob));
                }
                needed.insert((repository.clone(), info.digest));
            }
        }
        let links: Vec<_> = storage.links().try_collect().await.unwrap();
        for link in &links {
            let at = (link.repository.clone(), link.digest.clone());
            assert!(needed.contains(&at), "nothing needs the link {at:?}");
        }
        let linked: BTreeSet<&Digest> = links.iter().map(|link| &link.digest).collect();
        let contents: Vec<_> = storage.contents().try_collect().await.unwrap();
        for content in contents {
            assert!(linked.contains(&content.digest), "nothing links to {}", content.digest);
        }
    }
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

fn run_seed(seed: u64, totals: &Totals) {
    paused().block_on(interleave(seed, totals));
}

/// Runs seeds on all cores until one fails, which is given with its reason.
fn first_failure(
    seeds: std::ops::Range<u64>,
    mutant: Option<Mutant>,
    totals: &Totals,
) -> Option<(u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let failed = std::sync::Mutex::new(None);
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                mutant::set(mutant);
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || failed.lock().unwrap().is_some() {
                        return;
                    }
                    let run = std::panic::AssertUnwindSafe(|| run_seed(seed, totals));
                    if let Err(panic) = std::panic::catch_unwind(run) {
                        let reason = panic.downcast_ref::<String>().cloned();
                        let reason = reason.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                        failed.lock().unwrap().get_or_insert((seed, reason.unwrap_or_default()));
                        return;
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap()
}

#[test]
fn a_seed_is_one_interleaving() {
    let run = |seed| {
        let totals = Totals::default();
        run_seed(seed, &totals);
        (totals.turns.into_inner(), totals.requests.into_inner())
    };
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed), "{seed}");
    }
}

#[test]
fn no_interleaving_loses_what_was_acknowledged_or_keeps_what_nothing_needs() {
    let totals = Totals::default();
    if let Ok(seed) = std::env::var("ANYPLACE_SEED") {
        anyplace_service::init_logging();
        return run_seed(seed.parse().unwrap(), &totals);
    }
    let failure = first_failure(0..SEEDS, None, &totals);
    if let Some((seed, reason)) = failure {
        panic!("ANYPLACE_SEED={seed} runs it again: {reason}");
    }
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{SEEDS} interleavings, {} requests, {} turns, {} crashes, {} times that hours passed, {} that the store's clock was \
         set; {} collections beside clients took \
         {} links, {} content, let {} go, and spared {} behind the marker",
        of(&totals.requests),
        of(&totals.turns),
        of(&totals.crashes),
        of(&totals.jumps),
        of(&totals.settings),
        of(&totals.collections),
        of(&totals.links),
        of(&totals.content),
        of(&totals.expelled),
        of(&totals.needed),
    );
    let Totals { crashes, jumps, settings, links, content, expelled, .. } = &totals;
    for counter in [crashes, jumps, settings, links, content, expelled] {
        assert!(of(counter) > SEEDS / 20, "the campaign hardly does anything");
    }
}

/// The campaign would notice if a step of the protocol were missing. The collector's deadline, and a push beside a
/// delete, need so rare a meeting that they have tests of their own (`meetings`).
#[test]
fn each_step_of_the_protocol_is_missed() {
    // The failures are expected; their messages would only confuse.
    std::panic::set_hook(Box::new(|_| {}));
    let mutants = [
        Mutant::NoWait,
        Mutant::NoSecondLook,
        Mutant::NoSecondReading,
        Mutant::NoSecondLinks,
        Mutant::NoSecondDecision,
    ];
    let found: Vec<_> = mutants
        .into_iter()
        .map(|mutant| (mutant, first_failure(0..MUTANT_SEEDS, Some(mutant), &Totals::default())))
        .collect();
    let _ = std::panic::take_hook();
    for (mutant, failure) in &found {
        println!("{mutant:?}: {failure:?}");
    }
    let missed: Vec<_> = found.iter().filter(|(_, failure)| failure.is_none()).map(|(m, _)| m).collect();
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
