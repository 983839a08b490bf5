//! `reply`: what an instance sends, at the outer end of its veth.
//!
//! A packet from a serving port leaves as the VIP's, straight out of the uplink: the client never sees the instance's
//! address, and the ingress machine never sees the answer. Everything else goes up the stack.

use core::mem::offset_of;

use anyplace_ebpf_common::{Config, Counter, ENCAPSULATION_BYTES, Ipv4Header, Ports, ReplyKey, TCP};
use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect_neigh,
    macros::classifier,
    programs::TcContext,
};

use crate::{
    maps,
    packet::{self, ETHERNET, ETHERTYPE_IPV4, IPV4, TCP_BYTES, TCP_FLAGS},
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
    const TRANSPORT: usize = ETHERNET + IPV4;
    // SAFETY: the context is the kernel's.
    if unsafe { (*ctx.skb.skb).protocol } != u32::from(ETHERTYPE_IPV4) {
        return Ok(TC_ACT_UNSPEC);
    }
    let Ok(ip) = ctx.load::<Ipv4Header>(ETHERNET) else { return Ok(TC_ACT_UNSPEC) };
    // 169.254.0.0/16 is the machine talking to its own container: health checks.
    let link_local = ip.destination[0] == 169 && ip.destination[1] == 254;
    if ip.version_ihl != 0x45
        || !packet::is_tcp_or_udp(ip.protocol)
        || link_local
        || packet::is_later_fragment(&ip)
    {
        return Ok(TC_ACT_UNSPEC);
    }
    let Ok(ports) = ctx.load::<Ports>(TRANSPORT) else { return Ok(TC_ACT_UNSPEC) };
    let instance = u32::from_ne_bytes(ip.source);
    let key = ReplyKey { instance, port: ports.source, protocol: ip.protocol, reserved: 0 };
    let Some(reply) = maps::reply(&key) else { return Ok(TC_ACT_UNSPEC) };
    if ip.protocol == TCP
        && let Ok(flags) = ctx.load::<u8>(TRANSPORT + TCP_FLAGS)
        && packet::opens_connection(flags)
    {
        // No answer: the container opens a connection from a port that it serves. It goes the way of all others,
        // through the machine's firewall.
        return Ok(TC_ACT_UNSPEC);
    }
    if packet::is_fragment(&ip) {
        // Its later parts carry no port to be known by, and the client could never put them together.
        return Err(Counter::Fragment);
    }
    let config = maps::config().ok_or(Counter::HelperFailed)?;

    let (checksum, flags) = if ip.protocol == TCP {
        (TRANSPORT + 16, 0)
    } else {
        (TRANSPORT + 6, u64::from(BPF_F_MARK_MANGLED_0))
    };
    let (from, to) = (u64::from(instance), u64::from(reply.vip));
    ctx.l3_csum_replace(ETHERNET + offset_of!(Ipv4Header, checksum), from, to, 4).map_err(helper)?;
    ctx.l4_csum_replace(checksum, from, to, flags | u64::from(BPF_F_PSEUDO_HDR) | 4).map_err(helper)?;
    ctx.l4_csum_replace(checksum, u64::from(ports.source), u64::from(reply.port), flags | 2)
        .map_err(helper)?;
    ctx.store(ETHERNET + offset_of!(Ipv4Header, source), &reply.vip, 0).map_err(helper)?;
    ctx.store(TRANSPORT + offset_of!(Ports, source), &reply.port, 0).map_err(helper)?;
    if ip.protocol == TCP {
        clamp_segment_size(ctx, config, checksum)?;
    }
    maps::count(Counter::Replies);
    // SAFETY: no parameters beyond numbers; a null neighbour asks the kernel to look the route up.
    Ok(unsafe { bpf_redirect_neigh(config.uplink, core::ptr::null_mut(), 0, 0) } as i32)
}

/// Tells the client to send segments that still fit the uplink once they are encapsulated, whatever MTU the container
/// has. Only where the option comes first, as Linux, BSD, macOS and Windows send it; larger packets are dropped at
/// ingress and counted as too big.
#[inline(always)]
fn clamp_segment_size(ctx: &TcContext, config: &Config, checksum: usize) -> Result<(), Counter> {
    const OPTIONS: usize = ETHERNET + IPV4 + TCP_BYTES;
    /// Kind and length of the option.
    const MAXIMUM_SEGMENT_SIZE: [u8; 2] = [2, 4];
    let Ok(flags) = ctx.load::<u8>(ETHERNET + IPV4 + TCP_FLAGS) else { return Ok(()) };
    if !packet::negotiates(flags) {
        return Ok(());
    }
    let Ok([kind, length, high, low]) = ctx.load::<[u8; 4]>(OPTIONS) else { return Ok(()) };
    let limit = config.uplink_mtu.saturating_sub((ENCAPSULATION_BYTES + IPV4 + TCP_BYTES) as u32);
    let size = u16::from_be_bytes([high, low]);
    if [kind, length] != MAXIMUM_SEGMENT_SIZE || u32::from(size) <= limit {
        return Ok(());
    }
    let (from, to) = (size.to_be(), (limit as u16).to_be());
    ctx.l4_csum_replace(checksum, u64::from(from), u64::from(to), 2).map_err(helper)?;
    ctx.store(OPTIONS + 2, &to, 0).map_err(helper)
}

#[inline(always)]
fn helper<E>(_: E) -> Counter {
    Counter::HelperFailed
}
