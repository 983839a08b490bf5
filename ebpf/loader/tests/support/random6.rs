//! Random IPv6 packets, most of them for a VIP.

use std::net::Ipv6Addr;

use anyplace_ebpf_model::instance6;
use anyplace_seed::Seed;

use crate::{
    bed::{CONTAINER_PORT, GONE, HERE, HERE_TOO, MACHINE6, VIP6},
    packets::{ACK, SYN},
    packets6::{End6, Ip6, icmp6, tcp6, tcp6_with_segment_size, udp6},
    random::PORTS,
};

/// A second VIP; differs from the first in its last bits, as clients do.
pub(crate) const VIP6_TOO: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 2);
const OTHER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x192, 0, 0, 0, 2, 7);

/// What a client sends.
pub(crate) fn clients6(random: &mut Seed) -> Ip6 {
    let client = Ipv6Addr::new(0x2001, 0xdb8, 0x198, random.index(2) as u16, 0, 0, 100, 9);
    let vip = if random.chance(4) { OTHER6 } else { random.pick(&[VIP6, VIP6, VIP6_TOO]) };
    let from = (client, 40_000 + random.index(5) as u16);
    let to = (vip, PORTS.start + random.index(PORTS.len() + 1) as u16);
    let packet = match random.index(20) {
        0 => echo(random, client, vip),
        1..=3 => error(random, client, from, to),
        _ => transport(random, from, to),
    };
    header(random, packet)
}

/// What an instance sends.
pub(crate) fn answer6(random: &mut Seed) -> Ip6 {
    let from = match random.index(15) {
        0 => OTHER6,
        1 => VIP6,
        _ => instance6(random.pick(&[HERE, HERE, HERE_TOO, GONE])),
    };
    let vip = random.index(2) as u16;
    let port = CONTAINER_PORT + 100 * vip + random.index(PORTS.len() + 1) as u16;
    let to = match random.index(12) {
        0 => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
        1 => VIP6,
        2 => instance6(HERE),
        3 => MACHINE6,
        _ => Ipv6Addr::new(0x2001, 0xdb8, 0x198, 0, 0, 0, 100, 9),
    };
    let client_port = 40_000 + random.index(5) as u16;
    let packet = transport(random, (from, port), (to, client_port));
    header(random, packet)
}

/// An echo request, or another message with an ICMPv6 header.
fn echo(random: &mut Seed, client: Ipv6Addr, vip: Ipv6Addr) -> Ip6 {
    let length = random.index(40);
    let data = random.bytes(length);
    let kind = random.pick(&[128, 128, 128, 129, 135, 1, 2, 0, 5]);
    icmp6(client, vip, [kind, random.pick(&[0, 0, 0, 1])], [0; 4], &data)
}

/// An ICMPv6 error about a packet that the VIP sent.
fn error(random: &mut Seed, router: Ipv6Addr, client: End6, vip: End6) -> Ip6 {
    let sent = transport(random, vip, client);
    let mut quote = header(random, sent).bytes();
    quote.truncate(random.pick(&[48, 48, 60, 80, 128, 1232, 1232, 40, 44]));
    let router = if random.chance(50) { router } else { OTHER6 };
    let kind = random.pick(&[[1, 4], [1, 0], [2, 0], [3, 0], [4, 1]]);
    icmp6(router, vip.0, kind, [0, 0, 5, 0], &quote)
}

fn transport(random: &mut Seed, from: End6, to: End6) -> Ip6 {
    let length = if random.chance(4) { 1360 + random.index(80) } else { random.index(24) };
    let payload = random.bytes(length);
    if random.chance(50) {
        let flags = random.pick(&[SYN, SYN, ACK, ACK, ACK, ACK | 8, SYN | ACK, 4, ACK | 4, ACK | 1, 0, 0xff]);
        if flags & SYN != 0 && random.chance(50) {
            return tcp6_with_segment_size(from, to, flags, 1300 + random.index(300) as u16);
        }
        return tcp6(from, to, flags, &payload);
    }
    let mut packet = udp6(from, to, &payload);
    if random.chance(5) {
        packet.payload[6..8].copy_from_slice(&[0, 0]);
    }
    packet
}

/// A random header, and extension headers, around the same payload.
fn header(random: &mut Seed, mut packet: Ip6) -> Ip6 {
    packet.class = random.next() as u8;
    packet.label = random.index(1 << 20) as u32;
    packet.hops = random.pick(&[1, 2, 64, 255]);
    if random.chance(70) {
        return packet;
    }
    let count = random.pick(&[0, 1, 1, 2, 3, 5, 6, 7]);
    for _ in 0..count {
        let kind = random.pick(&[0, 60, 60, 43]);
        let mut data = vec![0; 6 + 8 * random.index(3)];
        if kind == 43 {
            // Type, segments left.
            data[..2].copy_from_slice(&[random.index(5) as u8, u8::from(random.chance(20))]);
        }
        packet.extensions.push((kind, data));
    }
    if random.chance(60) {
        let (offset, more) =
            random.pick(&[(0, true), (0, true), (0, false), (3, true), (4, false), (1, false)]);
        let id = random.index(4) as u32;
        packet = packet.fragment(offset, more, id);
        if random.chance(20) {
            packet.extensions.push((60, vec![0; 6]));
        }
    }
    packet
}
