//! Packets as fixtures: what it is, bytes in, verdict, bytes out, and the counter that says why.
//!
//! Each runs through the kernel's BPF_PROG_TEST_RUN, with the maps as the loader fills them.

use std::net::Ipv4Addr;

use anyplace_ebpf::{Bucket, Counter, Protocol, VipTable, bucket_index, flow_hash};
use anyplace_ebpf_common as common;

use crate::bed::*;
use crate::namespaces::root_or_skip;
use crate::packets::{
    self, ACK, Ip, SYN, frame, gue, gue_raw, icmp, received, sent, tcp, tcp_with_segment_size, udp,
    udp_without_checksum,
};

#[test]
fn ingress_sends_clients_packets_to_their_owners() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let client = (CLIENT, 40_000);
    let syn = tcp(client, (VIP, 80), SYN, b"");
    let data = tcp(client, (VIP, 81), ACK, b"hello, world");
    let datagram = udp(client, (VIP, 81), b"odd");
    let mut marked = tcp(client, (VIP, 80), ACK, b"x");
    marked.tos = 0xb9;
    let local = tcp(client, (VIP, 82), SYN, b"");
    let far = udp(client, (VIP, 83), b"");
    let fits = tcp(client, (VIP, 80), ACK, &[7; 1500 - 48 - 40]);
    let mut later = udp(client, (OTHER, 80), &[0; 16]);
    later.fragment = 0x0003;
    let mut short = received(&syn);
    short.truncate(14 + 20 + 12);
    let mut padded = received(&udp(client, (VIP, 80), b"a"));
    padded.resize(60, 0);
    let mut padded_out = sent(&encapsulated(THERE, &[], &udp(client, (VIP, 80), b"a")));
    padded_out.resize(60 + 48, 0);
    let mut cut = udp(client, (VIP, 80), b"");
    cut.payload.truncate(7);

    let through = |what, packet: &Ip, hop, hops: &[Ipv4Addr]| {
        changed(
            what,
            "ingress",
            received(packet),
            XDP_TX,
            sent(&encapsulated(hop, hops, packet)),
            Counter::Packets,
        )
    };
    let drop = |what, packet, counter| unchanged(what, "ingress", packet, XDP_DROP, Some(counter));
    let pass = |what, packet| unchanged(what, "ingress", packet, XDP_PASS, None);
    let local_out = received(&encapsulated(HERE, &[], &local));
    for fixture in [
        through("SYN to an owner on another machine", &syn, THERE, &[]),
        through("TCP with a former owner: three hops", &data, THERE, &[THERE_TOO, THERE]),
        through("UDP with a former owner: three hops", &datagram, THERE, &[THERE_TOO, THERE]),
        through("the client's traffic class and congestion marks are kept", &marked, THERE, &[]),
        through("an owner in another location", &far, FAR, &[HERE, FAR]),
        through("the largest packet that fits the uplink", &fits, THERE, &[]),
        changed("padding after the packet", "ingress", padded, XDP_TX, padded_out, Counter::Packets),
        changed(
            "an owner on this machine: up the stack",
            "ingress",
            received(&local),
            XDP_PASS,
            local_out,
            Counter::Packets,
        ),
        drop("a VIP without backends", received(&tcp(client, (VIP, 85), SYN, b"")), Counter::NoBackend),
        drop(
            "a VIP's address, another port",
            received(&tcp(client, (VIP, 22), SYN, b"")),
            Counter::UnknownPort,
        ),
        drop("a frame shorter than its packet", short, Counter::Malformed),
        drop("a UDP header cut short", received(&cut), Counter::Malformed),
        pass("another address", received(&tcp(client, (OTHER, 80), SYN, b""))),
        pass("a fragment for another address", received(&later)),
        pass("an echo reply to a VIP", received(&icmp(CLIENT, VIP, [0, 0], [0; 4], b""))),
        pass("ARP", [&[0xff; 6][..], &packets::ROUTER_MAC, &[8, 6], &[0; 46]].concat()),
        pass("IPv6", [&packets::UPLINK_MAC[..], &packets::ROUTER_MAC, &[0x86, 0xdd], &[0x60; 60]].concat()),
    ] {
        bed.check(fixture);
    }
    let counted = bed.plane.vip_counters(key(80, Protocol::Tcp)).unwrap().unwrap();
    assert_eq!((counted.packets, counted.connections), (3, 1), "{counted:?}");
}

#[test]
fn ingress_and_user_space_choose_the_same_bucket() {
    if !root_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    // Not a power of two, and each bucket with an address of its own.
    let hops: Vec<Ipv4Addr> = (0..389u32).map(|n| Ipv4Addr::from(0x0a01_0300 + n)).collect();
    let table = VipTable { buckets: hops.iter().copied().map(Bucket::steady).collect(), local: vec![] };
    bed.plane.set_vip(key(90, Protocol::Tcp), &table).unwrap();
    for n in 0..500u16 {
        let packet = tcp((CLIENT, 1024 + n * 97), (VIP, 90), SYN, b"");
        let (verdict, bytes) = bed.run("ingress", &received(&packet));
        assert_eq!(verdict, XDP_TX);
        let hash = flow_hash(
            common::address(CLIENT.octets()),
            common::address(VIP.octets()),
            common::port(1024 + n * 97),
            common::port(90),
            common::TCP,
        );
        let expected = hops[bucket_index(hash, 389) as usize];
        assert_eq!(bytes[30..34], expected.octets(), "flow {n}");
    }
}

#[test]
fn target_delivers_or_passes_on() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let port = |vip_port: u16| CONTAINER_PORT + vip_port - 80;
    let mac = |instance: Ipv4Addr| {
        let [a, b, c, d] = instance.octets();
        [0x02, 0x61, a, b, c, d]
    };
    let delivered =
        |instance: Ipv4Addr, packet: &Ip| frame(mac(instance), packets::ROUTER_MAC, &packet.bytes());
    let forwarded = |hop, hops: &[Ipv4Addr], inner: &Ip| {
        let mut outer = gue(SENDER, hop, hops, inner);
        outer.ttl = 63;
        // The neighbour's addresses are written when the redirect happens, after the program.
        received(&outer)
    };
    let deliver = |what, hop, hops: &[Ipv4Addr], inner: &Ip, instance, out: &Ip| {
        let packet = received(&gue(SENDER, hop, hops, inner));
        changed(what, "target", packet, TC_REDIRECT, delivered(instance, out), Counter::Delivered)
    };
    let pass_on = |what, hop, hops: &[Ipv4Addr], inner: &Ip, to, rest: &[Ipv4Addr]| {
        let packet = received(&gue(SENDER, hop, hops, inner));
        changed(what, "target", packet, TC_REDIRECT, forwarded(to, rest, inner), Counter::SecondHop)
    };
    let relay = |what, hops: &[Ipv4Addr], inner: &Ip, to, rest: &[Ipv4Addr]| {
        let packet = received(&gue(SENDER, MACHINE, hops, inner));
        changed(what, "target", packet, TC_REDIRECT, forwarded(to, rest, inner), Counter::Relayed)
    };
    let drop = |what, packet, counter| unchanged(what, "target", packet, TC_SHOT, Some(counter));
    let pass = |what, packet| unchanged(what, "target", packet, TC_UNSPEC, None);
    let segment = |from: u16, vip_port: u16, flags| tcp((CLIENT, from), (VIP, vip_port), flags, b"abc");
    let segment_in =
        |from: u16, vip_port, flags, to| tcp((CLIENT, from), (to, port(vip_port)), flags, b"abc");
    let datagram = |from: u16, vip_port: u16| udp((CLIENT, from), (VIP, vip_port), b"abcd");
    let datagram_in = |from: u16, vip_port, to| udp((CLIENT, from), (to, port(vip_port)), b"abcd");
    let bare = udp_without_checksum((CLIENT, 9), (VIP, 80), b"abcd");
    let bare_in = udp_without_checksum((CLIENT, 9), (HERE, port(80)), b"abcd");

    for fixture in [
        deliver(
            "a SYN is served by whom it is offered",
            HERE,
            &[THERE],
            &segment(1, 80, SYN),
            HERE,
            &segment_in(1, 80, SYN, HERE),
        ),
        deliver(
            "its flow is known from then on",
            HERE,
            &[THERE],
            &segment(1, 80, ACK),
            HERE,
            &segment_in(1, 80, ACK, HERE),
        ),
        pass_on(
            "the flow is that instance's, not its neighbour's",
            HERE_TOO,
            &[THERE],
            &segment(1, 80, ACK),
            THERE,
            &[],
        ),
        pass_on(
            "an unknown TCP flow goes to the former owner",
            HERE,
            &[THERE],
            &segment(2, 80, ACK),
            THERE,
            &[],
        ),
        deliver(
            "the last hop delivers always",
            HERE,
            &[],
            &segment(3, 80, ACK),
            HERE,
            &segment_in(3, 80, ACK, HERE),
        ),
        deliver(
            "and knows the flow then",
            HERE,
            &[THERE],
            &segment(3, 80, ACK),
            HERE,
            &segment_in(3, 80, ACK, HERE),
        ),
        deliver(
            "a RST at the last hop is delivered",
            HERE,
            &[],
            &segment(4, 80, 4),
            HERE,
            &segment_in(4, 80, 4, HERE),
        ),
        pass_on("but makes no flow known", HERE, &[THERE], &segment(4, 80, ACK), THERE, &[]),
        deliver(
            "a second hop on the same machine",
            HERE_TOO,
            &[HERE],
            &segment(1, 80, ACK),
            HERE,
            &segment_in(1, 80, ACK, HERE),
        ),
        pass_on("UDP, first of three hops: unknown", HERE, &[THERE, HERE], &datagram(5, 80), THERE, &[HERE]),
        pass_on(
            "UDP, second of three hops: unknown here too",
            HERE_TOO,
            &[THERE],
            &datagram(5, 80),
            THERE,
            &[],
        ),
        deliver("UDP, third hop: a new flow", HERE, &[], &datagram(5, 80), HERE, &datagram_in(5, 80, HERE)),
        deliver(
            "and known to the first hop then",
            HERE,
            &[THERE, HERE],
            &datagram(5, 80),
            HERE,
            &datagram_in(5, 80, HERE),
        ),
        deliver("a UDP checksum of zero stays zero", HERE, &[], &bare, HERE, &bare_in),
        deliver(
            "relayed to an instance of this machine",
            MACHINE,
            &[],
            &segment(6, 80, SYN),
            HERE,
            &segment_in(6, 80, SYN, HERE),
        ),
        relay("relayed to another machine", &[], &segment(7, 81, SYN), THERE, &[]),
        relay("relayed, with the sender's other hop kept", &[FAR], &segment(7, 81, ACK), THERE, &[FAR]),
        relay("relayed to one of two: three hops", &[], &segment(7, 83, ACK), THERE, &[HERE, THERE]),
        relay("relayed, the sender's hop after ours", &[FAR], &segment(7, 83, ACK), THERE, &[HERE, FAR]),
        relay("relayed UDP to one of two: three hops", &[], &datagram(7, 83), THERE, &[HERE, THERE]),
        relay(
            "relayed UDP, all slots in use",
            &[FAR, MACHINE],
            &datagram(7, 83),
            THERE,
            &[HERE, FAR, MACHINE],
        ),
        deliver(
            "relayed UDP, unknown to both, all on this machine",
            MACHINE,
            &[],
            &datagram(8, 84),
            HERE,
            &datagram_in(8, 84, HERE),
        ),
        pass_on(
            "an instance that is gone is passed over",
            GONE,
            &[THERE, GONE],
            &datagram(9, 80),
            THERE,
            &[GONE],
        ),
        pass_on("a port that the instance doesn't serve", HERE, &[THERE], &segment(9, 85, SYN), THERE, &[]),
        pass_on(
            "relayed without a backend here: the sender's next hop",
            MACHINE,
            &[THERE],
            &segment(9, 85, ACK),
            THERE,
            &[],
        )
        .counter(None),
        drop(
            "relayed without a backend anywhere",
            received(&gue(SENDER, MACHINE, &[], &segment(9, 85, ACK))),
            Counter::NoBackend,
        ),
        drop(
            "the last hop is gone",
            received(&gue(SENDER, GONE, &[], &segment(9, 80, ACK))),
            Counter::NoInstance,
        ),
        drop(
            "too many hops in the list",
            received(&gue_raw(SENDER, HERE, 4, 4, &[0; 16], &segment(9, 80, ACK))),
            Counter::Malformed,
        ),
        drop(
            "an index beyond the list",
            received(&gue_raw(SENDER, HERE, 4, 3, &[0; 12], &segment(9, 80, ACK))),
            Counter::Malformed,
        ),
        drop(
            "something else inside",
            received(&gue(SENDER, HERE, &[], &Ip::new(1, CLIENT, VIP, vec![0; 8]))),
            Counter::Malformed,
        ),
        drop(
            "cut in the middle",
            received(&gue(SENDER, HERE, &[], &segment(9, 80, ACK)))[..14 + 48 + 30].to_vec(),
            Counter::Malformed,
        ),
        drop(
            "passed on too often",
            {
                let mut old = gue(SENDER, HERE, &[THERE], &segment(10, 80, ACK));
                old.ttl = 1;
                received(&old)
            },
            Counter::TtlExceeded,
        ),
        pass("plain traffic to an instance", received(&segment_in(9, 80, SYN, HERE))),
        pass("plain UDP to the machine", received(&udp((CLIENT, 1), (MACHINE, 53), &[0; 60]))),
        pass(
            "GUE for somebody else, about no VIP",
            received(&gue(SENDER, OTHER, &[THERE], &tcp((CLIENT, 1), (OTHER, 80), SYN, b""))),
        ),
        pass("foreign data on our port for somebody else", received(&udp(SENDER, (OTHER, 6080), &[9; 60]))),
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
    let client = (CLIENT, 40_000);
    let inside = (HERE, CONTAINER_PORT);
    let rewritten = |what, packet: &Ip, out: &Ip| {
        changed(what, "reply", received(packet), TC_REDIRECT, received(out), Counter::Replies)
    };
    let pass = |what, packet: &Ip| unchanged(what, "reply", received(packet), TC_UNSPEC, None);
    for fixture in [
        rewritten("TCP", &tcp(inside, client, ACK, b"hello"), &tcp((VIP, 80), client, ACK, b"hello")),
        rewritten("UDP", &udp(inside, client, b"hello"), &udp((VIP, 80), client, b"hello")),
        rewritten(
            "UDP without a checksum",
            &udp_without_checksum(inside, client, b"hello"),
            &udp_without_checksum((VIP, 80), client, b"hello"),
        ),
        rewritten(
            "another served port",
            &tcp((HERE, CONTAINER_PORT + 2), client, SYN | ACK, b""),
            &tcp((VIP, 82), client, SYN | ACK, b""),
        ),
        rewritten(
            "a segment size that would not fit with the encapsulation is lowered",
            &tcp_with_segment_size(inside, client, SYN | ACK, 1460),
            &tcp_with_segment_size((VIP, 80), client, SYN | ACK, 1500 - 48 - 40),
        ),
        rewritten(
            "a segment size that fits stays",
            &tcp_with_segment_size(inside, client, SYN | ACK, 1360),
            &tcp_with_segment_size((VIP, 80), client, SYN | ACK, 1360),
        ),
        pass("a connection that the container opens", &tcp((HERE, 55_555), client, SYN, b"")),
        pass("a connection that the container opens from a serving port", &tcp(inside, client, SYN, b"")),
        pass(
            "an answer to a health check",
            &tcp(inside, (Ipv4Addr::new(169, 254, 1, 1), 40_000), SYN | ACK, b""),
        ),
        pass("a foreign source", &tcp((OTHER, CONTAINER_PORT), client, ACK, b"")),
        pass("ICMP", &Ip::new(1, HERE, CLIENT, vec![0; 8])),
    ] {
        bed.check(fixture);
    }
}
