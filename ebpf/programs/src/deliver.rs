//! The end of a packet's way: its encapsulation comes off, and it goes to an instance of this machine.
//!
//! What is plain is rewritten where it stands, its checksums by hand: a helper of the kernel for each field took most of the
//! time. One that is needed to take the encapsulation off costs more than all the rest that is left.

use core::mem::offset_of;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, InstanceValue, Ipv4Header, Ports, TCP};
use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::{bpf_csum_update, bpf_redirect_peer},
    programs::TcContext,
};

use crate::{
    inner::Inner,
    maps,
    packet::{self, ETHERNET, IPV4, in_buffer},
    quoted,
};

/// Strips the encapsulation, rewrites the destination and hands the packet to the instance.
#[inline(always)]
pub(crate) fn deliver(
    ctx: &TcContext,
    inner: &Inner,
    instance: &InstanceValue,
    address: u32,
    port: u16,
) -> Result<i32, Counter> {
    let (interface, mac) = (instance.interface, instance.mac);
    ctx.adjust_room(-(ENCAPSULATION_BYTES as i32), BPF_ADJ_ROOM_MAC, 0).map_err(helper)?;
    if inner.is_plain() {
        rewrite(ctx, inner, address, port).ok_or(Counter::HelperFailed)?;
    } else if rewrite_unusual(ctx.skb.skb, inner, address, port) != 0 {
        return Err(Counter::HelperFailed);
    }
    hand_over(ctx, interface, mac)
}

/// Gives a packet that is ready to the container behind an interface.
#[inline(always)]
pub(crate) fn hand_over(ctx: &TcContext, interface: u32, mac: [u8; 6]) -> Result<i32, Counter> {
    let destination = in_buffer::<[u16; 3]>(ctx, 0).ok_or(Counter::HelperFailed)?;
    let [a, b, c, d, e, f] = mac;
    // SAFETY: `in_buffer` checked the bounds, and no helper moved the packet since.
    unsafe {
        *destination = [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])];
    }
    maps::count(Counter::Delivered);
    // SAFETY: plain numbers.
    Ok(unsafe { bpf_redirect_peer(interface, 0) } as i32)
}

/// Changes destination and port of a plain packet.
#[inline(always)]
fn rewrite(ctx: &TcContext, inner: &Inner, address: u32, port: u16) -> Option<()> {
    let flow = &inner.flow;
    let moved = packet::difference(flow.vip, address);
    let ip = in_buffer::<Ipv4Header>(ctx, ETHERNET)?;
    // SAFETY: `in_buffer` checked the bounds, and no helper moved the packet since.
    unsafe {
        (*ip).destination = address.to_ne_bytes();
        (*ip).checksum = packet::changed((*ip).checksum, moved);
    }
    if rewrite_transport(ctx, ETHERNET + IPV4, flow.protocol, (flow.vip_port, port), moved)? {
        // The IP header's sum is what it was. The transport's checksum balances the port and, beyond that, an address
        // that stands in front of it: the sum over both that some drivers supply falls by as much. Elsewhere this
        // fails and does nothing.
        // SAFETY: plain numbers, and the kernel's context.
        unsafe { bpf_csum_update(ctx.skb.skb, !moved) };
    }
    Some(())
}

/// Changes the destination port of a transport header, and its checksum, also for a pseudo-header that changed by `moved`.
/// False if there is no checksum.
#[inline(always)]
pub(crate) fn rewrite_transport(
    ctx: &TcContext,
    transport: usize,
    protocol: u8,
    (from, to): (u16, u16),
    moved: u32,
) -> Option<bool> {
    let ports = in_buffer::<Ports>(ctx, transport)?;
    let place = in_buffer::<u16>(ctx, if protocol == TCP { transport + 16 } else { transport + 6 })?;
    // SAFETY: `in_buffer` checked the bounds, and no helper moved the packet since.
    unsafe {
        (*ports).destination = to;
        // In UDP, zero means none, and must neither be updated nor come out of an update.
        if protocol != TCP && *place == 0 {
            return Some(false);
        }
        let new = packet::changed(*place, moved + u32::from(!from) + u32::from(to));
        *place = if protocol != TCP && new == 0 { 0xffff } else { new };
    }
    Some(true)
}

/// The same for packets with options, fragments and ICMP errors; 0, or 1 if a helper failed.
#[inline(never)]
fn rewrite_unusual(skb: *mut __sk_buff, inner: &Inner, address: u32, port: u16) -> i32 {
    if try_rewrite_unusual(&TcContext::new(skb), inner, address, port).is_err() {
        return 1;
    }
    let transport = (ETHERNET + inner.header()) as u32;
    if inner.is_error() { quoted::rewrite(skb, transport, address, port) } else { 0 }
}

#[inline(always)]
fn try_rewrite_unusual(ctx: &TcContext, inner: &Inner, address: u32, port: u16) -> Result<(), i64> {
    const IP: usize = ETHERNET;
    let flow = &inner.flow;
    let (from, to) = (u64::from(flow.vip), u64::from(address));
    ctx.l3_csum_replace(IP + offset_of!(Ipv4Header, checksum), from, to, 4)?;
    ctx.store(IP + offset_of!(Ipv4Header, destination), &address, 0)?;
    if inner.is_error() || inner.is_later_fragment() {
        return Ok(());
    }
    let transport = ETHERNET + inner.header();
    let (checksum, flags) = if flow.protocol == TCP {
        (transport + 16, 0)
    } else {
        (transport + 6, u64::from(BPF_F_MARK_MANGLED_0))
    };
    ctx.l4_csum_replace(checksum, from, to, flags | u64::from(BPF_F_PSEUDO_HDR) | 4)?;
    ctx.l4_csum_replace(checksum, u64::from(flow.vip_port), u64::from(port), flags | 2)?;
    ctx.store(transport + offset_of!(Ports, destination), &port, 0)
}

#[inline(always)]
pub(crate) fn helper<E>(_: E) -> Counter {
    Counter::HelperFailed
}
