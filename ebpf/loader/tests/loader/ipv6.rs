//! IPv6 packet by packet: what the programs do with clients' packets for every kind of backend, and with answers.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyplace_ebpf::{Counter, flow_hash6};
use anyplace_ebpf_common as common;
use anyplace_ebpf_model::instance6;

use crate::bed::*;
use crate::namespaces::root_or_skip;
use crate::packets::{ACK, Ip, ROUTER_MAC, SYN, assert_checksums, received, sent};
use crate::packets6::{End6, Ip6, frame6, gue6, icmp6, received6, sent6, tcp6, tcp6_with_segment_size, udp6};

const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x198, 0, 0, 0, 0, 9);
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x192, 0, 0, 0, 0, 7);
const PORT: u16 = 40_000;

/// What `ingress` makes of a packet of the flow from [`PORT`] to the VIP's port.
fn encapsulated6(hop: Ipv4Addr, hops: &[Ipv4Addr], inner: &Ip6, port: u16, protocol: u8) -> Ip {
    let address = |address: Ipv6Addr| common::address6(address.octets());
    let ports = (common::port(PORT), common::port(port));
    let hash = flow_hash6(&address(CLIENT6), &address(VIP6), ports.0, ports.1, protocol);
    let mut outer = gue6((MACHINE, u16::from_be(common::source_port(hash))), hop, hops, inner);
    outer.tos = inner.class;
    outer
}

/// What the VIP has sent, as far as an error quotes it.
fn quote(packet: &Ip6, bytes: usize) -> Vec<u8> {
    let mut quote = packet.bytes();
    quote.truncate(bytes);
    quote
}

/// Packets of a flow to a VIP's port, in the order in which they are sent: what, packet, protocol of the flow.
fn kinds(client: End6, vip: End6) -> Vec<(&'static str, Ip6, u8)> {
    let mut optioned = tcp6(client, vip, ACK, b"after two headers");
    optioned.extensions = vec![(0, vec![0; 6]), (60, vec![1; 14])];
    optioned.class = 0xb9;
    let mut routed = udp6(client, vip, b"at the end of its route");
    routed.extensions = vec![(43, vec![0; 22])];
    let whole = udp6(client, vip, &[5; 40]);
    let (mut first, mut later) = (whole.clone(), whole);
    later.payload = first.payload.split_off(24);
    let answer = tcp6(vip, client, ACK, b"an answer");
    let datagram = udp6(vip, client, b"an answer");
    let fragment = udp6(vip, client, &[6; 64]).fragment(0, true, 9);
    vec![
        ("TCP", tcp6(client, vip, SYN, b""), 6),
        ("UDP", udp6(client, vip, b"a datagram"), 17),
        ("TCP behind options", optioned, 6),
        ("UDP behind a routing header", routed, 17),
        ("a first fragment", first.fragment(0, true, 7), 17),
        ("a later fragment", later.fragment(3, false, 7), 17),
        ("an atomic fragment", udp6(client, vip, b"all of it").fragment(0, false, 8), 17),
        ("unreachable", icmp6(ROUTER6, vip.0, [1, 4], [0; 4], &quote(&datagram, 48)), 17),
        ("packet too big", icmp6(ROUTER6, vip.0, [2, 0], [0, 0, 5, 0], &quote(&answer, 1232)), 6),
        ("time exceeded", icmp6(ROUTER6, vip.0, [3, 0], [0; 4], &quote(&answer, 52)), 6),
        ("a problem with a fragment", icmp6(ROUTER6, vip.0, [4, 0], [0; 4], &quote(&fragment, 100)), 17),
    ]
}

#[test]
fn ingress_sends_every_kind_of_packet_to_every_kind_of_owner() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    for (port, owner, hop, hops) in [
        (80, "on another machine", THERE, vec![]),
        (81, "on another machine, with a former one", THERE, vec![THERE_TOO, THERE]),
        (82, "on this machine", HERE, vec![]),
        (83, "in another location, and one here that drains", FAR, vec![HERE, FAR]),
        (84, "on this machine, with a former one", HERE, vec![THERE, HERE]),
    ] {
        for (what, packet, protocol) in kinds((CLIENT6, PORT), (VIP6, port)) {
            let out = encapsulated6(hop, &hops, &packet, port, protocol);
            let (verdict, out) = if hop == HERE { (XDP_PASS, received(&out)) } else { (XDP_TX, sent(&out)) };
            let what = format!("{what} for an owner {owner}");
            let (got, bytes) = bed.run("ingress", &received6(&packet));
            assert_eq!((got, hex(&bytes)), (verdict, hex(&out)), "{what}");
            assert_checksums(&what, &bytes);
        }
    }
    for (what, packet, _) in kinds((CLIENT6, PORT), (VIP6, 85)) {
        let before = bed.count(Counter::NoBackend);
        assert_eq!(bed.run("ingress", &received6(&packet)).0, XDP_DROP, "{what} without a backend");
        assert_eq!(bed.count(Counter::NoBackend), before + 1, "{what} without a backend");
    }
}

#[test]
fn ingress_answers_and_refuses() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let (client, vip) = ((CLIENT6, PORT), (VIP6, 80));
    let drop =
        |what, packet: &Ip6, counter| unchanged(what, "ingress", received6(packet), XDP_DROP, Some(counter));
    let pass = |what, packet: &Ip6| unchanged(what, "ingress", received6(packet), XDP_PASS, None);
    let mut echo = icmp6(CLIENT6, VIP6, [128, 0], [1, 2, 3, 4], b"ping");
    let mut echoed = icmp6(VIP6, CLIENT6, [129, 0], [1, 2, 3, 4], b"ping");
    echo.hops = 7;
    echoed.label = 0;
    let answered =
        changed("an echo request", "ingress", received6(&echo), XDP_TX, sent6(&echoed), Counter::EchoReplies);
    echo.extensions = vec![(60, vec![1; 6])];
    let big = tcp6(client, vip, ACK, &[7; 1500 - 48 - 60 + 1]);
    let told = icmp6(VIP6, CLIENT6, [2, 0], 1452u32.to_be_bytes(), &quote(&big, 128));
    let fits = tcp6(client, vip, ACK, &[7; 1500 - 48 - 60]);
    let mut long_way = tcp6(client, vip, SYN, b"");
    long_way.extensions = vec![(60, vec![1; 6]); 7];
    let mut to_go = tcp6(client, vip, SYN, b"");
    to_go.extensions = vec![(43, [&[0, 1][..], &[0; 20]].concat())];
    let mut short = received6(&tcp6(client, vip, SYN, b""));
    short.truncate(14 + 40 + 12);
    let later = udp6(client, vip, &[0; 16]).fragment(2, false, 99);
    let foreign = udp6((ROUTER6, 80), client, b"");
    for fixture in [
        answered,
        changed(
            "a packet that is too big",
            "ingress",
            received6(&big),
            XDP_TX,
            sent6(&told),
            Counter::TooBigSent,
        ),
        changed(
            "the largest that fits",
            "ingress",
            received6(&fits),
            XDP_TX,
            sent(&encapsulated6(THERE, &[], &fits, 80, 6)),
            Counter::Packets,
        ),
        drop("an echo request behind options", &echo, Counter::Options),
        drop("more extension headers than are read", &long_way, Counter::Options),
        drop("a route that doesn't end here", &to_go, Counter::Options),
        drop("a later fragment before the first", &later, Counter::FragmentUnknown),
        drop(
            "a fragment of ICMPv6",
            &icmp6(CLIENT6, VIP6, [128, 0], [0; 4], b"").fragment(0, true, 3),
            Counter::Fragment,
        ),
        drop("another port", &tcp6(client, (VIP6, 22), SYN, b""), Counter::UnknownPort),
        drop(
            "an error about somebody else's packet",
            &icmp6(ROUTER6, VIP6, [1, 0], [0; 4], &quote(&foreign, 48)),
            Counter::IcmpUnmatched,
        ),
        unchanged("a frame shorter than its packet", "ingress", short, XDP_DROP, Some(Counter::Malformed)),
        pass("another address", &tcp6(client, (ROUTER6, 80), SYN, b"")),
        pass("a neighbour's solicitation", &icmp6(CLIENT6, VIP6, [135, 0], [0; 4], &[0; 16])),
        pass("an echo reply", &icmp6(CLIENT6, VIP6, [129, 0], [0; 4], b"")),
        pass("another protocol", &Ip6::new(132, CLIENT6, VIP6, vec![0; 12])),
    ] {
        bed.check(fixture);
    }
}

/// The packet as the instance gets it.
fn inside(packet: &Ip6, instance: Ipv4Addr) -> Vec<u8> {
    let [a, b, c, d] = instance.octets();
    frame6([0x02, 0x61, a, b, c, d], ROUTER_MAC, packet)
}

#[test]
fn target_delivers_every_kind_of_packet() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    for (port, hop, instance) in [(80, HERE, HERE), (82, MACHINE, HERE), (80, HERE_TOO, HERE_TOO)] {
        let own = (instance6(instance), CONTAINER_PORT + port - 80);
        let out = kinds((CLIENT6, PORT), own);
        for ((what, packet, _), (_, out, _)) in kinds((CLIENT6, PORT), (VIP6, port)).into_iter().zip(out) {
            let what = format!("{what} to {hop}");
            let (verdict, bytes) = bed.run("target6", &received(&gue6(SENDER, hop, &[], &packet)));
            assert_eq!(verdict, TC_REDIRECT, "{what}");
            assert_eq!(hex(&bytes), hex(&inside(&out, instance)), "{what}");
            assert_checksums(&what, &bytes);
        }
    }
}

#[test]
fn target_passes_on_what_it_does_not_own() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let (client, vip) = ((CLIENT6, PORT + 1), (VIP6, 80));
    let ack = tcp6(client, vip, ACK, b"abc");
    let forwarded = |hop, hops: &[Ipv4Addr], inner: &Ip6| {
        let mut outer = gue6(SENDER, hop, hops, inner);
        outer.ttl = 63;
        received(&outer)
    };
    let pass_on = |what, packet: &Ip, out, counter| {
        changed(what, "target6", received(packet), TC_REDIRECT, out, counter)
    };
    let drop =
        |what, packet: &Ip, counter| unchanged(what, "target6", received(packet), TC_SHOT, Some(counter));
    let datagram = udp6(client, vip, b"abcd");
    let error = kinds(client, vip).swap_remove(8).1;
    let later = udp6(client, vip, &[0; 16]).fragment(2, false, 77);
    let mut wrong = gue6(SENDER, HERE, &[], &ack);
    wrong.payload[8 + 6] = 4;
    for fixture in [
        pass_on(
            "an unknown flow goes to the former owner",
            &gue6(SENDER, HERE, &[THERE, HERE], &ack),
            forwarded(THERE, &[HERE], &ack),
            Counter::SecondHop,
        ),
        pass_on(
            "an unknown flow of datagrams too",
            &gue6(SENDER, HERE, &[THERE], &datagram),
            forwarded(THERE, &[], &datagram),
            Counter::SecondHop,
        ),
        pass_on(
            "an error about an unknown flow too",
            &gue6(SENDER, HERE, &[THERE], &error),
            forwarded(THERE, &[], &error),
            Counter::SecondHop,
        ),
        pass_on(
            "relayed to one of two",
            &gue6(SENDER, MACHINE, &[FAR], &tcp6(client, (VIP6, 83), ACK, b"")),
            forwarded(THERE, &[HERE, FAR], &tcp6(client, (VIP6, 83), ACK, b"")),
            Counter::Relayed,
        ),
        pass_on(
            "an instance that is gone",
            &gue6(SENDER, GONE, &[THERE], &ack),
            forwarded(THERE, &[], &ack),
            Counter::SecondHop,
        ),
        drop("the last hop is gone", &gue6(SENDER, GONE, &[], &ack), Counter::NoInstance),
        drop("a later fragment alone", &gue6(SENDER, HERE, &[], &later), Counter::FragmentUnknown),
        drop("an index beyond the list", &wrong, Counter::Malformed),
        drop(
            "another message inside",
            &gue6(SENDER, HERE, &[], &icmp6(CLIENT6, VIP6, [128, 0], [0; 4], b"")),
            Counter::Malformed,
        ),
        drop(
            "relayed without a backend",
            &gue6(SENDER, MACHINE, &[], &tcp6(client, (VIP6, 85), ACK, b"")),
            Counter::NoBackend,
        ),
        unchanged(
            "IPv6 inside is not for the program before",
            "target",
            received(&gue6(SENDER, HERE, &[], &ack)),
            TC_UNSPEC,
            None,
        ),
    ] {
        bed.check(fixture);
    }
}

#[test]
fn reply_leaves_as_the_vips() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let (client, inside, vip) = ((CLIENT6, PORT), (instance6(HERE), CONTAINER_PORT), (VIP6, 80));
    let rewritten = |what, packet: &Ip6, out: &Ip6| {
        changed(what, "reply", received6(packet), TC_REDIRECT, received6(out), Counter::Replies)
    };
    let pass = |what, packet: &Ip6| unchanged(what, "reply", received6(packet), TC_UNSPEC, None);
    let parts = |from| {
        let whole = udp6(from, client, &[8; 64]);
        let (mut first, mut later) = (whole.clone(), whole);
        later.payload = first.payload.split_off(40);
        (first.fragment(0, true, 5), later.fragment(5, false, 5))
    };
    let ((first, later), (first_out, later_out)) = (parts(inside), parts(vip));
    for fixture in [
        rewritten("TCP", &tcp6(inside, client, ACK, b"hello"), &tcp6(vip, client, ACK, b"hello")),
        rewritten("UDP", &udp6(inside, client, b"hello"), &udp6(vip, client, b"hello")),
        rewritten("a first fragment", &first, &first_out),
        rewritten("a later fragment", &later, &later_out),
        rewritten(
            "a segment size that would not fit with the encapsulation is lowered",
            &tcp6_with_segment_size(inside, client, SYN | ACK, 1440),
            &tcp6_with_segment_size(vip, client, SYN | ACK, 1500 - 48 - 60),
        ),
        rewritten(
            "a segment size that fits stays",
            &tcp6_with_segment_size(inside, client, SYN | ACK, 1360),
            &tcp6_with_segment_size(vip, client, SYN | ACK, 1360),
        ),
        changed(
            "an answer to this machine itself: up the stack",
            "reply",
            received6(&tcp6(inside, (MACHINE6, PORT), ACK, b"hello")),
            TC_UNSPEC,
            received6(&tcp6(vip, (MACHINE6, PORT), ACK, b"hello")),
            Counter::Replies,
        ),
        pass("a connection that the container opens", &tcp6((inside.0, 55_555), client, SYN, b"")),
        pass("one from a serving port", &tcp6(inside, client, SYN, b"")),
        pass("a foreign source", &tcp6((ROUTER6, CONTAINER_PORT), client, ACK, b"")),
        pass("a neighbour's solicitation", &icmp6(inside.0, CLIENT6, [135, 0], [0; 4], &[0; 16])),
    ] {
        bed.check(fixture);
    }
}
