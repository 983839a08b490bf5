//! Clients' packets that aren't plain TCP or UDP: IP options, fragments, ICMP.
//!
//! A fragment after the first carries no ports; they are remembered from the first, by source, VIP, identification and
//! protocol, at ingress and at each hop. (Hashing addresses alone would need no memory, but would send a flow's
//! fragments and its whole packets to different instances.) One that comes before the first is dropped and counted.
//!
//! An ICMP error belongs to the flow of the packet that it quotes, seen from the other side.

use anyplace_ebpf_common::{Counter, ICMP, Ipv4Header, Ports, TCP, VipKey};
use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_DROP, XDP_PASS},
        xdp_md,
    },
    helpers::{bpf_xdp_get_buff_len, bpf_xdp_load_bytes},
    programs::XdpContext,
};

use crate::{
    answers,
    ingress::{Flow, at, forward},
    maps,
    packet::{self, ETHERNET, ICMP_BYTES, IPV4, TCP_FLAGS},
};

/// The verdict on such a packet. A function of its own, and not inlined: `ingress` is measured in nanoseconds.
#[inline(never)]
pub(crate) fn unusual(ctx: *mut xdp_md) -> u32 {
    match try_unusual(&XdpContext::new(ctx)) {
        Ok(action) => action,
        Err(reason) => {
            maps::count(reason);
            XDP_DROP
        }
    }
}

#[inline(always)]
fn try_unusual(ctx: &XdpContext) -> Result<u32, Counter> {
    let Some(ip) = at::<Ipv4Header>(ctx, ETHERNET) else { return Ok(XDP_PASS) };
    // SAFETY: `at` checked the bounds, and no helper moved the packet since.
    let ip = unsafe { *ip };
    let vip_address = u32::from_ne_bytes(ip.destination);
    let known = packet::is_tcp_or_udp(ip.protocol) || ip.protocol == ICMP;
    if ip.version_ihl >> 4 != 4 || !known || !maps::is_vip(vip_address) {
        return Ok(XDP_PASS);
    }
    let header = packet::header_bytes(&ip);
    let length = u16::from_be(ip.total_length) as usize;
    // SAFETY: the context is the kernel's.
    let frame = unsafe { bpf_xdp_get_buff_len(ctx.ctx) };
    if header == 0 || length < header || (ETHERNET + length) as u64 > frame {
        return Err(Counter::Malformed);
    }
    let transport = ETHERNET + header;
    let flow = if ip.protocol == ICMP {
        if packet::is_fragment(&ip) {
            return Err(Counter::Fragment);
        }
        if length < header + ICMP_BYTES {
            return Err(Counter::Malformed);
        }
        match load::<[u8; 2]>(ctx, transport)? {
            [8, 0] if header == IPV4 => return Ok(answers::echo(ctx.ctx)),
            [8, 0] => return Err(Counter::Options),
            [kind, _] if packet::quotes(kind) => {
                quoted(ctx, transport + ICMP_BYTES, length + ETHERNET, vip_address)?
            }
            _ => return Ok(XDP_PASS),
        }
    } else {
        transport_flow(ctx, &ip, transport, length - header)?
    };
    let vip = maps::vip(&VipKey::new(vip_address, flow.ports.destination, flow.protocol));
    let Some(vip) = vip else {
        return Err(if ip.protocol == ICMP { Counter::IcmpUnmatched } else { Counter::UnknownPort });
    };
    if ip.protocol == ICMP {
        maps::count(Counter::IcmpErrors);
    } else if packet::is_first_fragment(&ip) {
        maps::record_fragment(&packet::fragment_key(&ip), flow.ports);
    }
    forward(ctx, &flow.client(&ip), &vip)
}

/// The flow of a TCP or UDP packet with options, or of a fragment.
#[inline(always)]
fn transport_flow(
    ctx: &XdpContext,
    ip: &Ipv4Header,
    transport: usize,
    length: usize,
) -> Result<Flow, Counter> {
    let source = u32::from_ne_bytes(ip.source);
    if packet::is_later_fragment(ip) {
        let ports = maps::fragment_ports(&packet::fragment_key(ip)).ok_or(Counter::FragmentUnknown)?;
        return Ok(Flow { source, ports, protocol: ip.protocol, opens: false });
    }
    if length < packet::transport_bytes(ip.protocol) {
        return Err(Counter::Malformed);
    }
    let ports = load::<Ports>(ctx, transport)?;
    let opens = ip.protocol == TCP && packet::opens_connection(load::<u8>(ctx, transport + TCP_FLAGS)?);
    Ok(Flow { source, ports, protocol: ip.protocol, opens })
}

/// The flow of the packet that an ICMP error quotes, which one of our instances sent as the VIP.
#[inline(always)]
fn quoted(ctx: &XdpContext, at: usize, end: usize, vip: u32) -> Result<Flow, Counter> {
    if at + IPV4 > end {
        return Err(Counter::Malformed);
    }
    let ip = load::<Ipv4Header>(ctx, at)?;
    let header = packet::header_bytes(&ip);
    if header == 0 || at + header + ICMP_BYTES > end {
        return Err(Counter::Malformed);
    }
    if u32::from_ne_bytes(ip.source) != vip
        || !packet::is_tcp_or_udp(ip.protocol)
        || packet::is_later_fragment(&ip)
    {
        return Err(Counter::IcmpUnmatched);
    }
    let ports = load::<Ports>(ctx, at + header)?;
    Ok(Flow {
        source: u32::from_ne_bytes(ip.destination),
        ports: Ports { source: ports.destination, destination: ports.source },
        protocol: ip.protocol,
        opens: false,
    })
}

/// Copies a `T` out of the packet, at an offset that the verifier can't follow.
#[inline(always)]
pub(crate) fn load<T: Copy>(ctx: &XdpContext, offset: usize) -> Result<T, Counter> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: room for as many bytes as are asked for; the helper checks the packet's bounds.
    let result = unsafe {
        bpf_xdp_load_bytes(ctx.ctx, offset as u32, value.as_mut_ptr().cast(), size_of::<T>() as u32)
    };
    if result != 0 {
        return Err(Counter::Malformed);
    }
    // SAFETY: written by the helper; only types that any bytes are a value of are loaded here.
    Ok(unsafe { value.assume_init() })
}
