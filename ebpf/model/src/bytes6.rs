//! Reading IPv6 packets.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyplace_ebpf_common::{Counter, INSTANCE_PREFIX, MAX_EXTENSIONS};

use crate::{
    Fragmented,
    bytes::{byte, put, sum, word},
};

/// An IPv6 header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ip6 {
    pub(crate) class: u8,
    /// Header and payload.
    pub(crate) total: usize,
    pub(crate) next: u8,
    pub(crate) source: Ipv6Addr,
    pub(crate) destination: Ipv6Addr,
}

impl Ip6 {
    /// Reads one; `None` if it isn't all there, or says another version.
    pub(crate) fn read(frame: &[u8], at: usize) -> Option<Self> {
        let first = word(frame, at)?;
        let header = Self {
            class: (first >> 4) as u8,
            total: 40 + usize::from(word(frame, at + 4)?),
            next: byte(frame, at + 6)?,
            source: address(frame, at + 8)?,
            destination: address(frame, at + 24)?,
        };
        (first >> 12 == 6).then_some(header)
    }
}

fn address(frame: &[u8], at: usize) -> Option<Ipv6Addr> {
    let bytes: [u8; 16] = frame.get(at..at + 16)?.try_into().ok()?;
    Some(bytes.into())
}

/// The address that an instance has beside its IPv4 address.
pub fn instance6(instance: Ipv4Addr) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets[..12].copy_from_slice(&INSTANCE_PREFIX);
    octets[12..].copy_from_slice(&instance.octets());
    octets.into()
}

/// What stands behind the extension headers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transport {
    pub(crate) protocol: u8,
    pub(crate) at: usize,
    /// There are extension headers.
    pub(crate) extended: bool,
    /// Offset in units of eight bytes, "more fragments", identification.
    pub(crate) fragment: Option<(u16, bool, u32)>,
}

impl Transport {
    pub(crate) fn is_first(&self) -> bool {
        matches!(self.fragment, Some((0, true, _)))
    }

    pub(crate) fn is_later(&self) -> bool {
        matches!(self.fragment, Some((1.., _, _)))
    }

    pub(crate) fn has_ports(&self) -> bool {
        matches!(self.protocol, 6 | 17)
    }

    /// What its fragments have in common; the protocol isn't part of it.
    pub(crate) fn fragmented(&self, ip: &Ip6) -> Fragmented {
        let id = self.fragment.map_or(0, |(_, _, id)| id);
        (ip.source.into(), ip.destination.into(), id, 0)
    }
}

/// Walks over extension headers, of which the first is of type `next` and stands `at`, in a packet that ends at `end`.
pub(crate) fn walk(frame: &[u8], next: u8, at: usize, end: usize) -> Result<Transport, Counter> {
    let mut found = Transport { protocol: next, at, extended: false, fragment: None };
    for seen in 0.. {
        if found.is_later() || ![0, 43, 44, 60].contains(&found.protocol) {
            break;
        }
        if seen == MAX_EXTENSIONS {
            return Err(Counter::Options);
        }
        let header = frame.get(found.at..found.at + 8).filter(|_| found.at + 8 <= end);
        let header = header.ok_or(Counter::Malformed)?;
        let mut length = (usize::from(header[1]) + 1) * 8;
        match found.protocol {
            43 if header[3] > 0 => return Err(Counter::Options),
            44 if found.fragment.is_some() => return Err(Counter::Malformed),
            44 => {
                let bits = u16::from_be_bytes([header[2], header[3]]);
                let id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                found.fragment = Some((bits >> 3, bits & 1 != 0, id));
                length = 8;
            }
            _ => {}
        }
        found.extended = true;
        found.protocol = header[0];
        found.at += length;
        if found.at > end {
            return Err(Counter::Malformed);
        }
    }
    Ok(found)
}

/// Changes a checksum for an address that became another.
pub(crate) fn replace_address(frame: &mut [u8], at: usize, from: Ipv6Addr, to: Ipv6Addr) {
    let inverted = [!frame[at], !frame[at + 1]];
    let from: Vec<u8> = from.octets().iter().map(|byte| !byte).collect();
    let new = !sum(&[&inverted, &from, &to.octets()]);
    put(frame, at, &new.to_be_bytes());
}

/// The same for TCP, or for UDP, where zero means none.
pub(crate) fn replace_transport(frame: &mut [u8], at: usize, tcp: bool, from: Ipv6Addr, to: Ipv6Addr) {
    if !tcp && frame[at..at + 2] == [0, 0] {
        return;
    }
    replace_address(frame, at, from, to);
    if !tcp && frame[at..at + 2] == [0, 0] {
        put(frame, at, &[0xff, 0xff]);
    }
}
