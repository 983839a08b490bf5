//! VIPs and their tables.

use std::collections::BTreeSet;

use anyplace_ebpf_common::{self as common, Range, VipValue};

use crate::{
    DataPlane, Error,
    maps::whole,
    types::{Bucket, VipKey, VipTable},
};

impl DataPlane {
    /// Gives a VIP port its tables, or new ones. Programs see all of the old tables or all of the new ones.
    pub fn set_vip(&mut self, key: VipKey, table: &VipTable) -> Result<(), Error> {
        let map_key = key.to_map();
        if key.port == 0 {
            return Err(Error::ReservedKey(key));
        }
        let old = self.vips.get(&map_key).copied();
        let range = self.maps.arena.allocate(table.buckets.len() as u64 + table.local.len() as u64)?;
        let full = Range { offset: range.offset, len: table.buckets.len() as u32 };
        let local = Range { offset: range.offset + full.len, len: table.local.len() as u32 };
        let buckets = table.buckets.iter().chain(&table.local).map(|bucket| bucket.to_map());
        self.maps.arena.write(range.offset, buckets);
        let result = self.publish(map_key, old, full, local);
        match (&result, old) {
            (Err(_), _) => self.maps.arena.release_unused(range),
            (Ok(()), Some(old)) => self.maps.arena.release(whole(&old)),
            (Ok(()), None) => {}
        }
        result
    }

    /// Takes a VIP port away; one that isn't set is fine.
    pub fn remove_vip(&mut self, key: VipKey) -> Result<(), Error> {
        let map_key = key.to_map();
        let Some(value) = self.vips.get(&map_key).copied() else { return Ok(()) };
        self.maps.vips.remove(map_key)?;
        self.vips.remove(&map_key);
        self.maps.arena.release(whole(&value));
        let marker = common::VipKey::marker(map_key.address);
        let others = self.vips.keys().any(|other| other.address == map_key.address && *other != marker);
        if !others {
            self.maps.vips.remove(marker)?;
            self.vips.remove(&marker);
        }
        Ok(())
    }

    /// The VIP ports that are set, in order; after a restart, those of the process before.
    pub fn vips(&self) -> Vec<VipKey> {
        let mut keys: Vec<VipKey> = self.vips.keys().filter_map(VipKey::from_map).collect();
        keys.sort();
        keys
    }

    /// A VIP's tables, as the programs see them.
    pub fn vip_table(&self, key: VipKey) -> Option<VipTable> {
        let value = self.vip_value(key)?;
        let read = |range| self.maps.arena.read(range).into_iter().map(Bucket::from_map).collect();
        Some(VipTable { buckets: read(value.full), local: read(value.local) })
    }

    pub(crate) fn vip_value(&self, key: VipKey) -> Option<VipValue> {
        self.vips.get(&key.to_map()).copied()
    }

    /// Makes the tables the VIP's own.
    fn publish(
        &mut self,
        key: common::VipKey,
        old: Option<VipValue>,
        full: Range,
        local: Range,
    ) -> Result<(), Error> {
        let counter = match old {
            Some(old) => old.counter,
            None => {
                let counter = self.free_counter()?;
                self.clear_vip_counters(counter)?;
                counter
            }
        };
        let marker = common::VipKey::marker(key.address);
        if !self.vips.contains_key(&marker) {
            let value = VipValue { counter: u32::MAX, ..VipValue::default() };
            self.maps.vips.set(marker, value)?;
            self.vips.insert(marker, value);
        }
        let generation = old.map_or(0, |old| old.generation).wrapping_add(1);
        let value = VipValue { full, local, generation, counter };
        self.maps.vips.set(key, value)?;
        self.vips.insert(key, value);
        Ok(())
    }

    fn free_counter(&self) -> Result<u32, Error> {
        let used: BTreeSet<u32> = self.vips.values().map(|value| value.counter).collect();
        (0..common::MAX_VIPS)
            .find(|index| !used.contains(index))
            .ok_or(Error::Full { map: "VIP_COUNTERS", limit: common::MAX_VIPS })
    }
}
