//! `target6`: encapsulated IPv6 packets, at the machine of a hop.
//!
//! Behind `target` on the same interface, which leaves to it what says IPv6. The hops are the same, and so are the rules; the
//! client's packet and the tables that know it differ.

use core::mem::{MaybeUninit, offset_of};

use anyplace_ebpf_common::{
    Counter, ENCAPSULATION_BYTES, Encapsulation, FlowKey6, FragmentValue6, GUE_FLAGS_AND_PROTOCOL_IPV6,
    GUE_PORT, ICMPV6, Ipv6Header, PortKey6, Ports, TCP, UDP, VipKey6, flow_hash6, instance_address,
};
use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_DECAP_L3_IPV6, TC_ACT_SHOT, TC_ACT_UNSPEC,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    macros::classifier,
    programs::TcContext,
};

use crate::{
    deliver::{hand_over, helper, rewrite_transport},
    events,
    inner::{FAILED, FRAGMENT_UNKNOWN, INNER, MALFORMED, OPTIONS, READ, forget, malformed},
    maps, maps6,
    packet::{self, ETHERNET, ETHERTYPE_IPV4, ICMP_BYTES, TCP_FLAGS, in_buffer},
    packet6::{self, ETHERTYPE_IPV6, IPV6},
    quoted6,
    target::{
        Arrival, MAX_TRIES, Route, client_bytes, forward, is_well_formed, outer, outer_again, pass_on,
        unreadable,
    },
};

#[classifier]
pub fn target6(ctx: TcContext) -> i32 {
    match try_target6(&ctx) {
        Ok(action) => action,
        Err(reason) => {
            maps::count(reason);
            TC_ACT_SHOT
        }
    }
}

/// The client's packet, as far as it matters here.
struct Inner {
    flow: FlowKey6,
    /// Offset of its transport header in the frame, and what else is known of it: see the bits below.
    word: u32,
}

/// In the offset's word: may be served by whoever gets it.
const OPENS: u32 = 1 << 16;
/// Worth remembering when the last hop serves it.
const CONTINUES: u32 = 1 << 17;
/// A fragment after the first.
const FRAGMENT: u32 = 1 << 18;
/// An ICMPv6 error.
const ERROR: u32 = 1 << 19;
/// TCP or UDP without extension headers, all of whose headers stand in the buffer's first part.
const PLAIN: u32 = 1 << 20;

impl Inner {
    #[inline(always)]
    fn opens(&self) -> bool {
        self.word & OPENS != 0
    }

    #[inline(always)]
    fn continues(&self) -> bool {
        self.word & CONTINUES != 0
    }
}

/// A verdict, or the reason for a drop.
#[inline(always)]
fn try_target6(ctx: &TcContext) -> Result<i32, Counter> {
    // SAFETY: the context is the kernel's.
    if unsafe { (*ctx.skb.skb).protocol } != u32::from(ETHERTYPE_IPV4) {
        return Ok(TC_ACT_UNSPEC);
    }
    let Some(outer) = outer(ctx) else { return Ok(TC_ACT_UNSPEC) };
    if outer.ip.version_ihl != 0x45
        || outer.ip.protocol != UDP
        || outer.udp.destination != GUE_PORT.to_be()
        || outer.gue != GUE_FLAGS_AND_PROTOCOL_IPV6
        || packet::is_fragment(&outer.ip)
    {
        return Ok(TC_ACT_UNSPEC);
    }
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    let mut arrival = Arrival::new(config, outer);
    if arrival.is_ours() && arrival.is_foreign() {
        return Err(Counter::ForeignSource);
    }
    let mut inner = MaybeUninit::uninit();
    let found = if !is_well_formed(outer) {
        MALFORMED
    } else if let Some(plain) = plain(ctx, outer) {
        inner.write(plain);
        READ
    } else {
        unusual(ctx.skb.skb, &mut inner, u32::from(u16::from_be(outer.ip.total_length)))
    };
    if found != READ {
        return unreadable(found, arrival.is_ours());
    }
    // SAFETY: `READ` says that it was written.
    let inner = unsafe { inner.assume_init_mut() };
    inner.word = forget(ctx, inner.word);
    arrival.forget(ctx);
    let outer = outer_again(ctx)?;
    let mut place = MaybeUninit::uninit();
    let verdict = route(ctx.skb.skb, inner, outer, &mut place, &arrival);
    if verdict != PLACED {
        return Ok(verdict);
    }
    // SAFETY: `PLACED` says that it was written.
    deliver(ctx, inner, unsafe { place.assume_init_ref() })
}

/// Where to deliver.
struct Place {
    /// The instance's IPv4 address.
    address: u32,
    interface: u32,
    mac: [u8; 6],
    port: u16,
}

/// What [`route`] answers where an instance of this machine gets the packet.
const PLACED: i32 = i32::MAX;

/// Tries the hops: a verdict, or [`PLACED`] with the place. A function of its own: beside its caller's memory there must be
/// room on the stack for the walk along extension headers.
#[inline(never)]
fn route(
    skb: *mut __sk_buff,
    inner: &Inner,
    outer: &Encapsulation,
    place: &mut MaybeUninit<Place>,
    arrival: &Arrival,
) -> i32 {
    match try_route(&TcContext::new(skb), inner, outer, place, arrival) {
        Ok(verdict) => verdict,
        Err(reason) => {
            events::refused6(&inner.flow, reason);
            maps::count(reason);
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn try_route(
    ctx: &TcContext,
    inner: &Inner,
    outer: &Encapsulation,
    place: &mut MaybeUninit<Place>,
    arrival: &Arrival,
) -> Result<i32, Counter> {
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    let mut route = Route::new(arrival.address, outer);
    // Who is at `route.hop`; looked up with each new hop, so the first, which was before, isn't looked up twice.
    let mut here = arrival.instance;
    if !arrival.is_ours() {
        if !maps6::is_vip(inner.flow.vip) {
            return Ok(TC_ACT_UNSPEC);
        }
        if arrival.is_foreign() {
            return Err(Counter::ForeignSource);
        }
        pass_on(&mut route)?;
        here = maps::instance(route.hop);
    }
    let established = maps6::flow_owner(&inner.flow);
    let owner = if established == 0 { maps6::embryonic_owner(&inner.flow) } else { established };

    for _ in 0..MAX_TRIES {
        if route.hop == config.address {
            relay(inner, &mut route)?;
            here = maps::instance(route.hop);
            continue;
        }
        let Some(instance) = here else {
            if route.hop == arrival.address {
                return Err(Counter::NoInstance);
            }
            return forward(ctx, outer, config, &route);
        };
        let port = maps6::served_port(&PortKey6 {
            instance: route.hop,
            vip: inner.flow.vip,
            vip_port: inner.flow.vip_port,
            protocol: inner.flow.protocol,
            reserved: 0,
        });
        if let Some(port) = port {
            let owned = owner == route.hop;
            if owned || inner.opens() || route.left == 0 {
                let new_flow = remember(inner, route.hop, owned, established != 0);
                maps::count_instance(port.counter, client_bytes(outer), new_flow);
                let (interface, mac) = (instance.interface, instance.mac);
                place.write(Place { address: route.hop, interface, mac, port: port.port });
                return Ok(PLACED);
            }
        }
        pass_on(&mut route)?;
        here = maps::instance(route.hop);
    }
    Err(Counter::TtlExceeded)
}

/// Keeps in mind that an instance was given a flow's packet; whether this established the flow there.
#[inline(always)]
fn remember(inner: &Inner, instance: u32, owned: bool, established: bool) -> bool {
    if owned {
        return inner.continues() && !established && maps6::promote_flow(&inner.flow, instance);
    }
    if !inner.opens() && !inner.continues() {
        return false;
    }
    // An established flow that comes to another instance keeps its entry: nothing is evicted for it.
    if established {
        return maps6::establish_flow(&inner.flow, instance);
    }
    maps6::note_flow(&inner.flow, instance);
    false
}

/// A plain packet, all of whose lengths are right.
#[inline(always)]
fn plain(ctx: &TcContext, outer: &Encapsulation) -> Option<Inner> {
    const TRANSPORT: usize = INNER + IPV6;
    let ip = in_buffer::<Ipv6Header>(ctx, INNER)?;
    // SAFETY: `in_buffer` checked the bounds, and nothing moves the packet before the last use.
    let ip = unsafe { &*ip };
    let payload = u16::from_be(ip.payload_length) as usize;
    if ip.version() != 6
        || !packet6::is_tcp_or_udp(ip.next)
        || payload < packet::transport_bytes(ip.next)
        || IPV6 + payload + ENCAPSULATION_BYTES != u16::from_be(outer.ip.total_length) as usize
        || TRANSPORT + payload > ctx.len() as usize
    {
        return None;
    }
    let ports = in_buffer::<Ports>(ctx, TRANSPORT)?;
    let stage = if ip.next == TCP {
        let flags = in_buffer::<u8>(ctx, TRANSPORT + TCP_FLAGS)?;
        // SAFETY: as above.
        stage(unsafe { *flags })
    } else {
        CONTINUES
    };
    // SAFETY: as above.
    let ports = unsafe { *ports };
    let flow = flow(ip, ports, ip.next);
    Some(Inner { flow, word: TRANSPORT as u32 | stage | PLAIN })
}

/// Whether a TCP packet opens a connection, or shows that there is one.
#[inline(always)]
fn stage(flags: u8) -> u32 {
    let opens = if packet::opens_connection(flags) { OPENS } else { 0 };
    opens | if packet::continues_connection(flags) { CONTINUES } else { 0 }
}

#[inline(always)]
fn flow(ip: &Ipv6Header, ports: Ports, protocol: u8) -> FlowKey6 {
    FlowKey6 {
        source: ip.source(),
        vip: ip.destination(),
        source_port: ports.source,
        vip_port: ports.destination,
        protocol,
        reserved: [0; 3],
    }
}

/// Reads the client's packet, inside an outer one of `length` bytes; not [`READ`] if it isn't one that our ingress sends.
#[inline(never)]
fn unusual(skb: *mut __sk_buff, inner: &mut MaybeUninit<Inner>, length: u32) -> u32 {
    match try_unusual(&TcContext::new(skb), length) {
        Ok(found) => {
            inner.write(found);
            READ
        }
        Err(Counter::Malformed) => MALFORMED,
        Err(Counter::Options) => OPTIONS,
        Err(Counter::FragmentUnknown) => FRAGMENT_UNKNOWN,
        Err(_) => FAILED,
    }
}

#[inline(always)]
fn try_unusual(ctx: &TcContext, outer_length: u32) -> Result<Inner, Counter> {
    let ip = ctx.load::<Ipv6Header>(INNER).map_err(malformed)?;
    let length = IPV6 + u16::from_be(ip.payload_length) as usize;
    let end = INNER + length;
    if ip.version() != 6 || length + ENCAPSULATION_BYTES != outer_length as usize || end > ctx.len() as usize
    {
        return Err(Counter::Malformed);
    }
    let transport = packet6::walk_buffer(ctx, ip.next, INNER + IPV6, end)?;
    let at = transport.at;
    let mut word = at as u32;
    let (protocol, ports) = if transport.is_later_fragment() {
        let first = maps6::fragment(&transport.fragment_key(&ip)).ok_or(Counter::FragmentUnknown)?;
        word |= FRAGMENT;
        (first.protocol, first.ports)
    } else if packet6::is_tcp_or_udp(transport.protocol) {
        let protocol = transport.protocol;
        if at + packet::transport_bytes(protocol) > end {
            return Err(Counter::Malformed);
        }
        let ports = ctx.load::<Ports>(at).map_err(malformed)?;
        if transport.is_first_fragment() {
            let value = FragmentValue6 { ports, protocol, reserved: [0; 3] };
            maps6::record_fragment(&transport.fragment_key(&ip), value);
        }
        if protocol == TCP {
            word |= stage(ctx.load::<u8>(at + TCP_FLAGS).map_err(malformed)?);
        } else {
            word |= CONTINUES;
        }
        (protocol, ports)
    } else {
        let is_error = transport.protocol == ICMPV6 && !transport.is_fragment() && at + ICMP_BYTES <= end;
        return if is_error { error(ctx, &ip, at, end) } else { Err(Counter::Malformed) };
    };
    Ok(Inner { flow: flow(&ip, ports, protocol), word })
}

/// Reads an ICMPv6 error: its flow is that of the packet it quotes, which one of our instances sent.
#[inline(always)]
fn error(ctx: &TcContext, ip: &Ipv6Header, icmp: usize, end: usize) -> Result<Inner, Counter> {
    let kind = ctx.load::<u8>(icmp).map_err(malformed)?;
    let at = icmp + ICMP_BYTES;
    if !packet6::quotes(kind) || at + IPV6 > end {
        return Err(Counter::Malformed);
    }
    let quote = ctx.load::<Ipv6Header>(at).map_err(malformed)?;
    let transport = packet6::walk_buffer(ctx, quote.next, at + IPV6, end).map_err(malformed)?;
    if quote.version() != 6
        || quote.source != ip.destination
        || transport.is_later_fragment()
        || !packet6::is_tcp_or_udp(transport.protocol)
        || transport.at + ICMP_BYTES > end
    {
        return Err(Counter::Malformed);
    }
    let ports = ctx.load::<Ports>(transport.at).map_err(malformed)?;
    let flow = FlowKey6 {
        source: quote.destination(),
        vip: ip.destination(),
        source_port: ports.destination,
        vip_port: ports.source,
        protocol: transport.protocol,
        reserved: [0; 3],
    };
    Ok(Inner { flow, word: icmp as u32 | ERROR })
}

/// Turns the machine's own address into hops of this location.
#[inline(always)]
fn relay(inner: &Inner, route: &mut Route) -> Result<(), Counter> {
    let flow = &inner.flow;
    let bucket = maps6::vip(&VipKey6::new(flow.vip, flow.vip_port, flow.protocol)).and_then(|vip| {
        let hash = flow_hash6(&flow.source, &flow.vip, flow.source_port, flow.vip_port, flow.protocol);
        maps::bucket(&vip.local, hash)
    });
    route.relay(bucket)
}

/// Strips the encapsulation, rewrites the destination and hands the packet to the instance.
#[inline(always)]
fn deliver(ctx: &TcContext, inner: &Inner, place: &Place) -> Result<i32, Counter> {
    let (address, port) = (place.address, place.port);
    let decapsulation = u64::from(BPF_F_ADJ_ROOM_DECAP_L3_IPV6);
    ctx.adjust_room(-(ENCAPSULATION_BYTES as i32), BPF_ADJ_ROOM_MAC, decapsulation).map_err(helper)?;
    let ethertype = in_buffer::<u16>(ctx, ETHERNET - 2).ok_or(Counter::HelperFailed)?;
    // SAFETY: `in_buffer` checked the bounds, and no helper moved the packet since.
    unsafe { *ethertype = ETHERTYPE_IPV6 };
    if inner.word & PLAIN != 0 {
        rewrite(ctx, inner, address, port).ok_or(Counter::HelperFailed)?;
    } else if rewrite_unusual(ctx.skb.skb, inner, address, port) != 0 {
        return Err(Counter::HelperFailed);
    }
    hand_over(ctx, place.interface, place.mac)
}

/// Changes destination and port of a plain packet. The checksum balances all of it, so that a sum over the packet, which
/// some drivers supply, stays what it was.
#[inline(always)]
fn rewrite(ctx: &TcContext, inner: &Inner, address: u32, port: u16) -> Option<()> {
    let flow = &inner.flow;
    let to = instance_address(address);
    let ip = in_buffer::<Ipv6Header>(ctx, ETHERNET)?;
    // SAFETY: `in_buffer` checked the bounds, and no helper moved the packet since.
    unsafe { (*ip).set_destination(to) };
    let moved = packet6::difference(&flow.vip, &to);
    rewrite_transport(ctx, ETHERNET + IPV6, flow.protocol, (flow.vip_port, port), moved)?;
    Some(())
}

/// The same for packets with extension headers, fragments and ICMPv6 errors; 0, or 1 if a helper failed.
#[inline(never)]
fn rewrite_unusual(skb: *mut __sk_buff, inner: &Inner, address: u32, port: u16) -> i32 {
    let transport = (inner.word & 0xffff).wrapping_sub(ENCAPSULATION_BYTES as u32);
    if try_rewrite_unusual(&TcContext::new(skb), inner, transport as usize, address, port).is_err() {
        return 1;
    }
    if inner.word & ERROR != 0 { quoted6::rewrite(skb, transport, address, port) } else { 0 }
}

#[inline(always)]
fn try_rewrite_unusual(
    ctx: &TcContext,
    inner: &Inner,
    transport: usize,
    address: u32,
    port: u16,
) -> Result<(), i64> {
    let flow = &inner.flow;
    let to = instance_address(address);
    ctx.store(ETHERNET + offset_of!(Ipv6Header, destination), &to, 0)?;
    if inner.word & (FRAGMENT | ERROR) != 0 {
        return Ok(());
    }
    let (checksum, flags) = packet6::checksum(flow.protocol, transport);
    packet6::replace_address(ctx, checksum, &flow.vip, &to, flags)?;
    ctx.l4_csum_replace(checksum, u64::from(flow.vip_port), u64::from(port), flags | 2)?;
    ctx.store(transport + offset_of!(Ports, destination), &port, 0)
}
