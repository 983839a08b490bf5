//! The client's packet inside an encapsulation, as far as `target` must know it.
//!
//! Plain TCP and UDP packets are read where they stand. Those with IP options, fragments, ICMP errors, and whatever has its
//! headers outside of the buffer's first part are `unusual`, and copied out piece by piece.

use core::mem::MaybeUninit;

use anyplace_ebpf_common::{
    Counter, ENCAPSULATION_BYTES, Encapsulation, FlowKey, ICMP, Ipv4Header, Ports, TCP,
};
use aya_ebpf::{bindings::__sk_buff, programs::TcContext};

use crate::{
    maps,
    packet::{self, ETHERNET, ICMP_BYTES, IPV4, TCP_FLAGS, in_buffer},
};

/// Offset of the client's packet.
pub(crate) const INNER: usize = ETHERNET + ENCAPSULATION_BYTES;

/// How reading the client's packet went.
pub(crate) const READ: u32 = 0;
pub(crate) const MALFORMED: u32 = 1;
pub(crate) const OPTIONS: u32 = 2;
pub(crate) const FRAGMENT_UNKNOWN: u32 = 3;
pub(crate) const FAILED: u32 = 4;

/// The client's packet.
pub(crate) struct Inner {
    pub(crate) flow: FlowKey,
    /// Length of its IP header, and the bits below.
    word: u32,
}

/// May be served by whoever gets it: a TCP SYN.
const OPENS: u32 = 1 << 8;
/// Worth remembering when the last hop serves it: UDP, or TCP in mid-connection.
const CONTINUES: u32 = 1 << 9;
/// A fragment after the first.
const FRAGMENT: u32 = 1 << 10;
/// An ICMP error.
const ERROR: u32 = 1 << 11;
/// TCP or UDP without options or fragments, whose headers stand in the buffer's first part.
const PLAIN: u32 = 1 << 12;

impl Inner {
    /// Length of the IP header.
    #[inline(always)]
    pub(crate) fn header(&self) -> usize {
        (self.word & 60) as usize
    }

    #[inline(always)]
    pub(crate) fn opens(&self) -> bool {
        self.word & OPENS != 0
    }

    #[inline(always)]
    pub(crate) fn continues(&self) -> bool {
        self.word & CONTINUES != 0
    }

    #[inline(always)]
    pub(crate) fn is_later_fragment(&self) -> bool {
        self.word & FRAGMENT != 0
    }

    #[inline(always)]
    pub(crate) fn is_error(&self) -> bool {
        self.word & ERROR != 0
    }

    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        self.word & PLAIN != 0
    }

    #[inline(always)]
    pub(crate) fn forget(&mut self, ctx: &TcContext) {
        self.word = forget(ctx, self.word);
    }
}

/// The same number, of which the verifier knows nothing any more: so it goes through what follows once, and not once for
/// each way that led here (half of 646,206 instructions, of a million).
#[inline(always)]
pub(crate) fn forget(ctx: &TcContext, word: u32) -> u32 {
    // SAFETY: the context is the kernel's, and its control block this program's.
    unsafe {
        let place = &raw mut (*ctx.skb.skb).cb[0];
        place.write_volatile(word);
        place.read_volatile()
    }
}

/// Whether a TCP packet opens a connection, or shows that there is one.
#[inline(always)]
fn stage(flags: u8) -> u32 {
    let opens = if packet::opens_connection(flags) { OPENS } else { 0 };
    opens | if packet::continues_connection(flags) { CONTINUES } else { 0 }
}

/// A plain packet, all of whose lengths are right.
#[inline(always)]
pub(crate) fn plain(ctx: &TcContext, outer: &Encapsulation) -> Option<Inner> {
    let ip = in_buffer::<Ipv4Header>(ctx, INNER)?;
    // SAFETY: `in_buffer` checked the bounds, and nothing moves the packet before the last use.
    let ip = unsafe { &*ip };
    if ip.version_ihl != 0x45 || !packet::is_tcp_or_udp(ip.protocol) || packet::is_fragment(ip) {
        return None;
    }
    let length = u16::from_be(ip.total_length) as usize;
    if length < IPV4 + packet::transport_bytes(ip.protocol)
        || length + ENCAPSULATION_BYTES != u16::from_be(outer.ip.total_length) as usize
        || length + INNER > ctx.len() as usize
    {
        return None;
    }
    let ports = in_buffer::<Ports>(ctx, INNER + IPV4)?;
    let stage = if ip.protocol == TCP {
        let flags = in_buffer::<u8>(ctx, INNER + IPV4 + TCP_FLAGS)?;
        // SAFETY: as above.
        stage(unsafe { *flags })
    } else {
        CONTINUES
    };
    // SAFETY: as above.
    Some(Inner { flow: flow(ip, unsafe { *ports }), word: IPV4 as u32 | stage | PLAIN })
}

/// The flow of a TCP or UDP packet.
#[inline(always)]
fn flow(ip: &Ipv4Header, ports: Ports) -> FlowKey {
    FlowKey::new(u32::from_ne_bytes(ip.source), u32::from_ne_bytes(ip.destination), ports, ip.protocol)
}

/// Reads the client's packet, inside an outer one of `length` bytes; not [`READ`] if it isn't one that our ingress sends.
#[inline(never)]
pub(crate) fn unusual(skb: *mut __sk_buff, inner: &mut MaybeUninit<Inner>, length: u32) -> u32 {
    match try_unusual(&TcContext::new(skb), length as usize) {
        Ok(found) => {
            inner.write(found);
            READ
        }
        Err(Counter::Malformed) => MALFORMED,
        Err(Counter::FragmentUnknown) => FRAGMENT_UNKNOWN,
        Err(_) => FAILED,
    }
}

#[inline(always)]
fn try_unusual(ctx: &TcContext, outer_length: usize) -> Result<Inner, Counter> {
    let ip = ctx.load::<Ipv4Header>(INNER).map_err(malformed)?;
    let header = packet::header_bytes(&ip);
    let length = u16::from_be(ip.total_length) as usize;
    if header == 0
        || length < header
        || length + ENCAPSULATION_BYTES != outer_length
        || length + INNER > ctx.len() as usize
    {
        return Err(Counter::Malformed);
    }
    if !packet::is_tcp_or_udp(ip.protocol) {
        let payload = length - header;
        let is_error = ip.protocol == ICMP && !packet::is_fragment(&ip) && payload >= ICMP_BYTES;
        return if is_error { error(ctx, &ip, header, payload) } else { Err(Counter::Malformed) };
    }
    let later = packet::is_later_fragment(&ip);
    let ports = if later {
        maps::fragment_ports(&packet::fragment_key(&ip)).ok_or(Counter::FragmentUnknown)?
    } else if length < header + packet::transport_bytes(ip.protocol) {
        return Err(Counter::Malformed);
    } else {
        ctx.load::<Ports>(INNER + header).map_err(malformed)?
    };
    if packet::is_first_fragment(&ip) {
        maps::record_fragment(&packet::fragment_key(&ip), ports);
    }
    let mut word = header as u32;
    word |= if later {
        FRAGMENT
    } else if ip.protocol == TCP {
        stage(ctx.load::<u8>(INNER + header + TCP_FLAGS).map_err(malformed)?)
    } else {
        CONTINUES
    };
    Ok(Inner { flow: flow(&ip, ports), word })
}

/// Reads an ICMP error: its flow is that of the packet it quotes, which one of our instances sent.
#[inline(always)]
fn error(ctx: &TcContext, ip: &Ipv4Header, header: usize, payload: usize) -> Result<Inner, Counter> {
    let kind = ctx.load::<u8>(INNER + header).map_err(malformed)?;
    let at = INNER + header + ICMP_BYTES;
    if !packet::quotes(kind) || payload < ICMP_BYTES + IPV4 {
        return Err(Counter::Malformed);
    }
    let quote = ctx.load::<Ipv4Header>(at).map_err(malformed)?;
    let quote_header = packet::header_bytes(&quote);
    if quote_header == 0
        || payload < ICMP_BYTES + quote_header + 8
        || quote.source != ip.destination
        || !packet::is_tcp_or_udp(quote.protocol)
        || packet::is_later_fragment(&quote)
    {
        return Err(Counter::Malformed);
    }
    let ports = ctx.load::<Ports>(at + quote_header).map_err(malformed)?;
    let flow = FlowKey::new(
        u32::from_ne_bytes(quote.destination),
        u32::from_ne_bytes(ip.destination),
        Ports { source: ports.destination, destination: ports.source },
        quote.protocol,
    );
    Ok(Inner { flow, word: header as u32 | ERROR })
}

#[inline(always)]
pub(crate) fn malformed<E>(_: E) -> Counter {
    Counter::Malformed
}
