//! The filter in front of INSTANCES, see [`common::filter_bit`].
//!
//! A bit too many costs a lookup, one too few would send an instance's packets to the fabric: bits come before entries, and
//! go after them.

use anyplace_ebpf_common as common;
use aya::{
    Ebpf,
    maps::{Array, MapData},
};

use crate::{
    Error,
    maps::{INSTANCE_FILTER, typed},
};

/// One bit or more for each instance of the machine.
pub(crate) struct InstanceFilter(Array<MapData, u64>);

impl InstanceFilter {
    /// Takes the map out of a loaded object and fills it: a router that knows no filter may have changed the instances.
    pub(crate) fn take(object: &mut Ebpf, instances: &[u32]) -> Result<Self, Error> {
        let mut filter = Self(typed(object, &INSTANCE_FILTER)?);
        let mut words = vec![0; common::FILTER_WORDS as usize];
        for (word, bit) in instances.iter().map(|address| common::filter_bit(*address)) {
            if let Some(place) = words.get_mut(word as usize) {
                *place |= bit;
            }
        }
        for (word, bits) in (0..).zip(words) {
            filter.set(word, bits)?;
        }
        Ok(filter)
    }

    /// To be called before an instance gets its entry.
    pub(crate) fn add(&mut self, address: u32) -> Result<(), Error> {
        let (word, bit) = common::filter_bit(address);
        let bits = self.0.get(&word, 0);
        let bits = bits.map_err(|source| INSTANCE_FILTER.error("bpf_map_lookup_elem", source))?;
        self.set(word, bits | bit)
    }

    /// To be called when an instance's entry is gone, with those that are left.
    pub(crate) fn remove(&mut self, address: u32, left: impl Iterator<Item = u32>) -> Result<(), Error> {
        let (word, _) = common::filter_bit(address);
        let left = left.map(common::filter_bit).filter(|(other, _)| *other == word);
        self.set(word, left.fold(0, |bits, (_, bit)| bits | bit))
    }

    fn set(&mut self, word: u32, bits: u64) -> Result<(), Error> {
        let result = self.0.set(word, bits, 0);
        result.map_err(|source| INSTANCE_FILTER.error("bpf_map_update_elem", source))
    }
}
