//! Packets from first principles, and a checksum routine that shares nothing with the programs.

use std::net::Ipv4Addr;

use crate::packets6::check_ip6;

pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const ROUTER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0xfe];
pub(crate) const UPLINK_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
const GUE_PORT: u16 = 6080;

/// An IPv4 packet under construction; no Ethernet header yet.
#[derive(Clone, Debug)]
pub(crate) struct Ip {
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) id: u16,
    pub(crate) fragment: u16,
    pub(crate) protocol: u8,
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Ip {
    pub(crate) fn new(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, payload: Vec<u8>) -> Self {
        Self {
            tos: 0,
            ttl: 64,
            id: 0,
            fragment: 0x4000,
            protocol,
            source,
            destination,
            options: vec![],
            payload,
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let header = 20 + self.options.len();
        let mut bytes = vec![0x40 | (header / 4) as u8, self.tos];
        bytes.extend(((header + self.payload.len()) as u16).to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(self.fragment.to_be_bytes());
        bytes.extend([self.ttl, self.protocol, 0, 0]);
        bytes.extend(self.source.octets());
        bytes.extend(self.destination.octets());
        bytes.extend(&self.options);
        let sum = checksum(&[&bytes]);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }
}

/// One end of a flow.
pub(crate) type End = (Ipv4Addr, u16);

pub(crate) fn tcp(source: End, destination: End, flags: u8, payload: &[u8]) -> Ip {
    let mut segment = Vec::new();
    segment.extend(source.1.to_be_bytes());
    segment.extend(destination.1.to_be_bytes());
    segment.extend([1, 2, 3, 4, 5, 6, 7, 8, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    segment.extend(payload);
    let sum = transport_checksum(6, source.0, destination.0, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    Ip::new(6, source.0, destination.0, segment)
}

/// A SYN or SYN+ACK with a maximum segment size and one more option.
pub(crate) fn tcp_with_segment_size(source: End, destination: End, flags: u8, size: u16) -> Ip {
    let [high, low] = size.to_be_bytes();
    let mut packet = tcp(source, destination, flags, &[2, 4, high, low, 1, 3, 3, 7]);
    packet.payload[12] = 0x70;
    packet.payload[16..18].copy_from_slice(&[0, 0]);
    let sum = transport_checksum(6, source.0, destination.0, &packet.payload);
    packet.payload[16..18].copy_from_slice(&sum.to_be_bytes());
    packet
}

pub(crate) fn udp(source: End, destination: End, payload: &[u8]) -> Ip {
    let mut packet = udp_without_checksum(source, destination, payload);
    let sum = match transport_checksum(17, source.0, destination.0, &packet.payload) {
        0 => 0xffff,
        sum => sum,
    };
    packet.payload[6..8].copy_from_slice(&sum.to_be_bytes());
    packet
}

pub(crate) fn udp_without_checksum(source: End, destination: End, payload: &[u8]) -> Ip {
    let mut datagram = Vec::new();
    datagram.extend(source.1.to_be_bytes());
    datagram.extend(destination.1.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    Ip::new(17, source.0, destination.0, datagram)
}

/// An ICMP message.
pub(crate) fn icmp(source: Ipv4Addr, destination: Ipv4Addr, kind: [u8; 2], rest: [u8; 4], data: &[u8]) -> Ip {
    let mut message = vec![kind[0], kind[1], 0, 0];
    message.extend(rest);
    message.extend(data);
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    Ip::new(1, source, destination, message)
}

/// GUE with a hop list: the list's last `hops.len()` slots are used.
pub(crate) fn gue(source: End, hop: Ipv4Addr, hops: &[Ipv4Addr], inner: &Ip) -> Ip {
    let mut list = vec![0u8; 12];
    for (slot, hop) in list.chunks_mut(4).skip(3 - hops.len()).zip(hops) {
        slot.copy_from_slice(&hop.octets());
    }
    gue_raw(source, hop, 3 - hops.len() as u8, 3, &list, inner)
}

/// GUE with any list.
pub(crate) fn gue_raw(source: End, hop: Ipv4Addr, next: u8, count: u8, list: &[u8], inner: &Ip) -> Ip {
    gue_around(source, hop, [next, count], list, 4, &inner.bytes())
}

/// GUE around any packet, which is of protocol `inside`.
pub(crate) fn gue_around(
    source: End,
    hop: Ipv4Addr,
    [next, count]: [u8; 2],
    list: &[u8],
    inside: u8,
    packet: &[u8],
) -> Ip {
    let mut data = vec![(1 + list.len() / 4) as u8, inside, 0, 0, 0, 0, next, count];
    data.extend(list);
    data.extend(packet);
    udp_without_checksum(source, (hop, GUE_PORT), &data)
}

/// A frame as the uplink receives it.
pub(crate) fn received(packet: &Ip) -> Vec<u8> {
    frame(UPLINK_MAC, ROUTER_MAC, &packet.bytes())
}

/// A frame as it goes back to the router.
pub(crate) fn sent(packet: &Ip) -> Vec<u8> {
    frame(ROUTER_MAC, UPLINK_MAC, &packet.bytes())
}

pub(crate) fn frame(destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Vec<u8> {
    [&destination[..], &source, &[8, 0], packet].concat()
}

/// Every checksum in a frame, the inner ones of an encapsulation too.
pub(crate) fn assert_checksums(what: &str, frame: &[u8]) {
    if frame[12..14] == [0x86, 0xdd] {
        return check_ip6(what, &frame[14..]);
    }
    check_ip(what, &frame[14..]);
}

fn check_ip(what: &str, packet: &[u8]) {
    let header = usize::from(packet[0] & 15) * 4;
    let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    assert_eq!(checksum(&[&packet[..header]]), 0, "{what}: IPv4 header checksum");
    let source = Ipv4Addr::new(packet[12], packet[13], packet[14], packet[15]);
    let destination = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
    let segment = &packet[header..length];
    let protocol = packet[9];
    if u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0 {
        return; // A fragment: no checksum of the whole can be looked at.
    }
    if protocol == 1 {
        assert_eq!(checksum(&[segment]), 0, "{what}: ICMP checksum");
        if [3, 11, 12].contains(&segment[0]) {
            let quoted = &segment[8..];
            let header = usize::from(quoted[0] & 15) * 4;
            assert_eq!(checksum(&[&quoted[..header]]), 0, "{what}: quoted IPv4 header checksum");
        }
        return;
    }
    let absent = protocol == 17 && segment[6..8] == [0, 0];
    if !absent {
        assert_eq!(
            transport_checksum(protocol, source, destination, segment),
            0,
            "{what}: transport checksum"
        );
    }
    if protocol == 17 && segment[2..4] == GUE_PORT.to_be_bytes() {
        let check = if segment[9] == 41 { check_ip6 } else { check_ip };
        check(what, &segment[8 + 20..]);
    }
}

fn transport_checksum(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, segment: &[u8]) -> u16 {
    let length = (segment.len() as u16).to_be_bytes();
    checksum(&[&source.octets(), &destination.octets(), &[0, protocol], &length, segment])
}

/// RFC 1071, the slow way: byte by byte, carry by carry. Each part but the last has an even length.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u16;
    for part in parts {
        for pair in part.chunks(2) {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            let (next, carry) = sum.overflowing_add(word);
            sum = next + u16::from(carry);
        }
    }
    !sum
}
