//! The embedded engine: one local file, nothing to install.
//!
//! # On disk
//!
//! One redb file with these tables (integers little-endian in values; redb orders integer keys by number):
//!
//! | Table | Key | Value |
//! |---|---|---|
//! | `meta` | `layout`, `revision`, `compacted`, `next_lease` | u64 |
//! | `keys` | key | record: create, mod, version, lease (4 x u64, lease 0 = none), then the value's bytes |
//! | `history` | (revision u64, index u32) | 1, key length (u16), key, record as above; or 2, key length (u16), key for a delete |
//! | `leases` | lease u64 | time to live in milliseconds (u64) |
//! | `lease_keys` | (lease u64, key) | nothing; the keys that a lease deletes |
//!
//! `history` holds the changes of revisions above `compacted`, at most [`Limits::history_revisions`] and
//! [`Limits::history_bytes`] of them; the writer drops the oldest as it adds new ones.
//!
//! # Writing
//!
//! One thread writes. It takes all transactions that wait, applies them one after the other, each with its own
//! revision and its own conditions, in one redb transaction, and answers them all after one fsync (group commit).
//! So a transaction is durable when it is answered, and a hundred concurrent ones cost one fsync. If redb fails, the
//! outcome of that batch is unknown: its callers are told so, and the store takes no more writes.
//!
//! # Reading
//!
//! Reads use redb's snapshots and wait for no write or fsync. They see what is durable.
//!
//! # Leases
//!
//! Deadlines are only in memory: keeping a lease alive costs no write, and opening the store begins every lease anew,
//! as a change of etcd's leader does. Who was alive keeps its keys over a restart of the store.
//!
//! # Locking
//!
//! redb locks the file (`flock`), so a second opener gets [`Error::Locked`]. The lock goes with the process.

mod batch;
mod layout;
mod lease;
mod read;
mod watch;
mod writer;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use redb::{Database, DatabaseError};
use tokio::sync::{Semaphore, oneshot};

use crate::{BoxFuture, Error, KeyValue, LeaseId, Result, Revision, Store, Txn, TxnOutcome, WatchStream};
use lease::Leases;
use watch::Hub;
use writer::{Command, Queued};

/// redb's page cache. A location's whole state (1,000 machines, some thousand instances) fits; redb's own default of
/// 1 GiB would be most of a small control-plane machine.
const CACHE_BYTES: usize = 64 << 20;

/// Writes that may wait, in KiB (each at least one). Bounds memory; callers over it wait for their turn.
const QUEUE_KIB: usize = 64 << 10;

/// Longest lease. Leases say who is alive: a longer one is a mistake in units.
const MAX_LEASE_TTL: Duration = Duration::from_secs(24 * 3600);

/// Bounds of what the store keeps for watchers.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Revisions kept for watches to resume from. The default covers a reader that reconnects after minutes at
    /// hundreds of changes a second.
    pub history_revisions: usize,
    /// Bytes of history kept. Whichever of the two is reached first counts; the newest revision always stays.
    pub history_bytes: usize,
    /// Revisions that may wait in one watcher's buffer before it counts as lagging.
    pub watch_revisions: usize,
    /// Bytes that may wait in one watcher's buffer before it counts as lagging.
    pub watch_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            history_revisions: 100_000,
            history_bytes: 64 << 20,
            watch_revisions: 1024,
            watch_bytes: 16 << 20,
        }
    }
}

/// A [`Store`] in one local file. Dropping it finishes the writes that wait and closes the file.
pub struct EmbeddedStore {
    db: Arc<Database>,
    hub: Arc<Hub>,
    leases: Arc<Leases>,
    queue: Option<mpsc::Sender<Queued>>,
    room: Arc<Semaphore>,
    writer: Option<JoinHandle<()>>,
}

impl EmbeddedStore {
    /// Opens the store, or creates it and its parent folder.
    ///
    /// Blocks (a store that was killed is checked first): call it at start-up.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>> {
        Self::open_with(path, Limits::default())
    }

    /// [`open`](Self::open) with other bounds.
    pub fn open_with(path: impl AsRef<Path>, limits: Limits) -> Result<Arc<Self>> {
        let path = path.as_ref();
        let db = open_database(path)?;
        let start = layout::prepare(&db, path)?;
        tracing::debug!(path = %path.display(), revision = start.revision, "store open");
        let db = Arc::new(db);
        let hub = Arc::new(Hub::new(start.revision, limits));
        let leases = Arc::new(Leases::new(start.leases));
        let (queue, commands) = mpsc::channel();
        let writer = writer::Writer::new(
            Arc::clone(&db),
            Arc::clone(&hub),
            Arc::clone(&leases),
            start.counters,
            start.history,
            limits,
        );
        let writer = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(&commands))
            .map_err(|source| Error::Open { path: path.to_owned(), source: Arc::new(source) })?;
        Ok(Arc::new(Self {
            db,
            hub,
            leases,
            queue: Some(queue),
            room: Arc::new(Semaphore::new(QUEUE_KIB)),
            writer: Some(writer),
        }))
    }

    /// Queues a write and waits for its answer.
    async fn write<T>(
        &self,
        size_bytes: usize,
        command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command,
    ) -> Result<T> {
        // At most MAX_TXN_BYTES, so it fits u32 and the queue.
        let kib = u32::try_from(size_bytes / 1024 + 1).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(kib).await.map_err(|_| Error::Closed)?;
        let (reply, answer) = oneshot::channel();
        let queued = Queued { command: command(reply), size_bytes, _room: room };
        self.queue.as_ref().ok_or(Error::Closed)?.send(queued).map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }
}

impl Store for EmbeddedStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>>> {
        // One lookup, mostly in redb's cache: cheaper than another thread.
        Box::pin(async move { read::get(&self.db, key) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<KeyValue>, Revision)>> {
        let (db, prefix) = (Arc::clone(&self.db), prefix.to_owned());
        Box::pin(read::blocking(move || read::list(&db, &prefix)))
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome>> {
        Box::pin(async move {
            txn.validate()?;
            self.write(txn.size_bytes(), |reply| Command::Txn(txn, reply)).await
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<WatchStream>> {
        Box::pin(watch::open(&self.db, &self.hub, prefix, from))
    }

    fn grant_lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>> {
        Box::pin(async move {
            if ttl.is_zero() || ttl > MAX_LEASE_TTL {
                return Err(Error::LeaseTtl { ttl, max: MAX_LEASE_TTL });
            }
            self.write(0, |reply| Command::Grant(ttl, reply)).await
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(self.leases.keep_alive(lease)))
    }

    fn revoke_lease(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write(0, move |reply| Command::Revoke(lease, reply)))
    }

    fn compact(&self, up_to: Revision) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write(0, move |reply| Command::Compact(up_to, reply)))
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        // The writer drains the queue and ends when the last sender is gone.
        self.queue = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
    }
}

fn open_database(path: &Path) -> Result<Database> {
    let io = |source: std::io::Error| Error::Open { path: path.to_owned(), source: Arc::new(source) };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io)?;
    // What is stored may be secret; redb would let everyone read it.
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map_err(io)?;
    let db = Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(|source| match source {
        DatabaseError::DatabaseAlreadyOpen => Error::Locked { path: path.to_owned() },
        source => Error::Open { path: path.to_owned(), source: Arc::new(source) },
    })?;
    // A new file survives a power cut only once its folder's entry does.
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(io)?;
    Ok(db)
}
