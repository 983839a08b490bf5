//! `ingress` for IPv6: plain TCP and UDP packets first, then those with extension headers, fragments and ICMPv6.
//!
//! What it does is `ingress`'s and `unusual`'s; functions of their own, so that IPv4 pays one comparison for it.

use core::mem::MaybeUninit;

use anyplace_ebpf_common::{
    Address6, Counter, FragmentValue6, ICMPV6, Ipv6Header, Ports, TCP, VipKey6, VipValue, flow_hash6,
};
use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_DROP, XDP_PASS},
        xdp_md,
    },
    helpers::bpf_xdp_get_buff_len,
    programs::XdpContext,
};

use crate::{
    answers6, events,
    ingress::{self, Client, at},
    maps, maps6,
    packet::{self, ETHERNET, ICMP_BYTES, TCP_FLAGS},
    packet6::{self, IPV6},
    unusual::load,
};

/// What [`ingress6`] answers where the packet isn't plain TCP or UDP, so `unusual6` has to look at it. Not called from there:
/// their memory wouldn't fit the stack together.
pub(crate) const UNUSUAL: u32 = u32::MAX;

/// The verdict on an IPv6 packet, or [`UNUSUAL`].
#[inline(never)]
pub(crate) fn ingress6(ctx: *mut xdp_md) -> u32 {
    finish(try_ingress6(&XdpContext::new(ctx)))
}

/// The verdict on one with extension headers, a fragment, or an ICMPv6 message.
#[inline(never)]
pub(crate) fn unusual6(ctx: *mut xdp_md) -> u32 {
    let mut found = MaybeUninit::uninit();
    match read(ctx, &mut found) {
        // SAFETY: `FOUND` says that it was written.
        FOUND => forward(ctx, unsafe { found.assume_init_ref() }),
        action => action,
    }
}

/// What [`read`] answers where the packet is to be forwarded.
const FOUND: u32 = u32::MAX;

/// Where a packet goes.
struct Found {
    client: Client,
    vip: VipValue,
}

/// Looks for a packet's flow: the verdict, or [`FOUND`] with its flow.
#[inline(never)]
fn read(ctx: *mut xdp_md, found: &mut MaybeUninit<Found>) -> u32 {
    finish(try_read(&XdpContext::new(ctx), found))
}

#[inline(never)]
fn forward(ctx: *mut xdp_md, found: &Found) -> u32 {
    finish(ingress::forward(&XdpContext::new(ctx), &found.client, &found.vip))
}

#[inline(always)]
fn finish(result: Result<u32, Counter>) -> u32 {
    match result {
        Ok(action) => action,
        Err(reason) => {
            maps::count(reason);
            XDP_DROP
        }
    }
}

#[inline(always)]
fn try_ingress6(ctx: &XdpContext) -> Result<u32, Counter> {
    let Some(ip) = at::<Ipv6Header>(ctx, ETHERNET) else { return Ok(XDP_PASS) };
    // SAFETY: `at` checked the bounds, and no helper moved the packet since.
    let ip = unsafe { &*ip };
    if ip.version() != 6 {
        return Ok(XDP_PASS);
    }
    if !packet6::is_tcp_or_udp(ip.next) {
        return Ok(UNUSUAL);
    }
    let vip_address = ip.destination();
    let refuse = |reason| if maps6::is_vip(vip_address) { Err(reason) } else { Ok(XDP_PASS) };
    let Some(ports) = at::<Ports>(ctx, ETHERNET + IPV6) else { return refuse(Counter::Malformed) };
    // SAFETY: as above.
    let ports = unsafe { *ports };
    let Some(vip) = maps6::vip(&VipKey6::new(vip_address, ports.destination, ip.next)) else {
        return refuse(Counter::UnknownPort);
    };
    let payload = u16::from_be(ip.payload_length) as usize;
    if payload < packet::transport_bytes(ip.next) || ETHERNET + IPV6 + payload > ctx.data_end() - ctx.data() {
        return Err(Counter::Malformed);
    }
    let mut opens = false;
    if ip.next == TCP {
        let flags = at::<u8>(ctx, ETHERNET + IPV6 + TCP_FLAGS).ok_or(Counter::Malformed)?;
        // SAFETY: as above.
        opens = packet::opens_connection(unsafe { *flags });
    }
    let hash = flow_hash6(&ip.source(), &vip_address, ports.source, ports.destination, ip.next);
    let result = ingress::forward(ctx, &client(ip, hash, opens, true), &vip);
    if result == Err(Counter::NoBackend) {
        events::refused_at_ingress6(ctx.ctx);
    }
    result
}

/// What ingress makes of a packet.
#[inline(always)]
fn client(ip: &Ipv6Header, hash: u64, opens: bool, tell: bool) -> Client {
    let length = IPV6 as u32 + u32::from(u16::from_be(ip.payload_length));
    Client { ipv6: true, class: ip.traffic_class(), length, hash, opens, tell }
}

/// The flow that a packet belongs to, without its addresses.
struct Flow {
    hash: u64,
    vip_port: u16,
    protocol: u8,
    opens: bool,
}

impl Flow {
    #[inline(always)]
    fn new(source: &Address6, vip: &Address6, ports: Ports, protocol: u8, opens: bool) -> Self {
        let hash = flow_hash6(source, vip, ports.source, ports.destination, protocol);
        Self { hash, vip_port: ports.destination, protocol, opens }
    }
}

#[inline(always)]
fn try_read(ctx: &XdpContext, found: &mut MaybeUninit<Found>) -> Result<u32, Counter> {
    let Some(ip) = at::<Ipv6Header>(ctx, ETHERNET) else { return Ok(XDP_PASS) };
    // SAFETY: `at` checked the bounds, and no helper moves the packet before the last use.
    let ip = unsafe { &*ip };
    let vip_address = ip.destination();
    if !maps6::is_vip(vip_address) {
        return Ok(XDP_PASS);
    }
    let end = ETHERNET + IPV6 + u16::from_be(ip.payload_length) as usize;
    // SAFETY: the context is the kernel's.
    if end as u64 > unsafe { bpf_xdp_get_buff_len(ctx.ctx) } {
        return Err(Counter::Malformed);
    }
    let transport = packet6::walk_frame(ctx, ip.next, ETHERNET + IPV6, end)?;
    let protocol = transport.protocol;
    let mut error = false;
    let flow = if transport.is_later_fragment() {
        let first = maps6::fragment(&transport.fragment_key(ip)).ok_or(Counter::FragmentUnknown)?;
        Flow::new(&ip.source(), &vip_address, first.ports, first.protocol, false)
    } else if protocol == ICMPV6 {
        if transport.is_fragment() {
            return Err(Counter::Fragment);
        }
        if transport.at + ICMP_BYTES > end {
            return Err(Counter::Malformed);
        }
        match load::<[u8; 2]>(ctx, transport.at)? {
            [128, 0] if !transport.is_extended() => return Ok(answers6::echo(ctx.ctx)),
            [128, 0] => return Err(Counter::Options),
            [kind, _] if packet6::quotes(kind) => {}
            _ => return Ok(XDP_PASS),
        }
        error = true;
        quoted(ctx, transport.at + ICMP_BYTES, end, &vip_address)?
    } else if packet6::is_tcp_or_udp(protocol) {
        if transport.at + packet::transport_bytes(protocol) > end {
            return Err(Counter::Malformed);
        }
        let ports = load::<Ports>(ctx, transport.at)?;
        let opens = protocol == TCP && packet::opens_connection(load::<u8>(ctx, transport.at + TCP_FLAGS)?);
        if transport.is_first_fragment()
            && maps6::vip(&VipKey6::new(vip_address, ports.destination, protocol)).is_some()
        {
            let value = FragmentValue6 { ports, protocol, reserved: [0; 3] };
            maps6::record_fragment(&transport.fragment_key(ip), value);
        }
        Flow::new(&ip.source(), &vip_address, ports, protocol, opens)
    } else {
        return Ok(XDP_PASS);
    };
    let Some(vip) = maps6::vip(&VipKey6::new(vip_address, flow.vip_port, flow.protocol)) else {
        return Err(if error { Counter::IcmpUnmatched } else { Counter::UnknownPort });
    };
    if error {
        maps::count(Counter::IcmpErrors);
    }
    // No error about an error, nor about a fragment that has no ports to be known by.
    let tell = !error && !transport.is_later_fragment();
    found.write(Found { client: client(ip, flow.hash, flow.opens, tell), vip });
    Ok(FOUND)
}

/// The flow of the packet that an ICMPv6 error quotes, which one of our instances sent as the VIP.
#[inline(always)]
fn quoted(ctx: &XdpContext, at: usize, end: usize, vip: &Address6) -> Result<Flow, Counter> {
    if at + IPV6 > end {
        return Err(Counter::Malformed);
    }
    let ip = load::<Ipv6Header>(ctx, at)?;
    if ip.version() != 6 {
        return Err(Counter::Malformed);
    }
    let transport = packet6::walk_frame(ctx, ip.next, at + IPV6, end).map_err(|_| Counter::Malformed)?;
    let protocol = transport.protocol;
    if ip.source() != *vip || transport.is_later_fragment() || !packet6::is_tcp_or_udp(protocol) {
        return Err(Counter::IcmpUnmatched);
    }
    if transport.at + ICMP_BYTES > end {
        return Err(Counter::Malformed);
    }
    let ports = load::<Ports>(ctx, transport.at)?;
    let ports = Ports { source: ports.destination, destination: ports.source };
    Ok(Flow::new(&ip.destination(), vip, ports, protocol, false))
}
