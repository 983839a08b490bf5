//! `reply` for IPv6.

use core::mem::offset_of;

use anyplace_ebpf_common::{
    Counter, ENCAPSULATION_BYTES, FragmentValue6, Ipv6Header, Ports, ReplyKey, TCP, instance_address,
};
use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect_neigh,
    programs::TcContext,
};

use crate::{
    maps, maps6,
    packet::{self, ETHERNET, TCP_BYTES, TCP_FLAGS},
    packet6::{self, IPV6},
    reply::{clamp_segment_size, helper},
};

/// The verdict on an IPv6 packet. A function of its own: IPv4 pays one comparison for it.
#[inline(never)]
pub(crate) fn reply6(skb: *mut __sk_buff) -> i32 {
    match try_reply6(&TcContext::new(skb)) {
        Ok(action) => action,
        Err(reason) => {
            maps::count(reason);
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn try_reply6(ctx: &TcContext) -> Result<i32, Counter> {
    let Ok(ip) = ctx.load::<Ipv6Header>(ETHERNET) else { return Ok(TC_ACT_UNSPEC) };
    let source = ip.source();
    let instance = source[3];
    if ip.version() != 6 || source != instance_address(instance) {
        return Ok(TC_ACT_UNSPEC);
    }
    let walk = packet6::walk_buffer(ctx, ip.next, ETHERNET + IPV6, ctx.len() as usize);
    let Ok(transport) = walk else { return Ok(TC_ACT_UNSPEC) };
    let later = transport.is_later_fragment();
    let (protocol, ports) = if later {
        // Known if the first fragment was an answer; else it is no answer either.
        let first = maps6::fragment(&transport.fragment_key(&ip));
        let Some(first) = first else { return Ok(TC_ACT_UNSPEC) };
        (first.protocol, first.ports)
    } else if packet6::is_tcp_or_udp(transport.protocol) {
        let Ok(ports) = ctx.load::<Ports>(transport.at) else { return Ok(TC_ACT_UNSPEC) };
        (transport.protocol, ports)
    } else {
        return Ok(TC_ACT_UNSPEC);
    };
    let key = ReplyKey { instance, port: ports.source, protocol, reserved: 0 };
    let Some(reply) = maps6::reply(&key) else { return Ok(TC_ACT_UNSPEC) };
    if protocol == TCP
        && !later
        && let Ok(flags) = ctx.load::<u8>(transport.at + TCP_FLAGS)
        && packet::opens_connection(flags)
    {
        // No answer: the container opens a connection from a port that it serves.
        return Ok(TC_ACT_UNSPEC);
    }
    if transport.is_first_fragment() {
        let value = FragmentValue6 { ports, protocol, reserved: [0; 3] };
        maps6::record_fragment(&transport.fragment_key(&ip), value);
    }
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    if !later {
        let (checksum, flags) = packet6::checksum(protocol, transport.at);
        packet6::replace_address(ctx, checksum, &source, &reply.vip, flags).map_err(helper)?;
        ctx.l4_csum_replace(checksum, u64::from(ports.source), u64::from(reply.port), flags | 2)
            .map_err(helper)?;
        ctx.store(transport.at + offset_of!(Ports, source), &reply.port, 0).map_err(helper)?;
        if protocol == TCP {
            let limit = config.uplink_mtu.saturating_sub((ENCAPSULATION_BYTES + IPV6 + TCP_BYTES) as u32);
            clamp_segment_size(ctx, limit, transport.at, checksum)?;
        }
    }
    ctx.store(ETHERNET + offset_of!(Ipv6Header, source), &reply.vip, 0).map_err(helper)?;
    maps::count(Counter::Replies);
    if maps6::is_own(ip.destination()) {
        // As with IPv4: the client is this machine, or a container behind its address.
        return Ok(TC_ACT_UNSPEC);
    }
    // SAFETY: no parameters beyond numbers; a null neighbour asks the kernel to look the route up.
    Ok(unsafe { bpf_redirect_neigh(config.uplink, core::ptr::null_mut(), 0, 0) } as i32)
}
