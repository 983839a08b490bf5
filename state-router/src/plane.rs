//! Brings the data plane to the routes: computes what should be in it, and changes only what differs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use anyplace_ebpf::{Bucket, DataPlane, Instance, Port, Protocol, VipKey, VipTable};
use anyplace_model::{MachineId, Route, host_interface};
use anyplace_router_core::{Tables, tables};

/// The data plane and what was put into it.
pub(crate) struct Plane {
    data_plane: DataPlane,
    machine: MachineId,
    vips: BTreeMap<VipKey, Tables>,
    instances: BTreeMap<Ipv4Addr, Instance>,
    /// What failed last time, so that a lasting failure is logged once.
    failed: BTreeSet<String>,
}

impl Plane {
    pub(crate) fn new(data_plane: DataPlane, machine: MachineId) -> Self {
        Self {
            data_plane,
            machine,
            vips: BTreeMap::new(),
            instances: BTreeMap::new(),
            failed: BTreeSet::new(),
        }
    }

    /// Returns whether everything is in place; what isn't is tried again at the next call.
    pub(crate) fn apply<'a>(&mut self, routes: impl Iterator<Item = &'a Route>) -> bool {
        let (mut vips, mut instances) = (BTreeMap::new(), BTreeMap::new());
        for route in routes {
            let wanted = tables(route);
            for port in &route.ports {
                vips.insert(vip_key(route, port), wanted.clone());
            }
            // An instance that isn't ready may have no interface yet, and serves nothing anyway; one that has
            // stopped being ready stays, because its connections do.
            for endpoint in route.local.iter().filter(|endpoint| endpoint.machine == self.machine) {
                if endpoint.ready || endpoint.draining || self.instances.contains_key(&endpoint.address) {
                    instances.insert(endpoint.address, instance(route, endpoint.address));
                }
            }
        }
        let mut failed = BTreeSet::new();
        // New deliverers before tables that lead to them, tables that no longer do before deliverers go.
        for (address, instance) in &instances {
            if self.instances.get(address) != Some(instance) {
                match self.data_plane.set_instance(instance) {
                    Ok(()) => drop(self.instances.insert(*address, instance.clone())),
                    Err(error) => drop(failed.insert(format!("instance {address}: {}", chain(&error)))),
                }
            }
        }
        for (key, tables) in &vips {
            if self.vips.get(key) != Some(tables) {
                match self.data_plane.set_vip(*key, &vip_table(tables)) {
                    Ok(()) => drop(self.vips.insert(*key, tables.clone())),
                    Err(error) => drop(failed.insert(format!("VIP {key}: {}", chain(&error)))),
                }
            }
        }
        let gone: Vec<VipKey> =
            self.data_plane.vips().into_iter().filter(|key| !vips.contains_key(key)).collect();
        for key in gone {
            self.vips.remove(&key);
            if let Err(error) = self.data_plane.remove_vip(key) {
                failed.insert(format!("VIP {key}: {}", chain(&error)));
            }
        }
        for address in self.present() {
            if !instances.contains_key(&address) {
                self.instances.remove(&address);
                if let Err(error) = self.data_plane.remove_instance(address) {
                    failed.insert(format!("instance {address}: {}", chain(&error)));
                }
            }
        }
        for failure in failed.difference(&self.failed) {
            tracing::warn!("{failure}; trying again");
        }
        self.failed = failed;
        self.failed.is_empty()
    }

    /// Instances in the data plane, those of an earlier process included.
    fn present(&self) -> Vec<Ipv4Addr> {
        self.data_plane.instances().unwrap_or_default().into_iter().map(|instance| instance.address).collect()
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

fn vip_key(route: &Route, port: &anyplace_model::Port) -> VipKey {
    let protocol = match port.protocol {
        anyplace_model::Protocol::Tcp => Protocol::Tcp,
        anyplace_model::Protocol::Udp => Protocol::Udp,
    };
    VipKey { address: route.vip, port: port.port.get(), protocol }
}

fn instance(route: &Route, address: Ipv4Addr) -> Instance {
    let ports = route
        .ports
        .iter()
        .map(|port| Port { vip: vip_key(route, port), container_port: port.container_port() })
        .collect();
    Instance { address, host_interface: host_interface(address), ports }
}

fn vip_table(tables: &Tables) -> VipTable {
    let buckets = |table: &[anyplace_router_core::Bucket]| {
        table
            .iter()
            .map(|bucket| Bucket { now: bucket.now, before: bucket.before.unwrap_or(bucket.now) })
            .collect()
    };
    VipTable { buckets: buckets(&tables.full), local: buckets(&tables.local) }
}
