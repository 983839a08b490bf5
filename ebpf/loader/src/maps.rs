//! The maps with their types, as they come out of a loaded object.

use std::{io, os::fd::AsFd as _, path::Path};

use anyplace_ebpf_common as common;
use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
    sys::SyscallError,
};

use crate::{Error, arena::Arena};

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
    fn take(object: &mut Ebpf, spec: &Spec) -> Result<Self, Error> {
        let map = take(object, spec.name)?;
        let map = HashMap::try_from(map).map_err(|source| spec.error("open", source))?;
        Ok(Self { name: spec.name, limit: spec.entries, map })
    }

    /// Adds or replaces an entry; a program sees the old value or the new one, never a mixture.
    pub(crate) fn set(&mut self, key: K, value: V) -> Result<(), Error> {
        self.map.insert(Plain(key), Plain(value), 0).map_err(|source| match errno(&source) {
            Some(libc::E2BIG) => Error::Full { map: self.name, limit: self.limit },
            _ => Error::Map { map: self.name, call: "bpf_map_update_elem", source },
        })
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

/// All maps but the flow table, which only the programs use.
pub(crate) struct Maps {
    pub(crate) vips: Table<common::VipKey, common::VipValue>,
    pub(crate) instances: Table<u32, common::InstanceValue>,
    pub(crate) ports: Table<common::PortKey, common::PortValue>,
    pub(crate) replies: Table<common::ReplyKey, common::ReplyValue>,
    pub(crate) counters: PerCpuArray<MapData, Plain<common::Counters>>,
    pub(crate) vip_counters: PerCpuArray<MapData, Plain<common::VipCounters>>,
    pub(crate) config: Array<MapData, Plain<common::Config>>,
    pub(crate) arena: Arena,
}

impl Maps {
    /// Takes the maps out of a loaded object.
    pub(crate) fn take(object: &mut Ebpf) -> Result<Self, Error> {
        let vips: Table<common::VipKey, common::VipValue> = Table::take(object, &VIPS)?;
        let Map::Array(buckets) = take(object, BUCKETS.name)? else {
            return Err(Error::Missing { kind: "array map", name: BUCKETS.name });
        };
        // One range for each VIP: the full table and the local one behind it.
        let used = vips.entries()?.into_iter().map(|(_, value)| whole(&value));
        let arena = Arena::new(buckets.fd().as_fd(), common::ARENA_BUCKETS, used)
            .map_err(|io_error| BUCKETS.error("mmap", SyscallError { call: "mmap", io_error }.into()))?;
        Ok(Self {
            vips,
            instances: Table::take(object, &INSTANCES)?,
            ports: Table::take(object, &PORTS)?,
            replies: Table::take(object, &REPLIES)?,
            counters: typed(object, &COUNTERS)?,
            vip_counters: typed(object, &VIP_COUNTERS)?,
            config: typed(object, &CONFIG)?,
            arena,
        })
    }
}

/// The range of both tables of a VIP.
pub(crate) fn whole(value: &common::VipValue) -> common::Range {
    common::Range { offset: value.full.offset, len: value.full.len + value.local.len }
}

/// Refuses a folder with maps of another layout, before anything is loaded.
pub(crate) fn check_pinned(folder: &Path) -> Result<(), Error> {
    for spec in ALL {
        let path = folder.join(spec.name);
        if !path.exists() {
            continue;
        }
        let info = MapData::from_pin(&path)
            .and_then(|map| map.info())
            .map_err(|source| spec.error("BPF_OBJ_GET", source))?;
        let found = (info.key_size(), info.value_size(), info.max_entries());
        let expected = (spec.key, spec.value, spec.entries);
        if found != expected {
            let text =
                |(key, value, entries)| format!("keys of {key}, values of {value} bytes, {entries} entries");
            return Err(Error::Layout { path, found: text(found), expected: text(expected) });
        }
    }
    Ok(())
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
const VIPS: Spec = Spec::new::<common::VipKey, common::VipValue>("VIPS", common::MAX_VIPS);
const BUCKETS: Spec = Spec::new::<u32, common::Bucket>("BUCKETS", common::ARENA_BUCKETS);
const INSTANCES: Spec = Spec::new::<u32, common::InstanceValue>("INSTANCES", common::MAX_INSTANCES);
const PORTS: Spec = Spec::new::<common::PortKey, common::PortValue>("PORTS", common::MAX_PORTS);
const REPLIES: Spec = Spec::new::<common::ReplyKey, common::ReplyValue>("REPLIES", common::MAX_PORTS);
const FLOWS: Spec = Spec::new::<common::FlowKey, common::FlowValue>("FLOWS", common::MAX_FLOWS);
pub(crate) const COUNTERS: Spec = Spec::new::<u32, common::Counters>("COUNTERS", 1);
pub(crate) const VIP_COUNTERS: Spec = Spec::new::<u32, common::VipCounters>("VIP_COUNTERS", common::MAX_VIPS);

const ALL: [&Spec; 9] =
    [&CONFIG, &VIPS, &BUCKETS, &INSTANCES, &PORTS, &REPLIES, &FLOWS, &COUNTERS, &VIP_COUNTERS];

fn take(object: &mut Ebpf, name: &'static str) -> Result<Map, Error> {
    object.take_map(name).ok_or(Error::Missing { kind: "map", name })
}

fn typed<T: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, spec: &Spec) -> Result<T, Error> {
    T::try_from(take(object, spec.name)?).map_err(|source| spec.error("open", source))
}
