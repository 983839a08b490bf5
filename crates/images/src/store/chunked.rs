//! Pulls a zstd:chunked layer in parts: only what no image here has.
//!
//! 1. Table of contents and tar-split are fetched in one request, verified, and must agree.
//! 2. [`plan`] says what is missing and which parts of the blob bring it.
//! 3. Parts are fetched several at a time, in the blob's order. One thread hands the work that they allow to the pool,
//!    which decompresses, verifies and writes files.
//! 4. One thread puts the archive together from the tar-split, what the pool gives in order, and files that are here,
//!    and hashes it: its digest must be the layer's.
//!
//! So each byte is hashed twice, as with an ordinary layer: for its file and for the archive; chunks are only hashed
//! where they come from other files of the store.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use tokio::sync::mpsc;
use zstd_chunked::{Annotations, Limits, TarSplit, Toc, read_tar_split, read_toc};

use super::assemble::{Step, assemble};
use super::dirty::Writing;
use super::import::Written;
use super::plan::{self, Plan, Work};
use super::pool::Priority;
use super::pull::{Fetch, Pull, blocking, on_thread};
use super::room::Expected;
use super::table::Table;
use super::work::{self, Ready};
use super::{Inner, Lane};
use crate::error::{Error, Result};
use crate::manifest::Descriptor;
use crate::progress::Item;

/// Parts that are fetched at once for a layer: enough to fill a link of 1 Gbit/s and 40 ms.
const PARTS_AT_ONCE: usize = 4;
/// Largest table and tar-split together, compressed, that are held in memory; the largest public images have 20 MB.
const TABLES_MAX_BYTES: u64 = 256 << 20;

/// A verified table of contents and tar-split.
struct Tables {
    toc: Toc,
    tar_split: TarSplit,
}

impl Pull {
    /// Fetches what is missing of a layer. None where it has to be fetched whole: it has no table of contents, the
    /// registry knows no ranges, or the table has more than is accepted.
    pub(super) async fn fetch_missing(&self, of: Fetch<'_>) -> Result<Option<(Table, Written)>> {
        let Fetch { layer, item, lane, .. } = of;
        let Some(tables) = self.tables(layer, lane).await? else { return Ok(None) };
        let tables = Arc::new(tables);
        // While the parts arrive: nothing is kept before it is done.
        let of_check = tables.clone();
        let mut checking = tokio::task::spawn_blocking(move || of_check.tar_split.check(&of_check.toc));
        // The second time without what turned out to be damaged.
        for last in [false, true] {
            let (inner, pins, tables_of) = (self.inner.clone(), self.pins.clone(), tables.clone());
            let layer_bytes = layer.size;
            let plan = blocking(move || plan::plan(&inner, &pins, &tables_of.toc, layer_bytes)).await?;
            let Some(mut plan) = plan else { return Ok(None) };
            let (used, reused) = (std::mem::take(&mut plan.used), plan.reused);
            let expected = self.make_room(plan.disk_bytes(), lane).await?;
            self.progress.started(item, plan.parts.iter().map(|part| part.end - part.start).sum());
            match self.execute(of, plan, &tables, &expected).await {
                Ok(done) => {
                    (&mut checking).await.map_err(|_| Error::Cancelled)?.map_err(Error::Table)?;
                    self.counters.reuse(reused);
                    return Ok(Some(done));
                }
                Err(error @ (Error::DigestMismatch { .. } | Error::Damaged { .. })) if !last => {
                    let inner = self.inner.clone();
                    let damaged = blocking(move || inner.discard_damaged(&used)).await?;
                    if damaged == 0 {
                        return Err(error);
                    }
                    expected.withdraw();
                    tracing::warn!(%error, damaged, "objects of the store are damaged; fetching them again");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Table of contents and tar-split.
    async fn tables(&self, layer: &Descriptor, lane: &Arc<Lane>) -> Result<Option<Tables>> {
        let annotations = layer.annotations.clone().unwrap_or_default();
        let Some(annotations) = Annotations::from_map(&annotations).map_err(Error::Table)? else {
            return Ok(None);
        };
        let limits = Limits::default();
        match annotations.positions.check(&limits) {
            Err(zstd_chunked::Error::Limit { .. }) => return Ok(None),
            other => other.map_err(Error::Table)?,
        }
        let range = annotations.positions.range();
        if range.end > layer.size {
            let reason = format!("its table ends at {}, and the layer at {}", range.end, layer.size);
            return Err(Error::InvalidLayer { reason });
        }
        if range.end - range.start > TABLES_MAX_BYTES {
            return Ok(None);
        }
        let start = range.start;
        let Some(bytes) = self.part(layer, range, None, lane).await? else { return Ok(None) };
        let read = blocking(move || {
            let section = |section: zstd_chunked::Section| {
                let at = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
                // Both lie in the range: it is the hull of both.
                bytes.slice(at(section.range().start)..at(section.range().end))
            };
            let toc = section(annotations.positions.toc);
            let toc = read_toc(&toc, &annotations, &limits).map_err(Error::Table)?;
            let tar_split = section(annotations.positions.tar_split).to_vec();
            let tar_split = read_tar_split(tar_split, &toc, &annotations, &limits).map_err(Error::Table)?;
            Ok(Tables { toc, tar_split })
        });
        match read.await {
            Ok(tables) => Ok(Some(tables)),
            Err(Error::Table(zstd_chunked::Error::Limit { what, found, limit })) => {
                tracing::info!(layer = %layer.digest, what, found, limit, "fetching a layer whole");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// A range of the layer's blob; none where the registry knows no ranges.
    async fn part(
        &self,
        layer: &Descriptor,
        range: std::ops::Range<u64>,
        item: Option<&Item>,
        lane: &Arc<Lane>,
    ) -> Result<Option<Bytes>> {
        let length = usize::try_from(range.end - range.start).map_err(|_| Error::Cancelled)?;
        let mut blob = self.client.get_blob_range(&self.reference, &layer.digest, range).await?;
        if blob.ignores_range() {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(length);
        while let Some(chunk) = blob.chunk().await? {
            self.pay(chunk.len() as u64, lane).await;
            bytes.extend_from_slice(&chunk);
            if let Some(item) = item {
                self.progress.advanced(item, chunk.len() as u64);
            }
        }
        Ok(Some(bytes.into()))
    }

    async fn execute(
        &self,
        of: Fetch<'_>,
        plan: Plan,
        tables: &Arc<Tables>,
        expected: &Arc<Expected>,
    ) -> Result<(Table, Written)> {
        let Fetch { layer, diff_id, item, lane, turn } = of;
        let Plan { entries, files, work, parts, .. } = plan;
        // Parts that wait here are in memory.
        let (sender, arriving) = mpsc::channel(1);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (steps, in_order) = sync_channel(2 * cores);
        let (inner, expected, writing) = (self.inner.clone(), expected.clone(), self.writing.clone());
        let (priority, class) = (self.priority(lane), self.priority(lane).now());
        let of_dispatch = priority.clone();
        let dispatching = on_thread(class, "images-dispatch", move || {
            dispatch(&inner, &of_dispatch, (&expected, &writing), work, arriving, &steps)
        })?;
        let (inner, of, id) = (self.inner.clone(), tables.clone(), diff_id.clone());
        // The turn goes along: when this pull is given up, the next one waits until its threads have noticed.
        let held = (turn.clone(), self.writing.clone());
        let assembling = on_thread(class, "images-assemble", move || {
            let _held = held;
            assemble(&inner.objects, priority, &of.tar_split, entries, files, in_order, &id)
        })?;
        let downloaded = async {
            // A list, because the compiler can't see that a future made inside a closure may change threads.
            let mut fetches = Vec::with_capacity(parts.len());
            for part in parts {
                fetches.push(self.part(layer, part, Some(item), lane));
            }
            let mut arriving = stream::iter(fetches).buffered(PARTS_AT_ONCE);
            while let Some(part) = arriving.next().await {
                let part = part?.ok_or_else(|| Error::InvalidRegistry {
                    what: format!("registry {}", self.client.registry()),
                    reason: "it answers some range requests with the whole blob".to_owned(),
                })?;
                if sender.send(part).await.is_err() {
                    // The other side gave up: its error says why.
                    break;
                }
            }
            Ok(())
        }
        .await;
        drop(sender);
        let dispatched = dispatching.await.map_err(|_| Error::Cancelled)?;
        let assembled = assembling.await.map_err(|_| Error::Cancelled)?;
        // A failed download makes the others fail too; the download's error is the cause.
        downloaded?;
        match assembled {
            Err(Error::Cancelled) => dispatched.and(Err(Error::Cancelled)),
            assembled => assembled,
        }
    }
}

/// Hands work to the pool as its parts arrive, and to the assembly where each result will come from. Blocks.
fn dispatch(
    inner: &Inner,
    priority: &Priority,
    (expected, writing): (&Arc<Expected>, &Arc<Writing>),
    work: Vec<Work>,
    mut arriving: mpsc::Receiver<Bytes>,
    steps: &SyncSender<Step>,
) -> Result<()> {
    let mut parts = VecDeque::new();
    // Number of the first part in `parts`.
    let mut first = 0;
    let mut large = None;
    for work in work {
        if let Some(needed) = work.first_part() {
            while first < needed && parts.pop_front().is_some() {
                first += 1;
            }
        }
        while work.last_part().is_some_and(|last| last >= first + parts.len()) {
            parts.push_back(arriving.blocking_recv().ok_or(Error::Cancelled)?);
        }
        let bytes = work.disk_bytes();
        let ready = Ready::new(work, &parts, first)?;
        let file = match &ready {
            Ready::Segment { first: true, size, .. } => {
                let file = inner.objects.temporary()?;
                file.as_file().set_len(*size).map_err(Error::io("writing", file.path()))?;
                large =
                    Some(Arc::new(file.as_file().try_clone().map_err(Error::io("opening", file.path()))?));
                Some(file)
            }
            _ => None,
        };
        let (sender, result): (_, Receiver<_>) = sync_channel(1);
        if steps.send(Step { result, large: file }).is_err() {
            return Ok(());
        }
        let (objects, out) = (inner.objects.clone(), large.clone());
        let (expected, writing) = (expected.clone(), writing.clone());
        inner.pools.of(priority.now()).run(move |worker| {
            let _writing = writing;
            let done = work::run(worker, &objects, ready, out.as_deref());
            expected.wrote(bytes);
            // Nobody listens where the pull failed already.
            let _ = sender.send(done);
        })?;
    }
    Ok(())
}

impl Inner {
    /// Removes those of the objects that are damaged; says how many.
    fn discard_damaged(&self, used: &[super::objects::ObjectId]) -> Result<usize> {
        let damaged = self.check(used)?;
        for id in &damaged {
            self.objects.discard(id)?;
        }
        Ok(damaged.len())
    }
}
