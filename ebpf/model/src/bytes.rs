//! Reading and changing packets byte by byte.

use std::net::{IpAddr, Ipv4Addr};

use crate::{Flow, Fragmented};

/// Where an IP header stands in a frame.
pub(crate) const ETHERNET: usize = 14;

pub(crate) fn byte(frame: &[u8], at: usize) -> Option<u8> {
    frame.get(at).copied()
}

pub(crate) fn word(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([byte(frame, at)?, byte(frame, at + 1)?]))
}

pub(crate) fn address(frame: &[u8], at: usize) -> Option<Ipv4Addr> {
    let bytes: [u8; 4] = frame.get(at..at + 4)?.try_into().ok()?;
    Some(bytes.into())
}

pub(crate) fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An IPv4 header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ip {
    pub(crate) version: u8,
    /// Length of the header in bytes, as it says itself.
    pub(crate) header: usize,
    pub(crate) tos: u8,
    pub(crate) total: usize,
    pub(crate) id: u16,
    pub(crate) dont: bool,
    pub(crate) more: bool,
    pub(crate) offset: u16,
    pub(crate) ttl: u8,
    pub(crate) protocol: u8,
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
}

impl Ip {
    /// Reads one; `None` if its fixed part isn't all there.
    pub(crate) fn read(frame: &[u8], at: usize) -> Option<Self> {
        let destination = address(frame, at + 16)?;
        let fragment = word(frame, at + 6)?;
        Some(Self {
            version: byte(frame, at)? >> 4,
            header: usize::from(byte(frame, at)? & 15) * 4,
            tos: byte(frame, at + 1)?,
            total: usize::from(word(frame, at + 2)?),
            id: word(frame, at + 4)?,
            dont: fragment & 0x4000 != 0,
            more: fragment & 0x2000 != 0,
            offset: fragment & 0x1fff,
            ttl: byte(frame, at + 8)?,
            protocol: byte(frame, at + 9)?,
            source: address(frame, at + 12)?,
            destination,
        })
    }

    pub(crate) fn is_fragment(&self) -> bool {
        self.more || self.offset != 0
    }

    pub(crate) fn is_first_fragment(&self) -> bool {
        self.more && self.offset == 0
    }

    /// Whether its first byte makes sense.
    pub(crate) fn is_valid(&self) -> bool {
        self.version == 4 && self.header >= 20
    }

    /// What its fragments have in common.
    pub(crate) fn fragmented(&self) -> Fragmented {
        (self.source.into(), self.destination.into(), self.id.into(), self.protocol)
    }

    pub(crate) fn has_ports(&self) -> bool {
        matches!(self.protocol, 6 | 17)
    }
}

/// The flags of a TCP header.
pub(crate) fn tcp_flags(frame: &[u8], transport: usize) -> Option<u8> {
    byte(frame, transport + 13)
}

/// SYN without ACK, RST, FIN.
pub(crate) fn opens(flags: u8) -> bool {
    flags & 0x17 == 0x02
}

/// ACK without SYN, RST, FIN.
pub(crate) fn continues(flags: u8) -> bool {
    flags & 0x17 == 0x10
}

/// Sum of 16-bit words in ones' complement.
pub(crate) fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Changes a checksum for `from` that became `to` (the same even number of bytes), as the kernel's `csum_replace` does.
pub(crate) fn replace_checksum(frame: &mut [u8], at: usize, from: &[u8], to: &[u8]) {
    let add = |a: u32, b: u32| {
        let (sum, carry) = a.overflowing_add(b);
        sum + u32::from(carry)
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0u32, |n, byte| (n << 8) | u32::from(*byte));
    let old = !u32::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let sum = add(add(old, !number(from)), number(to));
    let mut folded = (sum & 0xffff) + (sum >> 16);
    folded = (folded & 0xffff) + (folded >> 16);
    put(frame, at, &(!(folded as u16)).to_be_bytes());
}

/// The same for a UDP checksum, in which zero means none.
pub(crate) fn replace_udp_checksum(frame: &mut [u8], at: usize, from: &[u8], to: &[u8]) {
    if frame[at..at + 2] == [0, 0] {
        return;
    }
    replace_checksum(frame, at, from, to);
    if frame[at..at + 2] == [0, 0] {
        put(frame, at, &[0xff, 0xff]);
    }
}

/// Murmur3's finaliser over the tuple as it stands in the packet, read as little-endian numbers.
pub(crate) fn flow_hash(flow: &Flow) -> u64 {
    let mix = |mut h: u64| {
        h ^= h >> 33;
        h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
        h ^= h >> 33;
        h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        h ^ (h >> 33)
    };
    let &(source, vip, source_port, vip_port, protocol) = flow;
    let port = |port: u16| u64::from(port.swap_bytes());
    let rest = (port(source_port) << 24) | (port(vip_port) << 8) | u64::from(protocol);
    match (source, vip) {
        (IpAddr::V6(source), IpAddr::V6(vip)) => {
            let parts = source.octets().into_iter().chain(vip.octets()).collect::<Vec<u8>>();
            let numbers = parts.chunks(8).map(|part| {
                let [a, b, c, d, e, f, g, h] = part.try_into().unwrap_or_default();
                (u64::from(u32::from_le_bytes([a, b, c, d])) << 32)
                    | u64::from(u32::from_le_bytes([e, f, g, h]))
            });
            let factors = [
                0x9e37_79b9_7f4a_7c15u64,
                0xd6e8_feb8_6659_fd93,
                0xa076_1d64_78bd_642f,
                0xe703_7ed1_a0b4_28db,
                0x8ebc_6af0_9c88_c6e3,
            ];
            let products =
                numbers.chain([rest]).zip(factors).map(|(number, factor)| number.wrapping_mul(factor));
            let sum = products.fold(0u64, u64::wrapping_add);
            mix(sum ^ (sum >> 29))
        }
        _ => {
            let address = |address: IpAddr| match address {
                IpAddr::V4(address) => u64::from(u32::from_le_bytes(address.octets())),
                IpAddr::V6(_) => 0,
            };
            mix(((address(source) << 32) | address(vip)) ^ mix(rest ^ 0x9e37_79b9_7f4a_7c15))
        }
    }
}
