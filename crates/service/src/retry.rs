//! Growing pauses between tries.

use std::time::Duration;

/// Pauses that double from the first to the last, spread by up to a quarter so that many clients of one server
/// don't come back in step.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    last: Duration,
    next: Duration,
}

impl Backoff {
    /// Pauses from `first` up to `last`.
    pub const fn new(first: Duration, last: Duration) -> Self {
        Self { first, last, next: first }
    }

    /// The next pause.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (self.next * 2).min(self.last);
        pause.mul_f64(1.0 - 0.25 * rand::random::<f64>())
    }

    /// After a success: start again from the first pause.
    pub const fn reset(&mut self) {
        self.next = self.first;
    }
}
