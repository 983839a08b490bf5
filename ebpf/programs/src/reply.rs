//! `reply`: what an instance sends, at the outer end of its veth.
//!
//! A packet from a serving port leaves as the VIP's, straight out of the uplink: the client never sees the instance's
//! address, and the ingress machine never sees the answer. Everything else goes up the stack.

use core::mem::offset_of;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, Ipv4Header, Ports, ReplyKey, TCP};
use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect_neigh,
    macros::classifier,
    programs::TcContext,
};

use crate::{
    maps,
    packet::{self, ETHERNET, ETHERTYPE_IPV4, IPV4, TCP_BYTES, TCP_FLAGS},
    packet6::ETHERTYPE_IPV6,
    reply6,
};

#[classifier]
pub fn reply(ctx: TcContext) -> i32 {
    match try_reply(&ctx) {
        Ok(action) => action,
        Err(reason) => {
            maps::count(reason);
            TC_ACT_SHOT
        }
    }
}

/// A verdict, or the reason for a drop.
#[inline(always)]
fn try_reply(ctx: &TcContext) -> Result<i32, Counter> {
    // SAFETY: the context is the kernel's.
    let ethertype = unsafe { (*ctx.skb.skb).protocol };
    if ethertype != u32::from(ETHERTYPE_IPV4) {
        let ipv6 = ethertype == u32::from(ETHERTYPE_IPV6);
        return Ok(if ipv6 { reply6::reply6(ctx.skb.skb) } else { TC_ACT_UNSPEC });
    }
    let Ok(ip) = ctx.load::<Ipv4Header>(ETHERNET) else { return Ok(TC_ACT_UNSPEC) };
    // 169.254.0.0/16 is the machine talking to its own container: health checks.
    let link_local = ip.destination[0] == 169 && ip.destination[1] == 254;
    let header = packet::header_bytes(&ip);
    if header == 0 || !packet::is_tcp_or_udp(ip.protocol) || link_local {
        return Ok(TC_ACT_UNSPEC);
    }
    let transport = ETHERNET + header;
    let later = packet::is_later_fragment(&ip);
    let ports = if later {
        // Known if the first fragment was an answer; else it is no answer either.
        let Some(ports) = maps::fragment_ports(&packet::fragment_key(&ip)) else { return Ok(TC_ACT_UNSPEC) };
        ports
    } else {
        let Ok(ports) = ctx.load::<Ports>(transport) else { return Ok(TC_ACT_UNSPEC) };
        ports
    };
    let instance = u32::from_ne_bytes(ip.source);
    let key = ReplyKey { instance, port: ports.source, protocol: ip.protocol, reserved: 0 };
    let Some(reply) = maps::reply(&key) else { return Ok(TC_ACT_UNSPEC) };
    if ip.protocol == TCP
        && !later
        && let Ok(flags) = ctx.load::<u8>(transport + TCP_FLAGS)
        && packet::opens_connection(flags)
    {
        // No answer: the container opens a connection from a port that it serves. It goes the way of all others,
        // through the machine's firewall.
        return Ok(TC_ACT_UNSPEC);
    }
    if packet::is_first_fragment(&ip) {
        maps::record_fragment(&packet::fragment_key(&ip), ports);
    }
    let config = maps::config().ok_or(Counter::HelperFailed)?;

    let (from, to) = (u64::from(instance), u64::from(reply.vip));
    ctx.l3_csum_replace(ETHERNET + offset_of!(Ipv4Header, checksum), from, to, 4).map_err(helper)?;
    ctx.store(ETHERNET + offset_of!(Ipv4Header, source), &reply.vip, 0).map_err(helper)?;
    if !later {
        let (checksum, flags) = if ip.protocol == TCP {
            (transport + 16, 0)
        } else {
            (transport + 6, u64::from(BPF_F_MARK_MANGLED_0))
        };
        ctx.l4_csum_replace(checksum, from, to, flags | u64::from(BPF_F_PSEUDO_HDR) | 4).map_err(helper)?;
        ctx.l4_csum_replace(checksum, u64::from(ports.source), u64::from(reply.port), flags | 2)
            .map_err(helper)?;
        ctx.store(transport + offset_of!(Ports, source), &reply.port, 0).map_err(helper)?;
        if ip.protocol == TCP {
            let limit = config.uplink_mtu.saturating_sub((ENCAPSULATION_BYTES + IPV4 + TCP_BYTES) as u32);
            clamp_segment_size(ctx, limit, transport, checksum)?;
        }
    }
    maps::count(Counter::Replies);
    if u32::from_ne_bytes(ip.destination) == config.address {
        // The client is this machine, or a container behind its address: the stack knows. The fabric can't bring it back.
        return Ok(TC_ACT_UNSPEC);
    }
    // SAFETY: no parameters beyond numbers; a null neighbour asks the kernel to look the route up.
    Ok(unsafe { bpf_redirect_neigh(config.uplink, core::ptr::null_mut(), 0, 0) } as i32)
}

/// Tells the client to send segments that still fit the uplink once they are encapsulated, whatever MTU the container
/// has. Only where the option comes first, as Linux, BSD, macOS and Windows send it; larger packets are dropped at
/// ingress and counted as too big.
#[inline(always)]
pub(crate) fn clamp_segment_size(
    ctx: &TcContext,
    limit: u32,
    transport: usize,
    checksum: usize,
) -> Result<(), Counter> {
    /// Kind and length of the option.
    const MAXIMUM_SEGMENT_SIZE: [u8; 2] = [2, 4];
    let Ok(flags) = ctx.load::<u8>(transport + TCP_FLAGS) else { return Ok(()) };
    if !packet::negotiates(flags) {
        return Ok(());
    }
    let options = transport + TCP_BYTES;
    let Ok([kind, length, high, low]) = ctx.load::<[u8; 4]>(options) else { return Ok(()) };
    let size = u16::from_be_bytes([high, low]);
    if [kind, length] != MAXIMUM_SEGMENT_SIZE || u32::from(size) <= limit {
        return Ok(());
    }
    let (from, to) = (size.to_be(), (limit as u16).to_be());
    ctx.l4_csum_replace(checksum, u64::from(from), u64::from(to), 2).map_err(helper)?;
    ctx.store(options + 2, &to, 0).map_err(helper)
}

#[inline(always)]
pub(crate) fn helper<E>(_: E) -> Counter {
    Counter::HelperFailed
}
