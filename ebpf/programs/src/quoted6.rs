//! The packet that an ICMPv6 error quotes: as `quoted`, for IPv6.

use core::mem::offset_of;

use anyplace_ebpf_common::{Ipv6Header, TCP, instance_address};
use aya_ebpf::{bindings::__sk_buff, programs::TcContext};

use crate::{
    packet::{self, ETHERNET, ICMP_BYTES},
    packet6::{self, IPV6},
};

/// Offset of the checksum in an ICMPv6 header.
const ICMP_CHECKSUM: usize = 2;

/// Makes the quoted source, which is the VIP, an instance's address, and its port `port`; `icmp` is where the ICMPv6 header
/// stands. The message's destination has become the instance's address already, and its checksum is brought up to that too.
/// Returns 0, or 1 if a helper failed.
#[inline(never)]
pub(crate) fn rewrite(skb: *mut __sk_buff, icmp: u32, instance: u32, port: u16) -> i32 {
    i32::from(try_rewrite(&TcContext::new(skb), icmp as usize, instance, port).is_none())
}

#[inline(always)]
fn try_rewrite(ctx: &TcContext, icmp: usize, instance: u32, port: u16) -> Option<()> {
    let at = icmp + ICMP_BYTES;
    let checksum = icmp + ICMP_CHECKSUM;
    let length = u16::from_be(ctx.load::<u16>(ETHERNET + offset_of!(Ipv6Header, payload_length)).ok()?);
    let end = ETHERNET + IPV6 + usize::from(length);
    let ip = ctx.load::<Ipv6Header>(at).ok()?;
    let transport = packet6::walk_buffer(ctx, ip.next, at + IPV6, end).ok()?;
    let (from, to) = (ip.source(), instance_address(instance));
    let old_port = ctx.load::<u16>(transport.at).ok()?;
    packet6::replace_address(ctx, checksum, &from, &to, 0).ok()?;
    let difference = packet6::difference(&from, &to);
    ctx.l4_csum_replace(checksum, 0, u64::from(difference), 0).ok()?;
    ctx.l4_csum_replace(checksum, u64::from(old_port), u64::from(port), 2).ok()?;
    ctx.store(at + offset_of!(Ipv6Header, source), &to, 0).ok()?;
    ctx.store(transport.at, &port, 0).ok()?;

    // A UDP checksum is among the eight bytes that are always quoted, one of TCP is not.
    let is_tcp = transport.protocol == TCP;
    let place = transport.at + if is_tcp { 16 } else { 6 };
    if place + 2 > end {
        return Some(());
    }
    let old = ctx.load::<u16>(place).ok()?;
    if !is_tcp && old == 0 {
        return Some(());
    }
    // The difference is a sum in 32 bits; its two halves are words like others.
    let mut new = packet::updated(old, 0, difference as u16);
    new = packet::updated(new, 0, (difference >> 16) as u16);
    new = packet::updated(new, old_port, port);
    if !is_tcp && new == 0 {
        new = 0xffff;
    }
    ctx.l4_csum_replace(checksum, u64::from(old), u64::from(new), 2).ok()?;
    ctx.store(place, &new, 0).ok()
}
