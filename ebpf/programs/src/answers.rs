//! ICMP that ingress sends itself, back to where a packet came from: echo replies, and "fragmentation needed".
//!
//! Both at a limited rate for each CPU, so that a flood gets no flood back.

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, ICMP, Ipv4Header, TTL, ipv4_checksum};
use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_DROP, XDP_TX},
        xdp_md,
    },
    helpers::{
        bpf_csum_diff, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len, bpf_xdp_load_bytes, bpf_xdp_store_bytes,
    },
    programs::XdpContext,
};

use crate::{
    ingress::{Ethernet, at},
    maps::{self, Answer},
    packet::{self, ETHERNET, ICMP_BYTES, IPV4},
};

/// First bytes of an ICMP message.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Icmp {
    pub(crate) kind: u16,
    pub(crate) checksum: u16,
    /// Identifier and sequence number; or zero and the MTU.
    pub(crate) rest: [u16; 2],
}

/// An ICMP message up to its data.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    ethernet: Ethernet,
    ip: Ipv4Header,
    icmp: Icmp,
}

const MESSAGE: usize = size_of::<Message>();
const _: () = assert!(MESSAGE == ETHERNET + IPV4 + ICMP_BYTES);

const ECHO_REQUEST: u16 = 0x0800u16.to_be();
const ECHO_REPLY: u16 = 0;
const FRAGMENTATION_NEEDED: u16 = 0x0304u16.to_be();
/// What is quoted at most: an IP header with all options, and the ports.
const QUOTE: usize = 60 + 8;

/// Answers an echo request without IP options, whose length was checked.
#[inline(never)]
pub(crate) fn echo(ctx: *mut xdp_md) -> u32 {
    finish(try_echo(&XdpContext::new(ctx)))
}

/// Drops a packet that doesn't fit the uplink once it is encapsulated, and tells its sender, if it can know.
#[inline(never)]
pub(crate) fn too_big(ctx: *mut xdp_md) -> u32 {
    maps::count(Counter::TooBig);
    finish(try_too_big(&XdpContext::new(ctx)))
}

/// `None`: a drop that needs no further reason.
#[inline(always)]
pub(crate) fn finish(result: Result<u32, Option<Counter>>) -> u32 {
    result.unwrap_or_else(|reason| {
        if let Some(reason) = reason {
            maps::count(reason);
        }
        XDP_DROP
    })
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
    message.ethernet = message.ethernet.back();
    message.ip = answer_header(message.ip, u16::from_be(message.ip.total_length));
    message.icmp.kind = ECHO_REPLY;
    message.icmp.checksum = packet::updated(message.icmp.checksum, ECHO_REQUEST, ECHO_REPLY);
    maps::count(Counter::EchoReplies);
    Ok(XDP_TX)
}

#[inline(always)]
fn try_too_big(ctx: &XdpContext) -> Result<u32, Option<Counter>> {
    // SAFETY: the context is the kernel's.
    let frame = unsafe { bpf_xdp_get_buff_len(ctx.ctx) };
    let config = maps::config().ok_or(Counter::HelperFailed)?;
    let ip = at::<Ipv4Header>(ctx, ETHERNET).ok_or(Counter::Malformed)?;
    let ethernet = at::<Ethernet>(ctx, 0).ok_or(Counter::Malformed)?;
    // SAFETY: `at` checked the bounds, and no helper moved the packet since.
    let (ip, ethernet) = unsafe { (*ip, *ethernet) };
    let header = packet::header_bytes(&ip);
    // No error about an error, nor about a fragment that has no ports to be known by.
    if header == 0
        || ip.protocol == ICMP
        || packet::is_later_fragment(&ip)
        || !packet::must_not_be_fragmented(&ip)
    {
        return Err(None);
    }
    if !maps::may_answer(config, Answer::TooBig) {
        return Err(Some(Counter::IcmpLimited));
    }
    let quoted = header + ICMP_BYTES;
    let mut quote = [0u32; QUOTE / 4];
    // SAFETY: `quoted` is at most the buffer's size; the helper checks the packet's bounds.
    if quoted > QUOTE
        || unsafe { bpf_xdp_load_bytes(ctx.ctx, ETHERNET as u32, quote.as_mut_ptr().cast(), quoted as u32) }
            != 0
    {
        return Err(Some(Counter::HelperFailed));
    }
    let mtu = (config.uplink_mtu.min(0xffff) as u16).saturating_sub(ENCAPSULATION_BYTES as u16).to_be();
    let mut icmp = Icmp { kind: FRAGMENTATION_NEEDED, checksum: 0, rest: [0, mtu] };
    let seed = u32::from(FRAGMENTATION_NEEDED) + u32::from(mtu);
    // SAFETY: adds up the buffer, which is zero behind the quote; no old bytes to take off.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, quote.as_mut_ptr(), QUOTE as u32, seed) };
    let mut sum = sum as u32;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    icmp.checksum = !(sum as u16);
    let mut answer = answer_header(ip, (IPV4 + ICMP_BYTES + quoted) as u16);
    answer.tos = 0;
    answer.id = 0;
    answer.fragment = 0;
    answer.checksum = 0;
    answer.checksum = ipv4_checksum(&answer);

    let change = (MESSAGE + quoted) as i32 - frame as i32;
    // SAFETY: the context is the kernel's; the packet pointer is fetched anew below.
    if unsafe { bpf_xdp_adjust_tail(ctx.ctx, change) } != 0 {
        return Err(Some(Counter::HelperFailed));
    }
    let message = at::<Message>(ctx, 0).ok_or(Counter::HelperFailed)?;
    // SAFETY: `at` checked the bounds after the packet changed.
    unsafe {
        *message = Message { ethernet: ethernet.back(), ip: answer, icmp };
    }
    // SAFETY: as with the load above.
    if unsafe { bpf_xdp_store_bytes(ctx.ctx, MESSAGE as u32, quote.as_mut_ptr().cast(), quoted as u32) } != 0
    {
        return Err(Some(Counter::HelperFailed));
    }
    maps::count(Counter::TooBigSent);
    Ok(XDP_TX)
}

/// The header of an answer to a packet with this one.
#[inline(always)]
fn answer_header(request: Ipv4Header, length: u16) -> Ipv4Header {
    let mut ip = Ipv4Header {
        version_ihl: 0x45,
        total_length: length.to_be(),
        ttl: TTL,
        protocol: ICMP,
        checksum: 0,
        source: request.destination,
        destination: request.source,
        ..request
    };
    ip.checksum = ipv4_checksum(&ip);
    ip
}
