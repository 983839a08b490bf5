//! The encapsulation: IPv4, UDP, GUE variant 0 with GLB's hop list as private data.
//!
//! ```text
//!  0                   1                   2                   3
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! | outer IPv4: source = the ingress machine, destination = a hop | 20 bytes
//! +---------------+---------------+---------------+---------------+
//! |  source port = flow hash      |       6080                    | UDP
//! |  length                       |       0 (no checksum)         |
//! +---+-+---------+---------------+-------------------------------+
//! | 0 |0|  4      | 4 IPv4, 41 v6 |       0 (flags)               | GUE
//! +---+-+---------+---------------+---------------+---------------+
//! |       0 (private data type)   | next hop      | hop count = 3 |
//! |                             hop 0                             |
//! |                             hop 1                             |
//! |                             hop 2                             |
//! +---------------------------------------------------------------+
//! | the client's packet, unchanged                                |
//! ```
//!
//! The outer destination is the hop being tried; `next hop` is the index of the one after it, 3 when there is none.
//! Slots below the index are spent or unused. The list always has three slots, so the encapsulation has one size
//! and a relay can add a hop in place.
//! Source: GLB director, "GUE header usage in GLB"; GUE: draft-ietf-intarea-gue.

use crate::Address6;

/// UDP port of the encapsulation.
pub const GUE_PORT: u16 = 6080;
/// Slots of the hop list: the longest is `[before of the relay, before of the ingress, now of the ingress]`.
pub const HOPS: u8 = 3;
/// Bytes in front of the client's packet.
pub const ENCAPSULATION_BYTES: usize = size_of::<Encapsulation>();
/// First four bytes of GUE: variant 0, data, header length 4 + 16 bytes, protocol IPv4, no flags.
pub const GUE_FLAGS_AND_PROTOCOL: [u8; 4] = [0x04, 4, 0, 0];
/// The same around an IPv6 packet.
pub const GUE_FLAGS_AND_PROTOCOL_IPV6: [u8; 4] = [0x04, 41, 0, 0];
/// First 96 bits of each instance's IPv6 address; its IPv4 address is the rest. No packet leaves its machine with such
/// an address, so the prefix is the same everywhere.
pub const INSTANCE_PREFIX: [u8; 12] = [0xfd, 0x5b, 0x27, 0xd6, 0x91, 0x4c, 0, 0, 0, 0, 0, 0];
/// Time to live of the outer header; each hop takes one, so a mistake in the tables can't circle for ever.
pub const TTL: u8 = 64;

const _: () = assert!(ENCAPSULATION_BYTES == 48);

/// An IPv4 header without options.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Header {
    /// Version and header length in words: 0x45.
    pub version_ihl: u8,
    /// Type of service.
    pub tos: u8,
    /// Header and payload, network byte order.
    pub total_length: u16,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset, network byte order.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: u16,
    /// Source, network byte order.
    pub source: [u8; 4],
    /// Destination, network byte order.
    pub destination: [u8; 4],
}

/// An IPv6 header. Fields that a program reads as one number each; the alignment is that of a received frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6Header {
    /// Version, traffic class, flow label.
    pub class: [u8; 4],
    /// Bytes behind this header, network byte order.
    pub payload_length: u16,
    /// Type of the header behind this one.
    pub next: u8,
    /// Hop limit.
    pub hops: u8,
    /// Source, network byte order.
    pub source: [u16; 8],
    /// Destination, network byte order.
    pub destination: [u16; 8],
}

const _: () = assert!(size_of::<Ipv6Header>() == 40);

impl Ipv6Header {
    /// The version that it claims.
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        self.class[0] >> 4
    }

    /// Its traffic class, where IPv4 has the type of service.
    #[inline(always)]
    pub const fn traffic_class(&self) -> u8 {
        self.class[0] << 4 | self.class[1] >> 4
    }

    /// The source in the pieces that keys have.
    #[inline(always)]
    pub const fn source(&self) -> Address6 {
        pieces(self.source)
    }

    /// The destination, likewise.
    #[inline(always)]
    pub const fn destination(&self) -> Address6 {
        pieces(self.destination)
    }

    /// Changes the destination.
    #[inline(always)]
    pub const fn set_destination(&mut self, address: Address6) {
        self.destination = words(address);
    }
}

#[inline(always)]
const fn words(address: Address6) -> [u16; 8] {
    const fn halves(piece: u32) -> [u16; 2] {
        let [a, b, c, d] = piece.to_ne_bytes();
        [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
    }
    let [[a, b], [c, d], [e, f], [g, h]] =
        [halves(address[0]), halves(address[1]), halves(address[2]), halves(address[3])];
    [a, b, c, d, e, f, g, h]
}

#[inline(always)]
const fn pieces(address: [u16; 8]) -> Address6 {
    const fn piece(first: u16, second: u16) -> u32 {
        let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
        u32::from_ne_bytes([a, b, c, d])
    }
    let [a, b, c, d, e, f, g, h] = address;
    [piece(a, b), piece(c, d), piece(e, f), piece(g, h)]
}

/// An instance's IPv6 address.
#[inline(always)]
pub const fn instance_address(instance: u32) -> Address6 {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = INSTANCE_PREFIX;
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
        u32::from_ne_bytes([i, j, k, l]),
        instance,
    ]
}

/// A UDP header, network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpHeader {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// Header and payload.
    pub length: u16,
    /// Checksum, 0 for none.
    pub checksum: u16,
}

/// First bytes of TCP and UDP alike, network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
}

/// All that is put in front of the client's packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encapsulation {
    /// Outer IPv4 header.
    pub ip: Ipv4Header,
    /// Outer UDP header.
    pub udp: UdpHeader,
    /// [`GUE_FLAGS_AND_PROTOCOL`].
    pub gue: [u8; 4],
    /// Private data type, 0.
    pub private_type: u16,
    /// Index of the next hop.
    pub next_hop: u8,
    /// [`HOPS`].
    pub hop_count: u8,
    /// The hops, network byte order.
    pub hops: [[u8; 4]; HOPS as usize],
}

// SAFETY: repr(C), all fields at even offsets, sizes asserted above; any bytes are a value.
unsafe impl crate::Layout for Encapsulation {}
// SAFETY: as above.
unsafe impl crate::Layout for Ipv6Header {}

/// The checksum field of an IPv4 header whose own checksum field is taken as zero.
#[inline(always)]
pub const fn ipv4_checksum(header: &Ipv4Header) -> u16 {
    let [s0, s1, s2, s3] = header.source;
    let [d0, d1, d2, d3] = header.destination;
    let mut sum = u16::from_ne_bytes([header.version_ihl, header.tos]) as u32
        + header.total_length as u32
        + header.id as u32
        + header.fragment as u32
        + u16::from_ne_bytes([header.ttl, header.protocol]) as u32
        + u16::from_ne_bytes([s0, s1]) as u32
        + u16::from_ne_bytes([s2, s3]) as u32
        + u16::from_ne_bytes([d0, d1]) as u32
        + u16::from_ne_bytes([d2, d3]) as u32;
    // Nine 16-bit numbers: two folds leave no carry.
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_a_known_header() {
        // The worked example of RFC 1071's literature: 4500 0073 0000 4000 4011 b861 c0a8 0001 c0a8 00c7.
        let header = Ipv4Header {
            version_ihl: 0x45,
            tos: 0,
            total_length: 0x73u16.to_be(),
            id: 0,
            fragment: 0x4000u16.to_be(),
            ttl: 0x40,
            protocol: 0x11,
            checksum: 0,
            source: [192, 168, 0, 1],
            destination: [192, 168, 0, 199],
        };
        assert_eq!(u16::from_be(ipv4_checksum(&header)), 0xb861);
    }

    #[test]
    fn fields_stand_where_the_format_says() {
        assert_eq!(std::mem::offset_of!(Encapsulation, udp), 20);
        assert_eq!(std::mem::offset_of!(Encapsulation, gue), 28);
        assert_eq!(std::mem::offset_of!(Encapsulation, next_hop), 34);
        assert_eq!(std::mem::offset_of!(Encapsulation, hop_count), 35);
        assert_eq!(std::mem::offset_of!(Encapsulation, hops), 36);
        assert_eq!(std::mem::offset_of!(Ipv6Header, next), 6);
        assert_eq!(std::mem::offset_of!(Ipv6Header, source), 8);
        assert_eq!(std::mem::offset_of!(Ipv6Header, destination), 24);
    }
}
