//! Who may send encapsulated packets to this machine.

use std::{collections::BTreeSet, net::Ipv4Addr};

use anyplace_ebpf_common::FleetKey;
use aya::maps::lpm_trie::Key;

use crate::{
    DataPlane, Error,
    maps::{FLEET, Maps, Plain},
    types::address,
};

impl DataPlane {
    /// From now on encapsulated packets must come from one of these prefixes (address, bits) or from this machine itself;
    /// others are dropped and counted. No prefixes: from anywhere. The choice outlives the process.
    pub fn set_fleet(&mut self, prefixes: &[(Ipv4Addr, u8)]) -> Result<(), Error> {
        let wanted: BTreeSet<FleetKey> = prefixes.iter().map(|prefix| key(*prefix)).collect();
        // New ones first, and while nobody is accepted the check is off: no packet of the fleet is lost meanwhile.
        for prefix in &wanted {
            let result = self.maps.fleet.insert(&trie_key(prefix), Plain(1), 0);
            result.map_err(|source| FLEET.error("bpf_map_update_elem", source))?;
        }
        self.change_config(|config| config.fleet_only = u32::from(!wanted.is_empty()))?;
        for old in entries(&self.maps)?.difference(&wanted) {
            let result = self.maps.fleet.remove(&trie_key(old));
            result.map_err(|source| FLEET.error("bpf_map_delete_elem", source))?;
        }
        Ok(())
    }
}

/// Whether an earlier process set prefixes.
pub(crate) fn is_set(maps: &Maps) -> Result<bool, Error> {
    Ok(!entries(maps)?.is_empty())
}

fn entries(maps: &Maps) -> Result<BTreeSet<FleetKey>, Error> {
    let keys = maps.fleet.keys().map(|key| {
        let key = key.map_err(|source| FLEET.error("bpf_map_get_next_key", source))?;
        Ok(FleetKey { bits: key.prefix_len(), address: key.data().0 })
    });
    keys.collect()
}

/// A prefix as the map keeps it: without the bits behind it, at most 32 long.
fn key((prefix, bits): (Ipv4Addr, u8)) -> FleetKey {
    let bits = u32::from(bits).min(32);
    let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    FleetKey { bits, address: address(Ipv4Addr::from(u32::from(prefix) & mask)) }
}

fn trie_key(key: &FleetKey) -> Key<Plain<u32>> {
    Key::new(key.bits, Plain(key.address))
}
