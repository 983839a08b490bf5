//! `target`: encapsulated packets, at the machine of a hop.
//!
//! The outer destination is the hop being tried. An instance of this machine that owns the flow (or is offered a new
//! one, or is the last hop) gets the packet; otherwise the next hop is tried, here or elsewhere. The machine's own
//! address means that another location sent the packet: the location's own table names the instance.
//!
//! Flows are known from their second packet on (FLOWS); what was seen once is in a table of its own (EMBRYONIC), so that
//! a flood of new tuples forgets nobody's connection.

use core::mem::offset_of;

use anyplace_ebpf_common::{
    Bucket, Config, Counter, ENCAPSULATION_BYTES, Encapsulation, FlowKey, GUE_FLAGS_AND_PROTOCOL,
    GUE_FLAGS_AND_PROTOCOL_IPV6, GUE_PORT, HOPS, ICMP, InstanceValue, Ipv4Header, PortKey, Ports, TCP, UDP,
    VipKey, flow_hash,
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
    events, maps,
    packet::{self, ETHERNET, ETHERTYPE_IPV4, ICMP_BYTES, IPV4, TCP_FLAGS},
    quoted,
};

/// Offset of the client's packet.
pub(crate) const INNER: usize = ETHERNET + ENCAPSULATION_BYTES;
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

/// The client's packet, as far as it matters here.
struct Inner {
    flow: FlowKey,
    kind: Kind,
    /// Length of its IP header.
    header: usize,
    /// May be served by whoever gets it: a TCP SYN.
    opens: bool,
    /// Worth remembering when the last hop serves it: UDP, or TCP in mid-connection.
    continues: bool,
}

impl Inner {
    /// The same, by way of the packet's control block: so that the verifier doesn't know any more which branches led
    /// here, and goes through what follows once and not for each of them (half of 646,206 instructions, of a million).
    #[inline(always)]
    fn forgotten(mut self, ctx: &TcContext) -> Self {
        const OPENS: u32 = 1 << 8;
        const CONTINUES: u32 = 1 << 9;
        const FRAGMENT: u32 = 1 << 10;
        const ERROR: u32 = 1 << 11;
        let mut word = self.header as u32;
        word |= if self.opens { OPENS } else { 0 } | if self.continues { CONTINUES } else { 0 };
        word |= match self.kind {
            Kind::Transport => 0,
            Kind::Fragment => FRAGMENT,
            Kind::Error => ERROR,
        };
        // SAFETY: the context is the kernel's, and its control block this program's.
        let word = unsafe {
            let place = &raw mut (*ctx.skb.skb).cb[0];
            place.write_volatile(word);
            place.read_volatile()
        };
        self.header = (word & 60) as usize;
        self.opens = word & OPENS != 0;
        self.continues = word & CONTINUES != 0;
        self.kind = match word & (FRAGMENT | ERROR) {
            0 => Kind::Transport,
            FRAGMENT => Kind::Fragment,
            _ => Kind::Error,
        };
        self
    }
}

/// What is rewritten beside the IP header.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Port and checksum of the transport header.
    Transport,
    /// Nothing: a fragment after the first.
    Fragment,
    /// The quoted packet of an ICMP error.
    Error,
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
        // What `target6` is for, the next program.
        || outer.gue == GUE_FLAGS_AND_PROTOCOL_IPV6
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
    let foreign = !maps::in_fleet(config, u32::from_ne_bytes(outer.ip.source));
    if ours && foreign {
        return Err(Counter::ForeignSource);
    }
    let inner = if well_formed { inner(ctx, &outer) } else { Err(Counter::Malformed) };
    let inner = match inner {
        Ok(inner) => inner.forgotten(ctx),
        Err(reason) if ours => return Err(reason),
        Err(_) => return Ok(TC_ACT_UNSPEC),
    };
    let result = try_route(ctx, &inner, &outer, config, (ours, foreign));
    if let Err(reason) = result {
        events::refused(&inner.flow, reason);
    }
    result
}

/// Tries the hops.
#[inline(always)]
fn try_route(
    ctx: &TcContext,
    inner: &Inner,
    outer: &Encapsulation,
    config: &Config,
    (ours, foreign): (bool, bool),
) -> Result<i32, Counter> {
    let received = u32::from_ne_bytes(outer.ip.destination);
    let mut route = Route::new(received, outer);
    if !ours {
        // Routed here, but nobody's: the address of an instance that is gone, if it is about a VIP at all.
        if !maps::is_vip(inner.flow.vip) {
            return Ok(TC_ACT_UNSPEC);
        }
        if foreign {
            return Err(Counter::ForeignSource);
        }
        pass_on(&mut route)?;
    }
    let established = maps::flow_owner(&inner.flow);
    let owner = if established == 0 { maps::embryonic_owner(&inner.flow) } else { established };

    for _ in 0..MAX_TRIES {
        if route.hop == config.address {
            relay(inner, &mut route)?;
            continue;
        }
        let Some(instance) = maps::instance(route.hop) else {
            if route.hop == received {
                // Only after the hops came round to where we started: nobody here to try.
                return Err(Counter::NoInstance);
            }
            return forward(ctx, outer, config, &route);
        };
        let port = maps::served_port(&PortKey {
            instance: route.hop,
            vip: inner.flow.vip,
            vip_port: inner.flow.vip_port,
            protocol: inner.flow.protocol,
            reserved: 0,
        });
        if let Some(port) = port {
            let owned = owner == route.hop;
            if owned || inner.opens || route.left == 0 {
                let new_flow = remember(inner, route.hop, owned, established != 0);
                maps::count_instance(port.counter, client_bytes(outer), new_flow);
                return deliver(ctx, inner, instance, route.hop, port.port);
            }
        }
        pass_on(&mut route)?;
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
        return inner.continues && !established && maps::promote_flow(&inner.flow, instance);
    }
    if !inner.opens && !inner.continues {
        return false;
    }
    // An established flow that comes to another instance keeps its entry: nothing is evicted for it.
    if established {
        return maps::establish_flow(&inner.flow, instance);
    }
    maps::note_flow(&inner.flow, instance);
    false
}

/// Reads the client's packet; an error if it isn't one that our ingress sends.
#[inline(always)]
fn inner(ctx: &TcContext, outer: &Encapsulation) -> Result<Inner, Counter> {
    let ip = ctx.load::<Ipv4Header>(INNER).map_err(malformed)?;
    let header = packet::header_bytes(&ip);
    let length = u16::from_be(ip.total_length) as usize;
    if header == 0
        || length < header
        || length + ENCAPSULATION_BYTES != u16::from_be(outer.ip.total_length) as usize
        || length + INNER > ctx.len() as usize
    {
        return Err(Counter::Malformed);
    }
    if !packet::is_tcp_or_udp(ip.protocol) {
        let payload = length - header;
        let is_error = ip.protocol == ICMP && !packet::is_fragment(&ip) && payload >= ICMP_BYTES;
        return if is_error { error(ctx, &ip, header, payload) } else { Err(Counter::Malformed) };
    }
    let later = packet::is_later_fragment(&ip);
    let ports = if later {
        maps::fragment_ports(&packet::fragment_key(&ip)).ok_or(Counter::FragmentUnknown)?
    } else if length < header + packet::transport_bytes(ip.protocol) {
        return Err(Counter::Malformed);
    } else {
        ctx.load::<Ports>(INNER + header).map_err(malformed)?
    };
    if packet::is_first_fragment(&ip) {
        maps::record_fragment(&packet::fragment_key(&ip), ports);
    }
    let (opens, continues) = if later {
        (false, false)
    } else if ip.protocol == TCP {
        let flags = ctx.load::<u8>(INNER + header + TCP_FLAGS).map_err(malformed)?;
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
    let kind = if later { Kind::Fragment } else { Kind::Transport };
    Ok(Inner { flow, kind, header, opens, continues })
}

/// Reads an ICMP error: its flow is that of the packet it quotes, which one of our instances sent.
#[inline(always)]
fn error(ctx: &TcContext, ip: &Ipv4Header, header: usize, payload: usize) -> Result<Inner, Counter> {
    let kind = ctx.load::<u8>(INNER + header).map_err(malformed)?;
    let at = INNER + header + ICMP_BYTES;
    if !packet::quotes(kind) || payload < ICMP_BYTES + IPV4 {
        return Err(Counter::Malformed);
    }
    let quote = ctx.load::<Ipv4Header>(at).map_err(malformed)?;
    let quote_header = packet::header_bytes(&quote);
    if quote_header == 0
        || payload < ICMP_BYTES + quote_header + 8
        || quote.source != ip.destination
        || !packet::is_tcp_or_udp(quote.protocol)
        || packet::is_later_fragment(&quote)
    {
        return Err(Counter::Malformed);
    }
    let ports = ctx.load::<Ports>(at + quote_header).map_err(malformed)?;
    let flow = FlowKey {
        source: u32::from_ne_bytes(quote.destination),
        vip: u32::from_ne_bytes(ip.destination),
        source_port: ports.destination,
        vip_port: ports.source,
        protocol: quote.protocol,
        reserved: [0; 3],
    };
    Ok(Inner { flow, kind: Kind::Error, header, opens: false, continues: false })
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
    let transport = ETHERNET + inner.header;
    let flow = &inner.flow;
    let (interface, mac) = (instance.interface, instance.mac);
    ctx.adjust_room(-(ENCAPSULATION_BYTES as i32), BPF_ADJ_ROOM_MAC, 0).map_err(helper)?;
    let (from, to) = (u64::from(flow.vip), u64::from(address));
    ctx.l3_csum_replace(IP + offset_of!(Ipv4Header, checksum), from, to, 4).map_err(helper)?;
    ctx.store(IP + offset_of!(Ipv4Header, destination), &address, 0).map_err(helper)?;
    match inner.kind {
        Kind::Transport => {
            let (checksum, flags) = if flow.protocol == TCP {
                (transport + 16, 0)
            } else {
                // A UDP checksum of zero means none, and must neither be updated nor come out of an update.
                (transport + 6, u64::from(BPF_F_MARK_MANGLED_0))
            };
            ctx.l4_csum_replace(checksum, from, to, flags | u64::from(BPF_F_PSEUDO_HDR) | 4)
                .map_err(helper)?;
            ctx.l4_csum_replace(checksum, u64::from(flow.vip_port), u64::from(port), flags | 2)
                .map_err(helper)?;
            ctx.store(transport + offset_of!(Ports, destination), &port, 0).map_err(helper)?;
        }
        Kind::Fragment => {}
        Kind::Error => {
            if quoted::rewrite(ctx.skb.skb, transport as u32, address, port) != 0 {
                return Err(Counter::HelperFailed);
            }
        }
    }
    ctx.store(0, &mac, 0).map_err(helper)?;
    maps::count(Counter::Delivered);
    // SAFETY: plain numbers.
    Ok(unsafe { bpf_redirect_peer(interface, 0) } as i32)
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

#[inline(always)]
pub(crate) fn malformed<E>(_: E) -> Counter {
    Counter::Malformed
}

#[inline(always)]
pub(crate) fn helper<E>(_: E) -> Counter {
    Counter::HelperFailed
}
