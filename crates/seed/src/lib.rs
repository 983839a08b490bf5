//! For tests: random numbers from a seed that is printed, and set again with `ANYPLACE_SEED`; how long campaigns are; and
//! changes of inputs.
//!
//! No crate that ships may depend on this one.

mod mutate;

pub use mutate::{corpus, corpus_lines, correct_checksums, mutate};

/// The variable that replays a run.
const VARIABLE: &str = "ANYPLACE_SEED";

/// The variable that makes campaigns whole.
const CAMPAIGN: &str = "ANYPLACE_CAMPAIGN";

/// How often a campaign does what it does: `usual` in every run of the tests, `whole` where `ANYPLACE_CAMPAIGN` is set, and
/// as often as that says where it is a number above 1.
pub fn rounds(usual: usize, whole: usize) -> usize {
    match std::env::var(CAMPAIGN) {
        Ok(text) => text.parse().ok().filter(|rounds| *rounds > 1).unwrap_or(whole),
        Err(_) => usual,
    }
}

/// splitmix64 (Steele, Lea and Flood, OOPSLA 2014): the same numbers for a seed, whatever version of whatever crate.
#[derive(Clone, Debug)]
pub struct Seed(u64);

impl Seed {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed of `ANYPLACE_SEED`, else of the clock; printed, so that a failure can be replayed.
    ///
    /// # Panics
    /// `ANYPLACE_SEED` is not a number.
    pub fn from_env() -> Self {
        let seed = match std::env::var(VARIABLE) {
            Ok(text) => {
                text.parse().unwrap_or_else(|_| panic!("{VARIABLE}: expected a number, not `{text}`"))
            }
            // Before 1970 any seed will do.
            Err(_) => std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64),
        };
        eprintln!("replay with {VARIABLE}={seed}");
        Self(seed)
    }

    /// Another, independent stream of numbers.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self(self.next())
    }

    /// Any number.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// An index below `bound`, which is not zero.
    pub fn index(&mut self, bound: usize) -> usize {
        self.below(bound as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of the items, of which there is at least one.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.index(items.len())]
    }

    /// Bytes that don't compress.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_splitmix64s() {
        let mut seed = Seed::new(1_234_567);
        let numbers: Vec<u64> = (0..3).map(|_| seed.next()).collect();
        // As the reference implementation gives them (prng.di.unimi.it/splitmix64.c).
        assert_eq!(
            numbers,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
        assert!((0..1_000).all(|_| seed.below(7) < 7 && seed.index(3) < 3));
        assert_eq!(seed.bytes(5).len(), 5);
    }
}
