//! Reads everything in the store again, slowly, in the background: what a disk spoilt is dropped and fetched anew.
//!
//! First all objects in the order of their names, then each image's documents, tables and mount. `scrub.json` has the
//! position, kept every [`KEEP_EVERY`], and the images that lack something since: they are no longer listed, and who
//! looks after the store has them fetched again ([`Store::repair`]). What is in the kernel's page cache is read from
//! there, so that damage on the disk shows once the cache has let go of it.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::objects::{ObjectId, lock};
use super::pool::PullClass;
use super::pull::{blocking, on_thread};
use super::{Inner, PullOptions, Store, StoredImage, Verified};
use crate::client::Client;
use crate::digest::Digest;
use crate::error::{Error, Result};

/// How often the position is kept.
const KEEP_EVERY: Duration = Duration::from_secs(10);
/// The longest wait at once, after which it is looked whether to stop.
const WAIT_MAX: Duration = Duration::from_millis(100);
/// Most files that are named.
const NAMED_MAX: usize = 100;

/// How the slow look at everything stands: the one that goes on, or the last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrub {
    /// Seconds since 1970 of its beginning; 0 where there was none yet.
    pub started_s: u64,
    /// Seconds since 1970 of its end; none while it goes on.
    pub finished_s: Option<u64>,
    /// Objects that were read this time.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files of the store that were damaged, this time and all times before.
    pub damaged: u64,
    /// Names of the first of them.
    pub names: Vec<String>,
    /// Images that lack something, and have to be fetched again.
    pub lacking: Vec<StoredImage>,
    /// The object that was read last.
    after: Option<Digest>,
}

/// Why [`Store::scrub`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scrubbed {
    /// It found these files damaged and goes on when it is called again.
    Damaged(Vec<String>),
    /// It has read everything.
    Done,
}

/// Holds reading to a rate.
struct Pace {
    bytes_per_s: u64,
    since: Instant,
    bytes: u64,
    stop: Arc<AtomicBool>,
}

impl Pace {
    /// Waits until so many bytes more may have been read.
    ///
    /// # Errors
    /// Nobody waits for the result any more.
    fn read(&mut self, bytes: u64) -> Result<()> {
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / self.bytes_per_s as f64);
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let left = due.saturating_sub(self.since.elapsed());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(WAIT_MAX));
        }
        // What wasn't used is not saved up.
        if self.since.elapsed() > due + Duration::from_secs(1) {
            (self.since, self.bytes) = (Instant::now(), 0);
        }
        Ok(())
    }
}

/// Stops the thread when nobody waits for it any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Store {
    /// How the slow look at everything stands.
    pub fn scrub_state(&self) -> Scrub {
        lock(&self.inner.scrub).clone()
    }

    /// Goes on with the slow look at everything, or begins one, at so many bytes a second, until it is done or finds
    /// damage. May be given up at any point.
    pub async fn scrub(&self, bytes_per_s: u64) -> Result<Scrubbed> {
        let stop = Arc::new(AtomicBool::new(false));
        let _stop = StopOnDrop(stop.clone());
        let inner = self.inner.clone();
        let pace = Pace { bytes_per_s: bytes_per_s.max(1), since: Instant::now(), bytes: 0, stop };
        let scrubbing = on_thread(PullClass::Prewarm, "images-scrub", move || inner.scrub_on(pace))?;
        scrubbing.await.map_err(|_| Error::Cancelled)?
    }

    /// Fetches what images lack that were found damaged, by what their names meant then; those that the registry no
    /// longer has are left to whoever wants them next.
    ///
    /// # Errors
    /// Of the first that can't be fetched now; it and those behind it stay in [`Scrub::lacking`].
    pub async fn repair(&self, client: &Client, options: &PullOptions) -> Result<()> {
        loop {
            let Some(image) = lock(&self.inner.scrub).lacking.first().cloned() else { return Ok(()) };
            let name = image.reference.at(&image.digest);
            // Somebody else may have pulled it since, or what the name means now.
            let is_here = self.inner.is_listed(&image.manifest) || self.inner.is_named(&image.reference);
            let fetched = match is_here {
                true => Ok(()),
                false => self.inner.fetch_from_any(&name, &image.reference, client, options).await.map(drop),
            };
            match fetched {
                Err(error) if !error.is_not_found() => return Err(error),
                Err(error) => {
                    tracing::warn!(image = %image.reference, %error, "a damaged image is no longer in its registry");
                }
                Ok(()) => {
                    tracing::info!(image = %image.reference, "fetched anew what was damaged of an image")
                }
            }
            let inner = self.inner.clone();
            blocking(move || {
                lock(&inner.scrub).lacking.retain(|other| *other != image);
                inner.keep_scrub()
            })
            .await?;
        }
    }
}

impl Inner {
    fn scrub_path(&self) -> PathBuf {
        self.dir.join("scrub.json")
    }

    /// The position that was kept last; a new one where it can't be read.
    pub(super) fn load_scrub(&self) {
        match std::fs::read(self.scrub_path()).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(scrub)) => *lock(&self.scrub) = scrub,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            _ => tracing::warn!("the position of the image store's scrub can't be read; it begins anew"),
        }
    }

    fn keep_scrub(&self) -> Result<()> {
        let scrub = lock(&self.scrub).clone();
        let bytes = serde_json::to_vec(&scrub).map_err(|e| Error::InvalidManifest {
            what: "the scrub's position".to_owned(),
            reason: e.to_string(),
        })?;
        self.write_durably(&self.scrub_path(), &bytes)
    }

    fn scrub_on(&self, mut pace: Pace) -> Result<Scrubbed> {
        {
            let mut scrub = lock(&self.scrub);
            if scrub.started_s == 0 || scrub.finished_s.is_some() {
                let Scrub { damaged, names, lacking, .. } = std::mem::take(&mut *scrub);
                *scrub = Scrub { started_s: now_s(), damaged, names, lacking, ..Scrub::default() };
            }
        }
        let after = lock(&self.scrub).after.clone();
        let mut kept = Instant::now();
        for folder in 0..=u8::MAX {
            for id in self.objects.in_folder(folder)? {
                if after.as_ref().is_some_and(|after| id.digest() <= *after) {
                    continue;
                }
                let mut bytes = 0;
                let is_right = self.objects.is_right_paced(&id, &mut |read| {
                    bytes += read;
                    pace.read(read)
                });
                let is_right = match is_right {
                    Err(Error::Cancelled) => {
                        self.keep_scrub()?;
                        return Err(Error::Cancelled);
                    }
                    Ok(is_right) => is_right,
                    // A disk that can't read it is as bad as wrong bytes; what is gone was removed.
                    Err(error) => {
                        tracing::warn!(object = ?id, %error, "can't read an object");
                        !self.objects.exists(&id)
                    }
                };
                let is_damaged = !is_right && self.objects.discard_if_wrong(&id)?;
                {
                    let mut scrub = lock(&self.scrub);
                    scrub.after = Some(id.digest());
                    (scrub.objects, scrub.bytes) = (scrub.objects + 1, scrub.bytes + bytes);
                }
                if is_damaged {
                    let images = self.images_with(&id)?;
                    return self.found_damage(vec![format!("objects/{}", id.path())], images);
                }
                if kept.elapsed() >= KEEP_EVERY {
                    self.keep_scrub()?;
                    kept = Instant::now();
                }
            }
        }
        let images: Vec<StoredImage> =
            lock(&self.images).values().map(|listed| listed.image.clone()).collect();
        let (mut report, mut broken) = (Verified::default(), Vec::new());
        for image in images {
            if !self.verify_image(&image.manifest, &mut report, &mut |read| pace.read(read))? {
                broken.push(image);
            }
        }
        lock(&self.scrub).finished_s = Some(now_s());
        report.damaged.append(&mut report.repaired);
        if !report.damaged.is_empty() || !broken.is_empty() {
            return self.found_damage(report.damaged, broken);
        }
        self.keep_scrub()?;
        Ok(Scrubbed::Done)
    }

    /// Takes images that lack something off the list, and notes them.
    fn found_damage(&self, files: Vec<String>, images: Vec<StoredImage>) -> Result<Scrubbed> {
        tracing::error!(
            ?files,
            images = images.len(),
            "what the image store has is damaged; it is fetched anew"
        );
        for image in &images {
            self.forget(&image.reference.canonical().to_string())?;
        }
        {
            let mut scrub = lock(&self.scrub);
            scrub.damaged += files.len() as u64;
            scrub.names.extend(files.iter().cloned());
            scrub.names.truncate(NAMED_MAX);
            for image in images {
                if !scrub.lacking.contains(&image) {
                    scrub.lacking.push(image);
                }
            }
        }
        self.keep_scrub()?;
        Ok(Scrubbed::Damaged(files))
    }

    /// The images that have an object.
    fn images_with(&self, id: &ObjectId) -> Result<Vec<StoredImage>> {
        let listed: Vec<StoredImage> =
            lock(&self.images).values().map(|listed| listed.image.clone()).collect();
        let mut found = Vec::new();
        for image in listed {
            let Some(documents) = self.documents(&image.manifest)? else { continue };
            for diff_id in &documents.config.rootfs.diff_ids {
                let Some(table) = self.table(diff_id)? else { continue };
                if table.objects().any(|file| file.id == *id) {
                    found.push(image);
                    break;
                }
            }
        }
        Ok(found)
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_secs())
}
