//! Random numbers from a seed that is printed, and set again with `ANYPLACE_SEED`.
#![allow(dead_code, reason = "not every test binary uses all of it")]

/// splitmix64.
pub(crate) struct Random(u64);

impl Random {
    /// From `ANYPLACE_SEED`, else from the clock.
    pub(crate) fn from_environment() -> Self {
        let seed = match std::env::var("ANYPLACE_SEED") {
            Ok(seed) => seed.parse().expect("ANYPLACE_SEED is a number"),
            Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        };
        eprintln!("replay with ANYPLACE_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below the bound.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}
