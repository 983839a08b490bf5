//! Keeps prewarming out of the way of live pulls.
//!
//! While a live pull runs, prewarming together may take a 19th of the rate that live pulls were measured at, which is
//! a 20th of the whole; and at all times no more than the configured rate. Bytes are paid for as they arrive: who has
//! to wait stops reading, and TCP slows the registry down.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::objects::lock;

/// Live bytes for each byte of prewarming. Live pulls may lose a tenth of their rate; a pull that the link bounds loses all of
/// prewarming's part of it, and some more for what was on its way when it began.
const SHARE: f64 = 19.0;
/// So that prewarming never stands still: a live pull may itself wait for a dead registry.
const LEAST_BYTES_PER_S: f64 = 64.0 * 1024.0;
/// How fast a measured rate follows.
const WINDOW: Duration = Duration::from_millis(250);
/// Longest pause before looking again: a live pull that ends must not be waited for.
const PAUSE_MAX: Duration = Duration::from_millis(50);

pub(super) struct Governor {
    /// Bytes a second of all prewarming together.
    cap: Option<u64>,
    live: AtomicU32,
    state: Mutex<State>,
}

struct State {
    /// Bytes of live pulls since `since`.
    bytes: u64,
    since: Instant,
    /// Bytes a second.
    live_rate: f64,
    /// Bytes that prewarming may take now; negative where it took more.
    tokens: f64,
    filled: Instant,
}

/// Counts a live pull while it runs.
pub(super) struct Live<'a>(&'a Governor);

impl Drop for Live<'_> {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Governor {
    pub(super) fn new(cap: Option<u64>) -> Governor {
        let now = Instant::now();
        let state = State { bytes: 0, since: now, live_rate: 0.0, tokens: 0.0, filled: now };
        Governor { cap: cap.filter(|cap| *cap > 0), live: AtomicU32::new(0), state: Mutex::new(state) }
    }

    pub(super) fn live(&self) -> Live<'_> {
        self.live.fetch_add(1, Ordering::Relaxed);
        Live(self)
    }

    /// Counts bytes of a live pull.
    pub(super) fn count(&self, bytes: u64) {
        let mut state = lock(&self.state);
        state.bytes += bytes;
        state.measure(Instant::now());
    }

    /// Waits until prewarming may take `bytes`, or until `urgent`: something live waits for it now.
    pub(super) async fn pace(&self, bytes: u64, urgent: impl Fn() -> bool) {
        let mut owed = bytes as f64;
        loop {
            if urgent() {
                return self.count(bytes);
            }
            let Some(pause) = self.take(&mut owed, Instant::now()) else { return };
            tokio::time::sleep(pause).await;
        }
    }

    /// How long to wait; none where nothing is owed any more.
    fn take(&self, owed: &mut f64, now: Instant) -> Option<Duration> {
        let mut state = lock(&self.state);
        state.measure(now);
        let busy = self.live.load(Ordering::Relaxed) > 0;
        let share = busy.then(|| (state.live_rate / SHARE).max(LEAST_BYTES_PER_S));
        let cap = self.cap.map(|cap| cap as f64);
        let rate = match (share, cap) {
            (Some(share), Some(cap)) => share.min(cap),
            (Some(rate), None) | (None, Some(rate)) => rate,
            (None, None) => {
                (state.tokens, state.filled) = (0.0, now);
                return None;
            }
        };
        // What was unused for longer than a window is lost, so that there is no burst after a pause.
        let gained = rate * now.saturating_duration_since(state.filled).as_secs_f64();
        state.tokens = (state.tokens + gained).min(rate * WINDOW.as_secs_f64());
        state.filled = now;
        state.tokens -= std::mem::take(owed);
        (state.tokens < 0.0).then(|| Duration::from_secs_f64(-state.tokens / rate).min(PAUSE_MAX))
    }
}

impl State {
    fn measure(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        if passed >= WINDOW {
            let rate = self.bytes as f64 / passed.as_secs_f64();
            self.live_rate = (self.live_rate + rate) / 2.0;
            (self.bytes, self.since) = (0, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes a second that prewarming gets through, in four seconds of made-up time.
    fn through(governor: &Governor, run: u64, live_bytes_per_ms: u64) -> f64 {
        const CHUNK: f64 = 16_384.0;
        let begin = Instant::now() + Duration::from_secs(100 * run);
        let (mut done, mut owed) = (0.0, CHUNK);
        for ms in 0..4_000 {
            let now = begin + Duration::from_millis(ms);
            lock(&governor.state).bytes += live_bytes_per_ms;
            for _ in 0..64 {
                if governor.take(&mut owed, now).is_some() {
                    break;
                }
                done += CHUNK;
                owed = CHUNK;
            }
        }
        done / 4.0
    }

    #[test]
    fn prewarming_takes_a_twentieth_beside_live_pulls() {
        let governor = Governor::new(None);
        assert!(through(&governor, 0, 0) > 1e9, "alone it is free");
        let _live = governor.live();
        let rate = through(&governor, 1, 100_000);
        assert!((4e6..=5.6e6).contains(&rate), "{rate} beside 100 MB/s");
    }

    #[test]
    fn the_configured_rate_always_holds() {
        let governor = Governor::new(Some(1_000_000));
        let rate = through(&governor, 0, 0);
        assert!((0.9e6..=1.3e6).contains(&rate), "{rate}");
        let _live = governor.live();
        let rate = through(&governor, 1, 100_000);
        assert!((0.9e6..=1.3e6).contains(&rate), "{rate}");
    }
}
