//! The store's own time, and ages by it.
//!
//! Ages are differences of times that the store gave, so this machine's clock doesn't matter. But the store's may be set
//! too, and a folder's is this machine's. So each reading is compared with the one before and this process's steady
//! clock, and ages leave out what nobody saw pass (`anyplace_registry_core::clock`, and decision 4).
//!
//! Keys: `gc/clock` is written to read the time, and tells the next process when somebody looked last; `gc/skipped` keeps
//! what ages leave out.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyplace_registry_core::clock::{Step, TOLERANCE_MS, Witnessed};
use bytes::Bytes;
use object_store::path::Path;
use tokio::time::Instant;

use super::{Error, Note, Result, Storage};

/// What a process knows of the store's clock.
#[derive(Default)]
pub(super) struct Clock(Mutex<State>);

#[derive(Default)]
struct State {
    /// What it said, and when that was here.
    last: Option<(SystemTime, Instant)>,
    witnessed: Witnessed,
    /// Whether what ages leave out has still to be written down.
    unkept: bool,
    /// How far this machine's clock is ahead of it, in s, as the log was told.
    told_ahead_s: i64,
}

/// Ages at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Ages {
    now: SystemTime,
    witnessed: Witnessed,
}

impl Ages {
    /// Ages at a moment, by a clock that was never set.
    #[cfg(test)]
    pub(crate) fn at(now: SystemTime) -> Ages {
        Ages { now, witnessed: Witnessed::default() }
    }

    /// The moment, by the store's clock.
    pub(crate) fn now(&self) -> SystemTime {
        self.now
    }

    /// How old what was put then is; none if it was put after the moment.
    pub(crate) fn of(&self, put: SystemTime) -> Option<Duration> {
        // By the milliseconds they may be the same.
        if put > self.now {
            return None;
        }
        self.witnessed.age_ms(ms(put), ms(self.now)).map(Duration::from_millis)
    }

    /// The same for what surely was put before: it may be dated after, if the clock was set back.
    pub(crate) fn of_past(&self, put: SystemTime) -> Duration {
        Duration::from_millis(self.witnessed.age_of_past_ms(ms(put), ms(self.now)))
    }
}

impl Clock {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// About the store's time, without asking: what it was, and what passed here since.
    pub(super) fn about_now(&self) -> SystemTime {
        self.lock().last.map_or_else(SystemTime::now, |(then, read)| then + read.elapsed())
    }
}

impl Storage {
    /// Learns what earlier processes knew of the store's clock, and reads it.
    pub(super) async fn learn_clock(&self) -> Result<()> {
        let before = self.head(&clock_key()).await?.map(|meta| SystemTime::from(meta.last_modified));
        let known = self.note::<Witnessed>(Note::Skipped).await?.map(|(witnessed, _)| witnessed);
        let is_kept = known.is_some() || self.head(&Note::Skipped.key()).await?.is_none();
        {
            let mut state = self.inner.clock.lock();
            state.last = before.map(|before| (before, Instant::now()));
            // Damaged: then only what comes from now on is sure.
            state.witnessed = known.unwrap_or_default();
            if !is_kept && let Some(before) = before {
                state.witnessed = Witnessed::since(ms(before));
            }
        }
        self.now().await.map(drop)
    }

    /// The store's own time: what it says is the time of an object that is written now.
    pub(crate) async fn now(&self) -> Result<SystemTime> {
        Ok(self.ages().await?.now)
    }

    /// Ages when the store's time was read last.
    pub(crate) fn ages_as_read(&self) -> Ages {
        let state = self.inner.clock.lock();
        let now = state.last.map_or(SystemTime::UNIX_EPOCH, |(last, _)| last);
        Ages { now, witnessed: state.witnessed.clone() }
    }

    /// Ages now.
    pub(crate) async fn ages(&self) -> Result<Ages> {
        let (key, asked) = (clock_key(), Instant::now());
        self.put_reserved(&key, Bytes::new()).await?;
        let meta =
            self.head(&key).await?.ok_or_else(|| Error::damaged(&key, "gone right after it was written"))?;
        let now = SystemTime::from(meta.last_modified);
        let (step, ages, unkept) = {
            let mut state = self.inner.clock.lock();
            let (step, ages) = state.see(now, asked);
            state.unkept |= step != Step::Steady;
            (step, ages, state.unkept)
        };
        tell(step, &self.inner.name);
        if unkept {
            match self.put_note(Note::Skipped, &ages.witnessed).await {
                // Another step may have come meanwhile.
                Ok(()) => {
                    let mut state = self.inner.clock.lock();
                    state.unkept = state.witnessed != ages.witnessed;
                }
                Err(error) => {
                    tracing::warn!(%error, "what ages leave out can't be kept; this process knows it, and tries again");
                }
            }
        }
        Ok(ages)
    }
}

impl State {
    fn see(&mut self, now: SystemTime, asked: Instant) -> (Step, Ages) {
        let step = match self.last {
            None => Step::Steady,
            Some((last, read)) => {
                // At least so long: both answers took some time too.
                let passed = asked.saturating_duration_since(read).as_millis() as u64;
                self.witnessed.see(ms(last), passed, ms(now))
            }
        };
        self.last = Some((now, Instant::now()));
        self.compare(now);
        (step, Ages { now, witnessed: self.witnessed.clone() })
    }

    /// Tells the log when this machine's clock and the store's begin to differ.
    fn compare(&mut self, now: SystemTime) {
        let here = SystemTime::now();
        let s = |later: SystemTime, earlier: SystemTime| {
            later.duration_since(earlier).map_or(0, |by| i64::try_from(by.as_secs()).unwrap_or(i64::MAX))
        };
        let ahead_s = s(here, now) - s(now, here);
        let tolerance_s = (TOLERANCE_MS / 1_000) as i64;
        if (ahead_s - self.told_ahead_s).abs() <= tolerance_s {
            return;
        }
        self.told_ahead_s = ahead_s;
        if ahead_s.abs() > tolerance_s {
            tracing::warn!(
                ahead_s,
                "this machine's clock and the store's differ: tokens, accounts and the audit record go by this \
                 one, ages by the store's; set the clocks, such as by NTP"
            );
        }
    }
}

fn tell(step: Step, store: &str) {
    match step {
        Step::Steady => {}
        Step::Ahead(ms) => tracing::warn!(
            store,
            ahead_s = ms / 1_000,
            "the store's clock went further than time did, or no registry was running: nothing gets older by that"
        ),
        Step::Back(ms) => tracing::warn!(
            store,
            back_s = ms / 1_000,
            "the store's clock was set back: what is dated later stays young until then"
        ),
    }
}

fn clock_key() -> Path {
    Path::from("gc/clock")
}

fn ms(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
