//! Adding up what the programs counted.

use anyplace_ebpf_common::{Counter, VipCounters};
use aya::util::nr_cpus;

use crate::{
    DataPlane, Error, VipKey,
    maps::{COUNTERS, Plain, VIP_COUNTERS},
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
        let cpus =
            self.maps.counters.get(&0, 0).map_err(|source| COUNTERS.error("bpf_map_lookup_elem", source))?;
        let mut totals = [0; Counter::ALL.len()];
        for Plain(cpu) in cpus.iter() {
            for (total, value) in totals.iter_mut().zip(cpu.values) {
                *total += value;
            }
        }
        Ok(Totals(totals))
    }

    /// What entered at this machine for one VIP port; `None` if it is not set.
    pub fn vip_counters(&self, key: VipKey) -> Result<Option<VipCounters>, Error> {
        let Some(value) = self.vip_value(key) else { return Ok(None) };
        let cpus = self
            .maps
            .vip_counters
            .get(&value.counter, 0)
            .map_err(|source| VIP_COUNTERS.error("bpf_map_lookup_elem", source))?;
        let mut total = VipCounters::default();
        for Plain(cpu) in cpus.iter() {
            total.packets += cpu.packets;
            total.bytes += cpu.bytes;
            total.connections += cpu.connections;
        }
        Ok(Some(total))
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
