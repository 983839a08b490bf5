//! `target`: encapsulated packets, at the machine of a hop.
//!
//! The outer destination is the hop being tried. An instance of this machine that owns the flow (or is offered a new
//! one, or is the last hop) gets the packet; otherwise the next hop is tried, here or elsewhere. The machine's own
//! address means that another location sent the packet: the location's own table names the instance.
//!
//! Flows are known from their second packet on (FLOWS); what was seen once is in a table of its own (EMBRYONIC), so that
//! a flood of new tuples forgets nobody's connection.

use core::mem::{MaybeUninit, offset_of};

use anyplace_ebpf_common::{
    Bucket, Config, Counter, ENCAPSULATION_BYTES, Encapsulation, GUE_FLAGS_AND_PROTOCOL,
    GUE_FLAGS_AND_PROTOCOL_IPV6, GUE_PORT, HOPS, InstanceValue, Ipv4Header, PortKey, UDP, VipKey, flow_hash,
};
use aya_ebpf::{
    bindings::{BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect_neigh,
    macros::classifier,
    programs::TcContext,
};

use crate::{
    deliver::{deliver, helper},
    events,
    inner::{self, FRAGMENT_UNKNOWN, INNER, Inner, MALFORMED, OPTIONS, READ},
    maps,
    packet::{self, ETHERNET, ETHERTYPE_IPV4, in_buffer},
};

/// Hops tried on this machine for one packet: a relay, its two instances, the first of them again, and one to spare.
pub(crate) const MAX_TRIES: usize = 5;

#[classifier]
pub fn target(ctx: TcContext) -> i32 {
    match try_target(&ctx) {
        Ok(action) => action,
        Err(reason) => {
            maps::count(reason);
            TC_ACT_SHOT
        }
    }
}

/// The hop being tried and those after it. Three variables and not an array: an index that the verifier can't follow
/// would cost a bounds check and a stack copy each time.
pub(crate) struct Route {
    pub(crate) hop: u32,
    next: [u32; 3],
    pub(crate) left: u8,
}

impl Route {
    /// What an encapsulation says that was received at `hop`.
    #[inline(always)]
    pub(crate) fn new(hop: u32, outer: &Encapsulation) -> Self {
        let hops = [
            u32::from_ne_bytes(outer.hops[0]),
            u32::from_ne_bytes(outer.hops[1]),
            u32::from_ne_bytes(outer.hops[2]),
        ];
        let (next, left) = match outer.next_hop {
            0 => (hops, 3),
            1 => ([hops[1], hops[2], 0], 2),
            2 => ([hops[2], 0, 0], 1),
            _ => ([0; 3], 0),
        };
        Self { hop, next, left }
    }

    #[inline(always)]
    fn pop(&mut self) -> bool {
        if self.left == 0 {
            return false;
        }
        self.hop = self.next[0];
        self.next = [self.next[1], self.next[2], 0];
        self.left -= 1;
        true
    }

    #[inline(always)]
    fn push(&mut self, hop: u32) {
        // Full only if a list of three arrives that was never tried, which our ingress doesn't send; the last falls off.
        self.next = [hop, self.next[0], self.next[1]];
        if self.left < HOPS {
            self.left += 1;
        }
    }

    /// The machine's own address becomes the hops of this location's bucket.
    #[inline(always)]
    pub(crate) fn relay(&mut self, bucket: Option<Bucket>) -> Result<(), Counter> {
        let Some(bucket) = bucket else {
            return if self.pop() { Ok(()) } else { Err(Counter::NoBackend) };
        };
        maps::count(Counter::Relayed);
        if bucket.before != bucket.now && bucket.before != 0 {
            // The end of the list is ours to extend, so that a flow which nobody knows comes to its owner after all.
            if self.left == 0 {
                self.push(bucket.now);
            }
            self.push(bucket.before);
        }
        self.hop = bucket.now;
        Ok(())
    }
}

/// The encapsulation, if the frame is long enough for one. Read where it stands: it is gone with the first change of the
/// packet.
#[inline(always)]
pub(crate) fn outer(ctx: &TcContext) -> Option<&Encapsulation> {
    let found = match in_buffer::<Encapsulation>(ctx, ETHERNET) {
        None => {
            // Longer frames may have their first bytes elsewhere.
            ctx.pull_data(INNER as u32).ok()?;
            in_buffer::<Encapsulation>(ctx, ETHERNET)?
        }
        Some(found) => found,
    };
    // SAFETY: `in_buffer` checked the bounds; the verifier refuses a use after the packet has moved.
    Some(unsafe { &*found })
}

/// The same once more, for what comes after the client's packet was read: so that the verifier forgets how far it was looked
/// into, and goes through the rest once and not for each kind of packet.
#[inline(always)]
pub(crate) fn outer_again(ctx: &TcContext) -> Result<&Encapsulation, Counter> {
    // SAFETY: the context is the kernel's; volatile, or the compiler would know them from before.
    let (start, end) = unsafe {
        let skb = ctx.skb.skb;
        ((&raw const (*skb).data).read_volatile(), (&raw const (*skb).data_end).read_volatile())
    };
    let (start, end) = (start as usize, end as usize);
    if start + INNER > end {
        return Err(Counter::HelperFailed);
    }
    // SAFETY: the bounds were checked.
    Ok(unsafe { &*((start + ETHERNET) as *const Encapsulation) })
}

/// Whether an encapsulation has the form that our ingress gives it; its protocol was looked at before.
#[inline(always)]
pub(crate) fn is_well_formed(outer: &Encapsulation) -> bool {
    outer.private_type == 0 && outer.hop_count == HOPS && outer.next_hop <= HOPS
}

/// What becomes of a packet whose inner part isn't what our ingress sends.
#[inline(always)]
pub(crate) fn unreadable(found: u32, ours: bool) -> Result<i32, Counter> {
    match found {
        _ if !ours => Ok(TC_ACT_UNSPEC),
        MALFORMED => Err(Counter::Malformed),
        OPTIONS => Err(Counter::Options),
        FRAGMENT_UNKNOWN => Err(Counter::FragmentUnknown),
        _ => Err(Counter::HelperFailed),
    }
}

/// A verdict, or the reason for a drop.
#[inline(always)]
fn try_target(ctx: &TcContext) -> Result<i32, Counter> {
    // SAFETY: the context is the kernel's.
    if unsafe { (*ctx.skb.skb).protocol } != u32::from(ETHERTYPE_IPV4) {
        return Ok(TC_ACT_UNSPEC);
    }
    let Some(outer) = outer(ctx) else { return Ok(TC_ACT_UNSPEC) };
    if outer.ip.version_ihl != 0x45
        || outer.ip.protocol != UDP
        || outer.udp.destination != GUE_PORT.to_be()
        || packet::is_fragment(&outer.ip)
        // What `target6` is for, the next program.
        || outer.gue == GUE_FLAGS_AND_PROTOCOL_IPV6
    {
        return Ok(TC_ACT_UNSPEC);
    }
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    let mut arrival = Arrival::new(config, outer);
    if arrival.is_ours() && arrival.is_foreign() {
        return Err(Counter::ForeignSource);
    }
    let mut inner = MaybeUninit::uninit();
    let found = if outer.gue != GUE_FLAGS_AND_PROTOCOL || !is_well_formed(outer) {
        MALFORMED
    } else if let Some(plain) = inner::plain(ctx, outer) {
        inner.write(plain);
        READ
    } else {
        inner::unusual(ctx.skb.skb, &mut inner, u32::from(u16::from_be(outer.ip.total_length)))
    };
    if found != READ {
        return unreadable(found, arrival.is_ours());
    }
    // SAFETY: `READ` says that it was written.
    let inner = unsafe { inner.assume_init_mut() };
    inner.forget(ctx);
    arrival.forget(ctx);
    let outer = outer_again(ctx)?;
    let result = try_route(ctx, inner, outer, config, &arrival);
    if let Err(reason) = result {
        events::refused(&inner.flow, reason);
    }
    result
}

/// Where a packet arrived, and from where.
pub(crate) struct Arrival {
    /// Its outer destination: the first hop to try.
    pub(crate) address: u32,
    /// The instance of this machine with that address.
    pub(crate) instance: Option<&'static InstanceValue>,
    /// The bits below.
    whose: u32,
}

/// The address is an instance's, or the machine's own.
const OURS: u32 = 1;
/// The packet comes from outside the fleet.
const FOREIGN: u32 = 2;

impl Arrival {
    #[inline(always)]
    pub(crate) fn new(config: &Config, outer: &Encapsulation) -> Self {
        let address = u32::from_ne_bytes(outer.ip.destination);
        let instance = maps::instance(address);
        let ours = address == config.address || instance.is_some();
        let foreign = !maps::in_fleet(config, u32::from_ne_bytes(outer.ip.source));
        let whose = if ours { OURS } else { 0 } | if foreign { FOREIGN } else { 0 };
        Self { address, instance, whose }
    }

    #[inline(always)]
    pub(crate) fn is_ours(&self) -> bool {
        self.whose & OURS != 0
    }

    #[inline(always)]
    pub(crate) fn is_foreign(&self) -> bool {
        self.whose & FOREIGN != 0
    }

    /// As [`Inner::forget`].
    #[inline(always)]
    pub(crate) fn forget(&mut self, ctx: &TcContext) {
        self.whose = inner::forget(ctx, self.whose);
    }
}

/// Tries the hops.
#[inline(always)]
fn try_route(
    ctx: &TcContext,
    inner: &Inner,
    outer: &Encapsulation,
    config: &Config,
    arrival: &Arrival,
) -> Result<i32, Counter> {
    let mut route = Route::new(arrival.address, outer);
    // Who is at `route.hop`; looked up with each new hop, so the first, which was before, isn't looked up twice.
    let mut here = arrival.instance;
    if !arrival.is_ours() {
        // Routed here, but nobody's: the address of an instance that is gone, if it is about a VIP at all.
        if !maps::is_vip(inner.flow.vip) {
            return Ok(TC_ACT_UNSPEC);
        }
        if arrival.is_foreign() {
            return Err(Counter::ForeignSource);
        }
        pass_on(&mut route)?;
        here = maps::instance(route.hop);
    }
    let established = maps::flow_owner(&inner.flow);
    let owner = if established == 0 { maps::embryonic_owner(&inner.flow) } else { established };

    for _ in 0..MAX_TRIES {
        if route.hop == config.address {
            relay(inner, &mut route)?;
            here = maps::instance(route.hop);
            continue;
        }
        let Some(instance) = here else {
            if route.hop == arrival.address {
                // Only after the hops came round to where we started: nobody here to try.
                return Err(Counter::NoInstance);
            }
            return forward(ctx, outer, config, &route);
        };
        let flow = &inner.flow;
        let port = PortKey::new(route.hop, flow.vip, flow.vip_port, flow.protocol);
        if let Some(port) = maps::served_port(&port) {
            let owned = owner == route.hop;
            if owned || inner.opens() || route.left == 0 {
                let new_flow = remember(inner, route.hop, owned, established != 0);
                maps::count_instance(port.counter, client_bytes(outer), new_flow);
                return deliver(ctx, inner, instance, route.hop, port.port);
            }
        }
        pass_on(&mut route)?;
        here = maps::instance(route.hop);
    }
    Err(Counter::TtlExceeded)
}

/// Length of the client's packet, which was compared with the outer one's when it was read.
#[inline(always)]
pub(crate) fn client_bytes(outer: &Encapsulation) -> u32 {
    u32::from(u16::from_be(outer.ip.total_length)).wrapping_sub(ENCAPSULATION_BYTES as u32)
}

#[inline(always)]
pub(crate) fn pass_on(route: &mut Route) -> Result<(), Counter> {
    if !route.pop() {
        return Err(Counter::NoInstance);
    }
    maps::count(Counter::SecondHop);
    Ok(())
}

/// Keeps in mind that an instance was given a flow's packet; whether this established the flow there.
#[inline(always)]
fn remember(inner: &Inner, instance: u32, owned: bool, established: bool) -> bool {
    if owned {
        return inner.continues() && !established && maps::promote_flow(&inner.flow, instance);
    }
    if !inner.opens() && !inner.continues() {
        return false;
    }
    // An established flow that comes to another instance keeps its entry: nothing is evicted for it.
    if established {
        return maps::establish_flow(&inner.flow, instance);
    }
    maps::note_flow(&inner.flow, instance);
    false
}

/// Turns the machine's own address into hops of this location.
#[inline(always)]
fn relay(inner: &Inner, route: &mut Route) -> Result<(), Counter> {
    let flow = &inner.flow;
    let bucket = maps::vip(&VipKey::new(flow.vip, flow.vip_port, flow.protocol)).and_then(|vip| {
        let hash = flow_hash(flow.source, flow.vip, flow.source_port, flow.vip_port, flow.protocol);
        maps::bucket(&vip.local, hash)
    });
    route.relay(bucket)
}

/// Sends the packet, still encapsulated, to the hop on another machine.
#[inline(always)]
pub(crate) fn forward(
    ctx: &TcContext,
    outer: &Encapsulation,
    config: &Config,
    route: &Route,
) -> Result<i32, Counter> {
    if outer.ip.ttl <= 1 {
        return Err(Counter::TtlExceeded);
    }
    const CHECKSUM: usize = ETHERNET + offset_of!(Ipv4Header, checksum);
    let old = [outer.ip.ttl, outer.ip.protocol];
    let new = [outer.ip.ttl - 1, outer.ip.protocol];
    let from = u64::from(u32::from_ne_bytes(outer.ip.destination));
    ctx.l3_csum_replace(CHECKSUM, from, u64::from(route.hop), 4).map_err(helper)?;
    ctx.l3_csum_replace(CHECKSUM, u64::from(u16::from_ne_bytes(old)), u64::from(u16::from_ne_bytes(new)), 2)
        .map_err(helper)?;
    ctx.store(ETHERNET + offset_of!(Ipv4Header, ttl), &new, 0).map_err(helper)?;
    ctx.store(ETHERNET + offset_of!(Ipv4Header, destination), &route.hop, 0).map_err(helper)?;

    let [first, second, third] = route.next;
    let hops = match route.left {
        0 => [0, 0, 0],
        1 => [0, 0, first],
        2 => [0, first, second],
        _ => [first, second, third],
    };
    let list = HopList { next_hop: HOPS - route.left, hop_count: HOPS, hops };
    ctx.store(ETHERNET + offset_of!(Encapsulation, next_hop), &list, u64::from(BPF_F_RECOMPUTE_CSUM))
        .map_err(helper)?;
    // SAFETY: no parameters beyond numbers; a null neighbour asks the kernel to look the route up.
    Ok(unsafe { bpf_redirect_neigh(config.uplink, core::ptr::null_mut(), 0, 0) } as i32)
}

/// The changeable part of the encapsulation.
#[repr(C, packed)]
struct HopList {
    next_hop: u8,
    hop_count: u8,
    hops: [u32; 3],
}
