//! Adding up what the programs counted.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path};

use anyplace_ebpf_common::{self as common, Counter, InstanceCounters, VipCounters};
use aya::{
    maps::{MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};

use crate::{
    DataPlane, Error, VipKey,
    maps::{
        COUNTERS, FLOW_EVENTS_LOST, INSTANCE_COUNTERS, PORTS, PORTS6, Plain, Spec, Table, VIP_COUNTERS, VIPS,
        VIPS6, by_vip, open,
    },
    types::{MapKey as _, ipv4},
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
        clear(&mut self.maps.vip_counters, &VIP_COUNTERS, index)
    }

    /// The same for a port of an instance.
    pub(crate) fn clear_instance_counters(&mut self, index: u32) -> Result<(), Error> {
        clear(&mut self.maps.instance_counters, &INSTANCE_COUNTERS, index)
    }
}

fn clear<T: common::Layout + Default>(
    map: &mut PerCpuArray<MapData, Plain<T>>,
    spec: &Spec,
    index: u32,
) -> Result<(), Error> {
    let cpus = nr_cpus().map_err(|(path, source)| Error::File { call: "read", path: path.into(), source })?;
    let zeroes = vec![Plain(T::default()); cpus];
    let zeroes = PerCpuValues::try_from(zeroes).map_err(|source| Error::File {
        call: "read",
        path: "/sys/devices/system/cpu/possible".into(),
        source,
    })?;
    map.set(index, zeroes, 0).map_err(|source| spec.error("bpf_map_update_elem", source))
}

/// Reads the counters beside the router, through the pinned maps.
pub struct Meters {
    counters: PerCpuArray<MapData, Plain<common::Counters>>,
    vips: Table<common::VipKey, common::VipValue>,
    vips6: Table<common::VipKey6, common::VipValue>,
    vip_counters: PerCpuArray<MapData, Plain<VipCounters>>,
    ports: Table<common::PortKey, common::PortValue>,
    ports6: Table<common::PortKey6, common::PortValue>,
    instance_counters: PerCpuArray<MapData, Plain<InstanceCounters>>,
    flow_events_lost: PerCpuArray<MapData, Plain<u64>>,
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
            ports: Table::open(&folder, &PORTS)?,
            ports6: Table::open(&folder, &PORTS6)?,
            instance_counters: open(&folder, &INSTANCE_COUNTERS)?,
            flow_events_lost: open(&folder, &FLOW_EVENTS_LOST)?,
        })
    }

    /// The machine's counters.
    pub fn totals(&self) -> Result<Totals, Error> {
        totals(&self.counters)
    }

    /// Events of flows that nobody read in time.
    pub fn lost_flow_events(&self) -> Result<u64, Error> {
        let cpus = self.flow_events_lost.get(&0, 0);
        let cpus = cpus.map_err(|source| FLOW_EVENTS_LOST.error("bpf_map_lookup_elem", source))?;
        Ok(cpus.iter().map(|Plain(lost)| lost).sum())
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

    /// What the instances of this machine were given, by VIP port and instance; those without counters of their own (see
    /// [`common::MAX_INSTANCE_COUNTERS`]) are left out.
    pub fn instances(&self) -> Result<BTreeMap<(VipKey, Ipv4Addr), InstanceCounters>, Error> {
        let ports = self.ports.entries()?.into_iter().map(|(key, value)| {
            (common::VipKey::new(key.vip, key.vip_port, key.protocol).vip(), key.instance, value.counter)
        });
        let ports6 = self.ports6.entries()?.into_iter().map(|(key, value)| {
            (common::VipKey6::new(key.vip, key.vip_port, key.protocol).vip(), key.instance, value.counter)
        });
        let mut found = BTreeMap::new();
        for (vip, instance, counter) in ports.chain(ports6) {
            if let Some(vip) = vip.filter(|_| counter != 0) {
                let total = instance_total(&self.instance_counters, counter.into())?;
                found.insert((vip, ipv4(instance)), total);
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

fn instance_total(
    map: &PerCpuArray<MapData, Plain<InstanceCounters>>,
    index: u32,
) -> Result<InstanceCounters, Error> {
    let cpus = map.get(&index, 0).map_err(|source| INSTANCE_COUNTERS.error("bpf_map_lookup_elem", source))?;
    let mut total = InstanceCounters::default();
    for Plain(cpu) in cpus.iter() {
        total.packets += cpu.packets;
        total.bytes += cpu.bytes;
        total.new_flows += cpu.new_flows;
    }
    Ok(total)
}
