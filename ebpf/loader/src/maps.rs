//! The maps with their types, as they come out of a loaded object.

use std::{io, net::IpAddr, os::fd::AsFd as _, path::Path};

use anyplace_ebpf_common as common;
use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, IterableMap as _, LpmTrie, Map, MapData, MapError, PerCpuArray},
    sys::SyscallError,
};

use crate::{
    Capacity, Error,
    arena::Arena,
    filter::InstanceFilter,
    sys,
    types::{MapKey, VipKey},
    vips::whole,
};

/// A layout of the common crate, for aya's trait on plain data.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Plain<T>(pub(crate) T);

// SAFETY: `Layout` promises exactly what `Pod` asks.
unsafe impl<T: common::Layout> Pod for Plain<T> {}

/// A hash map that knows its name and its bound.
#[derive(Debug)]
pub(crate) struct Table<K: common::Layout, V: common::Layout> {
    name: &'static str,
    limit: u32,
    map: HashMap<MapData, Plain<K>, Plain<V>>,
}

impl<K: common::Layout, V: common::Layout> Table<K, V> {
    fn take(object: &mut Ebpf, spec: &Spec, limit: u32) -> Result<Self, Error> {
        let map = take(object, spec.name)?;
        let map = HashMap::try_from(map).map_err(|source| spec.error("open", source))?;
        Ok(Self { name: spec.name, limit, map })
    }

    /// A map that is pinned.
    pub(crate) fn open(folder: &Path, spec: &Spec) -> Result<Self, Error> {
        Ok(Self { name: spec.name, limit: spec.entries, map: open(folder, spec)? })
    }

    /// Adds or replaces an entry; a program sees the old value or the new one, never a mixture.
    pub(crate) fn set(&mut self, key: K, value: V) -> Result<(), Error> {
        let result = self.map.insert(Plain(key), Plain(value), 0);
        result.map_err(|source| self.write_error("bpf_map_update_elem", source))
    }

    /// Adds or replaces many entries; on failure also says how many were written, from the first on.
    pub(crate) fn set_all(&mut self, keys: &[K], values: &[V]) -> Result<(), (usize, Error)> {
        // Below this a call for each is as fast, and a batch needs memory in the kernel.
        if keys.len() <= 4 {
            for (written, (key, value)) in keys.iter().zip(values).enumerate() {
                self.set(*key, *value).map_err(|error| (written, error))?;
            }
            return Ok(());
        }
        let call = "bpf_map_update_batch";
        sys::update_batch(self.map.map().fd().as_fd(), keys, values).map_err(|(written, io_error)| {
            (written, self.write_error(call, SyscallError { call, io_error }.into()))
        })
    }

    fn write_error(&self, call: &'static str, source: MapError) -> Error {
        match errno(&source) {
            Some(libc::E2BIG) => Error::Full { map: self.name, limit: self.limit },
            _ => Error::Map { map: self.name, call, source },
        }
    }

    pub(crate) fn get(&self, key: K) -> Result<Option<V>, Error> {
        match self.map.get(&Plain(key), 0) {
            Ok(Plain(value)) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(Error::Map { map: self.name, call: "bpf_map_lookup_elem", source }),
        }
    }

    /// Removes an entry, if it is there.
    pub(crate) fn remove(&mut self, key: K) -> Result<(), Error> {
        match self.map.remove(&Plain(key)) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) if errno(&source) == Some(libc::ENOENT) => Ok(()),
            Err(source) => Err(Error::Map { map: self.name, call: "bpf_map_delete_elem", source }),
        }
    }

    /// All entries. Complete, because nobody else writes.
    pub(crate) fn entries(&self) -> Result<Vec<(K, V)>, Error> {
        self.map
            .iter()
            .map(|entry| entry.map(|(Plain(key), Plain(value))| (key, value)))
            .collect::<Result<_, _>>()
            .map_err(|source| Error::Map { map: self.name, call: "bpf_map_get_next_key", source })
    }
}

/// All maps but those of flows, fragments and rates, which only the programs use.
pub(crate) struct Maps {
    pub(crate) vips: Table<common::VipKey, common::VipValue>,
    pub(crate) vips6: Table<common::VipKey6, common::VipValue>,
    pub(crate) instances: Table<u32, common::InstanceValue>,
    pub(crate) filter: InstanceFilter,
    pub(crate) ports: Table<common::PortKey, common::PortValue>,
    pub(crate) ports6: Table<common::PortKey6, common::PortValue>,
    pub(crate) replies: Table<common::ReplyKey, common::ReplyValue>,
    pub(crate) replies6: Table<common::ReplyKey, common::ReplyValue6>,
    pub(crate) counters: PerCpuArray<MapData, Plain<common::Counters>>,
    pub(crate) vip_counters: PerCpuArray<MapData, Plain<common::VipCounters>>,
    pub(crate) instance_counters: PerCpuArray<MapData, Plain<common::InstanceCounters>>,
    pub(crate) config: Array<MapData, Plain<common::Config>>,
    pub(crate) config6: Array<MapData, Plain<common::Config6>>,
    pub(crate) fleet: LpmTrie<MapData, Plain<u32>, Plain<u32>>,
    pub(crate) arena: Arena,
}

impl Maps {
    /// Takes the maps out of a loaded object; also the VIPs that an earlier process left in them.
    pub(crate) fn take(object: &mut Ebpf, sizes: &Sizes) -> Result<(Self, VipEntries), Error> {
        let vips: Table<common::VipKey, common::VipValue> = Table::take(object, &VIPS, sizes.vips)?;
        let vips6: Table<common::VipKey6, common::VipValue> = Table::take(object, &VIPS6, sizes.vips6)?;
        let Map::Array(buckets) = take(object, BUCKETS.name)? else {
            return Err(Error::Missing { kind: "array map", name: BUCKETS.name });
        };
        let mut entries = by_vip(vips.entries()?);
        entries.extend(by_vip(vips6.entries()?));
        let used = entries.iter().map(|(_, _, value)| whole(value.full, value.local));
        let arena = Arena::new(buckets.fd().as_fd(), sizes.buckets, used)
            .map_err(|io_error| BUCKETS.error("mmap", SyscallError { call: "mmap", io_error }.into()))?;
        let instances: Table<u32, common::InstanceValue> =
            Table::take(object, &INSTANCES, INSTANCES.entries)?;
        let addresses: Vec<u32> = instances.entries()?.into_iter().map(|(address, _)| address).collect();
        let maps = Self {
            vips,
            vips6,
            instances,
            filter: InstanceFilter::take(object, &addresses)?,
            ports: Table::take(object, &PORTS, PORTS.entries)?,
            ports6: Table::take(object, &PORTS6, PORTS6.entries)?,
            replies: Table::take(object, &REPLIES, REPLIES.entries)?,
            replies6: Table::take(object, &REPLIES6, REPLIES6.entries)?,
            counters: typed(object, &COUNTERS)?,
            vip_counters: typed(object, &VIP_COUNTERS)?,
            instance_counters: typed(object, &INSTANCE_COUNTERS)?,
            config: typed(object, &CONFIG)?,
            config6: typed(object, &CONFIG6)?,
            fleet: typed(object, &FLEET)?,
            arena,
        };
        Ok((maps, entries))
    }

    /// Slots of the counters by instance that ports name.
    pub(crate) fn port_counters(&self) -> Result<Vec<u32>, Error> {
        let ports = self.ports.entries()?.into_iter().map(|(_, value)| value);
        let ports6 = self.ports6.entries()?.into_iter().map(|(_, value)| value);
        Ok(ports.chain(ports6).map(|value| u32::from(value.counter)).collect())
    }
}

/// What stands in the maps of VIPs: the address, its port unless it is the address's marker, and the value.
pub(crate) type VipEntries = Vec<(IpAddr, Option<VipKey>, common::VipValue)>;

pub(crate) fn by_vip<K: MapKey>(entries: Vec<(K, common::VipValue)>) -> VipEntries {
    entries.into_iter().map(|(key, value)| (key.address(), key.vip(), value)).collect()
}

/// Sizes of the maps that grow with the number of VIPs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Entries of VIPS.
    pub(crate) vips: u32,
    /// Entries of VIPS6.
    pub(crate) vips6: u32,
    /// Slots of the arena.
    pub(crate) buckets: u32,
    /// Slots of the counters.
    pub(crate) counters: u32,
}

impl Sizes {
    /// Each map's name and size, for the loader of the object.
    pub(crate) fn by_name(&self) -> [(&'static str, u32); 4] {
        [
            (VIPS.name, self.vips),
            (VIPS6.name, self.vips6),
            (BUCKETS.name, self.buckets),
            (VIP_COUNTERS.name, self.counters),
        ]
    }
}

/// Sizes for a capacity, or those of the maps that an earlier process left in `folder`: a map can't grow. Refuses maps
/// of another layout, before anything is loaded.
pub(crate) fn sizes(folder: &Path, capacity: Capacity) -> Result<Sizes, Error> {
    // An address marker for each port, at most.
    let vips = capacity.vips.saturating_mul(2);
    let mut sizes = Sizes { vips, vips6: vips, buckets: capacity.buckets, counters: capacity.vips };
    for spec in ALL {
        let Some(map) = pinned(folder, spec)? else { continue };
        let info = map.info().map_err(|source| spec.error("BPF_OBJ_GET_INFO_BY_FD", source))?;
        let found = (info.key_size(), info.value_size(), info.max_entries());
        let mut expected = (spec.key, spec.value, spec.entries);
        match spec.name {
            "VIPS" => sizes.vips = found.2,
            "VIPS6" => sizes.vips6 = found.2,
            "BUCKETS" => sizes.buckets = found.2,
            "VIP_COUNTERS" => sizes.counters = found.2,
            _ => {}
        }
        if sizes.by_name().iter().any(|(name, _)| *name == spec.name) {
            expected.2 = found.2;
        }
        if found != expected {
            let text =
                |(key, value, entries)| format!("keys of {key}, values of {value} bytes, {entries} entries");
            let path = folder.join(spec.name);
            return Err(Error::Layout { path, found: text(found), expected: text(expected) });
        }
    }
    Ok(sizes)
}

/// What a map takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapMemory {
    /// Its name.
    pub map: &'static str,
    /// Kernel memory in bytes.
    pub bytes: u64,
    /// Entries that fit; the memory is taken for all of them in most maps.
    pub entries: u32,
}

/// Kernel memory of each pinned map.
pub(crate) fn memory(folder: &Path) -> Result<Vec<MapMemory>, Error> {
    let mut found = Vec::new();
    for spec in ALL {
        let Some(map) = pinned(folder, spec)? else { continue };
        let failed = |source| Error::File { call: "read", path: "/proc/thread-self/fdinfo".into(), source };
        let bytes = sys::map_memory(map.fd().as_fd()).map_err(failed)?;
        let info = map.info().map_err(|source| spec.error("BPF_OBJ_GET_INFO_BY_FD", source))?;
        found.push(MapMemory { map: spec.name, bytes, entries: info.max_entries() });
    }
    Ok(found)
}

/// Whether a map was made by an earlier process.
pub(crate) fn is_pinned(folder: &Path, spec: &Spec) -> bool {
    folder.join(spec.name).exists()
}

/// A pinned map with its type.
pub(crate) fn open<T: TryFrom<Map, Error = MapError>>(folder: &Path, spec: &Spec) -> Result<T, Error> {
    let map = pinned(folder, spec)?.ok_or(Error::Missing { kind: "pinned map", name: spec.name })?;
    Map::from_map_data(map).and_then(T::try_from).map_err(|source| spec.error("open", source))
}

fn pinned(folder: &Path, spec: &Spec) -> Result<Option<MapData>, Error> {
    let path = folder.join(spec.name);
    if !path.exists() {
        return Ok(None);
    }
    MapData::from_pin(&path).map(Some).map_err(|source| spec.error("BPF_OBJ_GET", source))
}

/// The system error inside a map error.
pub(crate) fn errno(error: &MapError) -> Option<i32> {
    let MapError::SyscallError(SyscallError { io_error, .. }) = error else { return None };
    io::Error::raw_os_error(io_error)
}

pub(crate) struct Spec {
    pub(crate) name: &'static str,
    key: u32,
    value: u32,
    entries: u32,
}

impl Spec {
    const fn new<K, V>(name: &'static str, entries: u32) -> Self {
        Self { name, key: size_of::<K>() as u32, value: size_of::<V>() as u32, entries }
    }

    pub(crate) fn error(&self, call: &'static str, source: MapError) -> Error {
        Error::Map { map: self.name, call, source }
    }
}

pub(crate) const CONFIG: Spec = Spec::new::<u32, common::Config>("CONFIG", 1);
pub(crate) const CONFIG6: Spec = Spec::new::<u32, common::Config6>("CONFIG6", 1);
pub(crate) const VIPS: Spec = Spec::new::<common::VipKey, common::VipValue>("VIPS", common::MAX_VIPS);
const BUCKETS: Spec = Spec::new::<u32, common::Bucket>("BUCKETS", common::ARENA_BUCKETS);
pub(crate) const INSTANCE_FILTER: Spec = Spec::new::<u32, u64>("INSTANCE_FILTER", common::FILTER_WORDS);
const INSTANCES: Spec = Spec::new::<u32, common::InstanceValue>("INSTANCES", common::MAX_INSTANCES);
pub(crate) const PORTS: Spec = Spec::new::<common::PortKey, common::PortValue>("PORTS", common::MAX_PORTS);
const REPLIES: Spec = Spec::new::<common::ReplyKey, common::ReplyValue>("REPLIES", common::MAX_PORTS);
const FLOWS: Spec = Spec::new::<common::FlowKey, common::FlowValue>("FLOWS", common::MAX_FLOWS);
const EMBRYONIC: Spec = Spec::new::<common::FlowKey, common::FlowValue>("EMBRYONIC", common::MAX_EMBRYONIC);
pub(crate) const VIPS6: Spec = Spec::new::<common::VipKey6, common::VipValue>("VIPS6", common::MAX_VIPS);
pub(crate) const PORTS6: Spec = Spec::new::<common::PortKey6, common::PortValue>("PORTS6", common::MAX_PORTS);
const REPLIES6: Spec = Spec::new::<common::ReplyKey, common::ReplyValue6>("REPLIES6", common::MAX_PORTS);
const FLOWS6: Spec = Spec::new::<common::FlowKey6, common::FlowValue>("FLOWS6", common::MAX_FLOWS);
const EMBRYONIC6: Spec =
    Spec::new::<common::FlowKey6, common::FlowValue>("EMBRYONIC6", common::MAX_EMBRYONIC);
const FRAGMENTS6: Spec =
    Spec::new::<common::FragmentKey6, common::FragmentValue6>("FRAGMENTS6", common::MAX_FRAGMENTS);
const WALK: Spec = Spec::new::<u32, common::Walk>("WALK", 1);
const FRAGMENTS: Spec = Spec::new::<common::FragmentKey, common::Ports>("FRAGMENTS", common::MAX_FRAGMENTS);
pub(crate) const FLEET: Spec = Spec::new::<common::FleetKey, u32>("FLEET", common::MAX_FLEET);
const RATES: Spec = Spec::new::<u32, u64>("RATES", 2);
pub(crate) const COUNTERS: Spec = Spec::new::<u32, common::Counters>("COUNTERS", 1);
pub(crate) const VIP_COUNTERS: Spec = Spec::new::<u32, common::VipCounters>("VIP_COUNTERS", common::MAX_VIPS);

pub(crate) const INSTANCE_COUNTERS: Spec =
    Spec::new::<u32, common::InstanceCounters>("INSTANCE_COUNTERS", common::MAX_INSTANCE_COUNTERS);

pub(crate) const FLOW_EVENTS: Spec = Spec::new::<(), ()>("FLOW_EVENTS", common::FLOW_EVENTS_BYTES);
pub(crate) const FLOW_EVENTS_LOST: Spec = Spec::new::<u32, u64>("FLOW_EVENTS_LOST", 1);

const ALL: [&Spec; 25] = [
    &CONFIG,
    &CONFIG6,
    &VIPS,
    &VIPS6,
    &PORTS6,
    &REPLIES6,
    &FLOWS6,
    &EMBRYONIC6,
    &FRAGMENTS6,
    &WALK,
    &BUCKETS,
    &INSTANCES,
    &INSTANCE_FILTER,
    &PORTS,
    &REPLIES,
    &FLOWS,
    &EMBRYONIC,
    &FRAGMENTS,
    &FLEET,
    &RATES,
    &COUNTERS,
    &VIP_COUNTERS,
    &INSTANCE_COUNTERS,
    &FLOW_EVENTS,
    &FLOW_EVENTS_LOST,
];

fn take(object: &mut Ebpf, name: &'static str) -> Result<Map, Error> {
    object.take_map(name).ok_or(Error::Missing { kind: "map", name })
}

pub(crate) fn typed<T: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, spec: &Spec) -> Result<T, Error> {
    T::try_from(take(object, spec.name)?).map_err(|source| spec.error("open", source))
}
