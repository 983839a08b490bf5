//! Events of flows: of which packets, how many of them, and what is lost.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    time::{Duration, SystemTime},
};

use anyplace_ebpf::{FlowEvents, Outcome, Protocol};
use anyplace_ebpf_common as common;

use crate::bed::*;
use crate::namespaces::root_or_skip;
use crate::packets::{ACK, SYN, gue, received, tcp, udp};
use crate::packets6::{gue6, received6, tcp6, udp6};

const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x198, 0, 0, 0, 0, 9);

/// What an event says, its time left out.
type Told = (Outcome, IpAddr, u16, IpAddr, u16, Protocol, Option<Ipv4Addr>);

fn told(events: &mut FlowEvents) -> Vec<Told> {
    let now = SystemTime::now();
    events
        .map(|event| {
            let age = now.duration_since(event.time).unwrap_or_default();
            assert!(age < Duration::from_secs(60), "an event of {age:?} ago");
            let (client, vip) = (event.client, event.vip);
            let (ip, port) = (client.ip(), client.port());
            (event.outcome, ip, port, vip.address, vip.port, vip.protocol, event.instance)
        })
        .collect()
}

#[test]
fn flows_that_are_established_and_packets_that_are_refused_are_told() {
    if !root_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let mut events = bed.flow_events();
    let segment = |port, vip_port, flags| tcp((CLIENT, port), (VIP, vip_port), flags, b"");
    let datagram = |port, vip_port| udp((CLIENT, port), (VIP, vip_port), b"");
    let segment6 = |port, vip_port, flags| tcp6((CLIENT6, port), (VIP6, vip_port), flags, b"");
    let datagram6 = |port, vip_port| udp6((CLIENT6, port), (VIP6, vip_port), b"");
    let send = |bed: &Bed| {
        for packet in [
            gue(SENDER, HERE, &[], &segment(1, 80, SYN)),
            gue(SENDER, HERE, &[], &segment(1, 80, ACK)),
            gue(SENDER, HERE, &[], &segment(1, 80, ACK)),
            // Once is not enough.
            gue(SENDER, HERE, &[], &datagram(2, 81)),
            gue(SENDER, HERE_TOO, &[], &datagram(3, 81)),
            gue(SENDER, HERE_TOO, &[], &datagram(3, 81)),
            gue(SENDER, MACHINE, &[], &segment(4, 85, SYN)),
            gue(SENDER, GONE, &[], &datagram(5, 80)),
            gue(SENDER, HERE, &[], &segment(6, 85, SYN)),
        ] {
            bed.run("target", &received(&packet));
        }
        for packet in [
            gue6(SENDER, HERE, &[], &segment6(1, 80, SYN)),
            gue6(SENDER, HERE, &[], &segment6(1, 80, ACK)),
            gue6(SENDER, GONE, &[], &datagram6(5, 80)),
        ] {
            bed.run("target6", &received(&packet));
        }
        for packet in [
            received(&segment(7, 85, SYN)),
            received(&datagram(8, 85)),
            // To another machine, to a port that is none of the VIP's: not refused by us, or no flow.
            received(&segment(9, 80, SYN)),
            received(&segment(9, 22, SYN)),
            received6(&segment6(7, 85, ACK)),
            received6(&datagram6(8, 85)),
        ] {
            bed.run("ingress", &packet);
        }
    };
    send(&bed);
    assert_eq!(told(&mut events), [], "none unless asked");

    bed.plane.set_flow_events(NonZeroU32::new(1)).unwrap();
    for map in ["FLOWS", "EMBRYONIC"] {
        forget::<16>(&bed, map);
        forget::<40>(&bed, &format!("{map}6"));
    }
    send(&bed);
    let four = |outcome, port, vip_port, protocol, instance| {
        (outcome, CLIENT.into(), port, VIP.into(), vip_port, protocol, instance)
    };
    let six = |outcome, port, vip_port, protocol, instance| {
        (outcome, CLIENT6.into(), port, VIP6.into(), vip_port, protocol, instance)
    };
    use Outcome::{Established, NoBackend, NoInstance};
    use Protocol::{Tcp, Udp};
    let expected: [Told; 12] = [
        four(Established, 1, 80, Tcp, Some(HERE)),
        four(Established, 3, 81, Udp, Some(HERE_TOO)),
        four(NoBackend, 4, 85, Tcp, None),
        four(NoInstance, 5, 80, Udp, None),
        four(NoInstance, 6, 85, Tcp, None),
        six(Established, 1, 80, Tcp, Some(HERE)),
        six(NoInstance, 5, 80, Udp, None),
        four(NoBackend, 7, 85, Tcp, None),
        four(NoBackend, 8, 85, Udp, None),
        six(NoBackend, 7, 85, Tcp, None),
        six(NoBackend, 8, 85, Udp, None),
        // Told while nobody read, and there for the next reader.
        four(NoBackend, 9, 85, Udp, None),
    ];
    assert_eq!(told(&mut events), expected[..11]);
    bed.run("ingress", &received(&datagram(9, 85)));
    drop(events);
    assert_eq!(told(&mut bed.flow_events()), expected[11..]);

    // The next router is asked anew.
    let bed = bed.restart();
    send(&bed);
    assert_eq!(told(&mut bed.flow_events()), [], "none any more");
    assert_eq!(bed.meters().lost_flow_events().unwrap(), 0);
}

fn forget<const KEY: usize>(bed: &Bed, map: &str)
where
    [u8; KEY]: aya::Pod,
{
    let mut flows: aya::maps::HashMap<_, [u8; KEY], [u8; 4]> = bed.map(map).try_into().unwrap();
    let keys: Vec<[u8; KEY]> = flows.keys().collect::<Result<_, _>>().unwrap();
    for key in keys {
        flows.remove(&key).unwrap();
    }
}

#[test]
fn about_one_in_so_many_is_told() {
    if !root_or_skip() {
        return;
    }
    const PACKETS: u32 = 20_000;
    let mut bed = Bed::new();
    let mut events = bed.flow_events();
    bed.plane.set_flow_events(NonZeroU32::new(10)).unwrap();
    let frame = received(&udp((CLIENT, 1), (VIP, 85), b""));
    for _ in 0..PACKETS {
        test_run(&bed.plane, "ingress", &frame).unwrap();
    }
    let count = told(&mut events).len();
    // 2,000 with a standard deviation of 42; eight of those each way.
    assert!((1_661..2_340).contains(&count), "{count} of {PACKETS}");
    assert_eq!(bed.meters().lost_flow_events().unwrap(), 0);
}

#[test]
fn what_finds_no_room_is_lost_and_counted() {
    if !root_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    bed.plane.set_flow_events(NonZeroU32::new(1)).unwrap();
    // Each takes its bytes and a header of 8. One place may stay empty.
    let room = common::FLOW_EVENTS_BYTES as usize / (size_of::<common::FlowEvent>() + 8);
    let frame = received(&udp((CLIENT, 1), (VIP, 85), b""));
    for _ in 0..room + 500 {
        assert_eq!(test_run(&bed.plane, "ingress", &frame).unwrap().0, XDP_DROP);
    }
    let lost = bed.meters().lost_flow_events().unwrap() as usize;
    assert!((500..=501).contains(&lost), "{lost}");
    let mut events = bed.flow_events();
    assert_eq!(told(&mut events).len(), room + 500 - lost);
    test_run(&bed.plane, "ingress", &frame).unwrap();
    assert_eq!(told(&mut events).len(), 1, "and there is room again");
    assert_eq!(bed.meters().lost_flow_events().unwrap() as usize, lost);
}
