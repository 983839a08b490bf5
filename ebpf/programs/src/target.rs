//! `target`: encapsulated packets, at the machine of a hop.
//!
//! The outer destination is the hop being tried. An instance of this machine that owns the flow (or is offered a new
//! one, or is the last hop) gets the packet; otherwise the next hop is tried, here or elsewhere. The machine's own
//! address means that another location sent the packet: the location's own table names the instance.

use core::mem::offset_of;

use anyplace_ebpf_common::{
    Config, Counter, ENCAPSULATION_BYTES, Encapsulation, FlowKey, GUE_FLAGS_AND_PROTOCOL, GUE_PORT, HOPS,
    InstanceValue, Ipv4Header, PortKey, Ports, TCP, UDP, VipKey, flow_hash,
};
use aya_ebpf::{
    bindings::{
        BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT, TC_ACT_UNSPEC,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::{bpf_redirect_neigh, bpf_redirect_peer},
    macros::classifier,
    programs::TcContext,
};

use crate::{
    maps,
    packet::{self, ETHERNET, ETHERTYPE_IPV4, IPV4, TCP_FLAGS},
};

/// Offset of the client's packet.
const INNER: usize = ETHERNET + ENCAPSULATION_BYTES;
/// Hops tried on this machine for one packet: a relay, its two instances, the first of them again, and one to spare.
const MAX_TRIES: usize = 5;

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

/// The client's packet, as far as it matters here.
struct Inner {
    flow: FlowKey,
    /// May be served by whoever gets it: a TCP SYN.
    opens: bool,
    /// Worth remembering when the last hop serves it: UDP, or TCP in mid-connection.
    continues: bool,
}

/// The hop being tried and those after it. Three variables and not an array: an index that the verifier can't follow
/// would cost a bounds check and a stack copy each time.
struct Route {
    hop: u32,
    next: [u32; 3],
    left: u8,
}

impl Route {
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
}

/// A verdict, or the reason for a drop.
#[inline(always)]
fn try_target(ctx: &TcContext) -> Result<i32, Counter> {
    // SAFETY: the context is the kernel's.
    if unsafe { (*ctx.skb.skb).protocol } != u32::from(ETHERTYPE_IPV4) {
        return Ok(TC_ACT_UNSPEC);
    }
    let Ok(outer) = ctx.load::<Encapsulation>(ETHERNET) else { return Ok(TC_ACT_UNSPEC) };
    if outer.ip.version_ihl != 0x45
        || outer.ip.protocol != UDP
        || outer.udp.destination != GUE_PORT.to_be()
        || packet::is_fragment(&outer.ip)
    {
        return Ok(TC_ACT_UNSPEC);
    }
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    let received = u32::from_ne_bytes(outer.ip.destination);
    let ours = received == config.address || maps::instance(received).is_some();
    let well_formed = outer.gue == GUE_FLAGS_AND_PROTOCOL
        && outer.private_type == 0
        && outer.hop_count == HOPS
        && outer.next_hop <= HOPS;
    let inner = if well_formed { inner(ctx, &outer) } else { None };
    let Some(inner) = inner else {
        return if ours { Err(Counter::Malformed) } else { Ok(TC_ACT_UNSPEC) };
    };
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
    let mut route = Route { hop: received, next, left };
    if !ours {
        // Routed here, but nobody's: the address of an instance that is gone, if it is about a VIP at all.
        if !maps::is_vip(inner.flow.vip) {
            return Ok(TC_ACT_UNSPEC);
        }
        pass_on(&mut route)?;
    }
    let owner = maps::flow_owner(&inner.flow);

    for _ in 0..MAX_TRIES {
        if route.hop == config.address {
            relay(&inner, &mut route)?;
            continue;
        }
        let Some(instance) = maps::instance(route.hop) else {
            if route.hop == received {
                // Only after the hops came round to where we started: nobody here to try.
                return Err(Counter::NoInstance);
            }
            return forward(ctx, &outer, config, &route);
        };
        let port = maps::container_port(&PortKey {
            instance: route.hop,
            vip: inner.flow.vip,
            vip_port: inner.flow.vip_port,
            protocol: inner.flow.protocol,
            reserved: 0,
        });
        if let Some(port) = port {
            let owned = owner == route.hop;
            if owned || inner.opens || route.left == 0 {
                if !owned && (inner.opens || inner.continues) {
                    maps::record_flow(&inner.flow, route.hop);
                }
                return deliver(ctx, &inner, instance, route.hop, port);
            }
        }
        pass_on(&mut route)?;
    }
    Err(Counter::TtlExceeded)
}

#[inline(always)]
fn pass_on(route: &mut Route) -> Result<(), Counter> {
    if !route.pop() {
        return Err(Counter::NoInstance);
    }
    maps::count(Counter::SecondHop);
    Ok(())
}

/// Reads the client's packet; `None` if it isn't one that our ingress sends.
#[inline(always)]
fn inner(ctx: &TcContext, outer: &Encapsulation) -> Option<Inner> {
    let ip = ctx.load::<Ipv4Header>(INNER).ok()?;
    if ip.version_ihl != 0x45 || !packet::is_tcp_or_udp(ip.protocol) || packet::is_fragment(&ip) {
        return None;
    }
    let length = u32::from(u16::from_be(ip.total_length));
    if (length as usize) < IPV4 + packet::transport_bytes(ip.protocol)
        || length + ENCAPSULATION_BYTES as u32 != u32::from(u16::from_be(outer.ip.total_length))
        || length + INNER as u32 > ctx.len()
    {
        return None;
    }
    let ports = ctx.load::<Ports>(INNER + IPV4).ok()?;
    let (opens, continues) = if ip.protocol == TCP {
        let flags = ctx.load::<u8>(INNER + IPV4 + TCP_FLAGS).ok()?;
        (packet::opens_connection(flags), packet::continues_connection(flags))
    } else {
        (false, true)
    };
    let flow = FlowKey {
        source: u32::from_ne_bytes(ip.source),
        vip: u32::from_ne_bytes(ip.destination),
        source_port: ports.source,
        vip_port: ports.destination,
        protocol: ip.protocol,
        reserved: [0; 3],
    };
    Some(Inner { flow, opens, continues })
}

/// Turns the machine's own address into hops of this location.
#[inline(always)]
fn relay(inner: &Inner, route: &mut Route) -> Result<(), Counter> {
    let flow = &inner.flow;
    let bucket = maps::vip(&VipKey::new(flow.vip, flow.vip_port, flow.protocol)).and_then(|vip| {
        let hash = flow_hash(flow.source, flow.vip, flow.source_port, flow.vip_port, flow.protocol);
        maps::bucket(&vip.local, hash)
    });
    let Some(bucket) = bucket else {
        return if route.pop() { Ok(()) } else { Err(Counter::NoBackend) };
    };
    maps::count(Counter::Relayed);
    if bucket.before != bucket.now && bucket.before != 0 {
        // The end of the list is ours to extend, so that a flow which nobody knows comes to its owner after all.
        if route.left == 0 {
            route.push(bucket.now);
        }
        route.push(bucket.before);
    }
    route.hop = bucket.now;
    Ok(())
}

/// Strips the encapsulation, rewrites the destination and hands the packet to the instance.
#[inline(always)]
fn deliver(
    ctx: &TcContext,
    inner: &Inner,
    instance: &InstanceValue,
    address: u32,
    port: u16,
) -> Result<i32, Counter> {
    const IP: usize = ETHERNET;
    const TRANSPORT: usize = ETHERNET + IPV4;
    let flow = &inner.flow;
    let (interface, mac) = (instance.interface, instance.mac);
    let (checksum, flags) = if flow.protocol == TCP {
        (TRANSPORT + 16, 0)
    } else {
        // A UDP checksum of zero means none, and must neither be updated nor come out of an update.
        (TRANSPORT + 6, u64::from(BPF_F_MARK_MANGLED_0))
    };
    ctx.adjust_room(-(ENCAPSULATION_BYTES as i32), BPF_ADJ_ROOM_MAC, 0).map_err(helper)?;
    let (from, to) = (u64::from(flow.vip), u64::from(address));
    ctx.l3_csum_replace(IP + offset_of!(Ipv4Header, checksum), from, to, 4).map_err(helper)?;
    ctx.l4_csum_replace(checksum, from, to, flags | u64::from(BPF_F_PSEUDO_HDR) | 4).map_err(helper)?;
    ctx.l4_csum_replace(checksum, u64::from(flow.vip_port), u64::from(port), flags | 2).map_err(helper)?;
    ctx.store(IP + offset_of!(Ipv4Header, destination), &address, 0).map_err(helper)?;
    ctx.store(TRANSPORT + offset_of!(Ports, destination), &port, 0).map_err(helper)?;
    ctx.store(0, &mac, 0).map_err(helper)?;
    maps::count(Counter::Delivered);
    // SAFETY: plain numbers.
    Ok(unsafe { bpf_redirect_peer(interface, 0) } as i32)
}

/// Sends the packet, still encapsulated, to the hop on another machine.
#[inline(always)]
fn forward(ctx: &TcContext, outer: &Encapsulation, config: &Config, route: &Route) -> Result<i32, Counter> {
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

#[inline(always)]
fn helper<E>(_: E) -> Counter {
    Counter::HelperFailed
}
