//! The cost of one packet: BPF_PROG_TEST_RUN around a wrapper that undoes the change, less the wrapper's own cost.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
};

use anyhow::{Context as _, Result, ensure};
use anyplace_ebpf::{Bucket, Capacity, Counter, DataPlane, Instance, Port, Protocol, VipKey, VipTable};

use crate::{
    Bed,
    bpf::{self, Kind},
    ip, median, report,
    wrapper::{self, ENCAPSULATION, MACS, Mix, Wrapper},
};

/// Packets of one run, and runs of which the median counts.
const PACKETS: u32 = 1_000_000;
const RUNS: usize = 5;
const VIPS: u32 = 65_000;
const ONE_VIP: u32 = 0xcb00_7101;
/// The last four bytes of the IPv6 VIP are those of the other: the wrapper writes them.
const ONE_VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0xcb00, 0x7101);
const FIRST_VIP: u32 = 0x0b00_0000;
const INSTANCE: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 65);
const XDP_TX: u32 = 3;
const TC_ACT_REDIRECT: u32 = 7;
const TC_ACT_UNSPEC: u32 = u32::MAX;
const TCP: u8 = 6;
const UDP: u8 = 17;

pub(crate) fn measure(bed: &Bed) -> Result<()> {
    let mut plane = bed.plane("forward", Capacity::for_vips(VIPS + 1_000))?;
    tables(&mut plane)?;
    let one = |flows| Mix { flows, vips: 1, base: ONE_VIP };
    let empty = ingress_run(wrapper::trivial(Kind::Xdp, XDP_TX as i32)?.as_raw_fd(), one(1), TCP, 0, 4)?;
    report("wrapper_ns", empty);
    let program = program(&plane, "ingress")?;
    let kept = |plane: &DataPlane| -> Result<(u64, u64)> {
        let bytes = plane.memory()?.iter().map(|it| it.bytes).sum();
        Ok((bytes, plane.counters()?.get(Counter::NewFlows)))
    };
    let (bytes, known) = kept(&plane)?;
    for flows in [1, 4_096, 65_536, 262_144] {
        let before = plane.counters()?.get(Counter::Packets);
        let cost = ingress_run(program, one(flows), TCP, ENCAPSULATION, 4)?;
        let sent = plane.counters()?.get(Counter::Packets) - before;
        ensure!(sent == u64::from(PACKETS) * RUNS as u64, "{sent} packets were sent on");
        report(&format!("forward_tcp_{flows}"), cost - empty);
    }
    // Tables that were allocated beforehand would not grow, so no flow may have been recorded in one either.
    let (bytes_after, known_after) = kept(&plane)?;
    ensure!(known_after == known, "ingress recorded {} flows", known_after - known);
    report("ingress_flow_bytes", bytes_after.saturating_sub(bytes) as f64 / 262_144.0);
    let many = Mix { flows: 65_536, vips: VIPS, base: FIRST_VIP };
    let cost = ingress_run(program, many, TCP, ENCAPSULATION, 4)?;
    report("forward_vips", cost - empty);
    let cost = ingress_run(program, one(65_536), UDP, ENCAPSULATION, 4)?;
    report("forward_udp", cost - empty);
    for flows in [4_096, 65_536] {
        let before = plane.counters()?.get(Counter::Packets);
        let cost = ingress_run(program, one(flows), TCP, ENCAPSULATION, 6)?;
        let sent = plane.counters()?.get(Counter::Packets) - before;
        ensure!(sent == u64::from(PACKETS) * RUNS as u64, "{sent} IPv6 packets were sent on");
        report(&format!("forward_v6_{flows}"), cost - empty);
    }

    let deliver = self::program(&plane, "target")?;
    for (name, protocol) in [("target_tcp", TCP), ("target_udp", UDP)] {
        let returns = wrapper::trivial(Kind::Classifier, TC_ACT_REDIRECT as i32)?;
        let empty = target_run(returns.as_raw_fd(), protocol, 0, 4, TC_ACT_REDIRECT)?;
        let before = plane.counters()?.get(Counter::Delivered);
        let cost = target_run(deliver, protocol, ENCAPSULATION, 4, TC_ACT_REDIRECT)?;
        let delivered = plane.counters()?.get(Counter::Delivered) - before;
        ensure!(delivered == u64::from(PACKETS) * RUNS as u64, "{delivered} packets were delivered");
        report(&format!("{name}_wrapper_ns"), empty);
        report(name, cost - empty);
    }
    target6(&plane)?;
    plane.unload()?;
    Ok(())
}

/// IPv6 inside: `target` leaves it to `target6`, the program behind it, and both cost.
fn target6(plane: &DataPlane) -> Result<()> {
    let (leave, deliver) = (program(plane, "target")?, program(plane, "target6")?);
    for (name, protocol) in [("target_v6_tcp", TCP), ("target_v6_udp", UDP)] {
        let run = |program, grow, verdict| target_run(program, protocol, grow, 6, verdict);
        let returns = wrapper::trivial(Kind::Classifier, TC_ACT_REDIRECT as i32)?;
        let empty = run(returns.as_raw_fd(), 0, TC_ACT_REDIRECT)?;
        let changes = wrapper::changing(TC_ACT_REDIRECT as i32)?;
        // There and back; the wrapper goes back only.
        let back = (run(changes.as_raw_fd(), 0, TC_ACT_REDIRECT)? - empty) / 2.0;
        let left = run(leave, 0, TC_ACT_UNSPEC)? - empty;
        let before = plane.counters()?.get(Counter::Delivered);
        let cost = run(deliver, ENCAPSULATION + wrapper::GROWTH, TC_ACT_REDIRECT)?;
        let delivered = plane.counters()?.get(Counter::Delivered) - before;
        ensure!(delivered == u64::from(PACKETS) * RUNS as u64, "{delivered} IPv6 packets were delivered");
        report(&format!("{name}_wrapper_ns"), empty + back);
        report(&format!("{name}_left"), left);
        report(name, left + cost - empty - back);
    }
    Ok(())
}

/// One VIP of each family with 256 buckets, 65,000 with 64 buckets of their own each, and an instance that serves the first.
fn tables(plane: &mut DataPlane) -> Result<()> {
    ip("link add apv0a010141 type veth peer name inner")?;
    let keys = |vip: u32| {
        [Protocol::Tcp, Protocol::Udp].map(|protocol| VipKey {
            address: Ipv4Addr::from(vip).into(),
            port: 80,
            protocol,
        })
    };
    let table = |seed: u32, len: u32| {
        let hop = |slot| Ipv4Addr::from(0x0a02_0000 + seed.wrapping_mul(31) % 60_000 + slot % 16);
        let buckets: Vec<Bucket> = (0..len).map(|slot| Bucket::steady(hop(slot))).collect();
        VipTable { local: buckets.clone(), buckets }
    };
    let first = table(1, 256);
    let many: Vec<VipTable> = (0..VIPS).map(|vip| table(vip, 64)).collect();
    let keys6 = keys(ONE_VIP).map(|key| VipKey { address: ONE_VIP6.into(), ..key });
    let one = keys(ONE_VIP).into_iter().chain(keys6).map(|key| (key, &first));
    let tcp = many.iter().enumerate().map(|(vip, table)| (keys(FIRST_VIP + vip as u32)[0], table));
    let failed = plane.set_vips(one.chain(tcp));
    ensure!(failed.is_empty(), "{} tables failed, first {:?}", failed.len(), failed.first());
    let served = keys(ONE_VIP).into_iter().chain(keys6);
    let ports = served.map(|vip| Port { vip, container_port: 8080 }).collect();
    plane.set_instance(&Instance { address: INSTANCE, host_interface: "apv0a010141".into(), ports })?;
    Ok(())
}

fn vip(version: u8) -> IpAddr {
    if version == 4 { Ipv4Addr::from(ONE_VIP).into() } else { ONE_VIP6.into() }
}

fn program(plane: &DataPlane, name: &str) -> Result<RawFd> {
    let program = plane.object().program(name).with_context(|| format!("no program {name}"))?;
    Ok(program.fd()?.as_fd().as_raw_fd())
}

/// `version`: of IP.
fn ingress_run(program: RawFd, mix: Mix, protocol: u8, strip: i32, version: u8) -> Result<f64> {
    let mut frame = frame(&client_packet(protocol, vip(version)));
    if strip > 0 {
        // As if the first packet had been wrapped already: the wrapper strips before it runs the program.
        frame.splice(0..0, vec![0; strip as usize]);
    }
    run(&wrapper::around_ingress(program, mix, strip, version)?, &frame, XDP_TX)
}

fn target_run(program: RawFd, protocol: u8, grow: i32, version: u8, verdict: u32) -> Result<f64> {
    let inner = client_packet(protocol, vip(version));
    let mut outer = vec![0x04, if version == 4 { 4 } else { 41 }, 0, 0, 0, 0, 3, 3];
    outer.extend([0; 12]);
    outer.extend(&inner);
    let mut datagram: Vec<u8> = [50_000u16, 6080, outer.len() as u16 + 8, 0].map(u16::to_be_bytes).concat();
    datagram.extend(outer);
    let wrapped = frame(&packet(UDP, Ipv4Addr::new(10, 1, 9, 1), INSTANCE, &datagram));
    let mix = Mix { flows: 1, vips: 1, base: ONE_VIP };
    let start = if grow > 0 { frame(&inner) } else { wrapped.clone() };
    run(&wrapper::around_target(program, mix, grow, &wrapped, version)?, &start, verdict)
}

/// Nanoseconds of one packet.
fn run(wrapper: &Wrapper, frame: &[u8], verdict: u32) -> Result<f64> {
    let mut costs = Vec::new();
    for _ in 0..RUNS {
        let (returned, _, cost) =
            bpf::test_run(&wrapper.program, frame, PACKETS).context("BPF_PROG_TEST_RUN")?;
        ensure!(returned == verdict, "the program returned {returned}, expected {verdict}");
        costs.push(f64::from(cost));
    }
    Ok(median(costs))
}

/// An acknowledgement in mid-connection, or a datagram; 64 bytes of payload.
fn client_packet(protocol: u8, vip: IpAddr) -> Vec<u8> {
    let mut segment: Vec<u8> = [1_024u16, 80].map(u16::to_be_bytes).concat();
    if protocol == TCP {
        segment.extend([1, 2, 3, 4, 5, 6, 7, 8, 0x50, 0x10, 0x20, 0, 0x12, 0x34, 0, 0]);
    } else {
        segment.extend([0, 72, 0x12, 0x34]);
    }
    segment.extend([7; 64]);
    match vip {
        IpAddr::V4(vip) => packet(protocol, Ipv4Addr::new(198, 51, 100, 9), vip, &segment),
        IpAddr::V6(vip) => packet6(protocol, Ipv6Addr::new(0x2001, 0xdb8, 0xc, 1, 0, 0, 0, 9), vip, &segment),
    }
}

fn packet6(protocol: u8, source: Ipv6Addr, destination: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let [high, low] = (payload.len() as u16).to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, high, low, protocol, 64];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

fn packet(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let [high, low] = (20 + payload.len() as u16).to_be_bytes();
    let mut packet = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn frame(packet: &[u8]) -> Vec<u8> {
    let ethertype = if packet.first().is_some_and(|byte| byte >> 4 == 6) { [0x86, 0xdd] } else { [8, 0] };
    [&MACS[..], &ethertype, packet].concat()
}
