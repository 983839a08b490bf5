//! The packet that an ICMP error quotes: a reply of an instance, as it left, with the VIP as its source.
//!
//! The instance must find its own address and port in it, or its stack can't tell which socket is meant. All checksums
//! are kept right: the quoted ones, as far as they were quoted, and that of the ICMP message.

use core::mem::offset_of;

use anyplace_ebpf_common::{Ipv4Header, TCP};
use aya_ebpf::{bindings::__sk_buff, programs::TcContext};

use crate::packet::{self, ETHERNET, ICMP_BYTES};

/// Offset of the checksum in an ICMP header.
const ICMP_CHECKSUM: usize = 2;

/// Makes the quoted source `address` and `port`. `icmp` is where the ICMP header stands, which was read before. Returns 0,
/// or an error of a helper. A function of its own: errors are rare.
#[inline(never)]
pub(crate) fn rewrite(skb: *mut __sk_buff, icmp: u32, address: u32, port: u16) -> i32 {
    match try_rewrite(&TcContext::new(skb), icmp as usize, address, port) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

#[inline(always)]
fn try_rewrite(ctx: &TcContext, icmp: usize, address: u32, port: u16) -> Result<(), i64> {
    let at = icmp + ICMP_BYTES;
    let checksum = icmp + ICMP_CHECKSUM;
    let ip = ctx.load::<Ipv4Header>(at)?;
    let header = packet::header_bytes(&ip);
    let transport = at + header;
    let old_address = u32::from_ne_bytes(ip.source);
    let old_port = ctx.load::<u16>(transport)?;

    let ip_checksum = packet::updated_address(ip.checksum, old_address, address);
    ctx.l4_csum_replace(checksum, u64::from(old_address), u64::from(address), 4)?;
    ctx.l4_csum_replace(checksum, u64::from(ip.checksum), u64::from(ip_checksum), 2)?;
    ctx.l4_csum_replace(checksum, u64::from(old_port), u64::from(port), 2)?;
    ctx.store(at + offset_of!(Ipv4Header, source), &address, 0)?;
    ctx.store(at + offset_of!(Ipv4Header, checksum), &ip_checksum, 0)?;
    ctx.store(transport, &port, 0)?;

    // A UDP checksum is among the eight bytes that are always quoted, one of TCP is not.
    let transport_checksum = transport + if ip.protocol == TCP { 16 } else { 6 };
    let length = u16::from_be(ctx.load::<u16>(ETHERNET + offset_of!(Ipv4Header, total_length))?) as usize;
    if transport_checksum + 2 > ETHERNET + length {
        return Ok(());
    }
    let old = ctx.load::<u16>(transport_checksum)?;
    if ip.protocol != TCP && old == 0 {
        return Ok(());
    }
    let mut new = packet::updated(packet::updated_address(old, old_address, address), old_port, port);
    if ip.protocol != TCP && new == 0 {
        new = 0xffff;
    }
    ctx.l4_csum_replace(checksum, u64::from(old), u64::from(new), 2)?;
    ctx.store(transport_checksum, &new, 0)
}
