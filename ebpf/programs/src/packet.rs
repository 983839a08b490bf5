//! Offsets and small readings of packets.

use anyplace_ebpf_common::{FragmentKey, Ipv4Header, TCP, UDP};
use aya_ebpf::programs::TcContext;

/// Length of an Ethernet header; VLAN tags are not looked into.
pub(crate) const ETHERNET: usize = 14;
/// Length of an IPv4 header without options.
pub(crate) const IPV4: usize = 20;
/// Ethernet type of IPv4, as it stands in the packet.
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800u16.to_be();
/// Offset of the flags in a TCP header.
pub(crate) const TCP_FLAGS: usize = 13;
/// Length of a TCP header without options.
pub(crate) const TCP_BYTES: usize = 20;
/// Length of a UDP header.
pub(crate) const UDP_BYTES: usize = 8;

/// Length of an ICMP header.
pub(crate) const ICMP_BYTES: usize = 8;

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const FIN: u8 = 0x01;
const ACK: u8 = 0x10;

/// "More fragments" or an offset.
const FRAGMENT_MASK: u16 = 0x3fffu16.to_be();
/// "More fragments".
const MORE_FRAGMENTS: u16 = 0x2000u16.to_be();
/// "Don't fragment".
const DONT_FRAGMENT: u16 = 0x4000u16.to_be();
/// The offset alone.
const FRAGMENT_OFFSET_MASK: u16 = 0x1fffu16.to_be();

#[inline(always)]
pub(crate) fn is_fragment(ip: &Ipv4Header) -> bool {
    ip.fragment & FRAGMENT_MASK != 0
}

#[inline(always)]
pub(crate) fn is_later_fragment(ip: &Ipv4Header) -> bool {
    ip.fragment & FRAGMENT_OFFSET_MASK != 0
}

/// The first of several.
#[inline(always)]
pub(crate) fn is_first_fragment(ip: &Ipv4Header) -> bool {
    ip.fragment & (FRAGMENT_OFFSET_MASK | MORE_FRAGMENTS) == MORE_FRAGMENTS
}

#[inline(always)]
pub(crate) fn must_not_be_fragmented(ip: &Ipv4Header) -> bool {
    ip.fragment & DONT_FRAGMENT != 0
}

#[inline(always)]
pub(crate) fn fragment_key(ip: &Ipv4Header) -> FragmentKey {
    FragmentKey {
        source: u32::from_ne_bytes(ip.source),
        destination: u32::from_ne_bytes(ip.destination),
        id: ip.id,
        protocol: ip.protocol,
        reserved: 0,
    }
}

/// Length of an IPv4 header as it says itself; 0 if it can't be one.
#[inline(always)]
pub(crate) fn header_bytes(ip: &Ipv4Header) -> usize {
    let bytes = ((ip.version_ihl & 15) as usize) * 4;
    if ip.version_ihl >> 4 == 4 && bytes >= IPV4 { bytes } else { 0 }
}

/// Destination unreachable, time exceeded, parameter problem: the errors that quote a packet.
#[inline(always)]
pub(crate) fn quotes(icmp_type: u8) -> bool {
    icmp_type == 3 || icmp_type == 11 || icmp_type == 12
}

/// A checksum after `from`, which it covers, became `to`.
#[inline(always)]
pub(crate) fn updated(checksum: u16, from: u16, to: u16) -> u16 {
    changed(checksum, u32::from(!from) + u32::from(to))
}

/// A checksum after the sum that it covers grew by `difference`: a few words, each of 16 bits.
#[inline(always)]
pub(crate) fn changed(checksum: u16, difference: u32) -> u16 {
    let mut sum = u32::from(!checksum) + difference;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// What a sum grows by when an address becomes another, in four words.
#[inline(always)]
pub(crate) fn difference(from: u32, to: u32) -> u32 {
    (!from & 0xffff) + (!from >> 16) + (to & 0xffff) + (to >> 16)
}

/// The same for an address.
#[inline(always)]
pub(crate) fn updated_address(checksum: u16, from: u32, to: u32) -> u16 {
    changed(checksum, difference(from, to))
}

#[inline(always)]
pub(crate) fn is_tcp_or_udp(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP
}

/// Length of the fixed part of the transport header.
#[inline(always)]
pub(crate) fn transport_bytes(protocol: u8) -> usize {
    if protocol == TCP { TCP_BYTES } else { UDP_BYTES }
}

/// The first packet of a connection: it may be served by whoever gets it.
#[inline(always)]
pub(crate) fn opens_connection(tcp_flags: u8) -> bool {
    tcp_flags & (SYN | ACK | RST | FIN) == SYN
}

/// SYN or SYN+ACK: the packets that carry a maximum segment size.
#[inline(always)]
pub(crate) fn negotiates(tcp_flags: u8) -> bool {
    tcp_flags & SYN != 0
}

/// A packet in the middle of a connection, which shows that the connection is worth remembering.
#[inline(always)]
pub(crate) fn continues_connection(tcp_flags: u8) -> bool {
    tcp_flags & (SYN | ACK | RST | FIN) == ACK
}

/// A pointer to a `T` at `offset` of a socket buffer, if its first part has that many bytes.
#[inline(always)]
pub(crate) fn in_buffer<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data();
    if start + offset + size_of::<T>() > ctx.data_end() {
        return None;
    }
    Some((start + offset) as *mut T)
}
