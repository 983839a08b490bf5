//! Counters by VIP port and instance: what they count, and how long.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use anyplace_ebpf::{Counter, Instance, Port, Protocol, VipKey};
use anyplace_ebpf_common as common;

use crate::bed::*;
use crate::namespaces::root_or_skip;
use crate::packets::{ACK, SYN, gue, icmp, received, tcp, udp};
use crate::packets6::{gue6, tcp6};

const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x198, 0, 0, 0, 0, 9);

/// Packets, bytes, new flows of all that got a packet.
type Counted = BTreeMap<(VipKey, Ipv4Addr), (u64, u64, u64)>;

fn counted(bed: &Bed) -> Counted {
    let all = bed.meters().instances().unwrap().into_iter();
    all.map(|(key, it)| (key, (it.packets, it.bytes, it.new_flows))).filter(|(_, it)| it.0 > 0).collect()
}

fn key6(port: u16, protocol: Protocol) -> VipKey {
    VipKey { address: VIP6.into(), port, protocol }
}

/// Some packets to both instances, of lengths that the test knows; the counters that they make.
fn send(bed: &Bed) -> Counted {
    let (client, vip) = ((CLIENT, 4000), (VIP, 80));
    let mut lost = tcp(vip, client, ACK, b"").bytes();
    lost.truncate(28);
    for (packet, verdict) in [
        // 40 and 43 bytes: a connection.
        (gue(SENDER, HERE, &[], &tcp(client, vip, SYN, b"")), TC_REDIRECT),
        (gue(SENDER, HERE, &[], &tcp(client, vip, ACK, b"abc")), TC_REDIRECT),
        // 32 bytes each; the first might be the only one.
        (gue(SENDER, HERE, &[], &udp(client, vip, b"abcd")), TC_REDIRECT),
        (gue(SENDER, HERE, &[], &udp(client, vip, b"abcd")), TC_REDIRECT),
        // An error about the connection, of 56 bytes, is the instance's too.
        (gue(SENDER, HERE, &[], &icmp(OTHER, VIP, [11, 0], [0; 4], &lost)), TC_REDIRECT),
        // One flow at the other instance, another VIP port.
        (gue(SENDER, HERE_TOO, &[], &tcp(client, (VIP, 81), SYN, b"")), TC_REDIRECT),
        // Passed on, and dropped.
        (gue(SENDER, HERE, &[THERE], &tcp((CLIENT, 5000), vip, ACK, b"")), TC_REDIRECT),
        (gue(SENDER, GONE, &[], &tcp((CLIENT, 5000), vip, ACK, b"")), TC_SHOT),
    ] {
        assert_eq!(bed.run("target", &received(&packet)).0, verdict);
    }
    let (client, vip) = ((CLIENT6, 4000), (VIP6, 80));
    for packet in [tcp6(client, vip, SYN, b""), tcp6(client, vip, ACK, b"abc")] {
        let packet = gue6(SENDER, HERE, &[], &packet);
        assert_eq!(bed.run("target6", &received(&packet)).0, TC_REDIRECT);
    }
    BTreeMap::from([
        ((key(80, Protocol::Tcp), HERE), (3, 40 + 43 + 56, 1)),
        ((key(80, Protocol::Udp), HERE), (2, 32 + 32, 1)),
        ((key(81, Protocol::Tcp), HERE_TOO), (1, 40, 0)),
        ((key6(80, Protocol::Tcp), HERE), (2, 60 + 63, 1)),
    ])
}

#[test]
fn packets_are_counted_where_they_are_delivered() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    assert_eq!(counted(&bed), BTreeMap::new());
    assert_eq!(send(&bed), counted(&bed));
    let all: u64 = counted(&bed).values().map(|it| it.0).sum();
    assert_eq!(bed.count(Counter::Delivered), all);
    let new_flows: u64 = counted(&bed).values().map(|it| it.2).sum();
    assert_eq!(bed.count(Counter::NewFlows), new_flows);
}

#[test]
fn counters_live_as_long_as_the_port_at_the_instance() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let mut expected = send(&bed);
    // The next router goes on with them.
    let mut bed = bed.restart();
    assert_eq!(counted(&bed), expected);
    let instances = bed.plane.instances().unwrap();
    let [here, here_too]: [Instance; 2] = instances.try_into().unwrap();
    bed.set_instance(&here);
    assert_eq!(counted(&bed), expected);

    // A port that isn't served any more has none; when it comes back, it begins at zero, and others don't notice.
    let without = |instance: &Instance, gone: &[VipKey]| {
        let ports = instance.ports.iter().filter(|port| !gone.contains(&port.vip)).copied().collect();
        Instance { ports, ..instance.clone() }
    };
    let gone = [key(80, Protocol::Tcp), key6(80, Protocol::Tcp)];
    bed.set_instance(&without(&here, &gone));
    for gone in gone {
        expected.remove(&(gone, HERE)).unwrap();
    }
    assert_eq!(counted(&bed), expected);
    bed.set_instance(&here);
    assert_eq!(counted(&bed), expected);

    // And so with an instance.
    bed.namespace.enter(|| bed.plane.remove_instance(HERE_TOO).unwrap());
    expected.remove(&(key(81, Protocol::Tcp), HERE_TOO)).unwrap();
    assert!(!bed.meters().instances().unwrap().keys().any(|(_, instance)| *instance == HERE_TOO));
    let mut bed = bed.restart();
    bed.set_instance(&here_too);
    assert_eq!(counted(&bed), expected);
}

#[test]
fn packets_for_an_instance_stay_on_its_machine_as_long_as_it_is_there() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let local = received(&tcp((CLIENT, 4000), (VIP, 82), SYN, b""));
    assert_eq!(bed.run("ingress", &local).0, XDP_PASS);
    // A router that knew no filter leaves none.
    std::fs::remove_file(bed.maps_folder().join("INSTANCE_FILTER")).unwrap();
    let mut bed = bed.restart();
    assert_eq!(bed.run("ingress", &local).0, XDP_PASS);

    let instances = bed.plane.instances().unwrap();
    let here = instances.into_iter().find(|instance| instance.address == HERE).unwrap();
    bed.namespace.enter(|| bed.plane.remove_instance(HERE).unwrap());
    assert_eq!(bed.run("ingress", &local).0, XDP_TX);
    bed.set_instance(&here);
    assert_eq!(bed.run("ingress", &local).0, XDP_PASS);
}

#[test]
fn ports_beyond_the_counters_work_without() {
    if !root_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    for instance in [HERE, HERE_TOO] {
        bed.namespace.enter(|| bed.plane.remove_instance(instance).unwrap());
    }
    let port = |number: u32| {
        let protocol = if number.is_multiple_of(2) { Protocol::Tcp } else { Protocol::Udp };
        let number = 1 + (number / 2) as u16;
        Port { vip: key(number, protocol), container_port: number }
    };
    let ports = (0..common::MAX_INSTANCE_COUNTERS).map(port).collect();
    let mut instance = Instance { address: HERE, host_interface: "apv0a010141".into(), ports };
    bed.set_instance(&instance);
    let counters = bed.meters().instances().unwrap();
    assert_eq!(counters.len() as u32, common::MAX_INSTANCE_COUNTERS - 1, "the first slot is nobody's own");
    for Port { vip, .. } in &instance.ports {
        let (from, to) = ((CLIENT, 4000), (VIP, vip.port));
        let packet = match vip.protocol {
            Protocol::Tcp => tcp(from, to, SYN, b""),
            Protocol::Udp => udp(from, to, b""),
        };
        if !counters.contains_key(&(*vip, HERE)) {
            assert_eq!(bed.run("target", &received(&gue(SENDER, HERE, &[], &packet))).0, TC_REDIRECT);
        }
    }
    assert_eq!(bed.count(Counter::Delivered), 1);
    assert_eq!(counted(&bed), BTreeMap::new());

    // Once there is room, it has one too, from the next change on.
    let first = instance.ports.remove(0);
    bed.set_instance(&instance);
    bed.set_instance(&instance);
    let counters = bed.meters().instances().unwrap();
    assert!(instance.ports.iter().all(|port| counters.contains_key(&(port.vip, HERE))));
    assert!(!counters.contains_key(&(first.vip, HERE)));
}
