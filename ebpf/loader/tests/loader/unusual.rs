//! Fragments, IP options, ICMP, foreign senders and floods: packet by packet, as in `ordinary.rs`.

use std::{
    io::Read as _,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyplace_ebpf::Counter;
use anyplace_ebpf_common as common;
use aya::maps::{HashMap, IterableMap as _, MapData};

use crate::bed::*;
use crate::namespaces::root_or_skip;
use crate::packets::{ACK, Ip, ROUTER_MAC, SYN, frame, gue, icmp, received, sent, tcp, udp};

/// Established flows that a flood must not touch.
const ESTABLISHED: u32 = 32_768;
/// New tuples of the flood.
const FLOOD: u32 = 655_360;
/// A router on the client's way.
const ON_THE_WAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// A UDP datagram in two parts, the first with 16 bytes.
fn in_fragments(datagram: &Ip, id: u16) -> (Ip, Ip) {
    let (mut first, mut later) = (datagram.clone(), datagram.clone());
    (first.id, later.id) = (id, id);
    (first.fragment, later.fragment) = (0x2000, 0x0002);
    later.payload = first.payload.split_off(16);
    (first, later)
}

/// What a router says about a packet that it got from a VIP.
fn error(kind: [u8; 2], about: &Ip, quoted: usize) -> Ip {
    let mut quote = about.bytes();
    quote.truncate(quoted);
    icmp(ON_THE_WAY, about.source, kind, [0, 0, 0x05, 0x14], &quote)
}

fn delivered(instance: Ipv4Addr, packet: &Ip) -> Vec<u8> {
    let [a, b, c, d] = instance.octets();
    frame([0x02, 0x61, a, b, c, d], ROUTER_MAC, &packet.bytes())
}

fn drop(what: &'static str, program: &'static str, packet: &Ip, counter: Counter) -> Fixture {
    let verdict = if program == "ingress" { XDP_DROP } else { TC_SHOT };
    unchanged(what, program, received(packet), verdict, Some(counter))
}

#[test]
fn options_and_fragments_reach_the_flows_instance() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let client = (CLIENT, 40_000);
    let whole = udp(client, (VIP, 81), &[7; 40]);
    let (first, later) = in_fragments(&whole, 9);
    let (_, stray) = in_fragments(&whole, 10);
    let mut options = tcp(client, (VIP, 81), SYN, b"");
    options.options = vec![7, 7, 4, 0, 0, 0, 0, 0];
    let flow = (client, 81, 17);
    let hops = [THERE_TOO, THERE];
    let sent_as = |packet: &Ip, flow| sent(&encapsulated_as(THERE, &hops, packet, flow));
    let through = |what, packet: &Ip, flow| {
        changed(what, "ingress", received(packet), XDP_TX, sent_as(packet, flow), Counter::Packets)
    };
    let mut part_of_icmp = icmp(CLIENT, VIP, [8, 0], [0; 4], &[0; 24]);
    part_of_icmp.fragment = 0x2000;
    let mut cut = first.clone();
    cut.payload.truncate(7);
    for fixture in [
        through("a whole datagram", &whole, flow),
        drop("a fragment before the first", "ingress", &later, Counter::FragmentUnknown),
        through("the first fragment: by its ports", &first, flow),
        through("a later one: the same way", &later, flow),
        through("and once more", &later, flow),
        drop("another packet's", "ingress", &stray, Counter::FragmentUnknown),
        drop("a first fragment without all of its ports' header", "ingress", &cut, Counter::Malformed),
        drop("a part of an ICMP message", "ingress", &part_of_icmp, Counter::Fragment),
        through("IP options", &options, (client, 81, 6)),
    ] {
        bed.check(fixture);
    }

    // At the target: (HERE, port 80) knows nobody yet.
    let whole = udp(client, (VIP, 80), &[7; 40]);
    let (first, later) = in_fragments(&whole, 19);
    let inside = udp(client, (HERE, CONTAINER_PORT), &[7; 40]);
    let (first_inside, _) = in_fragments(&inside, 19);
    let mut later_inside = later.clone();
    later_inside.destination = HERE;
    let mut options = tcp(client, (VIP, 80), SYN, b"x");
    options.options = vec![1; 40];
    let mut options_inside = tcp(client, (HERE, CONTAINER_PORT), SYN, b"x");
    options_inside.options = vec![1; 40];
    let deliver = |what, packet: &Ip, inside: &Ip| {
        let packet = received(&gue(SENDER, HERE, &[], packet));
        changed(what, "target", packet, TC_REDIRECT, delivered(HERE, inside), Counter::Delivered)
    };
    for fixture in [
        drop(
            "a fragment before the first",
            "target",
            &gue(SENDER, HERE, &[], &later),
            Counter::FragmentUnknown,
        ),
        deliver("the first fragment", &first, &first_inside),
        deliver("a later one: only its address changes", &later, &later_inside),
        deliver("IP options", &options, &options_inside),
    ] {
        bed.check(fixture);
    }

    // And back.
    let answer = udp((HERE, CONTAINER_PORT), client, &[8; 40]);
    let (first, later) = in_fragments(&answer, 77);
    let (first_out, _) = in_fragments(&udp((VIP, 80), client, &[8; 40]), 77);
    let mut later_out = later.clone();
    later_out.source = VIP;
    let back = |what, packet: &Ip, out: &Ip| {
        changed(what, "reply", received(packet), TC_REDIRECT, received(out), Counter::Replies)
    };
    for fixture in [
        unchanged("a fragment of no answer", "reply", received(&later), TC_UNSPEC, None),
        back("an answer's first fragment", &first, &first_out),
        back("its later one", &later, &later_out),
    ] {
        bed.check(fixture);
    }
}

#[test]
fn icmp_errors_reach_who_caused_them() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let client = (CLIENT, 40_000);
    let segment = tcp((VIP, 81), client, ACK, &[1; 600]);
    let datagram = udp((VIP, 81), client, b"hello");
    let mut marked = datagram.clone();
    marked.options = vec![1; 8];
    let hops = [THERE_TOO, THERE];
    let through = |what, error: &Ip, protocol| {
        let out = sent(&encapsulated_as(THERE, &hops, error, (client, 81, protocol)));
        changed(what, "ingress", received(error), XDP_TX, out, Counter::IcmpErrors)
    };
    let foreign = error([3, 1], &tcp((OTHER, 81), client, ACK, b""), 28);
    let misdirected = Ip { destination: VIP, ..foreign };
    let no_port = error([3, 1], &tcp((VIP, 22), client, ACK, b""), 28);
    for fixture in [
        through("fragmentation needed, about TCP", &error([3, 4], &segment, 28), 6),
        through("time exceeded, about UDP", &error([11, 0], &datagram, 28), 17),
        through("port unreachable, with the whole packet quoted", &error([3, 3], &datagram, 200), 17),
        through("parameter problem, about a packet with options", &error([12, 0], &marked, 36), 17),
        drop("about somebody else's packet", "ingress", &misdirected, Counter::IcmpUnmatched),
        drop("about a port that isn't served", "ingress", &no_port, Counter::IcmpUnmatched),
        drop("with too little quoted", "ingress", &error([3, 1], &segment, 27), Counter::Malformed),
    ] {
        bed.check(fixture);
    }

    // At the target, the instance finds its own address and port in it.
    let deliver = |what, from: &Ip, quoted: usize, inside: &Ip| {
        let mut expected = error([3, 4], inside, quoted);
        expected.destination = HERE;
        let packet = received(&gue(SENDER, HERE, &[], &error([3, 4], from, quoted)));
        changed(what, "target", packet, TC_REDIRECT, delivered(HERE, &expected), Counter::Delivered)
    };
    let segment = tcp((VIP, 80), client, ACK, &[1; 600]);
    let segment_inside = tcp((HERE, CONTAINER_PORT), client, ACK, &[1; 600]);
    let datagram = udp((VIP, 80), client, b"hello");
    let datagram_inside = udp((HERE, CONTAINER_PORT), client, b"hello");
    for fixture in [
        deliver("TCP, eight bytes quoted", &segment, 28, &segment_inside),
        deliver("TCP, its checksum quoted too", &segment, 100, &segment_inside),
        deliver("UDP", &datagram, 28, &datagram_inside),
    ] {
        bed.check(fixture);
    }
    // A flow that lives at the second hop: the error follows it.
    let passed = gue(SENDER, HERE, &[THERE], &error([3, 4], &segment, 28));
    let mut out = gue(SENDER, THERE, &[], &error([3, 4], &segment, 28));
    out.ttl = 63;
    bed.check(changed(
        "of an unknown flow: to the next hop",
        "target",
        received(&passed),
        TC_REDIRECT,
        received(&out),
        Counter::SecondHop,
    ));
}

#[test]
fn ingress_answers_within_a_rate() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    bed.set_icmp_interval(0);
    let request = icmp(CLIENT, VIP, [8, 0], [1, 2, 3, 4], b"data");
    let answer = icmp(VIP, CLIENT, [0, 0], [1, 2, 3, 4], b"data");
    let mut with_options = request.clone();
    with_options.options = vec![1; 4];
    let big = tcp((CLIENT, 40_000), (VIP, 80), ACK, &[7; 1500 - 48 - 40 + 1]);
    let mut told = icmp(VIP, CLIENT, [3, 4], [0, 0, 0x05, 0xac], &big.bytes()[..28]);
    told.fragment = 0;
    let mut may_be_cut = big.clone();
    may_be_cut.fragment = 0;
    let fits = Ipv4Addr::new(203, 0, 113, 99);
    for fixture in [
        changed(
            "an echo request",
            "ingress",
            received(&request),
            XDP_TX,
            sent(&answer),
            Counter::EchoReplies,
        ),
        drop("with options", "ingress", &with_options, Counter::Options),
        changed(
            "a packet too big for the uplink: its sender is told",
            "ingress",
            received(&big),
            XDP_TX,
            sent(&told),
            Counter::TooBigSent,
        ),
        drop("one that may be fragmented", "ingress", &may_be_cut, Counter::TooBig),
        unchanged(
            "an echo request to no VIP",
            "ingress",
            received(&icmp(CLIENT, fits, [8, 0], [0; 4], b"")),
            XDP_PASS,
            None,
        ),
    ] {
        bed.check(fixture);
    }

    // One in four seconds on each CPU, after a burst; this thread may be moved, but there are not this many CPUs.
    bed.set_icmp_interval(u32::MAX);
    let cpus = u64::try_from(aya::util::nr_cpus().unwrap()).unwrap();
    let rounds = (cpus + 1) * u64::from(common::ICMP_BURST) + 100;
    for packet in [&request, &big] {
        let before = bed.count(Counter::IcmpLimited);
        let frame = received(packet);
        bed.namespace.enter(|| {
            for _ in 0..rounds {
                test_run(&bed.plane, "ingress", &frame).unwrap();
            }
        });
        let limited = bed.count(Counter::IcmpLimited) - before;
        assert!((100..rounds).contains(&limited), "{limited} of {rounds} were held back");
    }
}

#[test]
fn only_the_fleet_may_encapsulate() {
    if !root_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let syn = |from| tcp((CLIENT, from), (VIP, 80), SYN, b"");
    let from = |source: Ipv4Addr, hop, port| gue((source, 50_000), hop, &[THERE], &syn(port));
    let taken = |what, source, port| {
        let inside = tcp((CLIENT, port), (HERE, CONTAINER_PORT), SYN, b"");
        let packet = received(&from(source, HERE, port));
        changed(what, "target", packet, TC_REDIRECT, delivered(HERE, &inside), Counter::Delivered)
    };
    bed.check(taken("from anywhere, as long as nothing is set", OTHER, 1));
    bed.plane.set_fleet(&[(Ipv4Addr::new(10, 1, 77, 7), 16), (FAR, 32)]).unwrap();
    for fixture in [
        taken("from a machine of the fleet", SENDER.0, 2),
        taken("from a single address of the fleet", FAR, 3),
        taken("from this machine itself", MACHINE, 4),
        drop("from elsewhere", "target", &from(OTHER, HERE, 5), Counter::ForeignSource),
        drop("for an instance that is gone", "target", &from(OTHER, GONE, 5), Counter::ForeignSource),
        unchanged(
            "not for us",
            "target",
            received(&gue(SENDER, OTHER, &[], &Ip::new(1, OTHER, OTHER, vec![0; 8]))),
            TC_UNSPEC,
            None,
        ),
    ] {
        bed.check(fixture);
    }
    bed.plane.set_fleet(&[(FAR, 32)]).unwrap();
    bed.check(drop("no longer of the fleet", "target", &from(SENDER.0, HERE, 6), Counter::ForeignSource));
    bed.plane.set_fleet(&[]).unwrap();
    bed.check(taken("from anywhere again", OTHER, 7));
}

/// Established flows outlive a flood of SYNs, and of datagrams.
#[test]
fn a_flood_of_new_tuples_forgets_no_established_flow() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let end = |number: u32| {
        let address = Ipv4Addr::from(0x2000_0000 + number / 60_000);
        (address, (1024 + number % 60_000) as u16)
    };
    let mut syn = received(&gue(SENDER, HERE, &[], &tcp((CLIENT, 1), (VIP, 80), SYN, b"")));
    let mut datagram = received(&gue(SENDER, HERE, &[], &udp((CLIENT, 1), (VIP, 80), b"")));
    // The fields of the flow; checksums don't matter to whom it belongs.
    let send = |frame: &mut Vec<u8>, number: u32, flags: Option<u8>| {
        let (address, port) = end(number);
        frame[62 + 12..62 + 16].copy_from_slice(&address.octets());
        frame[62 + 20..62 + 22].copy_from_slice(&port.to_be_bytes());
        if let Some(flags) = flags {
            frame[62 + 20 + 13] = flags;
        }
        assert_eq!(test_run(&bed.plane, "target", frame).unwrap().0, TC_REDIRECT);
    };
    let flows: HashMap<MapData, [u8; 16], [u8; 4]> = bed.map("FLOWS").try_into().unwrap();
    let established = || {
        let keys: Vec<[u8; 16]> = flows.keys().collect::<Result<_, _>>().unwrap();
        let first = |key: &&[u8; 16]| {
            let address = u32::from_be_bytes([key[0], key[1], key[2], key[3]]) - 0x2000_0000;
            let port = u32::from(u16::from_be_bytes([key[8], key[9]]));
            address * 60_000 + port - 1024 < ESTABLISHED
        };
        (keys.iter().filter(first).count(), keys.len())
    };
    bed.namespace.enter(|| {
        for number in 0..ESTABLISHED {
            send(&mut syn, number, Some(SYN));
            send(&mut syn, number, Some(ACK));
        }
        assert_eq!(established().0 as u32, ESTABLISHED);
        for number in ESTABLISHED..ESTABLISHED + FLOOD {
            send(&mut syn, number, Some(SYN));
        }
        assert_eq!(established(), (ESTABLISHED as usize, ESTABLISHED as usize), "after SYNs");
        for number in ESTABLISHED..ESTABLISHED + FLOOD / 4 {
            send(&mut datagram, number, None);
        }
        assert_eq!(established(), (ESTABLISHED as usize, ESTABLISHED as usize), "after datagrams");
    });
    assert_eq!(bed.count(Counter::NewFlows), u64::from(ESTABLISHED));

    let map = flows.map().fd().as_fd().as_raw_fd();
    let mut text = String::new();
    std::fs::File::open(format!("/proc/self/fdinfo/{map}")).unwrap().read_to_string(&mut text).unwrap();
    let memory: u64 =
        text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok()).unwrap();
    let each = memory.div_ceil(u64::from(common::MAX_FLOWS));
    eprintln!("{each} bytes of kernel memory for each flow");
    assert!(each <= 96, "{each} bytes for each flow");
}
