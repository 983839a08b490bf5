//! Every kind of packet of either family, for every kind of owner: at ingress and at the target.
//!
//! QUIC goes by its ports, like any datagram. Each row is what a client sends, built once for the VIP and once for the
//! instance: the second is what the instance must get.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyplace_ebpf::{Counter, VipTable, flow_hash, flow_hash6};
use anyplace_ebpf_common as common;
use anyplace_ebpf_model::instance6;

use crate::bed::*;
use crate::namespaces::root_or_skip;
use crate::packets::{
    ACK, End, Ip, ROUTER_MAC, SYN, UPLINK_MAC, assert_checksums, gue_around, icmp, received, sent, tcp, udp,
};
use crate::packets6::{End6, Ip6, icmp6, tcp6, udp6};

const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x198, 0, 0, 0, 0, 9);
/// A router on the client's way.
const ON_THE_WAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ON_THE_WAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x192, 0, 0, 0, 0, 1);

/// A packet, from its IP header on.
struct Row {
    what: &'static str,
    bytes: Vec<u8>,
    /// Of the flow that it belongs to.
    protocol: u8,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// May be served by whoever gets it.
    Opening,
    /// Belongs to a flow.
    Following,
    /// A fragment whose first one never comes.
    Stray,
}

/// The first packet of QUIC: a long header, version 1, two connection ids, and the least length that clients may send.
fn quic() -> Vec<u8> {
    let mut datagram = vec![0xc3, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1];
    datagram.resize(1_200, 0x5a);
    datagram
}

/// Packets in the order in which they are sent; `id` tells their fragments from those of other calls.
fn rows(client: SocketAddr, to: SocketAddr, id: u16) -> Vec<Row> {
    match (client.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(address)) => rows4((from, client.port()), (address, to.port()), id),
        (IpAddr::V6(from), IpAddr::V6(address)) => rows6((from, client.port()), (address, to.port()), id),
        _ => panic!("{client} and {to} are of different families"),
    }
}

fn rows4(client: End, to: End, id: u16) -> Vec<Row> {
    let row = |what, packet: &Ip, protocol, kind| Row { what, bytes: packet.bytes(), protocol, kind };
    let error = |kind, about: &Ip, quoted: usize| {
        let mut quote = about.bytes();
        quote.truncate(quoted);
        icmp(ON_THE_WAY, to.0, kind, [0, 0, 5, 0x14], &quote)
    };
    let parts = |id| {
        let whole = udp(client, to, &[7; 40]);
        let (mut first, mut later) = (whole.clone(), whole);
        (first.id, later.id) = (id, id);
        (first.fragment, later.fragment) = (0x2000, 0x0003);
        later.payload = first.payload.split_off(24);
        (first, later)
    };
    let ((first, later), (_, stray)) = (parts(id), parts(id + 1));
    let (segment, datagram) = (tcp(to, client, ACK, &[1; 600]), udp(to, client, b"an answer"));
    vec![
        row("SYN", &tcp(client, to, SYN, b""), 6, Kind::Opening),
        row("TCP", &tcp(client, to, ACK, b"data"), 6, Kind::Following),
        row("UDP", &udp(client, to, b"a datagram"), 17, Kind::Following),
        row("QUIC", &udp(client, to, &quic()), 17, Kind::Following),
        row("ICMP unreachable", &error([3, 3], &datagram, 60), 17, Kind::Following),
        row("ICMP time exceeded", &error([11, 0], &segment, 28), 6, Kind::Following),
        row("fragmentation needed", &error([3, 4], &segment, 28), 6, Kind::Following),
        row("a later fragment before the first", &stray, 17, Kind::Stray),
        row("a first fragment", &first, 17, Kind::Following),
        row("a later fragment", &later, 17, Kind::Following),
        row("a later fragment again", &later, 17, Kind::Following),
    ]
}

fn rows6(client: End6, to: End6, id: u16) -> Vec<Row> {
    let row = |what, packet: &Ip6, protocol, kind| Row { what, bytes: packet.bytes(), protocol, kind };
    let error = |kind, about: &Ip6, quoted: usize| {
        let mut quote = about.bytes();
        quote.truncate(quoted);
        icmp6(ON_THE_WAY6, to.0, kind, [0, 0, 5, 0], &quote)
    };
    let parts = |id: u16| {
        let whole = udp6(client, to, &[7; 40]);
        let (mut first, mut later) = (whole.clone(), whole);
        later.payload = first.payload.split_off(24);
        (first.fragment(0, true, id.into()), later.fragment(3, false, id.into()))
    };
    let ((first, later), (_, stray)) = (parts(id), parts(id + 1));
    let (segment, datagram) = (tcp6(to, client, ACK, &[1; 600]), udp6(to, client, b"an answer"));
    vec![
        row("SYN", &tcp6(client, to, SYN, b""), 6, Kind::Opening),
        row("TCP", &tcp6(client, to, ACK, b"data"), 6, Kind::Following),
        row("UDP", &udp6(client, to, b"a datagram"), 17, Kind::Following),
        row("QUIC", &udp6(client, to, &quic()), 17, Kind::Following),
        row("ICMPv6 unreachable", &error([1, 4], &datagram, 60), 17, Kind::Following),
        row("ICMPv6 time exceeded", &error([3, 0], &segment, 48), 6, Kind::Following),
        row("packet too big", &error([2, 0], &segment, 640), 6, Kind::Following),
        row("a later fragment before the first", &stray, 17, Kind::Stray),
        row("a first fragment", &first, 17, Kind::Following),
        row("a later fragment", &later, 17, Kind::Following),
        row("a later fragment again", &later, 17, Kind::Following),
    ]
}

/// Clients of both families, each with the VIP's address of its family.
fn families(client_port: u16, vip_port: u16) -> [(SocketAddr, SocketAddr); 2] {
    let four = ((CLIENT, client_port).into(), (VIP, vip_port).into());
    [four, ((CLIENT6, client_port).into(), (VIP6, vip_port).into())]
}

fn frame(destination: [u8; 6], source: [u8; 6], bytes: &[u8]) -> Vec<u8> {
    let ethertype = if bytes[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
    [&destination[..], &source, &ethertype, bytes].concat()
}

fn encapsulated(source: End, hop: Ipv4Addr, hops: &[Ipv4Addr], row: &Row) -> Ip {
    let mut list = vec![0u8; 12];
    for (slot, hop) in list.chunks_mut(4).skip(3 - hops.len()).zip(hops) {
        slot.copy_from_slice(&hop.octets());
    }
    let inside = if row.bytes[0] >> 4 == 4 { 4 } else { 41 };
    gue_around(source, hop, [3 - hops.len() as u8, 3], &list, inside, &row.bytes)
}

/// The outer source port that a flow has.
fn spread(client: SocketAddr, vip: SocketAddr, protocol: u8) -> u16 {
    let ports = (common::port(client.port()), common::port(vip.port()));
    let hash = match (client.ip(), vip.ip()) {
        (IpAddr::V4(client), IpAddr::V4(vip)) => {
            let address = |it: Ipv4Addr| common::address(it.octets());
            flow_hash(address(client), address(vip), ports.0, ports.1, protocol)
        }
        (IpAddr::V6(client), IpAddr::V6(vip)) => {
            let address = |it: Ipv6Addr| common::address6(it.octets());
            flow_hash6(&address(client), &address(vip), ports.0, ports.1, protocol)
        }
        _ => panic!("{client} and {vip} are of different families"),
    };
    u16::from_be(common::source_port(hash))
}

#[test]
fn ingress_sends_every_kind_of_packet_to_every_kind_of_owner() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let mut id = 0;
    for (port, owner, hop, hops) in [
        (80, "remote", THERE, vec![]),
        (81, "remote and chained", THERE, vec![THERE_TOO, THERE]),
        (82, "local", HERE, vec![]),
        (83, "in another location, one here drains", FAR, vec![HERE, FAR]),
        (84, "local and chained", HERE, vec![THERE, HERE]),
    ] {
        for (client, vip) in families(40_000, port) {
            id += 2;
            for row in rows(client, vip, id) {
                let what = format!("{} of {client}, owner {owner}", row.what);
                let before = bed.count(Counter::FragmentUnknown);
                let (verdict, bytes) = bed.run("ingress", &frame(UPLINK_MAC, ROUTER_MAC, &row.bytes));
                if row.kind == Kind::Stray {
                    assert_eq!(verdict, XDP_DROP, "{what}");
                    assert_eq!(bed.count(Counter::FragmentUnknown), before + 1, "{what}");
                    continue;
                }
                let source = (MACHINE, spread(client, vip, row.protocol));
                let out = encapsulated(source, hop, &hops, &row);
                let wanted = if hop == HERE { (XDP_PASS, received(&out)) } else { (XDP_TX, sent(&out)) };
                assert_eq!((verdict, hex(&bytes)), (wanted.0, hex(&wanted.1)), "{what}");
                assert_checksums(&what, &bytes);
            }
        }
    }
    for (client, vip) in families(40_000, 85) {
        id += 2;
        for row in rows(client, vip, id) {
            let what = format!("{} of {client}, without a backend", row.what);
            let reason = if row.kind == Kind::Stray { Counter::FragmentUnknown } else { Counter::NoBackend };
            let before = bed.count(reason);
            let (verdict, _) = bed.run("ingress", &frame(UPLINK_MAC, ROUTER_MAC, &row.bytes));
            assert_eq!((verdict, bed.count(reason)), (XDP_DROP, before + 1), "{what}");
        }
    }
}

/// What becomes of a row at the target.
#[derive(Clone, Copy)]
enum Fate {
    Delivered(Ipv4Addr),
    /// To a hop elsewhere, with those that are left.
    Forwarded(Ipv4Addr, &'static [Ipv4Addr]),
    Dropped(Counter),
}

/// Sends a flow's packets to a hop; `fate` says which of them, and what becomes of them.
fn send(
    bed: &Bed,
    (client, vip, id): (SocketAddr, SocketAddr, u16),
    (hop, hops): (Ipv4Addr, &[Ipv4Addr]),
    what: &str,
    fate: impl Fn(Kind) -> Option<Fate>,
) {
    let program = if vip.is_ipv4() { "target" } else { "target6" };
    for (index, row) in rows(client, vip, id).into_iter().enumerate() {
        let what = format!("{} of {client} to {vip}, {what}", row.what);
        let fate = match row.kind {
            // Nothing says that it is about a VIP: left to the stack.
            Kind::Stray if hop == GONE => None,
            Kind::Stray => Some(Fate::Dropped(Counter::FragmentUnknown)),
            kind => fate(kind),
        };
        let Some(fate) = fate else { continue };
        let counter = match fate {
            Fate::Delivered(_) => Some(Counter::Delivered),
            Fate::Forwarded(..) => None,
            Fate::Dropped(reason) => Some(reason),
        };
        let before = counter.map(|counter| bed.count(counter));
        let (verdict, bytes) = bed.run(program, &received(&encapsulated(SENDER, hop, hops, &row)));
        let wanted = match fate {
            Fate::Delivered(instance) => {
                let port = CONTAINER_PORT + vip.port() - 80;
                let own = match vip {
                    SocketAddr::V4(_) => SocketAddr::from((instance, port)),
                    SocketAddr::V6(_) => SocketAddr::from((instance6(instance), port)),
                };
                let [a, b, c, d] = instance.octets();
                Some(frame([0x02, 0x61, a, b, c, d], ROUTER_MAC, &rows(client, own, id)[index].bytes))
            }
            Fate::Forwarded(to, left) => {
                let mut out = encapsulated(SENDER, to, left, &row);
                out.ttl = 63;
                Some(received(&out))
            }
            Fate::Dropped(_) => None,
        };
        match wanted {
            Some(out) => {
                assert_eq!((verdict, hex(&bytes)), (TC_REDIRECT, hex(&out)), "{what}");
                assert_checksums(&what, &bytes);
            }
            None => assert_eq!(verdict, TC_SHOT, "{what}"),
        }
        if let (Some(counter), Some(before)) = (counter, before) {
            assert_eq!(bed.count(counter), before + 1, "{what}: counter {}", counter.name());
        }
    }
}

#[test]
fn the_target_gives_every_kind_of_packet_its_way() {
    if !root_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let chained = VipTable { buckets: vec![], local: vec![bucket(THERE, THERE_TOO)] };
    for key in keys(86) {
        bed.plane.set_vip(key, &chained).unwrap();
    }
    let following = |fate| move |kind| (kind == Kind::Following).then_some(fate);
    let every = |fate| move |_| Some(fate);
    let local = Fate::Delivered(HERE);
    for (client, vip) in families(40_000, 80) {
        send(&bed, (client, vip, 2), (HERE, &[]), "local, the last hop", every(local));
        send(&bed, (client, vip, 4), (HERE, &[THERE]), "local, a flow that is known", every(local));
        // Another instance has the bucket now. It doesn't know the flow, and takes those that begin.
        send(&bed, (client, vip, 6), (HERE_TOO, &[HERE]), "whose instance drains", following(local));
        let new = SocketAddr::new(client.ip(), 40_001);
        let opening = |kind| (kind == Kind::Opening).then_some(Fate::Delivered(HERE_TOO));
        send(&bed, (new, vip, 8), (HERE_TOO, &[HERE]), "while another instance drains", opening);
    }
    for (client, vip) in families(40_002, 82) {
        send(&bed, (client, vip, 2), (MACHINE, &[]), "relayed to an instance here", every(local));
    }
    for (client, vip) in families(40_003, 80) {
        let on = Fate::Forwarded(THERE, &[HERE]);
        send(&bed, (client, vip, 2), (HERE, &[THERE, HERE]), "chained, unknown here", following(on));
        let on = Fate::Forwarded(THERE, &[]);
        send(&bed, (client, vip, 4), (GONE, &[THERE]), "chained behind one that is gone", every(on));
        let lost = Fate::Dropped(Counter::NoInstance);
        send(&bed, (client, vip, 6), (GONE, &[]), "the last hop is gone", every(lost));
    }
    for (client, vip) in families(40_004, 81) {
        let remote = Fate::Forwarded(THERE, &[]);
        send(&bed, (client, vip, 2), (MACHINE, &[]), "relayed to another machine", every(remote));
    }
    for (client, vip) in families(40_005, 86) {
        let chained = Fate::Forwarded(THERE, &[THERE_TOO, THERE]);
        send(&bed, (client, vip, 2), (MACHINE, &[]), "relayed to one of two", every(chained));
    }
    for (client, vip) in families(40_006, 85) {
        let nobody = Fate::Dropped(Counter::NoBackend);
        send(&bed, (client, vip, 2), (MACHINE, &[]), "relayed without a backend", every(nobody));
        let next = Fate::Forwarded(FAR, &[]);
        send(&bed, (client, vip, 4), (MACHINE, &[FAR]), "without a backend here, a hop is left", every(next));
    }
}
