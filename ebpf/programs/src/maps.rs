//! The maps, all pinned by name, and small accessors around them.

use anyplace_ebpf_common::{
    ARENA_BUCKETS, Bucket, Config, Counter, Counters, FILTER_WORDS, FlowKey, FlowValue, FragmentKey,
    ICMP_BURST, InstanceCounters, InstanceValue, MAX_EMBRYONIC, MAX_FLEET, MAX_FLOWS, MAX_FRAGMENTS,
    MAX_INSTANCE_COUNTERS, MAX_INSTANCES, MAX_PORTS, MAX_VIPS, Outcome, PortKey, PortValue, Ports, Range,
    ReplyKey, ReplyValue, VipCounters, VipKey, VipValue, bucket_index, filter_bit,
};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
};

use crate::events;

#[map]
static CONFIG: Array<Config> = Array::pinned(1, 0);

#[map]
static VIPS: HashMap<VipKey, VipValue> = HashMap::pinned(MAX_VIPS, 0);

/// The arena. Mappable, so that the loader fills a table with plain writes.
#[map]
static BUCKETS: Array<Bucket> = Array::pinned(ARENA_BUCKETS, BPF_F_MMAPABLE);

#[map]
static INSTANCES: HashMap<u32, InstanceValue> = HashMap::pinned(MAX_INSTANCES, BPF_F_NO_PREALLOC);

/// Bits of the addresses in INSTANCES, so that one which isn't there needs no lookup.
#[map]
static INSTANCE_FILTER: Array<u64> = Array::pinned(FILTER_WORDS, 0);

#[map]
static PORTS: HashMap<PortKey, PortValue> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);

#[map]
static REPLIES: HashMap<ReplyKey, ReplyValue> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);

#[map]
static FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::pinned(MAX_FLOWS, 0);

/// Flows of which one packet was seen. A table of their own, so that a flood of new tuples evicts none of FLOWS.
#[map]
static EMBRYONIC: LruHashMap<FlowKey, FlowValue> = LruHashMap::pinned(MAX_EMBRYONIC, 0);

#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Ports> = LruHashMap::pinned(MAX_FRAGMENTS, 0);

#[map]
static FLEET: LpmTrie<u32, u32> = LpmTrie::pinned(MAX_FLEET, BPF_F_NO_PREALLOC);

/// For each [`Answer`], when the next one may go.
#[map]
static RATES: PerCpuArray<u64> = PerCpuArray::pinned(2, 0);

#[map]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::pinned(1, 0);

#[map]
static VIP_COUNTERS: PerCpuArray<VipCounters> = PerCpuArray::pinned(MAX_VIPS, 0);

#[map]
static INSTANCE_COUNTERS: PerCpuArray<InstanceCounters> = PerCpuArray::pinned(MAX_INSTANCE_COUNTERS, 0);

#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

#[inline(always)]
pub(crate) fn vip(key: &VipKey) -> Option<VipValue> {
    // Written as one word: the processor is slow to read what it has just written in pieces.
    let words = [u64::from(key.address) | u64::from(key.port) << 32 | u64::from(key.protocol) << 48];
    // SAFETY: the same bytes; the value is copied at once, and an update replaces the element instead of writing into it.
    unsafe { VIPS.get(&*words.as_ptr().cast::<VipKey>()) }.copied()
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

/// Whether an address is an instance's of this machine; cheaper than [`instance`] where it mostly isn't.
#[inline(always)]
pub(crate) fn is_instance(address: u32) -> bool {
    let (word, bit) = filter_bit(address);
    INSTANCE_FILTER.get(word).is_some_and(|bits| bits & bit != 0) && instance(address).is_some()
}

#[inline(always)]
pub(crate) fn served_port(key: &PortKey) -> Option<PortValue> {
    // In words, as in `vip`.
    let words = [key.instance, key.vip, u32::from(key.vip_port) | u32::from(key.protocol) << 16];
    // SAFETY: the same bytes; copied at once, and an update replaces the element.
    unsafe { PORTS.get(&*words.as_ptr().cast::<PortKey>()) }.copied()
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

/// Who has seen the one packet of a flow.
#[inline(always)]
pub(crate) fn embryonic_owner(key: &FlowKey) -> u32 {
    // SAFETY: as in `flow_owner`.
    unsafe { EMBRYONIC.get(key) }.map_or(0, |value| value.instance)
}

/// Remembers who owns a flow, and says whether it does. The map evicts by itself; a failure costs at most a detour of
/// later packets.
#[inline(always)]
pub(crate) fn establish_flow(key: &FlowKey, instance: u32) -> bool {
    let established = FLOWS.insert(key, FlowValue { instance }, 0).is_ok();
    if established {
        count(Counter::NewFlows);
        events::flow(key, instance, Outcome::Established);
    }
    established
}

/// Remembers who has seen the first packet of a flow.
#[inline(always)]
pub(crate) fn note_flow(key: &FlowKey, instance: u32) {
    if EMBRYONIC.insert(key, FlowValue { instance }, 0).is_ok() {
        count(Counter::Embryonic);
    }
}

/// Moves a flow among the established ones.
#[inline(always)]
pub(crate) fn promote_flow(key: &FlowKey, instance: u32) -> bool {
    let established = establish_flow(key, instance);
    // Gone already only if the table evicted it meanwhile.
    let _ = EMBRYONIC.remove(key);
    established
}

/// The ports of a packet whose first fragment was seen.
#[inline(always)]
pub(crate) fn fragment_ports(key: &FragmentKey) -> Option<Ports> {
    // SAFETY: copied at once; see `flow_owner`.
    unsafe { FRAGMENTS.get(key) }.copied()
}

/// Remembers a first fragment. Without it the rest is dropped and counted.
#[inline(always)]
pub(crate) fn record_fragment(key: &FragmentKey, ports: Ports) {
    let _ = FRAGMENTS.insert(key, ports, 0);
}

/// Whether this machine may take an encapsulation from `source`.
#[inline(always)]
pub(crate) fn in_fleet(config: &Config, source: u32) -> bool {
    config.fleet_only == 0 || source == config.address || FLEET.get(Key::new(32, source)).is_some()
}

/// What is sent at a limited rate.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Answer {
    Echo,
    TooBig,
}

/// Whether one more answer may go now.
#[inline(always)]
pub(crate) fn may_answer(config: &Config, answer: Answer) -> bool {
    let interval = u64::from(config.icmp_interval);
    if interval == 0 {
        return true;
    }
    let Some(next) = RATES.get_ptr_mut(answer as u32) else { return false };
    // SAFETY: the helper has no preconditions; the value is this CPU's own.
    unsafe {
        let now = bpf_ktime_get_ns();
        let earliest = now.saturating_sub(interval * u64::from(ICMP_BURST - 1));
        let at = if *next > earliest { *next } else { earliest };
        if at > now {
            return false;
        }
        *next = at + interval;
    }
    true
}

#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: a per-CPU value, and programs on one CPU don't interrupt each other within a counter's update on the
        // receive path; the index is a constant inside the array.
        unsafe { (*counters).values[counter as usize] += 1 };
    }
}

/// Counts a client's packet.
#[inline(always)]
pub(crate) fn count_packet(bytes: u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: as in `count`.
        unsafe {
            (*counters).values[Counter::Packets as usize] += 1;
            (*counters).values[Counter::Bytes as usize] += bytes;
        }
    }
}

#[inline(always)]
pub(crate) fn count_vip(index: u32, bytes: u64, connection: bool) {
    if let Some(counters) = VIP_COUNTERS.get_ptr_mut(index) {
        // SAFETY: as in `count`.
        unsafe {
            (*counters).packets += 1;
            (*counters).bytes += bytes;
            (*counters).connections += u64::from(connection);
        }
    }
}

/// Counts a client's packet that an instance gets, and whether it established a flow there.
#[inline(always)]
pub(crate) fn count_instance(index: u16, bytes: u32, new_flow: bool) {
    if let Some(counters) = INSTANCE_COUNTERS.get_ptr_mut(u32::from(index)) {
        // SAFETY: as in `count`.
        unsafe {
            (*counters).packets += 1;
            (*counters).bytes += u64::from(bytes);
            (*counters).new_flows += u64::from(new_flow);
        }
    }
}
