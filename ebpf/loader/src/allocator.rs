//! Which slots of the arena are free. Pure: time comes in as an argument.
//!
//! A range that a table left may still be read by a program that started before the switch, so it rests before it is
//! given out again.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use anyplace_ebpf_common::Range;

/// How long a range rests. A program runs for microseconds; a tenth of a second covers a receive thread that the
/// scheduler took off its CPU in the middle.
pub(crate) const REST: Duration = Duration::from_millis(100);

/// First-fit allocator of ranges.
#[derive(Debug)]
pub(crate) struct Allocator {
    capacity: u32,
    /// Offset to length; neighbours are merged.
    free: BTreeMap<u32, u32>,
    /// Oldest first. Its length is bounded by the number of slots.
    resting: VecDeque<(Instant, Range)>,
}

impl Allocator {
    /// All slots but those in `used`.
    pub(crate) fn new(capacity: u32, used: impl IntoIterator<Item = Range>) -> Self {
        let mut used: Vec<Range> = used.into_iter().filter(|range| range.len > 0).collect();
        used.sort_by_key(|range| range.offset);
        let mut free = BTreeMap::new();
        let mut next = 0u32;
        for range in used {
            if range.offset > next {
                free.insert(next, range.offset - next);
            }
            next = next.max(range.offset.saturating_add(range.len));
        }
        if next < capacity {
            free.insert(next, capacity - next);
        }
        Self { capacity, free, resting: VecDeque::new() }
    }

    pub(crate) const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// A free range of `len` slots.
    pub(crate) fn allocate(&mut self, len: u32, now: Instant) -> Option<Range> {
        if len == 0 {
            return Some(Range::default());
        }
        self.wake(now);
        let (&offset, &size) = self.free.iter().find(|(_, size)| **size >= len)?;
        self.free.remove(&offset);
        if size > len {
            self.free.insert(offset + len, size - len);
        }
        Some(Range { offset, len })
    }

    /// Gives a range back, to be used again after [`REST`].
    pub(crate) fn release(&mut self, range: Range, now: Instant) {
        if range.len > 0 {
            self.resting.push_back((now, range));
        }
    }

    /// Gives a range back that no program has seen.
    pub(crate) fn release_unused(&mut self, range: Range) {
        if range.len > 0 {
            self.insert_free(range);
        }
    }

    /// When the range that rests longest is free again.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        self.resting.front().map(|(since, _)| *since + REST)
    }

    fn wake(&mut self, now: Instant) {
        while let Some((since, range)) = self.resting.front().copied() {
            if now.saturating_duration_since(since) < REST {
                return;
            }
            self.resting.pop_front();
            self.insert_free(range);
        }
    }

    fn insert_free(&mut self, range: Range) {
        let Range { mut offset, mut len } = range;
        if let Some((&left, &size)) = self.free.range(..offset).next_back()
            && left + size == offset
        {
            self.free.remove(&left);
            offset = left;
            len += size;
        }
        if let Some(size) = self.free.remove(&(offset + len)) {
            len += size;
        }
        self.free.insert(offset, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift: enough randomness for a test, none in its outcome.
    fn next(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[test]
    fn no_slot_is_given_out_twice_or_lost() {
        // Oracle: one owner for each slot, and when it may be used again.
        let start = Instant::now();
        for seed in 1..=20u64 {
            let mut state = seed * 0x9e37_79b9;
            let mut now = start;
            let mut allocator = Allocator::new(1000, []);
            let mut live: Vec<Range> = Vec::new();
            let mut slots: Vec<(bool, Instant)> = vec![(false, start); 1000];
            for _ in 0..2000 {
                now += Duration::from_millis(next(&mut state) % 20);
                if next(&mut state).is_multiple_of(2) || live.is_empty() {
                    let len = (next(&mut state) % 60) as u32 + 1;
                    if let Some(range) = allocator.allocate(len, now) {
                        assert_eq!(range.len, len, "seed {seed}");
                        for slot in &mut slots[range.offset as usize..(range.offset + len) as usize] {
                            assert!(!slot.0 && now >= slot.1, "seed {seed}: slot given out early");
                            slot.0 = true;
                        }
                        live.push(range);
                    }
                } else {
                    let range = live.swap_remove(next(&mut state) as usize % live.len());
                    allocator.release(range, now);
                    for slot in &mut slots[range.offset as usize..(range.offset + range.len) as usize] {
                        *slot = (false, now + REST);
                    }
                }
            }
            for range in live {
                allocator.release(range, now);
            }
            let all = allocator.allocate(1000, now + REST);
            assert_eq!(all, Some(Range { offset: 0, len: 1000 }), "seed {seed}: slots were lost");
        }
    }

    #[test]
    fn used_ranges_are_left_alone_after_a_restart() {
        let used = [Range { offset: 10, len: 5 }, Range { offset: 0, len: 3 }, Range::default()];
        let mut allocator = Allocator::new(20, used);
        let now = Instant::now();
        assert_eq!(allocator.allocate(7, now), Some(Range { offset: 3, len: 7 }));
        assert_eq!(allocator.allocate(6, now), None);
        assert_eq!(allocator.allocate(5, now), Some(Range { offset: 15, len: 5 }));
    }
}
