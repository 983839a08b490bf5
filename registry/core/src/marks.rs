//! A set of what was seen in use, that never takes more than a fixed amount of memory.
//!
//! Up to [`EXACT_MAX`] entries it is exact. Beyond, it becomes a Bloom filter of [`FILTER_BYTES`]: what was put in is
//! always found, and a small share of what was not is found too. For a collector that is the harmless side: such
//! garbage is spared, and the next run, which has another seed, spares other garbage. With 10 million entries
//! about 1 in 10^9 is spared, with 100 million about 1 in 15.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// Most entries that are kept one by one; about 9 MiB.
pub const EXACT_MAX: usize = 1 << 18;
/// Bytes of the filter beyond that.
pub const FILTER_BYTES: usize = 64 << 20;
/// Bits that each entry sets.
const PROBES: u64 = 6;

/// The set.
#[derive(Debug)]
pub struct Marks {
    seed: u64,
    seen: Seen,
}

#[derive(Debug)]
enum Seen {
    Exact(HashSet<u128>),
    Filter(Vec<u64>),
}

impl Marks {
    /// An empty set. The seed, which is different for each run, decides what a full filter confuses.
    pub fn new(seed: u64) -> Marks {
        Marks { seed, seen: Seen::Exact(HashSet::new()) }
    }

    /// Puts an entry in; it is made of several words, in order.
    pub fn insert(&mut self, words: &[&str]) {
        let entry = self.fingerprint(words);
        match &mut self.seen {
            Seen::Exact(set) => {
                set.insert(entry);
                if set.len() > EXACT_MAX {
                    let mut filter = vec![0; FILTER_BYTES / 8];
                    set.iter().for_each(|&entry| set_bits(&mut filter, entry));
                    self.seen = Seen::Filter(filter);
                }
            }
            Seen::Filter(filter) => set_bits(filter, entry),
        }
    }

    /// Whether it was put in; never no where it was.
    pub fn contains(&self, words: &[&str]) -> bool {
        let entry = self.fingerprint(words);
        match &self.seen {
            Seen::Exact(set) => set.contains(&entry),
            Seen::Filter(filter) => {
                bits(entry, filter.len()).all(|(word, mask)| filter.get(word).is_some_and(|w| w & mask != 0))
            }
        }
    }

    fn fingerprint(&self, words: &[&str]) -> u128 {
        let half = |which: u8| {
            let mut hasher = DefaultHasher::new();
            (self.seed, which, words).hash(&mut hasher);
            u128::from(hasher.finish())
        };
        half(0) << 64 | half(1)
    }
}

fn set_bits(filter: &mut [u64], entry: u128) {
    for (word, mask) in bits(entry, filter.len()) {
        if let Some(word) = filter.get_mut(word) {
            *word |= mask;
        }
    }
}

fn bits(entry: u128, words: usize) -> impl Iterator<Item = (usize, u64)> {
    let (first, step) = ((entry >> 64) as u64, entry as u64 | 1);
    (0..PROBES).map(move |i| {
        let at = first.wrapping_add(step.wrapping_mul(i));
        // The high bits choose the word, the low ones the bit.
        ((at >> 6) as usize % words.max(1), 1 << (at & 63))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_forgotten_when_the_set_becomes_a_filter() {
        let mut marks = Marks::new(7);
        let name = |i: usize| i.to_string();
        let count = EXACT_MAX + 10_000;
        for i in 0..count {
            marks.insert(&["a", &name(i)]);
        }
        assert!(matches!(marks.seen, Seen::Filter(_)));
        assert!((0..count).all(|i| marks.contains(&["a", &name(i)])));
        let confused = (count..2 * count).filter(|&i| marks.contains(&["a", &name(i)])).count();
        assert!(confused < 10, "{confused}");
    }

    #[test]
    fn words_are_told_apart() {
        let mut marks = Marks::new(7);
        marks.insert(&["ab", "c"]);
        assert!(marks.contains(&["ab", "c"]));
        assert!(!marks.contains(&["a", "bc"]) && !marks.contains(&["abc"]));
    }
}
