//! The etcd engine: a replicated control plane's store.
//!
//! # In etcd
//!
//! | Key | Value |
//! |---|---|
//! | `<prefix>/layout` | the layout's number, in decimal |
//! | `<prefix>/k/<key>` | a key of the store |
//!
//! Several stores may share a cluster, each with a prefix of its own. Revisions are the cluster's: they also move when
//! somebody else writes, and never go back.
//!
//! # What etcd must allow
//!
//! [`MAX_TXN_OPS`](crate::MAX_TXN_OPS) operations in a transaction (`--max-txn-ops`); [`EtcdStore::open`] asks. Its
//! other limits may be the defaults.
//!
//! # Failures
//!
//! Requests go to one member, which answered a linearizable read after the last failure. A read that fails is tried
//! again, at the next member that answers, for [`PATIENCE`]. A write is tried again only where etcd said that it did
//! nothing; where nobody can tell, the caller gets [`Error::OutcomeUnknown`], and has to read before it goes on. No
//! lock of etcd's is used: they exclude nobody after a pause. What must not be overtaken has its conditions in the
//! transaction itself.
//!
//! A watch reads from etcd as fast as its reader does, so it never lags; it goes on at another member by itself, and
//! ends with [`Error::Compacted`] if its reader slept longer than history is kept.

mod config;
mod failure;
mod txn;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, KvClient, LeaseClient, SortOrder, SortTarget, TxnOp,
};

use crate::{
    BoxFuture, Error, KeyValue, LeaseId, MAX_TXN_OPS, Result, Revision, Store, Txn, TxnOutcome, WatchStream,
};
pub use config::EtcdConfig;
use failure::Failure;

/// The layout that this program reads and writes.
const LAYOUT: u64 = 1;
/// How long what can be repeated is repeated.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one request may take. etcd itself gives up after 5 s and an election.
const REQUEST: Duration = Duration::from_secs(7);
/// How long a member may take to show that it serves.
const PROBE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);
/// Longest lease, as of the embedded engine.
const MAX_LEASE_TTL: Duration = Duration::from_secs(24 * 3600);
/// Bytes that a page of a list should have, about.
const PAGE_BYTES: usize = 2 << 20;
/// Keys of a list's first page, whose sizes nobody knows.
const FIRST_PAGE: usize = 200;

/// A [`Store`] in etcd (3.4 or later).
pub struct EtcdStore {
    shared: Arc<Shared>,
}

/// The cluster, as seen from here.
struct Shared {
    /// One for each endpoint.
    members: Vec<Client>,
    /// Who is asked.
    current: AtomicUsize,
    /// Whether a request failed since `current` was looked at.
    suspect: AtomicBool,
    probing: tokio::sync::Mutex<()>,
    endpoints: String,
    /// `<prefix>/k/`
    keys: String,
    /// `<prefix>/layout`
    layout: String,
}

impl EtcdStore {
    /// Connects, and makes sure that the prefix is this program's, and that etcd allows what is needed.
    ///
    /// # Errors
    /// The configuration is impossible ([`Error::Config`]), no member answers ([`Error::Unavailable`]), the prefix has
    /// another layout or is used by something else ([`Error::Config`]), or etcd's limits are too low
    /// ([`Error::Config`]).
    pub async fn open(config: &EtcdConfig) -> Result<Arc<Self>> {
        let members = config.connect().await?;
        let shared = Arc::new(Shared {
            members,
            current: AtomicUsize::new(0),
            // Nobody has been asked yet.
            suspect: AtomicBool::new(true),
            probing: tokio::sync::Mutex::default(),
            endpoints: config.endpoints.join(", "),
            keys: format!("{}/k/", config.prefix),
            layout: format!("{}/layout", config.prefix),
        });
        shared.claim(&config.prefix).await?;
        shared.check_limits().await?;
        Ok(Arc::new(Self { shared }))
    }
}

impl Shared {
    /// Makes the prefix this program's, if it is nobody's.
    async fn claim(&self, prefix: &str) -> Result<()> {
        let taken = |reason: String| Error::Config { field: "etcd.prefix", reason };
        for _ in 0..2 {
            let found = self.read(|mut kv| {
                let layout = self.layout.clone();
                async move { kv.get(layout, None).await }
            });
            if let Some(kv) = found.await?.kvs().first() {
                let found = String::from_utf8_lossy(kv.value()).into_owned();
                if found != LAYOUT.to_string() {
                    return Err(taken(format!(
                        "{prefix} has layout {found}, this program reads layout {LAYOUT}; run the version that wrote \
                         it, or write another prefix"
                    )));
                }
                return Ok(());
            }
            let others = self.read(|mut kv| {
                let options = GetOptions::new().with_prefix().with_limit(1).with_keys_only();
                let prefix = format!("{prefix}/");
                async move { kv.get(prefix, Some(options)).await }
            });
            if let Some(kv) = others.await?.kvs().first() {
                let key = String::from_utf8_lossy(kv.key()).into_owned();
                return Err(taken(format!(
                    "{prefix} is used by something else (etcd has the key {key}); write another prefix"
                )));
            }
            let claim = etcd_client::Txn::new()
                .when([Compare::mod_revision(self.layout.as_str(), CompareOp::Equal, 0)])
                .and_then([TxnOp::put(self.layout.as_str(), LAYOUT.to_string(), None)]);
            // Whoever else claimed it meanwhile is looked at again.
            match self.write(|kv| txn::ask(kv, claim.clone())).await {
                Ok(claimed) if claimed.succeeded() => return Ok(()),
                Ok(_) | Err(Error::OutcomeUnknown { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Unavailable {
            endpoints: self.endpoints.clone(),
            reason: "it doesn't keep a key".to_owned(),
        })
    }

    async fn check_limits(&self) -> Result<()> {
        let ops = vec![TxnOp::get(self.layout.as_str(), None); MAX_TXN_OPS];
        let probe = etcd_client::Txn::new().and_then(ops);
        match self.read(|kv| txn::ask(kv, probe.clone())).await {
            Err(Error::TooManyOps { .. }) => Err(Error::Config {
                field: "etcd.endpoints",
                reason: format!(
                    "etcd takes too few operations in a transaction; start it with --max-txn-ops={MAX_TXN_OPS}"
                ),
            }),
            other => other.map(drop),
        }
    }

    /// The member to ask: the one that was asked last, or after a failure the next one that answers.
    async fn member(&self) -> Result<(usize, &Client)> {
        if !self.suspect.load(Ordering::Acquire) {
            return Ok(self.at(self.current.load(Ordering::Acquire)));
        }
        let _one = self.probing.lock().await;
        let (start, mut reason) = (Instant::now(), String::new());
        while self.suspect.load(Ordering::Acquire) {
            for _ in 0..self.members.len() {
                let (index, client) = self.at(self.current.load(Ordering::Acquire));
                let mut kv = client.kv_client();
                match tokio::time::timeout(PROBE, kv.get(self.layout.as_str(), None)).await {
                    Ok(Ok(_)) => {
                        self.suspect.store(false, Ordering::Release);
                        return Ok((index, client));
                    }
                    Ok(Err(error)) => match Failure::of(error) {
                        Failure::Passes(why) | Failure::Undone(why) => reason = why,
                        Failure::Final(error) => return Err(error),
                    },
                    Err(_) => reason = format!("no answer in {PROBE:?}"),
                }
                self.current.store((index + 1) % self.members.len(), Ordering::Release);
            }
            if start.elapsed() > PATIENCE {
                return Err(Error::Unavailable { endpoints: self.endpoints.clone(), reason });
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(self.at(self.current.load(Ordering::Acquire)))
    }

    fn at(&self, index: usize) -> (usize, &Client) {
        let index = index % self.members.len();
        (index, &self.members[index])
    }

    /// A member failed: before the next request, one that answers is looked for.
    fn suspect(&self, index: usize) {
        if self.current.load(Ordering::Acquire) == index {
            self.suspect.store(true, Ordering::Release);
        }
    }

    /// Asks until there is an answer or patience ends. Only for what may be done twice.
    async fn repeat<T, F>(&self, ask: impl Fn(Client) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let start = Instant::now();
        loop {
            let (index, client) = self.member().await?;
            let reason = match tokio::time::timeout(REQUEST, ask(client.clone())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => match Failure::of(error) {
                    Failure::Final(error) => return Err(error),
                    Failure::Passes(reason) | Failure::Undone(reason) => reason,
                },
                Err(_) => format!("no answer in {REQUEST:?}"),
            };
            self.suspect(index);
            if start.elapsed() > PATIENCE {
                return Err(Error::Unavailable { endpoints: self.endpoints.clone(), reason });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn read<T, F>(&self, ask: impl Fn(KvClient) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.repeat(|client| ask(kv(&client))).await
    }

    /// Asks once, and again only where etcd surely did nothing.
    async fn write<T, F>(&self, ask: impl Fn(KvClient) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let start = Instant::now();
        loop {
            let (index, client) = self.member().await?;
            let failure = match tokio::time::timeout(REQUEST, ask(kv(client))).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => Failure::of(error),
                Err(_) => Failure::Passes(format!("no answer in {REQUEST:?}")),
            };
            match failure {
                Failure::Final(error) => return Err(error),
                Failure::Passes(reason) => {
                    self.suspect(index);
                    return Err(Error::OutcomeUnknown { reason });
                }
                Failure::Undone(reason) => {
                    self.suspect(index);
                    if start.elapsed() > PATIENCE {
                        return Err(Error::Unavailable { endpoints: self.endpoints.clone(), reason });
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.keys)
    }

    fn strip(&self, kv: &etcd_client::KeyValue) -> Result<KeyValue> {
        let damaged =
            || Error::Corrupt { table: "etcd", key: String::from_utf8_lossy(kv.key()).into_owned() };
        let key = kv.key_str().ok().and_then(|key| key.strip_prefix(&self.keys)).ok_or_else(damaged)?;
        Ok(KeyValue {
            key: key.to_owned(),
            value: kv.value().to_vec().into(),
            create_revision: revision(kv.create_revision()),
            mod_revision: revision(kv.mod_revision()),
            version: revision(kv.version()),
            lease: (kv.lease() != 0).then(|| LeaseId(revision(kv.lease()))),
        })
    }

    /// The current revision.
    async fn revision(&self) -> Result<Revision> {
        let layout = self.layout.as_str();
        let answer = self.read(|mut kv| async move { kv.get(layout, None).await }).await?;
        Ok(answer.header().map_or(0, |header| revision(header.revision())))
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<KeyValue>, Revision)> {
        'anew: loop {
            let (mut found, mut at, mut limit) = (Vec::new(), 0, FIRST_PAGE);
            let start = self.key(prefix);
            let (mut from, end) = (start.clone().into_bytes(), txn::prefix_end(&start));
            loop {
                let options = GetOptions::new()
                    .with_range(end.clone())
                    .with_limit(limit as i64)
                    .with_revision(at)
                    .with_sort(SortTarget::Key, SortOrder::Ascend);
                let page = self.read(|mut kv| {
                    let (from, options) = (from.clone(), options.clone());
                    async move { kv.get(from, Some(options)).await }
                });
                let page = match page.await {
                    // History went while it was listed, page by page.
                    Err(Error::Compacted { .. }) if at != 0 => continue 'anew,
                    page => page?,
                };
                if at == 0 {
                    at = page.header().map_or(0, etcd_client::ResponseHeader::revision);
                }
                let bytes: usize = page.kvs().iter().map(|kv| kv.key().len() + kv.value().len()).sum();
                for kv in page.kvs() {
                    found.push(self.strip(kv)?);
                }
                let Some(last) = page.kvs().last().filter(|_| page.more()) else {
                    return Ok((found, revision(at)));
                };
                from = last.key().to_vec();
                from.push(0);
                limit = (PAGE_BYTES / (bytes / page.kvs().len()).max(1)).clamp(1, 10_000);
            }
        }
    }
}

impl Store for EtcdStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>>> {
        Box::pin(async move {
            let shared = &self.shared;
            let answer = shared.read(|mut kv| {
                let key = shared.key(key);
                async move { kv.get(key, None).await }
            });
            answer.await?.kvs().first().map(|kv| shared.strip(kv)).transpose()
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<KeyValue>, Revision)>> {
        Box::pin(self.shared.list(prefix))
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome>> {
        Box::pin(txn::run(&self.shared, txn))
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<WatchStream>> {
        Box::pin(watch::open(Arc::clone(&self.shared), prefix, from))
    }

    fn grant_lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>> {
        Box::pin(async move {
            if ttl.is_zero() || ttl > MAX_LEASE_TTL {
                return Err(Error::LeaseTtl { ttl, max: MAX_LEASE_TTL });
            }
            let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
            // A lease that was granted unheard has no keys, and expires.
            let granted =
                self.shared.repeat(|client| async move { lease(&client).grant(seconds as i64, None).await });
            Ok(LeaseId(revision(granted.await?.id())))
        })
    }

    fn keep_alive(&self, id: LeaseId) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let kept =
                self.shared.repeat(|client| async move { lease(&client).keep_alive(id.0 as i64).await });
            kept.await.map(drop).map_err(|error| failure::of_lease(error, id))
        })
    }

    fn revoke_lease(&self, id: LeaseId) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let tried = std::sync::atomic::AtomicU32::new(0);
            let revoked = self.shared.repeat(|client| {
                tried.fetch_add(1, Ordering::Relaxed);
                async move { lease(&client).revoke(id.0 as i64).await }
            });
            match revoked.await.map_err(|error| failure::of_lease(error, id)) {
                // An earlier try, whose answer was lost, revoked it.
                Err(Error::LeaseNotFound(_)) if tried.load(Ordering::Relaxed) > 1 => Ok(()),
                other => other.map(drop),
            }
        })
    }

    fn compact(&self, up_to: Revision) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let compacted = self.shared.read(|mut kv| async move { kv.compact(signed(up_to), None).await });
            match compacted.await {
                Err(Error::Compacted { .. }) => Ok(()),
                Err(Error::FutureRevision { .. }) => {
                    Err(Error::FutureRevision { asked: up_to, current: self.shared.revision().await? })
                }
                other => other.map(drop),
            }
        })
    }
}

fn kv(client: &Client) -> KvClient {
    // What is in etcd came through its own limit.
    client.kv_client().max_decoding_message_size(usize::MAX)
}

fn lease(client: &Client) -> LeaseClient {
    client.lease_client()
}

/// etcd's numbers are never negative.
fn revision(number: i64) -> u64 {
    number.max(0) as u64
}

fn signed(revision: Revision) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}
