//! Events of flows for the flow log: some of the flows that are established here, and of the packets that are refused.
//!
//! A reader that doesn't keep up loses events, never packets; they are counted.

use anyplace_ebpf_common::{
    Address6, Counter, FLOW_EVENTS_BYTES, FlowEvent, FlowKey, FlowKey6, Ipv4Header, Ipv6Header, Outcome,
    Ports, mapped,
};
use aya_ebpf::{
    bindings::xdp_md,
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns},
    macros::map,
    maps::{PerCpuArray, RingBuf},
    programs::XdpContext,
};

use crate::{
    maps,
    packet::{ETHERNET, IPV4},
    packet6::IPV6,
    unusual::load,
};

#[map]
static FLOW_EVENTS: RingBuf = RingBuf::pinned(FLOW_EVENTS_BYTES, 0);

/// Events for which the ring buffer had no room.
#[map]
static FLOW_EVENTS_LOST: PerCpuArray<u64> = PerCpuArray::pinned(1, 0);

/// Whether this one is told.
#[inline(always)]
fn is_sampled() -> bool {
    let sample = maps::config().map_or(0, |config| config.flow_sample);
    // SAFETY: the helper has no preconditions.
    sample != 0 && unsafe { bpf_get_prandom_u32() } <= sample
}

/// An IPv4 flow was established, or one of its packets refused.
#[inline(always)]
pub(crate) fn flow(key: &FlowKey, instance: u32, outcome: Outcome) {
    if is_sampled() {
        tell(key, instance, outcome as u32);
    }
}

/// The same for IPv6.
#[inline(always)]
pub(crate) fn flow6(key: &FlowKey6, instance: u32, outcome: Outcome) {
    if is_sampled() {
        tell6(key, instance, outcome as u32);
    }
}

/// A packet of this flow was dropped, for a reason that may be worth an event.
#[inline(always)]
pub(crate) fn refused(key: &FlowKey, reason: Counter) {
    if let Some(outcome) = outcome(reason) {
        flow(key, 0, outcome);
    }
}

/// The same for IPv6.
#[inline(always)]
pub(crate) fn refused6(key: &FlowKey6, reason: Counter) {
    if let Some(outcome) = outcome(reason) {
        flow6(key, 0, outcome);
    }
}

#[inline(always)]
fn outcome(reason: Counter) -> Option<Outcome> {
    match reason {
        Counter::NoBackend => Some(Outcome::NoBackend),
        Counter::NoInstance => Some(Outcome::NoInstance),
        _ => None,
    }
}

/// A plain TCP or UDP packet found no backend at ingress. It is read once more, so that those which find one pay nothing.
#[inline(never)]
pub(crate) fn refused_at_ingress(ctx: *mut xdp_md) {
    if !is_sampled() {
        return;
    }
    let ctx = XdpContext::new(ctx);
    let Ok(ip) = load::<Ipv4Header>(&ctx, ETHERNET) else { return };
    let Ok(ports) = load::<Ports>(&ctx, ETHERNET + IPV4) else { return };
    let (source, vip) = (u32::from_ne_bytes(ip.source), u32::from_ne_bytes(ip.destination));
    put(mapped(source), mapped(vip), ports, ip.protocol, 0, Outcome::NoBackend as u32);
}

/// The same for IPv6.
#[inline(never)]
pub(crate) fn refused_at_ingress6(ctx: *mut xdp_md) {
    if !is_sampled() {
        return;
    }
    let ctx = XdpContext::new(ctx);
    let Ok(ip) = load::<Ipv6Header>(&ctx, ETHERNET) else { return };
    let Ok(ports) = load::<Ports>(&ctx, ETHERNET + IPV6) else { return };
    put(ip.source(), ip.destination(), ports, ip.next, 0, Outcome::NoBackend as u32);
}

// Functions of their own, so that what they need isn't on the stack of their callers.
#[inline(never)]
fn tell(key: &FlowKey, instance: u32, outcome: u32) {
    let ports = Ports { source: key.source_port, destination: key.vip_port };
    put(mapped(key.source), mapped(key.vip), ports, key.protocol, instance, outcome);
}

#[inline(never)]
fn tell6(key: &FlowKey6, instance: u32, outcome: u32) {
    let ports = Ports { source: key.source_port, destination: key.vip_port };
    put(key.source, key.vip, ports, key.protocol, instance, outcome);
}

/// Writes an event into the buffer itself: the stack has no room for one.
#[inline(always)]
fn put(source: Address6, vip: Address6, ports: Ports, protocol: u8, instance: u32, outcome: u32) {
    let Some(mut place) = FLOW_EVENTS.reserve::<FlowEvent>(0) else {
        if let Some(lost) = FLOW_EVENTS_LOST.get_ptr_mut(0) {
            // SAFETY: this CPU's own value.
            unsafe { *lost += 1 };
        }
        return;
    };
    let event = place.as_mut_ptr();
    // SAFETY: room for an event, which is written in full; the helper has no preconditions.
    unsafe {
        (*event).time_ns = bpf_ktime_get_ns();
        (*event).source = source;
        (*event).vip = vip;
        (*event).instance = instance;
        (*event).source_port = ports.source;
        (*event).vip_port = ports.destination;
        (*event).protocol = protocol;
        (*event).outcome = outcome as u8;
        (*event).reserved = [0; 6];
    }
    place.submit(0);
}
