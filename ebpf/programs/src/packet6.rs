//! IPv6 packets: offsets, and the walk along extension headers.
//!
//! Hop-by-hop and destination options, routing and fragment headers are walked over, at most [`MAX_EXTENSIONS`] of them, in
//! any order. A routing header that still names hops is refused: the VIP isn't where such a packet is to end.

use anyplace_ebpf_common::{Address6, Counter, FragmentKey6, Ipv6Header, MAX_EXTENSIONS, TCP, UDP, Walk};
use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, xdp_md},
    helpers::bpf_csum_update,
    programs::{TcContext, XdpContext},
};

use crate::{maps6, unusual::load};

/// Length of an IPv6 header.
pub(crate) const IPV6: usize = 40;
/// Ethernet type of IPv6, as it stands in the packet.
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86ddu16.to_be();

const HOP_BY_HOP: u32 = 0;
const ROUTING: u32 = 43;
const FRAGMENT: u32 = 44;
const DESTINATION_OPTIONS: u32 = 60;

/// Met on the way: any extension header.
const EXTENSION: u32 = 1;
/// A fragment header of the first part of several.
const FIRST: u32 = 2;
/// One of a later part.
const LATER: u32 = 4;
/// A fragment header of any kind.
const FRAGMENTED: u32 = 8;

/// Bits of a fragment header's second word: offset, and "more fragments".
const OFFSET: u16 = 0xfff8;
const MORE: u16 = 1;

/// Where a walk ended.
#[derive(Clone, Copy)]
pub(crate) struct Transport {
    /// Protocol; of a later fragment, whatever its first header is.
    pub(crate) protocol: u8,
    /// Offset in the frame.
    pub(crate) at: usize,
    met: u32,
    /// Of the packet whose fragment this is.
    pub(crate) id: u32,
}

impl Transport {
    #[inline(always)]
    pub(crate) fn is_extended(&self) -> bool {
        self.met & EXTENSION != 0
    }

    #[inline(always)]
    pub(crate) fn is_first_fragment(&self) -> bool {
        self.met & FIRST != 0
    }

    #[inline(always)]
    pub(crate) fn is_later_fragment(&self) -> bool {
        self.met & LATER != 0
    }

    #[inline(always)]
    pub(crate) fn is_fragment(&self) -> bool {
        self.met & (FIRST | LATER) != 0
    }

    /// What the fragments of a packet with this header have in common.
    #[inline(always)]
    pub(crate) fn fragment_key(&self, ip: &Ipv6Header) -> FragmentKey6 {
        FragmentKey6 { source: ip.source(), destination: ip.destination(), id: self.id }
    }
}

/// Walks over the extension headers that begin with one of type `next` at `at`, inside a packet that ends at `end`.
#[inline(always)]
pub(crate) fn walk_frame(ctx: &XdpContext, next: u8, at: usize, end: usize) -> Result<Transport, Counter> {
    walked(walk_xdp(ctx.ctx, next, at as u32, end as u32))
}

/// The same in a socket buffer.
#[inline(always)]
pub(crate) fn walk_buffer(ctx: &TcContext, next: u8, at: usize, end: usize) -> Result<Transport, Counter> {
    walked(walk_tc(ctx.skb.skb, next, at as u32, end as u32))
}

#[inline(always)]
fn walked(result: u32) -> Result<Transport, Counter> {
    match result {
        WALKED => {}
        MALFORMED => return Err(Counter::Malformed),
        TOO_MANY => return Err(Counter::Options),
        _ => return Err(Counter::HelperFailed),
    }
    let walk = maps6::walk().ok_or(Counter::HelperFailed)?;
    let Walk { next, at, met, id } = get(walk);
    Ok(Transport { protocol: next as u8, at: (at & 0xffff) as usize, met, id })
}

/// How a walk went.
const WALKED: u32 = 0;
const MALFORMED: u32 = 1;
const TOO_MANY: u32 = 2;
const FAILED: u32 = 3;

// Functions of their own, so that what they need isn't on the stack of their callers.
#[inline(never)]
fn walk_xdp(ctx: *mut xdp_md, next: u8, at: u32, end: u32) -> u32 {
    walk(|at| load(&XdpContext::new(ctx), at).ok(), next, at, end)
}

#[inline(never)]
fn walk_tc(skb: *mut __sk_buff, next: u8, at: u32, end: u32) -> u32 {
    walk(|at| TcContext::new(skb).load(at).ok(), next, at, end)
}

/// Where the walk has come to stands in a map and not in registers: so the verifier knows nothing of it, finds each step
/// like the one before, and goes through one instead of through all ways to combine several.
#[inline(always)]
fn walk(load: impl Fn(usize) -> Option<[u8; 8]>, next: u8, at: u32, end: u32) -> u32 {
    let Some(walk) = maps6::walk() else { return FAILED };
    put(walk, Walk { next: u32::from(next), at, met: 0, id: 0 });
    for _ in 0..MAX_EXTENSIONS {
        let Walk { next, at, met, id } = get(walk);
        let at = at & 0xffff;
        if has_ended(next, met) {
            return WALKED;
        }
        if at + 8 > end {
            return MALFORMED;
        }
        let Some(header) = load(at as usize) else { return MALFORMED };
        let mut bytes = 8 + u32::from(header[1]) * 8;
        let (mut met, mut id) = (met | EXTENSION, id);
        if next == ROUTING && header[3] != 0 {
            return TOO_MANY;
        }
        if next == FRAGMENT {
            if met & FRAGMENTED != 0 {
                return MALFORMED;
            }
            let [_, _, high, low, a, b, c, d] = header;
            let word = u16::from_be_bytes([high, low]);
            met |= FRAGMENTED;
            if word & OFFSET != 0 {
                met |= LATER;
            } else if word & MORE != 0 {
                met |= FIRST;
            }
            id = u32::from_ne_bytes([a, b, c, d]);
            bytes = 8;
        }
        if at + bytes > end {
            return MALFORMED;
        }
        put(walk, Walk { next: u32::from(header[0]), at: at + bytes, met, id });
    }
    let Walk { next, met, .. } = get(walk);
    if has_ended(next, met) { WALKED } else { TOO_MANY }
}

#[inline(always)]
fn has_ended(next: u32, met: u32) -> bool {
    met & LATER != 0 || !matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS)
}

#[inline(always)]
fn put(place: *mut Walk, walk: Walk) {
    // SAFETY: this CPU's own element of the map.
    unsafe {
        (&raw mut (*place).next).write_volatile(walk.next);
        (&raw mut (*place).at).write_volatile(walk.at);
        (&raw mut (*place).met).write_volatile(walk.met);
        (&raw mut (*place).id).write_volatile(walk.id);
    }
}

#[inline(always)]
fn get(place: *mut Walk) -> Walk {
    // SAFETY: this CPU's own element of the map.
    unsafe {
        Walk {
            next: (&raw const (*place).next).read_volatile(),
            at: (&raw const (*place).at).read_volatile(),
            met: (&raw const (*place).met).read_volatile(),
            id: (&raw const (*place).id).read_volatile(),
        }
    }
}

#[inline(always)]
pub(crate) fn is_tcp_or_udp(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP
}

/// Where a transport header's checksum stands, and how to change it: zero in UDP means none, and must neither be updated nor
/// come out of an update.
#[inline(always)]
pub(crate) fn checksum(protocol: u8, transport: usize) -> (usize, u64) {
    if protocol == TCP { (transport + 16, 0) } else { (transport + 6, u64::from(BPF_F_MARK_MANGLED_0)) }
}

/// What a sum grows by when an address becomes another: less than two words.
#[inline(always)]
pub(crate) fn difference(from: &Address6, to: &Address6) -> u32 {
    let mut sum = 0;
    for (from, to) in from.iter().zip(to) {
        sum += u64::from(!from) + u64::from(*to);
    }
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u32
}

/// Updates the checksum at an offset, which covers a pseudo-header, for an address in the IP header that became another.
#[inline(always)]
pub(crate) fn replace_address(
    ctx: &TcContext,
    checksum: usize,
    from: &Address6,
    to: &Address6,
    flags: u64,
) -> Result<(), i64> {
    let difference = difference(from, to);
    ctx.l4_csum_replace(checksum, 0, u64::from(difference), flags | u64::from(BPF_F_PSEUDO_HDR))?;
    // An IPv6 header has no checksum that would balance the address, so the packet's sum stays what it was; the helper
    // takes it for IPv4's and changes it where the driver has supplied one. Elsewhere this fails and does nothing.
    // SAFETY: plain numbers, and the kernel's context.
    unsafe { bpf_csum_update(ctx.skb.skb, difference) };
    Ok(())
}

/// Destination unreachable, packet too big, time exceeded, parameter problem: the errors that quote a packet.
#[inline(always)]
pub(crate) fn quotes(icmp_type: u8) -> bool {
    icmp_type >= 1 && icmp_type <= 4
}
