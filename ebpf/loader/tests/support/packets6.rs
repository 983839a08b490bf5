//! IPv6 packets from first principles.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::packets::{End, Ip, ROUTER_MAC, UPLINK_MAC, checksum, gue_around};

/// An IPv6 packet under construction; no Ethernet header yet.
#[derive(Clone, Debug)]
pub(crate) struct Ip6 {
    pub(crate) class: u8,
    pub(crate) label: u32,
    pub(crate) hops: u8,
    /// Type of the payload.
    pub(crate) protocol: u8,
    pub(crate) source: Ipv6Addr,
    pub(crate) destination: Ipv6Addr,
    /// Extension headers: type, and bytes from the third on, a multiple of eight with the two before.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) payload: Vec<u8>,
}

impl Ip6 {
    pub(crate) fn new(protocol: u8, source: Ipv6Addr, destination: Ipv6Addr, payload: Vec<u8>) -> Self {
        Self { class: 0, label: 0, hops: 64, protocol, source, destination, extensions: vec![], payload }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut types: Vec<u8> = self.extensions.iter().map(|(kind, _)| *kind).collect();
        types.push(self.protocol);
        let mut rest = Vec::new();
        for ((kind, data), next) in self.extensions.iter().zip(&types[1..]) {
            // A fragment header has no length: its second byte is reserved.
            let length = if *kind == 44 { 0 } else { (data.len() + 2) / 8 - 1 };
            rest.extend([*next, length as u8]);
            rest.extend(data);
        }
        rest.extend(&self.payload);
        let mut bytes = (6 << 28 | u32::from(self.class) << 20 | self.label).to_be_bytes().to_vec();
        bytes.extend((rest.len() as u16).to_be_bytes());
        bytes.extend([types[0], self.hops]);
        bytes.extend(self.source.octets());
        bytes.extend(self.destination.octets());
        bytes.extend(rest);
        bytes
    }

    /// With a fragment header behind the other extension headers: offset in units of eight bytes.
    pub(crate) fn fragment(mut self, offset: u16, more: bool, id: u32) -> Self {
        let mut data = (offset << 3 | u16::from(more)).to_be_bytes().to_vec();
        data.extend(id.to_be_bytes());
        self.extensions.push((44, data));
        self
    }
}

/// One end of a flow.
pub(crate) type End6 = (Ipv6Addr, u16);

pub(crate) fn tcp6(source: End6, destination: End6, flags: u8, payload: &[u8]) -> Ip6 {
    let mut segment = Vec::new();
    segment.extend(source.1.to_be_bytes());
    segment.extend(destination.1.to_be_bytes());
    segment.extend([1, 2, 3, 4, 5, 6, 7, 8, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    segment.extend(payload);
    let mut packet = Ip6::new(6, source.0, destination.0, segment);
    fill(&mut packet, 16);
    packet
}

/// A SYN or SYN+ACK with a maximum segment size and one more option.
pub(crate) fn tcp6_with_segment_size(source: End6, destination: End6, flags: u8, size: u16) -> Ip6 {
    let [high, low] = size.to_be_bytes();
    let mut packet = tcp6(source, destination, flags, &[2, 4, high, low, 1, 3, 3, 7]);
    packet.payload[12] = 0x70;
    fill(&mut packet, 16);
    packet
}

pub(crate) fn udp6(source: End6, destination: End6, payload: &[u8]) -> Ip6 {
    let mut datagram = Vec::new();
    datagram.extend(source.1.to_be_bytes());
    datagram.extend(destination.1.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    let mut packet = Ip6::new(17, source.0, destination.0, datagram);
    fill(&mut packet, 6);
    if packet.payload[6..8] == [0, 0] {
        packet.payload[6..8].copy_from_slice(&[0xff, 0xff]);
    }
    packet
}

/// An ICMPv6 message.
pub(crate) fn icmp6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    kind: [u8; 2],
    rest: [u8; 4],
    data: &[u8],
) -> Ip6 {
    let mut message = vec![kind[0], kind[1], 0, 0];
    message.extend(rest);
    message.extend(data);
    let mut packet = Ip6::new(58, source, destination, message);
    fill(&mut packet, 2);
    packet
}

/// Puts the checksum where it belongs.
fn fill(packet: &mut Ip6, at: usize) {
    packet.payload[at..at + 2].copy_from_slice(&[0, 0]);
    let sum = transport_checksum(packet.protocol, packet.source, packet.destination, &packet.payload);
    packet.payload[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// GUE with a hop list: the list's last `hops.len()` slots are used.
pub(crate) fn gue6(source: End, hop: Ipv4Addr, hops: &[Ipv4Addr], inner: &Ip6) -> Ip {
    let mut list = vec![0u8; 12];
    for (slot, hop) in list.chunks_mut(4).skip(3 - hops.len()).zip(hops) {
        slot.copy_from_slice(&hop.octets());
    }
    gue_around(source, hop, [3 - hops.len() as u8, 3], &list, 41, &inner.bytes())
}

/// A frame as the uplink receives it.
pub(crate) fn received6(packet: &Ip6) -> Vec<u8> {
    frame6(UPLINK_MAC, ROUTER_MAC, packet)
}

/// A frame as it goes back to the router.
pub(crate) fn sent6(packet: &Ip6) -> Vec<u8> {
    frame6(ROUTER_MAC, UPLINK_MAC, packet)
}

pub(crate) fn frame6(destination: [u8; 6], source: [u8; 6], packet: &Ip6) -> Vec<u8> {
    [&destination[..], &source, &[0x86, 0xdd], &packet.bytes()].concat()
}

/// Every checksum of an IPv6 packet.
pub(crate) fn check_ip6(what: &str, packet: &[u8]) {
    let octets = |at: usize| <[u8; 16]>::try_from(&packet[at..at + 16]).unwrap();
    let (source, destination) = (octets(8).into(), octets(24).into());
    let end = 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    let (mut protocol, mut at) = (packet[6], 40);
    while [0, 43, 44, 60].contains(&protocol) {
        if protocol == 44 && u16::from_be_bytes([packet[at + 2], packet[at + 3]]) & !6 != 0 {
            return; // A fragment: no checksum of the whole can be looked at.
        }
        let length = if protocol == 44 { 8 } else { 8 + 8 * usize::from(packet[at + 1]) };
        (protocol, at) = (packet[at], at + length);
    }
    let sum = transport_checksum(protocol, source, destination, &packet[at..end]);
    assert_eq!(sum, 0, "{what}: checksum behind IPv6");
}

fn transport_checksum(protocol: u8, source: Ipv6Addr, destination: Ipv6Addr, segment: &[u8]) -> u16 {
    let length = (segment.len() as u32).to_be_bytes();
    checksum(&[&source.octets(), &destination.octets(), &length, &[0, protocol], segment])
}
