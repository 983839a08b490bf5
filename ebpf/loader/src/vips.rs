//! VIPs and their tables.
//!
//! Tables that are equal are stored once for all ports of a VIP, and once for its two kinds; a table that a VIP has
//! already isn't written again.

use std::{collections::BTreeSet, net::IpAddr};

use anyplace_ebpf_common::{self as common, Range, VipValue};

use crate::{
    DataPlane, Error,
    maps::{Table, VipEntries},
    types::{Bucket, MapKey, VipKey, VipTable},
};

/// Entries of one batch: bounds the memory of a call, and how long the kernel is in it (some milliseconds).
const BATCH: usize = 4_096;

/// An entry that is prepared, and not yet seen by any program.
struct Staged {
    key: VipKey,
    value: VipValue,
    old: Option<VipValue>,
    /// A range of its own, written for this entry; otherwise it shares one.
    fresh: Option<Range>,
    /// The address becomes a VIP by this entry.
    first: bool,
}

impl DataPlane {
    /// Gives a VIP port its tables, or new ones. Programs see all of the old tables or all of the new ones.
    pub fn set_vip(&mut self, key: VipKey, table: &VipTable) -> Result<(), Error> {
        match self.set_vips([(key, table)]).pop() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// Does what [`DataPlane::set_vip`] does for many ports, with one system call for thousands of them. Returns those
    /// that failed.
    pub fn set_vips<'a>(
        &mut self,
        vips: impl IntoIterator<Item = (VipKey, &'a VipTable)>,
    ) -> Vec<(VipKey, Error)> {
        let mut failed = Vec::new();
        let mut staged: Vec<Staged> = Vec::new();
        let mut keys = BTreeSet::new();
        for (key, table) in vips {
            if staged.len() >= BATCH || !keys.insert(key) {
                self.publish(std::mem::take(&mut staged), &mut failed);
                keys = BTreeSet::from([key]);
            }
            match self.stage(key, table, &staged) {
                Ok(Some(entry)) => staged.push(entry),
                Ok(None) => {}
                Err(error) => failed.push((key, error)),
            }
        }
        self.publish(staged, &mut failed);
        failed
    }

    /// Takes a VIP port away; one that isn't set is fine.
    pub fn remove_vip(&mut self, key: VipKey) -> Result<(), Error> {
        let Some(value) = self.vips.get(&key).copied() else { return Ok(()) };
        remove(&mut self.maps.vips, common::VipKey::of(key))?;
        remove(&mut self.maps.vips6, common::VipKey6::of(key))?;
        self.vips.remove(&key);
        self.vip_counters.release(value.counter);
        self.release(key, &value);
        if self.ports(key.address).next().is_none() {
            self.set_marker(key.address, false)?;
        }
        Ok(())
    }

    /// The VIP ports that are set, in order; after a restart, those of the process before.
    pub fn vips(&self) -> Vec<VipKey> {
        self.vips.keys().copied().collect()
    }

    /// The ports that are set of the same address as `key`.
    pub fn ports_of(&self, key: VipKey) -> Vec<VipKey> {
        self.ports(key.address).map(|(key, _)| *key).collect()
    }

    /// A VIP's tables, as the programs see them.
    pub fn vip_table(&self, key: VipKey) -> Option<VipTable> {
        let value = self.vip_value(key)?;
        let read = |range| self.maps.arena.read(range).into_iter().map(Bucket::from_map).collect();
        Some(VipTable { buckets: read(value.full), local: read(value.local) })
    }

    pub(crate) fn vip_value(&self, key: VipKey) -> Option<VipValue> {
        self.vips.get(&key).copied()
    }

    /// Adopts what an earlier process left: its ports, and a marker for each address, also where that process was
    /// killed between the two.
    pub(crate) fn adopt_vips(&mut self, entries: VipEntries) -> Result<(), Error> {
        let mut marked = BTreeSet::new();
        for (address, port, value) in entries {
            match port {
                Some(key) => drop(self.vips.insert(key, value)),
                None => drop(marked.insert(address)),
            }
        }
        let wanted: BTreeSet<IpAddr> = self.vips.keys().map(|key| key.address).collect();
        for address in wanted.symmetric_difference(&marked) {
            self.set_marker(*address, wanted.contains(address))?;
        }
        Ok(())
    }

    /// Makes an address a VIP, or no VIP any more.
    fn set_marker(&mut self, address: IpAddr, is_vip: bool) -> Result<(), Error> {
        let (marker, marker6) = (common::VipKey::marker_of(address), common::VipKey6::marker_of(address));
        if is_vip {
            marker.map_or(Ok(()), |key| self.maps.vips.set(key, MARKER))?;
            return marker6.map_or(Ok(()), |key| self.maps.vips6.set(key, MARKER));
        }
        remove(&mut self.maps.vips, marker)?;
        remove(&mut self.maps.vips6, marker6)
    }

    /// Writes a table beside those in use; `None` where the port has it already.
    fn stage(&mut self, key: VipKey, table: &VipTable, staged: &[Staged]) -> Result<Option<Staged>, Error> {
        if key.port == 0 {
            return Err(Error::ReservedKey(key));
        }
        let map = |buckets: &[Bucket]| buckets.iter().map(|bucket| bucket.to_map()).collect::<Vec<_>>();
        let (full, local) = (map(&table.buckets), map(&table.local));
        let arena = &self.maps.arena;
        let same = |value: &VipValue| arena.holds(value.full, &full) && arena.holds(value.local, &local);
        let old = self.vips.get(&key).copied();
        if old.is_some_and(|old| same(&old)) {
            return Ok(None);
        }
        let beside = staged.iter().rev().take_while(|entry| entry.key.address == key.address);
        let mut first = beside.clone().next().is_none();
        let mut equal = beside.map(|entry| entry.value).find(&same);
        for (_, value) in self.ports(key.address) {
            first = false;
            equal = equal.or_else(|| Some(*value).filter(&same));
        }
        let (ranges, fresh) = match equal {
            Some(value) => ((value.full, value.local), None),
            None => {
                let ranges = self.write(&full, &local)?;
                (ranges, Some(whole(ranges.0, ranges.1)))
            }
        };
        let counter = match old {
            Some(old) => Ok(old.counter),
            None => self.new_counter(),
        };
        let counter = match counter {
            Ok(counter) => counter,
            Err(error) => {
                fresh.into_iter().for_each(|range| self.maps.arena.release_unused(range));
                return Err(error);
            }
        };
        let generation = old.map_or(0, |old| old.generation).wrapping_add(1);
        let value = VipValue { full: ranges.0, local: ranges.1, generation, counter };
        Ok(Some(Staged { key, value, old, fresh, first }))
    }

    /// Puts tables into free ranges; equal ones into the same.
    fn write(&mut self, full: &[common::Bucket], local: &[common::Bucket]) -> Result<(Range, Range), Error> {
        let own = if full == local { &[] } else { local };
        let range = self.maps.arena.allocate(full.len() as u64 + own.len() as u64)?;
        let full_range = Range { offset: range.offset, len: full.len() as u32 };
        let own_range = Range { offset: range.offset + full_range.len, len: own.len() as u32 };
        self.maps.arena.write(full_range.offset, full);
        self.maps.arena.write(own_range.offset, own);
        Ok((full_range, if full == local { full_range } else { own_range }))
    }

    /// Makes staged entries the programs' own, as far as the kernel takes them.
    fn publish(&mut self, staged: Vec<Staged>, failed: &mut Vec<(VipKey, Error)>) {
        let (staged, staged6): (Vec<_>, Vec<_>) =
            staged.into_iter().partition(|entry| entry.key.address.is_ipv4());
        let result = write(&mut self.maps.vips, &staged);
        self.published(staged, result, failed);
        let result = write(&mut self.maps.vips6, &staged6);
        self.published(staged6, result, failed);
    }

    /// Keeps in mind what was written, and gives back what others don't use any more.
    fn published(
        &mut self,
        staged: Vec<Staged>,
        (mut written, mut error): (usize, Option<Error>),
        failed: &mut Vec<(VipKey, Error)>,
    ) {
        let mut left = Vec::new();
        for entry in staged {
            let needs = 1 + usize::from(entry.first);
            if written >= needs {
                written -= needs;
                self.vips.insert(entry.key, entry.value);
                left.extend(entry.old.map(|old| (entry.key, old)));
                continue;
            }
            // The first that failed has the reason; those behind it weren't tried.
            written = 0;
            entry.fresh.into_iter().for_each(|range| self.maps.arena.release_unused(range));
            if entry.old.is_none() {
                self.vip_counters.release(entry.value.counter);
            }
            if entry.first && self.ports(entry.key.address).next().is_none() {
                // Should this fail too, the next start removes the marker.
                let _ = self.set_marker(entry.key.address, false);
            }
            failed.push((entry.key, error.take().unwrap_or(Error::NotTried)));
        }
        left.sort_by_key(|(key, value)| (key.address, value.full.offset, value.local.offset));
        left.dedup_by_key(|(key, value)| (key.address, value.full, value.local));
        for (key, value) in left {
            self.release(key, &value);
        }
    }

    /// Gives the ranges of a former value back, unless another port of the VIP uses them.
    fn release(&mut self, key: VipKey, old: &VipValue) {
        let used =
            self.ports(key.address).any(|(_, value)| (value.full, value.local) == (old.full, old.local));
        if !used {
            self.maps.arena.release(whole(old.full, old.local));
        }
    }

    /// All ports of an address.
    fn ports(&self, address: IpAddr) -> impl Iterator<Item = (&VipKey, &VipValue)> {
        self.vips.range(VipKey::first(address)..).take_while(move |(other, _)| other.address == address)
    }

    fn new_counter(&mut self) -> Result<u32, Error> {
        let (index, clean) = self.vip_counters.take()?;
        if !clean {
            self.clear_vip_counters(index)?;
        }
        Ok(index)
    }
}

/// Writes entries of one family with their markers: how many of all these were written, and what went wrong then.
fn write<K: MapKey>(map: &mut Table<K, VipValue>, staged: &[Staged]) -> (usize, Option<Error>) {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for entry in staged {
        if let Some(marker) = K::marker_of(entry.key.address).filter(|_| entry.first) {
            keys.push(marker);
            values.push(MARKER);
        }
        if let Some(key) = K::of(entry.key) {
            keys.push(key);
            values.push(entry.value);
        }
    }
    match map.set_all(&keys, &values) {
        Ok(()) => (keys.len(), None),
        Err((written, error)) => (written, Some(error)),
    }
}

fn remove<K: MapKey>(map: &mut Table<K, VipValue>, key: Option<K>) -> Result<(), Error> {
    key.map_or(Ok(()), |key| map.remove(key))
}

/// The value of an address marker.
const MARKER: VipValue = VipValue {
    full: Range { offset: 0, len: 0 },
    local: Range { offset: 0, len: 0 },
    generation: 0,
    counter: u32::MAX,
};

/// The range of both tables of a VIP, which are one and the same or stand side by side.
pub(crate) fn whole(full: Range, local: Range) -> Range {
    match (full.len, local.len) {
        (_, 0) => full,
        (0, _) => local,
        _ => {
            let offset = full.offset.min(local.offset);
            let end = (full.offset + full.len).max(local.offset + local.len);
            Range { offset, len: end - offset }
        }
    }
}
