//! When and how often requests are repeated.
//!
//! Repeated are requests that got no answer, and those that a registry answered with 429, 500, 502, 503 or 504:
//! what may be otherwise a moment later. Any other answer is final. Waits grow by doubling and are spread, so that
//! many clients of a registry that comes back don't all ask at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::RngExt as _;
use reqwest::header::{HeaderMap, RETRY_AFTER};

use crate::error::Error;

/// The first wait; the n-th is this times 2^n.
const WAIT_FIRST: Duration = Duration::from_millis(100);
/// The longest wait of our own: long enough not to press a registry that is down.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// The longest wait that a registry may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// How often a request is repeated before its failure is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Patience {
    /// Most repetitions of one request.
    pub retries: u32,
}

impl Patience {
    /// For services that can use a copy of their own, or are asked again anyway: about 1.5 s.
    pub const SHORT: Patience = Patience { retries: 4 };
    /// For what nobody wants to start again for a short break of the network, or a restart: a person's command. About 30 s.
    pub const LONG: Patience = Patience { retries: 9 };
    /// Every failure is reported at once.
    pub const NONE: Patience = Patience { retries: 0 };

    pub(super) fn backoff(self) -> Backoff {
        Backoff { patience: self, made: 0 }
    }
}

/// What a client met, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// Requests that were answered, however.
    pub answered: u64,
    /// Requests that were repeated.
    pub retries: u64,
    /// Requests that failed although they were repeated as often as allowed.
    pub gave_up: u64,
    /// Downloads and uploads that went on in the middle after a break.
    pub resumed: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) answered: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) gave_up: AtomicU64,
    pub(super) resumed: AtomicU64,
}

impl Counters {
    pub(super) fn snapshot(&self) -> ClientStats {
        ClientStats {
            answered: self.answered.load(Ordering::Relaxed),
            retries: self.retries.load(Ordering::Relaxed),
            gave_up: self.gave_up.load(Ordering::Relaxed),
            resumed: self.resumed.load(Ordering::Relaxed),
        }
    }
}

/// The waits of one request.
#[derive(Debug)]
pub(super) struct Backoff {
    patience: Patience,
    made: u32,
}

impl Backoff {
    /// How long to wait before the next repetition; none when there were enough.
    pub(super) fn next(&mut self, asked: Option<Duration>) -> Option<Duration> {
        if self.made >= self.patience.retries {
            return None;
        }
        let longest = WAIT_FIRST.saturating_mul(1 << self.made.min(16)).min(WAIT_MAX);
        self.made += 1;
        let own = longest.mul_f64(rand::rng().random_range(0.5..1.0));
        Some(own.max(asked.unwrap_or_default().min(RETRY_AFTER_MAX)))
    }

    /// Something was achieved, so that the next failure is a first one.
    pub(super) fn reset(&mut self) {
        self.made = 0;
    }
}

/// Whether a repetition may succeed where this answer was given.
pub(super) fn is_passing(status: u16) -> bool {
    matches!(status, 429 | 500 | 502 | 503 | 504)
}

/// How long the registry asks to wait, in seconds; a date would need clocks that agree, so it is not taken.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

impl Error {
    /// Whether the same request may succeed a moment later.
    pub fn is_passing(&self) -> bool {
        match self {
            Error::RegistryUnreachable { source, .. } => !source.is_builder() && !source.is_redirect(),
            Error::Registry { status, .. } => is_passing(*status),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end() {
        let mut backoff = Patience { retries: 12 }.backoff();
        let mut waits = Vec::new();
        while let Some(wait) = backoff.next(None) {
            waits.push(wait);
        }
        assert_eq!(waits.len(), 12);
        for (n, wait) in waits.iter().enumerate() {
            let longest = WAIT_FIRST.saturating_mul(1 << n).min(WAIT_MAX);
            assert!(*wait >= longest / 2 && *wait <= longest, "{n}: {wait:?}");
        }
        backoff.reset();
        assert_eq!(backoff.next(Some(Duration::from_secs(7))), Some(Duration::from_secs(7)));
        assert_eq!(backoff.next(Some(Duration::from_secs(86_400))), Some(RETRY_AFTER_MAX));
    }
}
