//! `target6`: encapsulated IPv6 packets, at the machine of a hop.
//!
//! Behind `target` on the same interface, which leaves to it what says IPv6. The hops are the same, and so are the rules; the
//! client's packet and the tables that know it differ.

use core::mem::{MaybeUninit, offset_of};

use anyplace_ebpf_common::{
    Counter, ENCAPSULATION_BYTES, Encapsulation, FlowKey6, FragmentValue6, GUE_FLAGS_AND_PROTOCOL_IPV6,
    GUE_PORT, HOPS, ICMPV6, Ipv6Header, PortKey6, Ports, TCP, UDP, VipKey6, flow_hash6, instance_address,
};
use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_DECAP_L3_IPV6, TC_ACT_SHOT, TC_ACT_UNSPEC,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::bpf_redirect_peer,
    macros::classifier,
    programs::TcContext,
};

use crate::{
    events, maps, maps6,
    packet::{self, ETHERNET, ETHERTYPE_IPV4, ICMP_BYTES, TCP_FLAGS},
    packet6::{self, ETHERTYPE_IPV6, IPV6},
    quoted6,
    target::{INNER, MAX_TRIES, Route, client_bytes, forward, helper, malformed, pass_on},
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

/// Where to deliver.
struct Place {
    /// The instance's IPv4 address.
    address: u32,
    interface: u32,
    mac: [u8; 6],
    port: u16,
}

/// The same number, of which the verifier knows nothing any more: so it goes through what follows once, and not once for
/// each way that led here.
#[inline(always)]
fn forget(ctx: &TcContext, word: u32) -> u32 {
    // SAFETY: the context is the kernel's, and its control block this program's.
    unsafe {
        let place = &raw mut (*ctx.skb.skb).cb[0];
        place.write_volatile(word);
        place.read_volatile()
    }
}

/// A verdict, or the reason for a drop.
#[inline(always)]
fn try_target6(ctx: &TcContext) -> Result<i32, Counter> {
    // SAFETY: the context is the kernel's.
    if unsafe { (*ctx.skb.skb).protocol } != u32::from(ETHERTYPE_IPV4) {
        return Ok(TC_ACT_UNSPEC);
    }
    let Ok(outer) = ctx.load::<Encapsulation>(ETHERNET) else { return Ok(TC_ACT_UNSPEC) };
    if outer.ip.version_ihl != 0x45
        || outer.ip.protocol != UDP
        || outer.udp.destination != GUE_PORT.to_be()
        || outer.gue != GUE_FLAGS_AND_PROTOCOL_IPV6
        || packet::is_fragment(&outer.ip)
    {
        return Ok(TC_ACT_UNSPEC);
    }
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    let received = u32::from_ne_bytes(outer.ip.destination);
    let ours = received == config.address || maps::instance(received).is_some();
    let well_formed = outer.private_type == 0 && outer.hop_count == HOPS && outer.next_hop <= HOPS;
    let foreign = !maps::in_fleet(config, u32::from_ne_bytes(outer.ip.source));
    if ours && foreign {
        return Err(Counter::ForeignSource);
    }
    let mut inner = MaybeUninit::uninit();
    let length = u32::from(u16::from_be(outer.ip.total_length));
    let result = if well_formed { read(ctx.skb.skb, &mut inner, length) } else { MALFORMED };
    if result != READ {
        return match result {
            _ if !ours => Ok(TC_ACT_UNSPEC),
            MALFORMED => Err(Counter::Malformed),
            OPTIONS => Err(Counter::Options),
            FRAGMENT_UNKNOWN => Err(Counter::FragmentUnknown),
            _ => Err(Counter::HelperFailed),
        };
    }
    // SAFETY: `READ` says that it was written.
    let inner = unsafe { inner.assume_init_mut() };
    inner.word = forget(ctx, inner.word);
    let mut place = MaybeUninit::uninit();
    let verdict = route(ctx.skb.skb, inner, &outer, &mut place, u32::from(ours) | u32::from(foreign) << 1);
    if verdict != PLACED {
        return Ok(verdict);
    }
    // SAFETY: `PLACED` says that it was written.
    let place = unsafe { place.assume_init_ref() };
    let transport = (inner.word & 0xffff).wrapping_sub(ENCAPSULATION_BYTES as u32);
    if deliver(ctx.skb.skb, inner, place) != 0
        || inner.word & ERROR != 0 && quoted6::rewrite(ctx.skb.skb, transport, place.address, place.port) != 0
    {
        return Err(Counter::HelperFailed);
    }
    ctx.store(0, &place.mac, 0).map_err(helper)?;
    maps::count(Counter::Delivered);
    // SAFETY: plain numbers.
    Ok(unsafe { bpf_redirect_peer(place.interface, 0) } as i32)
}

/// What [`route`] answers where an instance of this machine gets the packet.
const PLACED: i32 = i32::MAX;

/// Tries the hops: a verdict, or [`PLACED`] with the place.
#[inline(never)]
fn route(
    skb: *mut __sk_buff,
    inner: &Inner,
    outer: &Encapsulation,
    place: &mut MaybeUninit<Place>,
    whose: u32,
) -> i32 {
    match try_route(&TcContext::new(skb), inner, outer, place, whose) {
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
    whose: u32,
) -> Result<i32, Counter> {
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    let received = u32::from_ne_bytes(outer.ip.destination);
    let (ours, foreign) = (whose & 1 != 0, whose & 2 != 0);
    let mut route = Route::new(received, outer);
    if !ours {
        if !maps6::is_vip(inner.flow.vip) {
            return Ok(TC_ACT_UNSPEC);
        }
        if foreign {
            return Err(Counter::ForeignSource);
        }
        pass_on(&mut route)?;
    }
    let established = maps6::flow_owner(&inner.flow);
    let owner = if established == 0 { maps6::embryonic_owner(&inner.flow) } else { established };

    for _ in 0..MAX_TRIES {
        if route.hop == config.address {
            relay(inner, &mut route)?;
            continue;
        }
        let Some(instance) = maps::instance(route.hop) else {
            if route.hop == received {
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

/// How reading the client's packet went.
const READ: u32 = 0;
const MALFORMED: u32 = 1;
const OPTIONS: u32 = 2;
const FRAGMENT_UNKNOWN: u32 = 3;
const FAILED: u32 = 4;

/// Reads the client's packet, inside an outer one of `length` bytes; not [`READ`] if it isn't one that our ingress sends.
#[inline(never)]
fn read(skb: *mut __sk_buff, inner: &mut MaybeUninit<Inner>, length: u32) -> u32 {
    match try_read(&TcContext::new(skb), length) {
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
fn try_read(ctx: &TcContext, outer_length: u32) -> Result<Inner, Counter> {
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
            let flags = ctx.load::<u8>(at + TCP_FLAGS).map_err(malformed)?;
            word |= if packet::opens_connection(flags) { OPENS } else { 0 };
            word |= if packet::continues_connection(flags) { CONTINUES } else { 0 };
        } else {
            word |= CONTINUES;
        }
        (protocol, ports)
    } else {
        let is_error = transport.protocol == ICMPV6 && !transport.is_fragment() && at + ICMP_BYTES <= end;
        return if is_error { error(ctx, &ip, at, end) } else { Err(Counter::Malformed) };
    };
    let flow = FlowKey6 {
        source: ip.source(),
        vip: ip.destination(),
        source_port: ports.source,
        vip_port: ports.destination,
        protocol,
        reserved: [0; 3],
    };
    Ok(Inner { flow, word })
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

/// Strips the encapsulation and rewrites the destination; 0, or 1 if a helper failed.
#[inline(never)]
fn deliver(skb: *mut __sk_buff, inner: &Inner, place: &Place) -> i32 {
    i32::from(try_deliver(&TcContext::new(skb), inner, place).is_err())
}

#[inline(always)]
fn try_deliver(ctx: &TcContext, inner: &Inner, place: &Place) -> Result<(), i64> {
    let transport = (inner.word & 0xffff).wrapping_sub(ENCAPSULATION_BYTES as u32) as usize;
    let flow = &inner.flow;
    let decapsulation = u64::from(BPF_F_ADJ_ROOM_DECAP_L3_IPV6);
    ctx.adjust_room(-(ENCAPSULATION_BYTES as i32), BPF_ADJ_ROOM_MAC, decapsulation)?;
    let to = instance_address(place.address);
    ctx.store(ETHERNET - 2, &ETHERTYPE_IPV6, 0)?;
    ctx.store(ETHERNET + offset_of!(Ipv6Header, destination), &to, 0)?;
    if inner.word & (FRAGMENT | ERROR) != 0 {
        return Ok(());
    }
    let (checksum, flags) = packet6::checksum(flow.protocol, transport);
    packet6::replace_address(ctx, checksum, &flow.vip, &to, flags)?;
    ctx.l4_csum_replace(checksum, u64::from(flow.vip_port), u64::from(place.port), flags | 2)?;
    ctx.store(transport + offset_of!(Ports, destination), &place.port, 0)
}
