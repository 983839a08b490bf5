//! Adding up what the programs counted.

use std::{collections::BTreeMap, path::Path};

use anyplace_ebpf_common::{self as common, Counter, VipCounters};
use aya::{
    maps::{MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};

use crate::{
    DataPlane, Error, VipKey,
    maps::{COUNTERS, Plain, Table, VIP_COUNTERS, VIPS, VIPS6, by_vip, open},
};

/// The global counters, summed over all CPUs. They only grow, also across restarts of the router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals([u64; Counter::ALL.len()]);

impl Totals {
    /// One of them.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize]
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (Counter, u64)> {
        Counter::ALL.iter().map(|&counter| (counter, self.get(counter)))
    }
}

impl DataPlane {
    /// The machine's counters.
    pub fn counters(&self) -> Result<Totals, Error> {
        totals(&self.maps.counters)
    }

    /// What entered at this machine for one VIP port; `None` if it is not set.
    pub fn vip_counters(&self, key: VipKey) -> Result<Option<VipCounters>, Error> {
        self.vip_value(key).map(|value| vip_total(&self.maps.vip_counters, value.counter)).transpose()
    }

    /// Sets a VIP's counters to zero, before a new VIP gets the slot.
    pub(crate) fn clear_vip_counters(&mut self, index: u32) -> Result<(), Error> {
        let cpus =
            nr_cpus().map_err(|(path, source)| Error::File { call: "read", path: path.into(), source })?;
        let zeroes = vec![Plain(VipCounters::default()); cpus];
        let zeroes = aya::maps::PerCpuValues::try_from(zeroes).map_err(|source| Error::File {
            call: "read",
            path: "/sys/devices/system/cpu/possible".into(),
            source,
        })?;
        self.maps
            .vip_counters
            .set(index, zeroes, 0)
            .map_err(|source| VIP_COUNTERS.error("bpf_map_update_elem", source))
    }
}

/// Reads the counters beside the router, through the pinned maps.
pub struct Meters {
    counters: PerCpuArray<MapData, Plain<common::Counters>>,
    vips: Table<common::VipKey, common::VipValue>,
    vips6: Table<common::VipKey6, common::VipValue>,
    vip_counters: PerCpuArray<MapData, Plain<VipCounters>>,
}

impl Meters {
    /// Of the data plane that is pinned below `pin_dir`.
    pub fn open(pin_dir: &Path) -> Result<Self, Error> {
        let folder = pin_dir.join(common::SCHEMA);
        Ok(Self {
            counters: open(&folder, &COUNTERS)?,
            vips: Table::open(&folder, &VIPS)?,
            vips6: Table::open(&folder, &VIPS6)?,
            vip_counters: open(&folder, &VIP_COUNTERS)?,
        })
    }

    /// The machine's counters.
    pub fn totals(&self) -> Result<Totals, Error> {
        totals(&self.counters)
    }

    /// What entered at this machine for each VIP port.
    pub fn vips(&self) -> Result<BTreeMap<VipKey, VipCounters>, Error> {
        let mut found = BTreeMap::new();
        let entries = by_vip(self.vips.entries()?).into_iter().chain(by_vip(self.vips6.entries()?));
        for (_, key, value) in entries {
            if let Some(key) = key {
                found.insert(key, vip_total(&self.vip_counters, value.counter)?);
            }
        }
        Ok(found)
    }
}

fn totals(map: &PerCpuArray<MapData, Plain<common::Counters>>) -> Result<Totals, Error> {
    let cpus: PerCpuValues<_> =
        map.get(&0, 0).map_err(|source| COUNTERS.error("bpf_map_lookup_elem", source))?;
    let mut totals = [0; Counter::ALL.len()];
    for Plain(cpu) in cpus.iter() {
        for (total, value) in totals.iter_mut().zip(cpu.values) {
            *total += value;
        }
    }
    Ok(Totals(totals))
}

fn vip_total(map: &PerCpuArray<MapData, Plain<VipCounters>>, index: u32) -> Result<VipCounters, Error> {
    let cpus = map.get(&index, 0).map_err(|source| VIP_COUNTERS.error("bpf_map_lookup_elem", source))?;
    let mut total = VipCounters::default();
    for Plain(cpu) in cpus.iter() {
        total.packets += cpu.packets;
        total.bytes += cpu.bytes;
        total.connections += cpu.connections;
    }
    Ok(total)
}
