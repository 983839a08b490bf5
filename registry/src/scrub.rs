//! Re-hashes what is stored, at a limited rate, in the background.
//!
//! Content that doesn't have its digest, or that the disk has lost (`EIO`, several times), is moved to `quarantine/`,
//! where nothing serves it: whoever asks is told that it isn't there, and a push stores it again. If there is another
//! place to get it from (an upstream), it is repaired at once. The position is kept in the store, so a restart goes on
//! where it was, within [`KEEP_EVERY`].
//!
//! ```toml
//! [scrub]
//! every = "30d"     # "0s": only when asked for
//! rate = "32MiB"    # bytes a second
//! ```

mod metadata;
mod report;

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use anyplace_images::{Algorithm, Digest};
use anyplace_service::ScrubConfig;
use futures_util::StreamExt as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::storage::{Error, Marked, Note, Storage};
pub use report::{ScrubFinding, ScrubOutcome, ScrubPhase, ScrubReport, ScrubStatus};

/// How often the position is kept.
const KEEP_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked whether it is time.
const CHECK_EVERY: Duration = Duration::from_secs(600);
/// How often content that can't be read is tried.
const READ_TRIES: usize = 3;
/// The wait before the next try.
const READ_PAUSE: Duration = Duration::from_millis(500);

/// Gets content of a repository from elsewhere, and says whether it is stored here now.
pub(crate) type Repair =
    Box<dyn Fn(String, Digest) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// A scrub that isn't over.
#[derive(Serialize, Deserialize)]
struct Position {
    report: ScrubReport,
    /// The last that was read.
    after: Option<Digest>,
}

/// The registry's scrubber.
pub(crate) struct Scrubber {
    storage: Storage,
    config: ScrubConfig,
    repair: Option<Repair>,
    one: Arc<tokio::sync::Mutex<()>>,
    running: Mutex<Option<ScrubReport>>,
    totals: Totals,
    stop: CancellationToken,
}

/// Since the start.
#[derive(Default)]
struct Totals {
    contents: AtomicU64,
    bytes: AtomicU64,
    wrong: AtomicU64,
}

/// What hashing found.
enum Found {
    Right(u64),
    Wrong(u64, String),
    Gone,
}

impl Scrubber {
    /// A scrubber that stops soon after `stop`.
    pub(crate) fn new(
        storage: Storage,
        config: &Config,
        repair: Option<Repair>,
        stop: CancellationToken,
    ) -> Scrubber {
        let (one, running, totals) = Default::default();
        Scrubber { storage, config: config.scrub, repair, one, running, totals, stop }
    }

    /// For `/metrics`.
    pub(crate) fn counters(&self) -> impl IntoIterator<Item = (&'static str, &'static str, &AtomicU64)> {
        let [contents, bytes, wrong] = [&self.totals.contents, &self.totals.bytes, &self.totals.wrong];
        [
            ("scrubbed_contents", "Contents that a scrub read", contents),
            ("scrubbed_bytes", "Bytes that a scrub read", bytes),
            ("scrub_damaged", "Contents that a scrub found damaged", wrong),
        ]
    }

    /// Scrubs whenever it is time, until the registry stops.
    pub(crate) async fn run_by_itself(self: &Arc<Self>) {
        while self.stop.run_until_cancelled(tokio::time::sleep(CHECK_EVERY)).await.is_some() {
            match self.is_time().await {
                Ok(true) => drop(self.scrub().await),
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "the scrubber couldn't look whether it is time"),
            }
        }
    }

    async fn is_time(&self) -> anyhow::Result<bool> {
        let every = self.config.every.to_std();
        if every.is_zero() {
            return Ok(false);
        }
        if self.storage.note::<Position>(Note::Scrub).await?.is_some() {
            return Ok(true);
        }
        let Some((_, ended)) = self.storage.note::<ScrubReport>(Note::LastScrub).await? else {
            return Ok(true);
        };
        Ok(self.storage.ages().await?.of_past(ended) >= every)
    }

    /// Begins a scrub, or goes on with the one that was interrupted, in the background; none if one runs already.
    pub(crate) async fn start(self: &Arc<Self>) -> crate::storage::Result<Option<ScrubReport>> {
        let Ok(one) = self.one.clone().try_lock_owned() else { return Ok(None) };
        let position = self.begin().await?;
        let (this, report) = (self.clone(), position.report.clone());
        tokio::spawn(async move { this.go_on(position, one).await });
        Ok(Some(report))
    }

    /// Scrubs, or goes on with a scrub; none if one runs already.
    async fn scrub(&self) -> crate::storage::Result<Option<ScrubReport>> {
        let Ok(one) = self.one.clone().try_lock_owned() else { return Ok(None) };
        let position = self.begin().await?;
        Ok(Some(self.go_on(position, one).await))
    }

    /// What it does, and did.
    pub(crate) async fn status(&self) -> crate::storage::Result<ScrubStatus> {
        let running = self.running.lock().ok().and_then(|report| report.clone());
        let last = self.storage.note(Note::LastScrub).await?.map(|(report, _)| report);
        Ok(ScrubStatus { running, last })
    }

    /// Waits until nothing is going on.
    pub(crate) async fn ended(&self) {
        let _one = self.one.lock().await;
    }

    async fn begin(&self) -> crate::storage::Result<Position> {
        let position = match self.storage.note::<Position>(Note::Scrub).await? {
            Some((position, _)) => position,
            None => Position { report: ScrubReport::new(moment(self.storage.now().await?)), after: None },
        };
        self.show(Some(position.report.clone()));
        Ok(position)
    }

    fn show(&self, report: Option<ScrubReport>) {
        if let Ok(mut running) = self.running.lock() {
            *running = report;
        }
    }

    async fn go_on(&self, mut position: Position, one: OwnedMutexGuard<()>) -> ScrubReport {
        let outcome = self.work(&mut position).await;
        let ended = self.storage.now().await.map(moment).unwrap_or(position.report.started);
        let report = &mut position.report;
        (report.phase, report.error) = match &outcome {
            Ok(()) if self.stop.is_cancelled() => (ScrubPhase::Stopped, None),
            Ok(()) => (ScrubPhase::Done, None),
            Err(error) => (ScrubPhase::Stopped, Some(format!("{error:#}"))),
        };
        let noted = async {
            if position.report.phase == ScrubPhase::Done {
                position.report.finished = Some(ended);
                self.storage.put_note(Note::LastScrub, &position.report).await?;
                return self.storage.remove_note(Note::Scrub).await.map(drop);
            }
            self.storage.put_note(Note::Scrub, &position).await
        };
        if let Err(error) = noted.await {
            tracing::warn!(%error, "the scrub's position can't be kept; it begins anew");
        }
        let ScrubReport { phase, checked, bytes, .. } = position.report;
        let wrong = position.report.wrong.count;
        tracing::info!(%phase, checked, bytes, wrong, "scrubbed");
        // Who sees that it ended may begin the next one.
        drop(one);
        self.show(None);
        position.report
    }

    async fn work(&self, position: &mut Position) -> anyhow::Result<()> {
        position.report.phase = ScrubPhase::Running;
        let (mut pace, mut kept) = (Pace::new(self.config.rate.0), Instant::now());
        for algorithm in Algorithm::ALL {
            for shard in 0..=255_u8 {
                let digits = format!("{shard:02x}");
                let past = |after: &Digest| (after.kind(), &after.hex()[..2]) > (algorithm, digits.as_str());
                if position.after.as_ref().is_some_and(past) {
                    continue;
                }
                let digests = self.storage.digests_in(algorithm, &digits).await.context("listing content")?;
                for digest in digests {
                    if position
                        .after
                        .as_ref()
                        .is_some_and(|after| after.kind() == algorithm && *after >= digest)
                    {
                        continue;
                    }
                    if self.stop.is_cancelled() {
                        return Ok(());
                    }
                    if !self.check(&digest, &mut position.report, &mut pace).await? {
                        return Ok(());
                    }
                    position.after = Some(digest);
                    self.show(Some(position.report.clone()));
                    if kept.elapsed() >= KEEP_EVERY {
                        self.storage.put_note(Note::Scrub, position).await?;
                        kept = Instant::now();
                    }
                }
            }
        }
        let report = &mut position.report;
        let checked = metadata::check(&self.storage, &self.stop, |problem| report.problem(problem)).await;
        checked.context("reading what is kept beside content")
    }

    /// Reads one content, and does what has to be done about it; not, if the registry stops meanwhile.
    async fn check(
        &self,
        digest: &Digest,
        report: &mut ScrubReport,
        pace: &mut Pace,
    ) -> anyhow::Result<bool> {
        let Some(stored) = self.storage.content_stored(digest).await? else { return Ok(true) };
        let Some(found) = self.stop.run_until_cancelled(self.hash(digest, pace)).await else {
            return Ok(false);
        };
        let found = match found {
            Ok(found) => found,
            Err(error) if error.is_damage() => Found::Wrong(0, error.to_string()),
            Err(error) => {
                report.problem(format!("{digest} can't be read: {error}"));
                return Ok(true);
            }
        };
        report.checked += 1;
        self.totals.contents.fetch_add(1, Ordering::Relaxed);
        match found {
            Found::Right(size) => report.bytes += size,
            Found::Gone => {}
            Found::Wrong(size, found) => {
                report.bytes += size;
                self.totals.wrong.fetch_add(1, Ordering::Relaxed);
                tracing::error!(%digest, found, "content is damaged");
                let finding = self.put_right(digest, found, stored).await?;
                report.wrong.push(finding);
            }
        }
        Ok(true)
    }

    async fn hash(&self, digest: &Digest, pace: &mut Pace) -> crate::storage::Result<Found> {
        let mut tries = 1;
        loop {
            match self.hash_once(digest, pace).await {
                Err(Error::Store { .. }) if self.storage.content_stored(digest).await?.is_none() => {
                    return Ok(Found::Gone);
                }
                Err(Error::Store { .. }) if tries < READ_TRIES => {
                    tries += 1;
                    tokio::time::sleep(READ_PAUSE).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn hash_once(&self, digest: &Digest, pace: &mut Pace) -> crate::storage::Result<Found> {
        let Some(expected) = self.storage.content_size(digest).await? else { return Ok(Found::Gone) };
        let (mut hasher, mut size) = (digest.hasher(), 0);
        if expected > 0 {
            let mut chunks = self.storage.open_content(digest, None).await?.into_stream();
            while let Some(chunk) = chunks.next().await {
                let chunk = chunk.map_err(|e| self.storage.failed_content("read", digest, e))?;
                size += chunk.len() as u64;
                hasher.update(&chunk);
                self.totals.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                pace.wait(chunk.len() as u64).await;
            }
        }
        let found = hasher.finish();
        Ok(match found == *digest {
            true => Found::Right(size),
            false => Found::Wrong(size, format!("its {size} bytes have the digest {found}")),
        })
    }

    /// Moves wrong content aside, and gets it from elsewhere if that is possible.
    async fn put_right(
        &self,
        digest: &Digest,
        found: String,
        stored: SystemTime,
    ) -> anyhow::Result<ScrubFinding> {
        let (marked, run) = (Marked::Digest(digest.clone()), hex::encode(rand::random::<[u8; 8]>()));
        self.storage.put_marker(&marked, &run).await?;
        // Someone may have put it right while it was read.
        let moved = match self.storage.content_stored(digest).await {
            Ok(now) if now == Some(stored) => self.storage.quarantine(digest).await.map(Some),
            Ok(_) => Ok(None),
            Err(error) => Err(error),
        };
        if moved.is_ok() {
            self.storage.remove_marker(&marked, &run).await?;
        }
        let Some(moved_to) = moved? else {
            return Ok(ScrubFinding::new(digest, found, Vec::new(), None, ScrubOutcome::Replaced));
        };
        let links = self.storage.links_of(digest).await?;
        let repositories: Vec<String> = links.into_iter().map(|link| link.repository).collect();
        let mut outcome = match repositories.is_empty() {
            true => ScrubOutcome::Unneeded,
            false => ScrubOutcome::Missing,
        };
        if let Some(repair) = &self.repair {
            for repository in &repositories {
                if repair(repository.clone(), digest.clone()).await {
                    outcome = ScrubOutcome::Repaired;
                    break;
                }
            }
        }
        Ok(ScrubFinding::new(digest, found, repositories, Some(moved_to), outcome))
    }
}

/// Holds reading to a rate.
struct Pace {
    bytes_a_second: u64,
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn new(bytes_a_second: u64) -> Pace {
        Pace { bytes_a_second, since: Instant::now(), bytes: 0 }
    }

    async fn wait(&mut self, bytes: u64) {
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / self.bytes_a_second as f64);
        tokio::time::sleep_until(self.since + due).await;
        // What wasn't used is not saved up.
        if self.since.elapsed() > due + Duration::from_secs(1) {
            (self.since, self.bytes) = (Instant::now(), 0);
        }
    }
}

fn moment(time: SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH)
}
