//! The maps of VIPs that are IPv6 addresses; the others serve both families.

use anyplace_ebpf_common::{
    Address6, Config6, Counter, FlowKey6, FlowValue, FragmentKey6, FragmentValue6, MAX_EMBRYONIC, MAX_FLOWS,
    MAX_FRAGMENTS, MAX_PORTS, MAX_VIPS, Outcome, PortKey6, PortValue, ReplyKey, ReplyValue6, VipKey6,
    VipValue, Walk,
};
use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};

use crate::{events, maps::count};

#[map]
static CONFIG6: Array<Config6> = Array::pinned(1, 0);

#[map]
static VIPS6: HashMap<VipKey6, VipValue> = HashMap::pinned(MAX_VIPS, BPF_F_NO_PREALLOC);

#[map]
static PORTS6: HashMap<PortKey6, PortValue> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);

#[map]
static REPLIES6: HashMap<ReplyKey, ReplyValue6> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);

#[map]
static FLOWS6: LruHashMap<FlowKey6, FlowValue> = LruHashMap::pinned(MAX_FLOWS, 0);

#[map]
static EMBRYONIC6: LruHashMap<FlowKey6, FlowValue> = LruHashMap::pinned(MAX_EMBRYONIC, 0);

#[map]
static FRAGMENTS6: LruHashMap<FragmentKey6, FragmentValue6> = LruHashMap::pinned(MAX_FRAGMENTS, 0);

#[map]
static WALK: PerCpuArray<Walk> = PerCpuArray::pinned(1, 0);

/// Whether an address is the machine's own.
#[inline(always)]
pub(crate) fn is_own(address: Address6) -> bool {
    CONFIG6.get(0).is_some_and(|config| config.address == address)
}

/// This CPU's scratch memory.
#[inline(always)]
pub(crate) fn walk() -> Option<*mut Walk> {
    WALK.get_ptr_mut(0)
}

#[inline(always)]
pub(crate) fn vip(key: &VipKey6) -> Option<VipValue> {
    // SAFETY: the value is copied at once; an update replaces the element instead of writing into it.
    unsafe { VIPS6.get(key) }.copied()
}

/// Whether `address` is a VIP, whatever its ports.
#[inline(always)]
pub(crate) fn is_vip(address: Address6) -> bool {
    vip(&VipKey6::marker(address)).is_some()
}

#[inline(always)]
pub(crate) fn served_port(key: &PortKey6) -> Option<PortValue> {
    // SAFETY: copied at once; an update replaces the element.
    unsafe { PORTS6.get(key) }.copied()
}

#[inline(always)]
pub(crate) fn reply(key: &ReplyKey) -> Option<ReplyValue6> {
    // SAFETY: copied at once; an update replaces the element.
    unsafe { REPLIES6.get(key) }.copied()
}

#[inline(always)]
pub(crate) fn flow_owner(key: &FlowKey6) -> u32 {
    // SAFETY: as with FLOWS.
    unsafe { FLOWS6.get(key) }.map_or(0, |value| value.instance)
}

#[inline(always)]
pub(crate) fn embryonic_owner(key: &FlowKey6) -> u32 {
    // SAFETY: as with FLOWS.
    unsafe { EMBRYONIC6.get(key) }.map_or(0, |value| value.instance)
}

#[inline(always)]
pub(crate) fn establish_flow(key: &FlowKey6, instance: u32) -> bool {
    let established = FLOWS6.insert(key, FlowValue { instance }, 0).is_ok();
    if established {
        count(Counter::NewFlows);
        events::flow6(key, instance, Outcome::Established);
    }
    established
}

#[inline(always)]
pub(crate) fn note_flow(key: &FlowKey6, instance: u32) {
    if EMBRYONIC6.insert(key, FlowValue { instance }, 0).is_ok() {
        count(Counter::Embryonic);
    }
}

#[inline(always)]
pub(crate) fn promote_flow(key: &FlowKey6, instance: u32) -> bool {
    let established = establish_flow(key, instance);
    // Gone already only if the table evicted it meanwhile.
    let _ = EMBRYONIC6.remove(key);
    established
}

#[inline(always)]
pub(crate) fn fragment(key: &FragmentKey6) -> Option<FragmentValue6> {
    // SAFETY: copied at once; see FLOWS.
    unsafe { FRAGMENTS6.get(key) }.copied()
}

#[inline(always)]
pub(crate) fn record_fragment(key: &FragmentKey6, value: FragmentValue6) {
    let _ = FRAGMENTS6.insert(key, value, 0);
}
