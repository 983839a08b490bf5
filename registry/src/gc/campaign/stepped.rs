//! An object store in memory whose every request takes its turn, and a runner that gives turns by a seed.
//!
//! A request waits for a turn before it is done, and for another before the caller hears of it; a listing comes in pages
//! of two keys, with a turn before each. All times are those of tokio's paused clock, so hours pass when the runner
//! says so. A request that was on its way when hours passed fails, as a connection would; one that was done is answered, however late.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, SystemTime};

use anyplace_seed::Seed;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, StreamExt as _};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::time::Instant;

use crate::storage::Storage;

/// Keys in a page of a listing.
const PAGE: usize = 2;

/// The store; clones are the same.
#[derive(Clone)]
pub(super) struct Stepped(Arc<Shared>);

struct Shared {
    inner: InMemory,
    put: Mutex<BTreeMap<Path, SystemTime>>,
    began: Instant,
    /// Ms that its clock is ahead of what it should be, or behind.
    off_ms: AtomicI64,
    /// Requests take no turns.
    calm: AtomicBool,
    /// Grows when hours pass.
    epoch: AtomicU64,
    requests: AtomicU64,
}

impl Stepped {
    pub(super) fn new() -> Stepped {
        Stepped(Arc::new(Shared {
            inner: InMemory::new(),
            put: Mutex::default(),
            began: Instant::now(),
            off_ms: AtomicI64::new(0),
            calm: AtomicBool::new(true),
            epoch: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        }))
    }

    pub(super) fn inner(&self) -> &InMemory {
        &self.0.inner
    }

    pub(super) fn set_calm(&self, calm: bool) {
        self.0.calm.store(calm, Ordering::Relaxed);
    }

    /// Lets time pass; what is on its way fails.
    pub(super) async fn pass(&self, time: Duration) {
        self.0.epoch.fetch_add(1, Ordering::Relaxed);
        tokio::time::advance(time).await;
    }

    /// Sets its clock: so much more than it should be.
    pub(super) fn set_clock(&self, off_ms: i64) {
        self.0.off_ms.store(off_ms, Ordering::Relaxed);
    }

    pub(super) fn requests(&self) -> u64 {
        self.0.requests.load(Ordering::Relaxed)
    }

    fn now(&self) -> SystemTime {
        // No two puts at the same time: their order would hang on random names.
        let order = Duration::from_micros(self.requests());
        let right =
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + self.0.began.elapsed() + order;
        let off_ms = self.0.off_ms.load(Ordering::Relaxed);
        let off = Duration::from_millis(off_ms.unsigned_abs());
        if off_ms < 0 { right - off } else { right + off }
    }

    fn stamped(&self, mut meta: ObjectMeta) -> ObjectMeta {
        if let Some(put) = self.0.put.lock().unwrap().get(&meta.location) {
            meta.last_modified = (*put).into();
        }
        meta
    }

    async fn step(&self) {
        if self.0.calm.load(Ordering::Relaxed) {
            return;
        }
        let mut waited = false;
        poll_fn(|cx| match std::mem::replace(&mut waited, true) {
            true => Poll::Ready(()),
            false => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
        .await;
    }

    async fn request<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        self.0.requests.fetch_add(1, Ordering::Relaxed);
        let epoch = self.0.epoch.load(Ordering::Relaxed);
        self.step().await;
        self.in_time(epoch)?;
        // In memory nothing waits.
        let outcome = request.now_or_never().expect("requests to memory don't wait");
        // The answer is on its way, and waits for a process that was stopped meanwhile.
        self.step().await;
        outcome
    }

    fn in_time(&self, epoch: u64) -> Result<()> {
        match self.0.epoch.load(Ordering::Relaxed) == epoch {
            true => Ok(()),
            false => Err(Error::Generic { store: "stepped", source: "the connection is gone".into() }),
        }
    }

    async fn page(&self, prefix: Option<Path>, after: Option<Path>) -> Result<Vec<ObjectMeta>> {
        let list = async {
            let listed = match &after {
                Some(after) => self.0.inner.list_with_offset(prefix.as_ref(), after),
                None => self.0.inner.list(prefix.as_ref()),
            };
            let mut all: Vec<ObjectMeta> = listed.map(|meta| meta.unwrap()).collect().await;
            all.sort_by(|a, b| a.location.cmp(&b.location));
            all.truncate(PAGE);
            Ok(all)
        };
        let page = self.request(list).await?;
        Ok(page.into_iter().map(|meta| self.stamped(meta)).collect())
    }
}

impl fmt::Display for Stepped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stepped")
    }
}

impl fmt::Debug for Stepped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stepped")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Stepped {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let put = async {
            let put = self.0.inner.put_opts(location, payload, opts).await?;
            self.0.put.lock().unwrap().insert(location.clone(), self.now());
            Ok(put)
        };
        self.request(put).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.0.inner.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let mut got = self.request(self.0.inner.get_opts(location, options)).await?;
        got.meta = self.stamped(got.meta);
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let delete = move |location: Result<Path>| {
            let this = this.clone();
            async move {
                let location = location?;
                let inner = this.0.inner.clone();
                let deletion = async {
                    let mut deleted = inner.delete_stream(stream::iter([Ok(location.clone())]).boxed());
                    deleted.next().await.expect("one was asked for").map(drop)
                };
                this.request(deletion).await?;
                Ok(location)
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        let pages =
            stream::try_unfold((this, prefix, None, false), |(this, prefix, after, ended)| async move {
                if ended {
                    return Ok::<_, Error>(None);
                }
                let page = this.page(prefix.clone(), after.clone()).await?;
                let ended = page.len() < PAGE;
                let after = page.last().map(|meta| meta.location.clone()).or(after);
                Ok(Some((stream::iter(page.into_iter().map(Ok)), (this, prefix, after, ended))))
            });
        futures_util::TryStreamExt::try_flatten(pages).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut listed = self.request(self.0.inner.list_with_delimiter(prefix)).await?;
        listed.objects = listed.objects.into_iter().map(|meta| self.stamped(meta)).collect();
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.request(self.0.inner.copy_opts(from, to, options)).await
    }
}

/// Numbers from a seed.
#[derive(Clone)]
pub(super) struct Dice(Rc<RefCell<Seed>>);

impl Dice {
    pub(super) fn new(seed: u64) -> Dice {
        Dice(Rc::new(RefCell::new(Seed::new(seed))))
    }

    /// One of the numbers below `end`.
    pub(super) fn below(&self, end: usize) -> usize {
        self.0.borrow_mut().index(end)
    }

    pub(super) fn one_in(&self, many: usize) -> bool {
        self.below(many) == 0
    }
}

/// Wakes a task, and the runner.
struct Turn {
    ready: AtomicBool,
    runner: Arc<Mutex<Option<Waker>>>,
}

impl Wake for Turn {
    fn wake(self: Arc<Self>) {
        self.ready.store(true, Ordering::Relaxed);
        if let Some(waker) = &*self.runner.lock().unwrap() {
            waker.wake_by_ref();
        }
    }
}

struct Task {
    collects: bool,
    /// Until this turn its process is stopped.
    stopped_until: u64,
    work: Pin<Box<dyn Future<Output = ()>>>,
    turn: Arc<Turn>,
    on_crash: Box<dyn Fn()>,
}

/// Gives turns to tasks, lets time pass, and ends tasks in the middle.
pub(super) struct Runner {
    store: Stepped,
    dice: Dice,
    tasks: Vec<Task>,
    waker: Arc<Mutex<Option<Waker>>>,
    pub(super) turns: Rc<RefCell<u64>>,
    pub(super) crashes: u64,
    pub(super) jumps: u64,
    /// Whether it sets the store's clock, and how often it did.
    pub(super) sets_clock: bool,
    pub(super) looking: Vec<Storage>,
    pub(super) settings: u64,
}

impl Runner {
    pub(super) fn new(store: Stepped, dice: Dice) -> Runner {
        let (waker, turns) = Default::default();
        Runner {
            store,
            dice,
            tasks: Vec::new(),
            waker,
            turns,
            crashes: 0,
            jumps: 0,
            sets_clock: false,
            looking: Vec::new(),
            settings: 0,
        }
    }

    pub(super) fn add(
        &mut self,
        collects: bool,
        work: impl Future<Output = ()> + 'static,
        on_crash: impl Fn() + 'static,
    ) {
        let turn = Arc::new(Turn { ready: AtomicBool::new(true), runner: self.waker.clone() });
        self.tasks.push(Task {
            collects,
            stopped_until: 0,
            work: Box::pin(work),
            turn,
            on_crash: Box::new(on_crash),
        });
    }

    /// Runs all tasks to their end, natural or not.
    pub(super) async fn run(&mut self, rough: bool) {
        self.store.set_calm(false);
        while !self.tasks.is_empty() {
            *self.turns.borrow_mut() += 1;
            if self.dice.one_in(6) {
                // Sleepers get their turn too, and what other tasks were spawned.
                tokio::time::advance(Duration::from_millis(25)).await;
            }
            if rough && self.dice.one_in(400) {
                self.jumps += 1;
                let minutes = [5, 16, 20, 20, 26 * 60][self.dice.below(5)];
                self.store.pass(Duration::from_secs(minutes * 60)).await;
                // Often it passes because a process is stopped, and others go on before it does.
                let turns = self.dice.below(800) as u64;
                let collectors: Vec<usize> =
                    (0..self.tasks.len()).filter(|at| self.tasks[*at].collects).collect();
                let at = match collectors.len() {
                    0 => self.dice.below(self.tasks.len()),
                    many => collectors[self.dice.below(many)],
                };
                self.tasks[at].stopped_until = *self.turns.borrow() + turns;
            }
            if rough && self.sets_clock && self.dice.one_in(300) {
                self.settings += 1;
                const HOUR_MS: i64 = 3_600_000;
                let offs = [0, 0, 2 * HOUR_MS, 30 * HOUR_MS, 10 * 8_766 * HOUR_MS];
                let off = offs[self.dice.below(5)];
                self.store.set_clock(if self.dice.one_in(2) { -off } else { off });
                // Registries look every five minutes; nobody sees a clock that was wrong for less.
                self.store.set_calm(true);
                for storage in &self.looking {
                    storage.now().await.unwrap();
                }
                self.store.set_calm(false);
            }
            if rough && self.dice.one_in(400) {
                let task = self.tasks.swap_remove(self.dice.below(self.tasks.len()));
                self.crashes += 1;
                drop(task.work);
                (task.on_crash)();
                continue;
            }
            let is_ready = |at: &usize| self.tasks[*at].turn.ready.load(Ordering::Relaxed);
            let all: Vec<usize> = (0..self.tasks.len()).filter(is_ready).collect();
            if all.is_empty() {
                self.sleep().await;
                continue;
            }
            let now = *self.turns.borrow();
            let ready: Vec<usize> =
                all.iter().copied().filter(|at| self.tasks[*at].stopped_until <= now).collect();
            // When nothing else can go on, the stopped one does.
            let ready = if ready.is_empty() { all } else { ready };
            let at = ready[self.dice.below(ready.len())];
            let task = &mut self.tasks[at];
            task.turn.ready.store(false, Ordering::Relaxed);
            let waker = Waker::from(task.turn.clone());
            if task.work.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                drop(self.tasks.swap_remove(at));
            }
        }
        self.store.set_calm(true);
    }

    /// Until a task can go on. When all wait for the clock, tokio advances it.
    async fn sleep(&self) {
        poll_fn(|cx| {
            *self.waker.lock().unwrap() = Some(cx.waker().clone());
            match self.tasks.iter().any(|task| task.turn.ready.load(Ordering::Relaxed)) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }
}
