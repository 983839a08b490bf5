//! Randomness of the tests: a seed that is printed, and replayed with `ANYPLACE_SEED`.

use std::time::{SystemTime, UNIX_EPOCH};

/// Xorshift64*: enough for choosing test cases.
pub(crate) struct Random(u64);

impl Random {
    /// From `ANYPLACE_SEED`, else from the clock; printed, so that a failure can be replayed.
    pub(crate) fn from_env() -> Self {
        let seed = std::env::var("ANYPLACE_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = seed.unwrap_or_else(clock);
        println!("ANYPLACE_SEED={seed}");
        Self::new(seed)
    }

    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }
}
