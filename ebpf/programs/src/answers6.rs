//! ICMPv6 that ingress sends itself: echo replies, and "packet too big". At the rates of `answers`, and in its counters.

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, ICMPV6, Ipv6Header, TTL};
use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_DROP, XDP_TX},
        xdp_md,
    },
    helpers::{bpf_csum_diff, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len},
    programs::XdpContext,
};

use crate::{
    answers::{Icmp, finish},
    ingress::{Ethernet, at},
    maps::{self, Answer},
    packet::{self, ETHERNET, ICMP_BYTES},
    packet6::IPV6,
};

/// An ICMPv6 message up to its data.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    ethernet: Ethernet,
    ip: Ipv6Header,
    icmp: Icmp,
}

const MESSAGE: usize = size_of::<Message>();
const _: () = assert!(MESSAGE == ETHERNET + IPV6 + ICMP_BYTES);

const ECHO_REQUEST: u16 = 0x8000u16.to_be();
const ECHO_REPLY: u16 = 0x8100u16.to_be();
const PACKET_TOO_BIG: u16 = 0x0200u16.to_be();
/// What is quoted: the headers of nearly all packets, and far less than any that is too big has.
const QUOTE: usize = 128;

/// What is quoted of a packet.
#[repr(C)]
struct Quote {
    ip: Ipv6Header,
    rest: [u8; QUOTE - IPV6],
}

/// Answers an echo request without extension headers, whose length was checked.
#[inline(never)]
pub(crate) fn echo(ctx: *mut xdp_md) -> u32 {
    finish(try_echo(&XdpContext::new(ctx)))
}

/// Drops a packet that doesn't fit the uplink once it is encapsulated, and tells its sender, if it may be told.
#[inline(never)]
pub(crate) fn too_big(ctx: *mut xdp_md, tell: bool) -> u32 {
    maps::count(Counter::TooBig);
    if !tell {
        return XDP_DROP;
    }
    finish(try_too_big(&XdpContext::new(ctx)))
}

#[inline(always)]
fn try_echo(ctx: &XdpContext) -> Result<u32, Option<Counter>> {
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    if !maps::may_answer(config, Answer::Echo) {
        return Err(Some(Counter::IcmpLimited));
    }
    let message = at::<Message>(ctx, 0).ok_or(Counter::Malformed)?;
    // SAFETY: `at` checked the bounds, and no helper moved the packet since.
    let message = unsafe { &mut *message };
    let (source, destination) = (message.ip.source, message.ip.destination);
    message.ethernet = message.ethernet.back();
    message.ip.hops = TTL;
    message.ip.source = destination;
    message.ip.destination = source;
    message.icmp.kind = ECHO_REPLY;
    message.icmp.checksum = packet::updated(message.icmp.checksum, ECHO_REQUEST, ECHO_REPLY);
    maps::count(Counter::EchoReplies);
    Ok(XDP_TX)
}

/// The packet stays where it is and becomes the quote; the message's headers go in front of it.
#[inline(always)]
fn try_too_big(ctx: &XdpContext) -> Result<u32, Option<Counter>> {
    // SAFETY: the context is the kernel's.
    let frame = unsafe { bpf_xdp_get_buff_len(ctx.ctx) };
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    if !maps::may_answer(config, Answer::TooBig) {
        return Err(Some(Counter::IcmpLimited));
    }
    let ethernet = at::<Ethernet>(ctx, 0).ok_or(Counter::HelperFailed)?;
    let quote = at::<Quote>(ctx, ETHERNET).ok_or(Counter::HelperFailed)?;
    let mtu = (config.uplink_mtu.min(0xffff) as u16).saturating_sub(ENCAPSULATION_BYTES as u16).to_be();
    let length = ((ICMP_BYTES + QUOTE) as u16).to_be();
    let seed =
        u32::from(PACKET_TOO_BIG) + u32::from(mtu) + u32::from(length) + u32::from(u16::from(ICMPV6).to_be());
    // SAFETY: `at` checked the bounds, and no helper moved the packet since; the helper adds up the quote, then its
    // addresses once more, for the message's own pseudo-header. No old bytes to take off.
    let (ethernet, ip, sum) = unsafe {
        let ip = (*quote).ip;
        let none = core::ptr::null_mut();
        let sum = bpf_csum_diff(none, 0, quote.cast(), QUOTE as u32, seed) as u32;
        let addresses = (&raw mut (*quote).ip.source).cast();
        (*ethernet, ip, bpf_csum_diff(none, 0, addresses, 32, sum) as u32)
    };
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let icmp = Icmp { kind: PACKET_TOO_BIG, checksum: !(sum as u16), rest: [0, mtu] };
    let answer = Ipv6Header {
        class: [0x60, 0, 0, 0],
        payload_length: length,
        next: ICMPV6,
        hops: TTL,
        source: ip.destination,
        destination: ip.source,
    };

    const GROWTH: usize = MESSAGE - ETHERNET;
    let change = (MESSAGE + QUOTE) as i32 - (frame as i32 + GROWTH as i32);
    // SAFETY: the context is the kernel's; the packet pointer is fetched anew below.
    let failed = unsafe {
        bpf_xdp_adjust_head(ctx.ctx, -(GROWTH as i32)) != 0 || bpf_xdp_adjust_tail(ctx.ctx, change) != 0
    };
    if failed {
        return Err(Some(Counter::HelperFailed));
    }
    let message = at::<Message>(ctx, 0).ok_or(Counter::HelperFailed)?;
    // SAFETY: `at` checked the bounds after the packet changed.
    unsafe {
        *message = Message { ethernet: ethernet.back(), ip: answer, icmp };
    }
    maps::count(Counter::TooBigSent);
    Ok(XDP_TX)
}
