//! Brings the data plane to the routes: computes what should be in it for the routes that changed, and changes only
//! what differs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, PoisonError},
};

use anyplace_ebpf::{Bucket, DataPlane, Instance, Port, Protocol, VipKey, VipTable};
use anyplace_model::{InstanceId, MachineId, Route, host_interface};
use anyplace_router_core::{Tables, tables};

/// Below this many routes threads cost more than they save.
const PARALLEL: usize = 64;

/// A change of one VIP.
#[derive(Debug, Clone)]
pub enum Change {
    /// New, or other than before.
    Put(Route),
    /// Gone.
    Remove(IpAddr),
}

impl Change {
    fn vip(&self) -> IpAddr {
        match self {
            Self::Put(route) => route.vip,
            Self::Remove(vip) => *vip,
        }
    }
}

/// The instances of this machine by their addresses, as the routes name them, and where they take TCP connections; to be
/// read beside the router.
#[derive(Debug, Clone, Default)]
pub struct Names {
    names: Shared<InstanceId>,
    tcp_ports: Shared<u16>,
}

type Shared<T> = Arc<Mutex<Arc<BTreeMap<Ipv4Addr, T>>>>;

impl Names {
    /// What is known now.
    pub fn get(&self) -> Arc<BTreeMap<Ipv4Addr, InstanceId>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A TCP port of each that has one, in its container.
    pub fn tcp_ports(&self) -> Arc<BTreeMap<Ipv4Addr, u16>> {
        self.tcp_ports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, address: Ipv4Addr, name: Option<&InstanceId>, tcp_port: Option<u16>) {
        set(&self.names, address, name.cloned());
        set(&self.tcp_ports, address, tcp_port);
    }
}

fn set<T: Clone>(shared: &Shared<T>, address: Ipv4Addr, value: Option<T>) {
    let mut all = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let all = Arc::make_mut(&mut all);
    match value {
        Some(value) => drop(all.insert(address, value)),
        None => drop(all.remove(&address)),
    }
}

/// The data plane and what was put into it.
pub struct Plane {
    data_plane: DataPlane,
    machine: MachineId,
    instances: BTreeMap<Ipv4Addr, Local>,
    /// Which of them serve a VIP, and what.
    serving: BTreeMap<(IpAddr, Ipv4Addr), Vec<Port>>,
    /// What failed, to be tried again, and why. At most one for each VIP.
    failed: BTreeMap<IpAddr, (Change, String)>,
    names: Names,
}

/// An instance of this machine.
#[derive(Debug, Default)]
struct Local {
    vips: BTreeSet<IpAddr>,
    /// As the data plane has it.
    set: Option<Instance>,
}

impl Plane {
    /// A router's view of a data plane, which may hold what an earlier process put into it.
    pub fn new(data_plane: DataPlane, machine: MachineId) -> Self {
        let (instances, serving, failed) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { data_plane, machine, instances, serving, failed, names: Names::default() }
    }

    /// The names of this machine's instances.
    pub fn names(&self) -> Names {
        self.names.clone()
    }

    /// The data plane, to be read.
    pub fn data_plane(&self) -> &DataPlane {
        &self.data_plane
    }

    /// Whether everything that was applied is in place.
    pub fn is_settled(&self) -> bool {
        self.failed.is_empty()
    }

    /// Tries again what failed.
    pub fn retry(&mut self) {
        let known: BTreeSet<String> = self.failed.values().map(|(_, reason)| reason.clone()).collect();
        let changes = std::mem::take(&mut self.failed).into_values().map(|(change, _)| change).collect();
        self.apply_but_log(changes, &known);
    }

    /// Brings the VIPs that changed into the data plane, the last change of each; what fails is kept for
    /// [`Plane::retry`].
    pub fn apply(&mut self, changes: Vec<Change>) {
        let last: BTreeMap<IpAddr, Change> =
            changes.into_iter().map(|change| (change.vip(), change)).collect();
        self.apply_but_log(last.into_values().collect(), &BTreeSet::new());
    }

    /// Takes away what an earlier process left and no route names; to be called when all routes have been applied.
    pub fn finish(&mut self, is_known: impl Fn(IpAddr) -> bool) {
        let vips = self.data_plane.vips().into_iter().map(|key| key.address);
        let unknown: BTreeSet<IpAddr> = vips.filter(|vip| !is_known(*vip)).collect();
        self.apply(unknown.into_iter().map(Change::Remove).collect());
        for instance in self.data_plane.instances().unwrap_or_default() {
            if !self.instances.contains_key(&instance.address)
                && let Err(error) = self.data_plane.remove_instance(instance.address)
            {
                tracing::warn!(
                    "instance {}: {}; it stays until the next start",
                    instance.address,
                    chain(&error)
                );
            }
        }
        return_heap();
    }

    /// `known`: failures that were logged already. Each VIP may be in `changes` once.
    fn apply_but_log(&mut self, changes: Vec<Change>, known: &BTreeSet<String>) {
        let tables = all_tables(&changes);
        let mut failed: BTreeMap<IpAddr, String> = BTreeMap::new();
        // New deliverers before tables that lead to them, tables that no longer do before deliverers go.
        let mut leaving = Vec::new();
        for change in &changes {
            let (vip, wanted) = (change.vip(), self.wanted(change));
            self.name(change, &wanted);
            let gone = self.instances_of(vip).filter(|address| !wanted.contains_key(address));
            leaving.extend(gone.map(|address| (vip, address)));
            for (address, ports) in wanted {
                self.instances.entry(address).or_default().vips.insert(vip);
                self.serving.insert((vip, address), ports);
                if let Err(reason) = self.set_instance(address) {
                    failed.insert(vip, reason);
                }
            }
        }
        let ports = |change: &Change| match change {
            Change::Put(route) => route.ports.iter().map(|port| vip_key(route, port)).collect(),
            Change::Remove(_) => Vec::new(),
        };
        let vips = changes.iter().zip(&tables);
        let vips = vips.flat_map(|(change, table)| ports(change).into_iter().map(move |key| (key, table)));
        for (key, error) in self.data_plane.set_vips(vips) {
            failed.insert(key.address, format!("VIP {key}: {}", chain(&error)));
        }
        for change in &changes {
            let wanted = ports(change);
            let probe = VipKey { address: change.vip(), port: 0, protocol: Protocol::Tcp };
            for key in self.data_plane.ports_of(probe).into_iter().filter(|key| !wanted.contains(key)) {
                if let Err(error) = self.data_plane.remove_vip(key) {
                    failed.insert(key.address, format!("VIP {key}: {}", chain(&error)));
                }
            }
        }
        for (vip, address) in leaving {
            if let Err(reason) = self.leave(vip, address) {
                failed.insert(vip, reason);
            }
        }
        for change in changes {
            match failed.remove(&change.vip()) {
                Some(reason) => {
                    if !known.contains(&reason) {
                        tracing::warn!("{reason}; trying again");
                    }
                    self.failed.insert(change.vip(), (change, reason));
                }
                // An older failure of the VIP is settled by what came after it.
                None => drop(self.failed.remove(&change.vip())),
            }
        }
    }

    /// The instances of this machine that a VIP wants, with what they serve for it.
    fn wanted(&self, change: &Change) -> BTreeMap<Ipv4Addr, Vec<Port>> {
        let Change::Put(route) = change else { return BTreeMap::new() };
        let here = route.local.iter().filter(|endpoint| endpoint.machine == self.machine);
        // An instance that isn't ready may have no interface yet, and serves nothing anyway; one that has stopped
        // being ready stays, because its connections do.
        here.filter(|it| it.ready || it.draining || self.instances.contains_key(&it.address))
            .map(|endpoint| {
                let ports = route
                    .ports
                    .iter()
                    .map(|port| Port { vip: vip_key(route, port), container_port: port.container_port() });
                (endpoint.address, ports.collect())
            })
            .collect()
    }

    fn name(&self, change: &Change, wanted: &BTreeMap<Ipv4Addr, Vec<Port>>) {
        let Change::Put(route) = change else { return };
        let tcp = route.ports.iter().find(|port| port.protocol == anyplace_model::Protocol::Tcp);
        let tcp_port = tcp.map(anyplace_model::Port::container_port);
        for endpoint in route.local.iter().filter(|endpoint| wanted.contains_key(&endpoint.address)) {
            self.names.set(endpoint.address, Some(&endpoint.instance), tcp_port);
        }
    }

    /// The instances of this machine that serve a VIP.
    fn instances_of(&self, vip: IpAddr) -> impl Iterator<Item = Ipv4Addr> {
        let all = (vip, Ipv4Addr::UNSPECIFIED)..=(vip, Ipv4Addr::BROADCAST);
        self.serving.range(all).map(|((_, address), _)| *address)
    }

    fn set_instance(&mut self, address: Ipv4Addr) -> Result<(), String> {
        let Some(local) = self.instances.get_mut(&address) else { return Ok(()) };
        let ports = local.vips.iter().filter_map(|vip| self.serving.get(&(*vip, address)));
        let ports = ports.flatten().copied().collect();
        let instance = Instance { address, host_interface: host_interface(address), ports };
        if local.set.as_ref() == Some(&instance) {
            return Ok(());
        }
        let result = self.data_plane.set_instance(&instance);
        result.map_err(|error| format!("instance {address}: {}", chain(&error)))?;
        local.set = Some(instance);
        Ok(())
    }

    /// An instance doesn't serve a VIP any more.
    fn leave(&mut self, vip: IpAddr, address: Ipv4Addr) -> Result<(), String> {
        let Some(local) = self.instances.get_mut(&address) else { return Ok(()) };
        let others = local.vips.iter().any(|other| *other != vip);
        if !others {
            // What failed stays known here, so that the next try finds it.
            let result = self.data_plane.remove_instance(address);
            result.map_err(|error| format!("instance {address}: {}", chain(&error)))?;
            self.instances.remove(&address);
            self.serving.remove(&(vip, address));
            self.names.set(address, None, None);
            return Ok(());
        }
        local.vips.remove(&vip);
        self.serving.remove(&(vip, address));
        self.set_instance(address)
    }
}

/// The tables of each change, on all CPUs where there are many.
fn all_tables(changes: &[Change]) -> Vec<VipTable> {
    let table = |change: &Change| match change {
        Change::Put(route) => vip_table(&tables(route)),
        Change::Remove(_) => VipTable::default(),
    };
    if changes.len() < PARALLEL {
        return changes.iter().map(table).collect();
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let parts = changes.chunks(changes.len().div_ceil(threads));
        let workers: Vec<_> = parts
            .map(|part| (part, scope.spawn(move || part.iter().map(table).collect::<Vec<_>>())))
            .collect();
        // A worker that panicked is repeated here, where the panic has its message.
        let join = |(part, worker): (&[Change], std::thread::ScopedJoinHandle<'_, Vec<VipTable>>)| {
            worker.join().unwrap_or_else(|_| part.iter().map(table).collect())
        };
        workers.into_iter().flat_map(join).collect()
    })
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
    VipKey { address: route.vip, port: port.port.get(), protocol: protocol(port.protocol) }
}

/// The data plane's name of a protocol.
pub(crate) fn protocol(protocol: anyplace_model::Protocol) -> Protocol {
    match protocol {
        anyplace_model::Protocol::Tcp => Protocol::Tcp,
        anyplace_model::Protocol::Udp => Protocol::Udp,
    }
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

/// Gives the system back what only the reading of a snapshot took, which the allocator would keep for later.
fn return_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, and touches no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
