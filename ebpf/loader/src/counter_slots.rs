//! Which slots of the counters by VIP, or by instance, are free.

use std::collections::BTreeSet;

use crate::Error;

/// Hands out slots of one map: those that were given back first, then such as nobody had.
#[derive(Debug)]
pub(crate) struct CounterSlots {
    map: &'static str,
    returned: Vec<u32>,
    next: u32,
    limit: u32,
    /// Slots that no process used hold zeroes.
    clean: bool,
}

impl CounterSlots {
    /// Those from `first` to below `limit` but for `used`; `clean` if the map was made just now.
    pub(crate) fn new(
        map: &'static str,
        first: u32,
        limit: u32,
        used: impl Iterator<Item = u32>,
        clean: bool,
    ) -> Self {
        let used: BTreeSet<u32> = used.filter(|index| (first..limit).contains(index)).collect();
        let next = used.last().map_or(first, |last| last + 1);
        let returned = (first..next).filter(|index| !used.contains(index)).collect();
        Self { map, returned, next, limit, clean }
    }

    /// A free slot, and whether it is zero.
    pub(crate) fn take(&mut self) -> Result<(u32, bool), Error> {
        if let Some(index) = self.returned.pop() {
            return Ok((index, false));
        }
        if self.next >= self.limit {
            return Err(Error::Full { map: self.map, limit: self.limit });
        }
        self.next += 1;
        Ok((self.next - 1, self.clean))
    }

    pub(crate) fn release(&mut self, index: u32) {
        if index < self.limit {
            self.returned.push(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_in_use_are_left_alone_and_the_number_is_bounded() {
        let mut slots = CounterSlots::new("VIP_COUNTERS", 0, 4, [2].into_iter(), true);
        let mut taken: Vec<_> = (0..3).map(|_| slots.take().unwrap()).collect();
        taken.sort_unstable();
        assert_eq!(taken, [(0, false), (1, false), (3, true)]);
        assert!(matches!(slots.take(), Err(Error::Full { map: "VIP_COUNTERS", limit: 4 })));
        slots.release(1);
        assert_eq!(slots.take().unwrap(), (1, false));
    }

    #[test]
    fn slots_before_the_first_are_nobodys() {
        let mut slots = CounterSlots::new("INSTANCE_COUNTERS", 1, 3, [0, 0].into_iter(), true);
        assert_eq!(slots.take().unwrap(), (1, true));
        assert_eq!(slots.take().unwrap(), (2, true));
        assert!(slots.take().is_err());
    }
}
