//! Random numbers, and random packets: valid ones whose fields come from small pools, so that flows meet again, and
//! damaged ones.

use std::net::Ipv4Addr;

use anyplace_ebpf_model::Program;
use anyplace_seed::Seed;

use crate::{
    bed::{CLIENT, CONTAINER_PORT, FAR, GONE, HERE, HERE_TOO, MACHINE, OTHER, SENDER, THERE, THERE_TOO, VIP},
    packets::{
        ACK, Ip, SYN, gue_around, icmp, received, tcp, tcp_with_segment_size, udp, udp_without_checksum,
    },
    packets6::received6,
    random6::{answer6, clients6},
};

/// A second VIP.
pub(crate) const VIP_TOO: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// Whatever a bucket or a hop list may name.
pub(crate) const HOPS: [Ipv4Addr; 7] = [HERE, HERE_TOO, GONE, THERE, THERE_TOO, FAR, MACHINE];
/// VIP ports that tables are made for; the one after them has none.
pub(crate) const PORTS: std::ops::Range<u16> = 80..86;

/// A program and a frame for it.
pub(crate) fn packet(random: &mut Seed) -> (Program, Vec<u8>) {
    let program = random.pick(&[Program::Ingress, Program::Target, Program::Target, Program::Reply]);
    let made_for = if random.chance(2) { random.pick(&[Program::Ingress, Program::Target]) } else { program };
    let ipv6 = random.chance(50);
    let mut frame = match made_for {
        Program::Ingress if ipv6 => received6(&clients6(random)),
        Program::Ingress => received(&clients(random)),
        Program::Target => received(&encapsulated(random, ipv6)),
        Program::Reply if ipv6 => received6(&answer6(random)),
        Program::Reply => received(&answer(random)),
    };
    if random.chance(30) {
        damage(random, &mut frame);
    }
    (program, frame)
}

/// What a client sends.
fn clients(random: &mut Seed) -> Ip {
    let client = Ipv4Addr::from(u32::from(CLIENT) + random.index(3) as u32);
    let vip = if random.chance(4) { OTHER } else { random.pick(&[VIP, VIP, VIP_TOO]) };
    let from = (client, 40_000 + random.index(5) as u16);
    let to = (vip, PORTS.start + random.index(PORTS.len() + 1) as u16);
    let packet = match random.index(20) {
        0 => echo(random, client, vip),
        1 | 2 => error(random, client, from, to),
        _ => transport(random, from, to),
    };
    header(random, packet)
}

/// An echo request, or another message with an ICMP header.
fn echo(random: &mut Seed, client: Ipv4Addr, vip: Ipv4Addr) -> Ip {
    let length = random.index(40);
    let data = random.bytes(length);
    icmp(client, vip, [random.pick(&[8, 8, 8, 0, 13, 3]), random.pick(&[0, 0, 0, 1])], [0; 4], &data)
}

/// An ICMP error about a packet that the VIP sent.
fn error(random: &mut Seed, router: Ipv4Addr, client: (Ipv4Addr, u16), vip: (Ipv4Addr, u16)) -> Ip {
    let sent = transport(random, vip, client);
    let mut quote = header(random, sent).bytes();
    quote.truncate(random.pick(&[28, 28, 28, 38, 48, 88, 20, 24]));
    let router = if random.chance(50) { router } else { OTHER };
    let kind = random.pick(&[[3, 1], [3, 3], [3, 4], [11, 0], [12, 0]]);
    icmp(router, vip.0, kind, [0, 0, 5, 0], &quote)
}

/// What an instance sends.
fn answer(random: &mut Seed) -> Ip {
    let from = random.pick(&[HERE, HERE, HERE_TOO, GONE]);
    let vip = random.index(2) as u16;
    let port = CONTAINER_PORT + 100 * vip + random.index(PORTS.len() + 1) as u16;
    let to = match random.index(12) {
        0 => Ipv4Addr::new(169, 254, 1, 1),
        1 => VIP,
        2 => HERE,
        3 => MACHINE,
        _ => CLIENT,
    };
    let client_port = 40_000 + random.index(5) as u16;
    let packet = transport(random, (from, port), (to, client_port));
    header(random, packet)
}

/// What another machine sends.
fn encapsulated(random: &mut Seed, ipv6: bool) -> Ip {
    let inner = if ipv6 { clients6(random).bytes() } else { clients(random).bytes() };
    let inside = match random.index(200) {
        0 => 4,
        1 => 41,
        2 => 6,
        _ if ipv6 => 41,
        _ => 4,
    };
    let hop = if random.chance(3) { OTHER } else { random.pick(&HOPS) };
    let next = if random.chance(3) { random.index(5) as u8 } else { random.index(4) as u8 };
    let list: Vec<u8> =
        (0..3).flat_map(|_| if random.chance(3) { OTHER } else { random.pick(&HOPS) }.octets()).collect();
    let sender = if random.chance(5) { (OTHER, SENDER.1) } else { SENDER };
    let mut packet = gue_around(sender, hop, [next, 3], &list, inside, &inner);
    packet.ttl = random.pick(&[64, 64, 63, 2, 1, 0]);
    packet
}

fn transport(random: &mut Seed, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Ip {
    let length = if random.chance(3) { 1380 + random.index(80) } else { random.index(24) };
    let payload = random.bytes(length);
    if random.chance(50) {
        let flags = random.pick(&[SYN, SYN, ACK, ACK, ACK, ACK | 8, SYN | ACK, 4, ACK | 4, ACK | 1, 0, 0xff]);
        if flags & SYN != 0 && random.chance(50) {
            let size = 1300 + random.index(300) as u16;
            return tcp_with_segment_size(from, to, flags, size);
        }
        tcp(from, to, flags, &payload)
    } else if random.chance(10) {
        udp_without_checksum(from, to, &payload)
    } else {
        udp(from, to, &payload)
    }
}

/// A random IPv4 header around the same payload.
fn header(random: &mut Seed, mut packet: Ip) -> Ip {
    packet.tos = random.next() as u8;
    packet.id = random.index(4) as u16;
    packet.ttl = random.pick(&[1, 2, 64, 255]);
    packet.fragment = match random.index(20) {
        0 => 0x2000,
        1 => 0x2003,
        2 => 0x0004,
        3..12 => 0,
        _ => 0x4000,
    };
    if random.chance(6) {
        let words = random.index(11);
        packet.options = vec![1; 4 * words];
    }
    packet
}

/// Damages a frame; most of it where headers are.
fn damage(random: &mut Seed, frame: &mut Vec<u8>) {
    for _ in 0..=random.index(3) {
        let at = random.index(frame.len().min(170));
        match random.index(6) {
            0 => frame[at] ^= 1 << random.index(8),
            1 => frame[at] = random.next() as u8,
            2 => frame[at] = random.pick(&[0, 0xff, 0x7f, 0x80]),
            3 if at >= 14 => frame.truncate(at),
            4 => {
                let length = random.index(60);
                frame.extend(random.bytes(length));
            }
            _ => frame.swap(at, at / 2),
        }
    }
}
