//! Which slots of the per-VIP counters are free.

use std::collections::BTreeSet;

use anyplace_ebpf_common::VipValue;

use crate::{Error, maps::VIP_COUNTERS};

/// Hands out slots: those that were given back first, then such as no VIP had.
#[derive(Debug)]
pub(crate) struct VipCounterSlots {
    returned: Vec<u32>,
    next: u32,
    limit: u32,
    /// Slots that no process used hold zeroes.
    clean: bool,
}

impl VipCounterSlots {
    /// All but those of `used`; `clean` if the map was made just now.
    pub(crate) fn new<'a>(limit: u32, used: impl Iterator<Item = &'a VipValue>, clean: bool) -> Self {
        let used: BTreeSet<u32> = used.map(|value| value.counter).filter(|index| *index < limit).collect();
        let next = used.last().map_or(0, |last| last + 1);
        let returned = (0..next).filter(|index| !used.contains(index)).collect();
        Self { returned, next, limit, clean }
    }

    /// A free slot, and whether it is zero.
    pub(crate) fn take(&mut self) -> Result<(u32, bool), Error> {
        if let Some(index) = self.returned.pop() {
            return Ok((index, false));
        }
        if self.next >= self.limit {
            return Err(Error::Full { map: VIP_COUNTERS.name, limit: self.limit });
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
        let used = [VipValue { counter: 2, ..VipValue::default() }];
        let mut slots = VipCounterSlots::new(4, used.iter(), true);
        let mut taken: Vec<_> = (0..3).map(|_| slots.take().unwrap()).collect();
        taken.sort_unstable();
        assert_eq!(taken, [(0, false), (1, false), (3, true)]);
        assert!(matches!(slots.take(), Err(Error::Full { limit: 4, .. })));
        slots.release(1);
        assert_eq!(slots.take().unwrap(), (1, false));
    }
}
