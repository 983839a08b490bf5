//! Pulling: resolve the name, choose the platform, fetch the layers that are missing, and list the image.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};

use super::dirty::Writing;
use super::import::{self, Target, Written};
use super::objects::{Pins, lock};
use super::pool::{Priority, PullClass, spawn};
use super::resolve::{check_layer_type, choose_platform};
use super::room::Room;
use super::stream::{Message, channel};
use super::table::Table;
use super::{Inner, Lane, Listed, PulledImage, Store, StoredImage};
use crate::client::{Client, RawManifest};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, ImageConfig, MANIFEST_MAX_BYTES, Manifest};
use crate::mount::Mounter;
use crate::progress::{Item, NoProgress, SharedProgress, Stage};
use crate::reference::Reference;

/// Layers that are fetched at once.
const PARALLEL: usize = 4;

/// How to pull.
#[derive(Clone)]
pub struct PullOptions {
    /// Is told what happens.
    pub progress: SharedProgress,
    /// Whom it is for.
    pub class: PullClass,
}

impl Default for PullOptions {
    fn default() -> PullOptions {
        PullOptions { progress: NoProgress::shared(), class: PullClass::Live }
    }
}

/// What a pull took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PullStats {
    /// Layers of the image.
    pub layers: u64,
    /// Layers that were here already, or that another pull fetched.
    pub layers_reused: u64,
    /// Bytes of layers as the registry has them (compressed), all layers together.
    pub layer_bytes: u64,
    /// Bytes of layers that came from the registry.
    pub bytes_fetched: u64,
    /// Bytes of files and chunks (uncompressed) that were found here, or twice in a layer, in place of fetching them.
    pub bytes_reused: u64,
    /// Files of the layers that were fetched.
    pub files: u64,
    /// Bytes of objects that were written.
    pub bytes_written: u64,
}

/// Counters of a pull that runs, shared by its layers.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) layers_reused: AtomicU64,
    pub(super) bytes_fetched: AtomicU64,
    pub(super) bytes_reused: AtomicU64,
    pub(super) files: AtomicU64,
    pub(super) bytes_written: AtomicU64,
}

impl Counters {
    pub(super) fn reuse(&self, bytes: u64) {
        self.bytes_reused.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// The right to fetch a layer.
pub(super) type Turn = Arc<tokio::sync::OwnedMutexGuard<()>>;

/// A layer that is being fetched.
#[derive(Clone, Copy)]
pub(super) struct Fetch<'a> {
    pub(super) layer: &'a Descriptor,
    pub(super) diff_id: &'a Digest,
    pub(super) item: &'a Item,
    pub(super) lane: &'a Arc<Lane>,
    pub(super) turn: &'a Turn,
}

/// What the parts of one pull share.
pub(super) struct Pull {
    pub(super) inner: Arc<Inner>,
    pub(super) client: Client,
    pub(super) reference: Reference,
    pub(super) progress: SharedProgress,
    pub(super) class: PullClass,
    pub(super) pins: Arc<Pins>,
    pub(super) room: Arc<Room>,
    /// Held by whatever writes.
    pub(super) writing: Arc<Writing>,
    pub(super) counters: Counters,
    /// The image's own.
    pub(super) lane: Arc<Lane>,
}

impl Store {
    /// Makes sure that the image is here.
    ///
    /// A name with a tag is resolved at the registry each time; when the registry can't be reached, what the name
    /// meant last is used if it is here, and says so ([`PulledImage::stale`]). A name with a digest that is here needs no registry. Pulls of one image, and
    /// of one layer, that run at once are joined.
    pub async fn pull(
        &self,
        reference: &Reference,
        client: &Client,
        options: &PullOptions,
    ) -> Result<PulledImage> {
        if reference.digest.is_some()
            && let Some(image) = self.find(reference)?
        {
            self.inner.touch(reference, &image)?;
            return Ok(image);
        }
        match self.inner.fetch_from_any(reference, reference, client, options).await {
            Err(error) if error.is_unreachable() => match self.find(reference)? {
                Some(mut image) => {
                    tracing::warn!(%reference, %error, digest = %image.digest, "using the image that is here");
                    image.stale = Some(error.to_string());
                    Ok(image)
                }
                None => Err(error),
            },
            other => other,
        }
    }
}

impl Inner {
    /// Fetches what a reference means, and lists it under a name, usually the same.
    pub(super) async fn fetch_as(
        self: &Arc<Self>,
        reference: &Reference,
        name: &Reference,
        client: &Client,
        options: &PullOptions,
    ) -> Result<PulledImage> {
        let _live = (options.class == PullClass::Live).then(|| self.governor.live());
        let asking = self.asking(reference, client);
        let top = asking.get_manifest(reference).await?;
        let digest = top.digest.clone();
        let raw = choose_platform(reference, top, &asking).await?;
        let lane = self.lane(&raw.digest);
        let _turn = lane.wait(options.class).await;
        let (inner, of) = (self.clone(), (digest.clone(), raw.digest.clone()));
        if let Some(image) = blocking(move || inner.listed(&of.0, &of.1)).await? {
            let manifest: Manifest = manifest::parse("the manifest", &raw.bytes)?;
            for layer in &manifest.layers {
                options.progress.skipped(&item(layer), layer.size);
            }
            self.list(name, &image, None, options.class).await?;
            return Ok(image);
        }
        let (inner, id, class) = (self.clone(), raw.digest.clone(), options.class);
        let writing = blocking(move || {
            if class == PullClass::Prewarm {
                inner.remembered(&id)?;
            }
            // A removal that is under way must not take what this pull is about to write.
            let _gc = inner.gc.read().unwrap_or_else(PoisonError::into_inner);
            inner.writers.begin()
        });
        let pull = Pull {
            writing: writing.await?,
            inner: self.clone(),
            client: client.clone(),
            reference: reference.clone(),
            progress: options.progress.clone(),
            class: options.class,
            pins: Arc::new(self.objects.pins()),
            room: Arc::new(Room::new(&self.coming)),
            counters: Counters::default(),
            lane: lane.clone(),
        };
        match pull.run_in_room(&digest, &raw).await {
            Ok(image) => {
                self.list(name, &image, Some((pull.writing, pull.pins)), options.class).await?;
                Ok(image)
            }
            Err(error) => {
                // What is here is whole, only not listed: the next pull goes on with it. But what had no room leaves
                // nothing that takes some.
                let no_room = matches!(error, Error::NoRoom { .. } | Error::DiskFull { .. });
                let leaves_nothing = no_room && options.class == PullClass::Prewarm;
                let (inner, Pull { writing, pins, .. }) = (self.clone(), pull);
                let ended = blocking(move || {
                    Writing::finish(writing)?;
                    drop(pins);
                    if leaves_nothing { inner.collect().map(drop) } else { Ok(()) }
                });
                if let Err(error) = ended.await {
                    tracing::warn!(%error, "can't sync or tidy the image store");
                }
                Err(error)
            }
        }
    }

    /// An image that is listed under any name.
    fn listed(&self, digest: &Digest, manifest: &Digest) -> Result<Option<PulledImage>> {
        // Nothing is removed between the look and the hold.
        let _gc = self.gc.read().unwrap_or_else(PoisonError::into_inner);
        if self.is_listed(manifest) { self.image(digest, manifest) } else { Ok(None) }
    }

    pub(super) fn is_listed(&self, manifest: &Digest) -> bool {
        lock(&self.images).values().any(|listed| listed.image.manifest == *manifest)
    }

    /// Lists an image under a name, and brings it and its record to the disk later. Its objects stay pinned until
    /// then, since removals look at records.
    async fn list(
        self: &Arc<Self>,
        reference: &Reference,
        image: &PulledImage,
        written: Option<(Arc<Writing>, Arc<Pins>)>,
        class: PullClass,
    ) -> Result<()> {
        let record = StoredImage {
            reference: reference.canonical(),
            digest: image.digest.clone(),
            manifest: image.manifest.clone(),
        };
        let key = record.reference.to_string();
        let known = lock(&self.images).get(&key).is_some_and(|listed| listed.image == record);
        if known && written.is_none() {
            return self.touch(reference, image);
        }
        let bytes = serde_json::to_vec(&record).map_err(|e| Error::InvalidManifest {
            what: "the store's record of an image".to_owned(),
            reason: e.to_string(),
        })?;
        let listed = Listed { image: record, used: SystemTime::now() };
        if lock(&self.images).insert(key.clone(), listed.clone()).is_some() {
            self.removals.send_replace(());
        }
        self.settling.send_modify(|count| *count += 1);
        let (inner, hold) = (self.clone(), image.clone());
        tokio::task::spawn_blocking(move || {
            let settled = inner.settle(&key, &bytes, written);
            if let Err(error) = settled {
                tracing::error!(%error, image = key, "an image is not on the disk; it is fetched again");
                let mut images = lock(&inner.images);
                if images.get(&key).is_some_and(|now| now.image == listed.image) {
                    images.remove(&key);
                    inner.removals.send_replace(());
                }
                *lock(&inner.unsettled) = Some(error);
            }
            drop(hold);
            // An image that is used may exceed the budget by what layers without a table turned out to have.
            if let Err(error) = inner.evict(class) {
                tracing::error!(%error, "can't make room in the image store");
            }
            // Last of all: whoever waits may want to open the store again.
            let settling = inner.settling.clone();
            drop(inner);
            settling.send_modify(|count| *count -= 1);
        });
        Ok(())
    }

    fn settle(&self, key: &str, record: &[u8], written: Option<(Arc<Writing>, Arc<Pins>)>) -> Result<()> {
        // Also where nothing was written: the image that this name means now may be waiting for its sync.
        self.writers.sync()?;
        self.write_durably(&self.record_path(key), record)?;
        match written {
            Some((writing, pins)) => {
                Writing::finish(writing)?;
                // A removal that is under way hasn't seen the record.
                let _gc = self.gc.read().unwrap_or_else(PoisonError::into_inner);
                drop(pins);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Lane {
    /// Waits for one's turn; a live pull hurries whoever has it.
    async fn wait(&self, class: PullClass) -> tokio::sync::OwnedMutexGuard<()> {
        if class == PullClass::Live {
            self.urgent.store(true, Ordering::Relaxed);
        }
        self.turn.clone().lock_owned().await
    }
}

impl Pull {
    pub(super) async fn run(&self, digest: &Digest, raw: &RawManifest) -> Result<PulledImage> {
        let reference = &self.reference;
        let manifest: Manifest = manifest::parse(&format!("the manifest of `{reference}`"), &raw.bytes)?;
        let config_digest = &manifest.config.digest;
        let config_bytes = match self.inner.read_blob(config_digest)? {
            Some(bytes) => bytes,
            None => {
                let size = Some(manifest.config.size);
                let blob = self.client.get_blob(reference, config_digest, size).await?;
                blob.read(MANIFEST_MAX_BYTES).await?
            }
        };
        let config: ImageConfig =
            manifest::parse(&format!("the configuration of `{reference}`"), &config_bytes)?;
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(Error::InvalidManifest {
                what: format!("the configuration of `{reference}`"),
                reason: format!("{} diff_ids for {} layers", diff_ids.len(), manifest.layers.len()),
            });
        }
        self.write(digest.clone(), raw, &manifest, config_bytes, &config).await
    }

    async fn write(
        &self,
        digest: Digest,
        raw: &RawManifest,
        manifest: &Manifest,
        config_bytes: Vec<u8>,
        config: &ImageConfig,
    ) -> Result<PulledImage> {
        // A list, because the compiler can't see that a future made inside a stream's closure may change threads.
        let mut fetches = Vec::with_capacity(manifest.layers.len());
        for (layer, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
            fetches.push(self.ensure_layer(layer, diff_id));
        }
        let tables: Vec<Arc<Table>> = stream::iter(fetches).buffered(PARALLEL).try_collect().await?;
        let inner = self.inner.clone();
        if let Mounter::Folders { .. } = blocking(move || inner.mounter().cloned()).await? {
            // Its folder is a copy of all its files.
            let files = tables.iter().flat_map(|table| table.objects());
            self.make_room(files.map(|file| file.size).sum(), &self.lane).await?;
        }
        let (inner, id) = (self.inner.clone(), raw.digest.clone());
        let files = [
            (self.inner.blob_path(&manifest.config.digest), config_bytes),
            (self.inner.blob_path(&raw.digest), raw.bytes.to_vec()),
        ];
        let image = blocking(move || {
            inner.build_from(&id, &tables)?;
            for (path, bytes) in files {
                inner.write_whole(&path, &bytes)?;
            }
            inner.image(&digest, &id)
        });
        let mut image = image.await?.ok_or(Error::Cancelled)?;
        let counters = &self.counters;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        image.stats = PullStats {
            layers: manifest.layers.len() as u64,
            layers_reused: of(&counters.layers_reused),
            layer_bytes: manifest.layers.iter().map(|layer| layer.size).sum(),
            bytes_fetched: of(&counters.bytes_fetched),
            bytes_reused: of(&counters.bytes_reused),
            files: of(&counters.files),
            bytes_written: of(&counters.bytes_written),
        };
        Ok(image)
    }

    /// Fetches a layer unless it is here; others that want the same one wait for it.
    async fn ensure_layer(&self, layer: &Descriptor, diff_id: &Digest) -> Result<Arc<Table>> {
        check_layer_type(&layer.media_type)?;
        let item = item(layer);
        let lane = self.inner.lane(diff_id);
        let turn = Arc::new(lane.wait(self.class).await);
        let (inner, pins, id) = (self.inner.clone(), self.pins.clone(), diff_id.clone());
        if let Some(table) = blocking(move || inner.whole_layer(&id, &pins)).await? {
            self.counters.layers_reused.fetch_add(1, Ordering::Relaxed);
            self.progress.skipped(&item, layer.size);
            return Ok(table);
        }
        let of = Fetch { layer, diff_id, item: &item, lane: &lane, turn: &turn };
        let (table, written) = match self.fetch_missing(of).await? {
            Some(done) => done,
            None => {
                self.progress.started(&item, layer.size);
                self.fetch_whole(of).await?
            }
        };
        self.counters.files.fetch_add(written.files, Ordering::Relaxed);
        self.counters.bytes_written.fetch_add(written.bytes, Ordering::Relaxed);
        let (inner, id) = (self.inner.clone(), diff_id.clone());
        let table = blocking(move || {
            let table = Arc::new(table);
            inner.write_whole(&inner.table_path(&id), &table.to_bytes()?)?;
            inner.remember(&id, &table);
            Ok(table)
        });
        let table = table.await?;
        self.progress.finished(&item);
        Ok(table)
    }

    /// Fetches a layer from its first to its last byte.
    async fn fetch_whole(&self, of: Fetch<'_>) -> Result<(Table, Written)> {
        let Fetch { layer, diff_id, item, lane, turn } = of;
        // How much more it is when it is unpacked nobody says.
        let expected = self.make_room(layer.size, lane).await?;
        let mut blob = self.client.get_blob(&self.reference, &layer.digest, Some(layer.size)).await?;
        let (sender, reader) = channel();
        let (inner, pins, priority) = (self.inner.clone(), self.pins.clone(), self.priority(lane));
        let (diff_id, size) = (diff_id.clone(), layer.size);
        // The turn goes along: when this pull is given up, the next one waits until the import has noticed.
        let (turn, writing) = (turn.clone(), self.writing.clone());
        let importing = on_thread(priority.now(), "images-import", move || {
            let _turn = turn;
            let (objects, pools) = (&inner.objects, &inner.pools);
            let (pins, expected, priority, writing) = (&pins, &expected, &priority, &writing);
            let target = Target { objects, pins, pools, priority, expected, writing };
            import::import(reader, size, &diff_id, &target)
        })?;
        let downloaded = async {
            while let Some(chunk) = blob.chunk().await? {
                let len = chunk.len() as u64;
                self.pay(len, lane).await;
                if sender.send(Message::Data(chunk)).await.is_err() {
                    // The import gave up: its error says why.
                    return Ok(());
                }
                self.progress.advanced(item, len);
            }
            let _ = sender.send(Message::Complete).await;
            Ok(())
        }
        .await;
        drop(sender);
        let imported = importing.await.map_err(|_| Error::Cancelled)?;
        // A failed download makes the import fail too; the download's error is the cause.
        downloaded.and(imported)
    }

    pub(super) fn priority(&self, lane: &Arc<Lane>) -> Priority {
        Priority { class: self.class, lanes: [self.lane.clone(), lane.clone()] }
    }

    /// Counts bytes that arrived; prewarming waits until it may take more.
    pub(super) async fn pay(&self, bytes: u64, lane: &Arc<Lane>) {
        self.counters.bytes_fetched.fetch_add(bytes, Ordering::Relaxed);
        match self.class {
            PullClass::Live => self.inner.governor.count(bytes),
            PullClass::Prewarm => {
                let priority = self.priority(lane);
                self.inner.governor.pace(bytes, || priority.now() == PullClass::Live).await;
            }
        }
    }
}

impl Inner {
    /// A layer's table if all its objects are here, which are then pinned.
    fn whole_layer(&self, diff_id: &Digest, pins: &Pins) -> Result<Option<Arc<Table>>> {
        let Some(table) = self.table(diff_id)? else { return Ok(None) };
        let whole = table.objects().all(|file| {
            pins.add(&file.id);
            self.objects.has(&file.id, file.size)
        });
        Ok(whole.then_some(table))
    }
}

/// Runs something that blocks, away from the threads that drive the network.
pub(super) async fn blocking<T: Send + 'static>(
    body: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(body).await.map_err(|_| Error::Cancelled)?
}

/// Runs something that blocks for long on a thread of its own, with the priority of its class.
pub(super) fn on_thread<T: Send + 'static>(
    class: PullClass,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<tokio::sync::oneshot::Receiver<T>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    spawn(class, name, move || {
        // Nobody listens where the pull was given up.
        let _ = sender.send(body());
    })?;
    Ok(receiver)
}

fn item(layer: &Descriptor) -> Item {
    Item { stage: Stage::Fetch, name: layer.digest.short().to_owned() }
}
