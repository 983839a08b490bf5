//! The maps, all pinned by name, and small accessors around them.

use anyplace_ebpf_common::{
    ARENA_BUCKETS, Bucket, Config, Counter, Counters, FlowKey, FlowValue, InstanceValue, MAX_FLOWS,
    MAX_INSTANCES, MAX_PORTS, MAX_VIPS, PortKey, PortValue, Range, ReplyKey, ReplyValue, VipCounters, VipKey,
    VipValue, bucket_index,
};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};

#[map]
static CONFIG: Array<Config> = Array::pinned(1, 0);

#[map]
static VIPS: HashMap<VipKey, VipValue> = HashMap::pinned(MAX_VIPS, 0);

/// The arena. Mappable, so that the loader fills a table with plain writes.
#[map]
static BUCKETS: Array<Bucket> = Array::pinned(ARENA_BUCKETS, BPF_F_MMAPABLE);

#[map]
static INSTANCES: HashMap<u32, InstanceValue> = HashMap::pinned(MAX_INSTANCES, BPF_F_NO_PREALLOC);

#[map]
static PORTS: HashMap<PortKey, PortValue> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);

#[map]
static REPLIES: HashMap<ReplyKey, ReplyValue> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);

#[map]
static FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::pinned(MAX_FLOWS, 0);

#[map]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::pinned(1, 0);

#[map]
static VIP_COUNTERS: PerCpuArray<VipCounters> = PerCpuArray::pinned(MAX_VIPS, 0);

#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

#[inline(always)]
pub(crate) fn vip(key: &VipKey) -> Option<VipValue> {
    // SAFETY: the value is copied at once; an update replaces the element instead of writing into it.
    unsafe { VIPS.get(key) }.copied()
}

/// Whether `address` is a VIP, whatever its ports.
#[inline(always)]
pub(crate) fn is_vip(address: u32) -> bool {
    vip(&VipKey::marker(address)).is_some()
}

/// The bucket of a flow; `None` for an empty table or a bucket without an owner.
#[inline(always)]
pub(crate) fn bucket(range: &Range, hash: u64) -> Option<Bucket> {
    if range.len == 0 {
        return None;
    }
    let bucket = *BUCKETS.get(range.offset.wrapping_add(bucket_index(hash, range.len)))?;
    if bucket.now == 0 { None } else { Some(bucket) }
}

#[inline(always)]
pub(crate) fn instance(address: u32) -> Option<&'static InstanceValue> {
    // SAFETY: used within this program run; an update replaces the element instead of writing into it.
    unsafe { INSTANCES.get(&address) }
}

#[inline(always)]
pub(crate) fn container_port(key: &PortKey) -> Option<u16> {
    // SAFETY: copied at once; an update replaces the element.
    unsafe { PORTS.get(key) }.map(|value| value.port)
}

#[inline(always)]
pub(crate) fn reply(key: &ReplyKey) -> Option<ReplyValue> {
    // SAFETY: copied at once; an update replaces the element.
    unsafe { REPLIES.get(key) }.copied()
}

#[inline(always)]
pub(crate) fn flow_owner(key: &FlowKey) -> u32 {
    // SAFETY: copied at once. An LRU may reuse the element for another flow under our eyes; the four bytes read are
    // then some instance's address, and the worst outcome is that one packet takes its second hop.
    unsafe { FLOWS.get(key) }.map_or(0, |value| value.instance)
}

/// Remembers who owns a flow. The map evicts by itself; a failure costs at most a detour of later packets.
#[inline(always)]
pub(crate) fn record_flow(key: &FlowKey, instance: u32) {
    if FLOWS.insert(key, FlowValue { instance }, 0).is_ok() {
        count(Counter::NewFlows);
    }
}

#[inline(always)]
pub(crate) fn count(counter: Counter) {
    add(counter, 1);
}

#[inline(always)]
pub(crate) fn add(counter: Counter, amount: u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: a per-CPU value, and programs on one CPU don't interrupt each other within a counter's update on the
        // receive path; the index is a constant inside the array.
        unsafe { (*counters).values[counter as usize] += amount };
    }
}

#[inline(always)]
pub(crate) fn count_vip(index: u32, bytes: u64, connection: bool) {
    if let Some(counters) = VIP_COUNTERS.get_ptr_mut(index) {
        // SAFETY: as in `add`.
        unsafe {
            (*counters).packets += 1;
            (*counters).bytes += bytes;
            (*counters).connections += u64::from(connection);
        }
    }
}
