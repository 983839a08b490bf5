//! Random numbers from a seed that is printed, and set again with `ANYPLACE_SEED`.

/// splitmix64: the same numbers for a seed, whatever version of whatever crate.
pub(crate) struct Seed(u64);

impl Seed {
    /// The seed of `ANYPLACE_SEED`, else of the clock.
    pub(crate) fn from_env() -> Self {
        let seed = match std::env::var("ANYPLACE_SEED") {
            Ok(seed) => seed.parse().expect("ANYPLACE_SEED is a number"),
            Err(_) => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                now.expect("the clock is after 1970").as_nanos() as u64
            }
        };
        eprintln!("replay with ANYPLACE_SEED={seed}");
        Self(seed)
    }

    /// Another, independent stream of numbers.
    #[allow(dead_code, reason = "not every test binary forks")]
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    #[allow(dead_code, reason = "not every test binary chooses")]
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
