//! A store that fails at random: before an operation, after it (done, but the answer lost), or late.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyplace_seed::Seed;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result,
};

#[derive(Debug)]
pub(super) struct Faulty {
    inner: InMemory,
    /// Whether it heeds conditions.
    conditional: bool,
    seed: Mutex<Seed>,
    /// One operation in so many fails; 0 for none.
    pub(super) one_in: AtomicU64,
    pub(super) faults: AtomicU64,
    /// Nothing works.
    pub(super) down: AtomicBool,
    /// Content is there, but the disk below has lost it.
    pub(super) lost: AtomicBool,
    /// Reads take a millisecond.
    pub(super) slow: AtomicBool,
    /// Keys of all reads, also of those that ask for no content.
    pub(super) reads: Mutex<Vec<String>>,
    reading: AtomicU64,
    /// Most slow reads at once.
    pub(super) reading_max: AtomicU64,
}

/// What happens to one operation.
enum Fate {
    Good,
    Refused,
    Unanswered,
}

impl Faulty {
    pub(super) fn new(inner: InMemory, conditional: bool) -> Faulty {
        let zero = || AtomicU64::new(0);
        let seed = Mutex::new(Seed::new(1));
        Faulty {
            inner,
            conditional,
            seed,
            one_in: zero(),
            faults: zero(),
            down: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            slow: AtomicBool::new(false),
            reads: Mutex::default(),
            reading: zero(),
            reading_max: zero(),
        }
    }

    pub(super) fn seed(&self, seed: u64) {
        *self.seed.lock().unwrap() = Seed::new(seed);
    }

    async fn fate(&self) -> Fate {
        if self.down.load(Ordering::SeqCst) {
            return Fate::Refused;
        }
        let one_in = self.one_in.load(Ordering::SeqCst);
        if one_in == 0 {
            return Fate::Good;
        }
        let (hit, kind, delay) = {
            let mut seed = self.seed.lock().unwrap();
            (seed.below(one_in) == 0, seed.below(2), seed.below(10) == 0)
        };
        if delay {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if !hit {
            return Fate::Good;
        }
        self.faults.fetch_add(1, Ordering::SeqCst);
        if kind == 0 { Fate::Refused } else { Fate::Unanswered }
    }

    async fn run<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        match self.fate().await {
            Fate::Good => operation.await,
            Fate::Refused => Err(broken("503 before the operation")),
            Fate::Unanswered => {
                let _ = operation.await;
                Err(broken("the answer was lost"))
            }
        }
    }
}

fn broken(what: &'static str) -> Error {
    Error::Generic { store: "faulty", source: what.into() }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut opts: PutOptions,
    ) -> Result<PutResult> {
        if !self.conditional {
            opts.mode = PutMode::Overwrite;
        }
        self.run(self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.reads.lock().unwrap().push(location.to_string());
        if self.slow.load(Ordering::SeqCst) {
            let reading = self.reading.fetch_add(1, Ordering::SeqCst) + 1;
            self.reading_max.fetch_max(reading, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.reading.fetch_sub(1, Ordering::SeqCst);
        }
        if self.lost.load(Ordering::SeqCst) && !options.head && location.as_ref().starts_with("blobs/") {
            let source = std::io::Error::from_raw_os_error(libc::EIO).into();
            return Err(Error::Generic { store: "faulty", source });
        }
        self.run(self.inner.get_opts(location, options)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        // Deletes have their fate here too, one for all of a stream.
        let down = self.down.load(Ordering::SeqCst);
        let inner = self.inner.clone();
        locations
            .and_then(move |location| {
                let inner = inner.clone();
                async move {
                    if down {
                        return Err(broken("503 before the operation"));
                    }
                    inner.delete(&location).await?;
                    Ok(location)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let one_in = self.one_in.load(Ordering::SeqCst);
        let hit = one_in > 0 && self.seed.lock().unwrap().below(one_in) == 0;
        if hit || self.down.load(Ordering::SeqCst) {
            self.faults.fetch_add(1, Ordering::SeqCst);
            return futures_util::stream::iter([Err(broken("503 on a listing"))]).boxed();
        }
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.run(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[async_trait::async_trait]
impl MultipartStore for Faulty {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        self.run(self.inner.create_multipart(path)).await
    }

    async fn put_part(
        &self,
        path: &Path,
        id: &MultipartId,
        part_idx: usize,
        data: PutPayload,
    ) -> Result<PartId> {
        self.run(self.inner.put_part(path, id, part_idx, data)).await
    }

    async fn complete_multipart(
        &self,
        path: &Path,
        id: &MultipartId,
        parts: Vec<PartId>,
    ) -> Result<PutResult> {
        self.run(self.inner.complete_multipart(path, id, parts)).await
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.run(self.inner.abort_multipart(path, id)).await
    }
}
