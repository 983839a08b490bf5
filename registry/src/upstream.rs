//! The pull-through cache: gets what this registry doesn't have from others, verifies it, and keeps it.
//!
//! - Upstreams are asked in their order. What one doesn't have, doesn't answer for, or sends wrong, the next is asked
//!   for; content is asked for again a few times. A tier (location, region, origin) is nothing else than an upstream.
//! - However many ask for the same thing at once, one fetch runs; it goes on when the one who asked first goes away.
//! - Blobs come in pieces, each verified on its own if its digest is known (see [`crate::cache::layout`]), so a range
//!   costs its pieces only, and is served as soon as they are here. Other blobs are fetched whole first.
//! - A blob belongs to the repositories of which an upstream says that they have it; it is asked once for each.
//! - While no upstream can be asked, what is here is served: tags as they were when last seen.
//!
//! What is cached is never mixed with what was pushed: it may be evicted at any time.

mod blobs;
mod failure;
mod flights;
mod kept;
mod manifests;
mod members;
mod reading;
mod referrers;
mod remote;
mod tags;
mod whole;

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use anyplace_images::Reference;
use bytes::Bytes;

use crate::cache::counters::CacheCounters;
use crate::cache::layout::PIECE_BYTES;
use crate::cache::memory::{BUDGET_MIN_BYTES, Memory};
use crate::cache::pieces::{Blob, Pieces};
use crate::config::Config;
pub(crate) use failure::Failure;
use flights::Flights;
pub(crate) use kept::KeptTag;
pub use kept::{CacheUsage, Cached, CachedRepository};
pub(crate) use manifests::CachedManifest;
use manifests::Recent;
use members::Members;
use remote::{Kind, Remote};
pub(crate) use tags::Resolved;
use tags::Seen;

/// How long an upstream may take to begin its answer where there is a local one to fall back on: several round trips
/// around the Earth.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// The same where there is none, and for manifests (at most 4 MiB) as a whole.
const ONLY_ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How often content is asked for.
const ROUNDS: u32 = 3;
/// The wait before the second round; doubled before the third.
const PAUSE: Duration = Duration::from_millis(200);

/// How long to wait for the cache's folder at the start.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// A cache. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    remotes: Vec<Arc<Remote>>,
    pieces: Arc<Pieces>,
    memory: Memory,
    members: Members,
    recent: Recent,
    seen: Seen,
    counters: Arc<CacheCounters>,
    piece_bytes: u64,
    tag_ttl: Duration,
    piece_flights: Flights<Bytes>,
    whole_flights: Flights<Arc<Blob>>,
    manifest_flights: Flights<CachedManifest>,
    tag_flights: Flights<Option<tags::Kept>>,
    list_flights: Flights<tags::Listed>,
    referrer_flights: Flights<referrers::Asked>,
    size_flights: Flights<u64>,
}

impl Cache {
    /// What it takes of its budgets, as Prometheus reads it.
    pub(crate) fn use_of_room(&self) -> String {
        let Inner { pieces, memory, .. } = &*self.inner;
        let mut text = String::new();
        for (name, help, value) in [
            ("disk_bytes", "Bytes of pieces on disk", pieces.used()),
            ("disk_budget_bytes", "Most bytes of pieces on disk", pieces.budget()),
            ("record_bytes", "Bytes of manifests, tags and lists of pieces on disk", pieces.records.used()),
            ("memory_bytes", "Bytes of pieces in memory", memory.used() as u64),
            ("memory_budget_bytes", "Most bytes of pieces in memory", memory.budget() as u64),
        ] {
            let name = format!("anyplace_registry_cache_{name}");
            // Writing to a string can't fail.
            let _ = write!(text, "# HELP {name} {help}.\n# TYPE {name} gauge\n{name} {value}\n");
        }
        text
    }

    /// A cache of the configured upstreams, if there are any.
    pub(crate) async fn open(config: &Config) -> anyhow::Result<Option<Cache>> {
        if config.upstreams.is_empty() {
            return Ok(None);
        }
        let counters = Arc::<CacheCounters>::default();
        let remotes = config.upstreams.iter().map(|one| Remote::new(one, counters.clone()).map(Arc::new));
        let settings = &config.cache;
        let (piece_bytes, memory) = (settings.piece_bytes.0, settings.memory_budget.0);
        anyhow::ensure!(
            PIECE_BYTES.contains(&piece_bytes),
            "cache.piece_bytes is {piece_bytes}; expected 1 to 8 MiB"
        );
        anyhow::ensure!(
            memory >= BUDGET_MIN_BYTES,
            "cache.memory_budget is {memory}; expected {BUDGET_MIN_BYTES} at least"
        );
        let root = config.data_dir.join("cache");
        let doing = || format!("can't open the cache in {}; check data_dir", root.display());
        std::fs::create_dir_all(&root).with_context(doing)?;
        let budget = match settings.disk_budget {
            Some(bytes) => bytes.0,
            None => half_of_disk(&root).with_context(doing)?,
        };
        let mut waited = Duration::ZERO;
        let pieces = loop {
            match Pieces::open(&root, budget, counters.clone()) {
                // The one before may still be ending what it was fetching.
                Err(error) if error.kind() == ErrorKind::ResourceBusy && waited < LOCK_TIMEOUT => {
                    tokio::time::sleep(PAUSE).await;
                    waited += PAUSE;
                }
                result => break result.with_context(doing)?,
            }
        };
        let inner = Inner {
            remotes: remotes.collect::<anyhow::Result<_>>()?,
            pieces,
            memory: Memory::new(memory),
            members: Members::default(),
            recent: Recent::default(),
            seen: Seen::default(),
            piece_bytes,
            tag_ttl: Duration::from_millis(settings.tag_ttl_ms),
            piece_flights: Flights::new(counters.clone()),
            whole_flights: Flights::new(counters.clone()),
            manifest_flights: Flights::new(counters.clone()),
            tag_flights: Flights::new(counters.clone()),
            list_flights: Flights::new(counters.clone()),
            referrer_flights: Flights::new(counters.clone()),
            size_flights: Flights::new(counters.clone()),
            counters,
        };
        Ok(Some(Cache { inner: Arc::new(inner) }))
    }

    /// What the cache counts.
    pub(crate) fn counters(&self) -> &Arc<CacheCounters> {
        &self.inner.counters
    }

    /// Blocking: evicts so many bytes for others on its disk if it can, and says how many it did.
    pub(crate) fn evict(&self, bytes: u64) -> u64 {
        CacheCounters::one(&self.inner.counters.disk_full);
        self.inner.pieces.evict(bytes)
    }

    /// The repository that a client means who asks for `name` of another registry, `namespace`. One that no upstream
    /// stands for means nothing here.
    pub(crate) fn name_in(&self, namespace: &str, name: &str) -> String {
        let known = self.inner.remotes.iter().any(|remote| remote.namespace() == Some(namespace));
        if known { format!("{namespace}/{name}") } else { name.to_owned() }
    }
}

impl Inner {
    /// Asks the upstreams in turn, and all again where that may help. Who wants a piece waits for those that are left
    /// alone: a download that breaks off costs more than a moment.
    async fn ask_any<T, F>(
        &self,
        kind: Kind,
        remotes: &[Arc<Remote>],
        repository: &str,
        ask: impl Fn(Arc<Remote>, Reference) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut worst = Failure::Absent;
        for round in 0..ROUNDS {
            let (mut again, mut left_alone) = (false, None);
            for remote in remotes {
                let Some(reference) = remote.reference(repository) else { continue };
                match ask(remote.clone(), reference).await {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => {
                        again |= failure.may_pass();
                        if matches!(failure, Failure::LeftAlone(_)) && kind == Kind::Piece {
                            let until = remote.left_alone_until(kind).unwrap_or_else(Instant::now);
                            left_alone = left_alone.max(Some(until));
                        }
                        worst = worst.max(failure);
                    }
                }
            }
            let next = match (again, left_alone) {
                _ if round + 1 == ROUNDS => break,
                (true, _) => Instant::now() + PAUSE * (1 << round),
                (false, Some(until)) => until,
                (false, None) => break,
            };
            tokio::time::sleep_until(next.into()).await;
        }
        Err(worst)
    }
}

fn half_of_disk(folder: &Path) -> std::io::Result<u64> {
    let disk = nix::sys::statvfs::statvfs(folder)?;
    Ok(disk.blocks() * disk.fragment_size() / 2)
}
