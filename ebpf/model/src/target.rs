//! Encapsulated packets.

use std::net::Ipv4Addr;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, GUE_PORT};

use crate::{
    Flow, Machine, Verdict, bucket,
    bytes::{
        ETHERNET, Ip, address, byte, continues, opens, put, replace_checksum, replace_udp_checksum,
        tcp_flags, word,
    },
};

/// Where the client's packet stands.
const INNER: usize = ETHERNET + ENCAPSULATION_BYTES;

/// The client's packet.
struct Inner {
    flow: Flow,
    transport: usize,
    opens: bool,
    continues: bool,
}

impl Machine {
    pub(crate) fn target(&mut self, frame: &mut Vec<u8>) -> Result<Verdict, Counter> {
        let gue = word(frame, 12) == Some(0x0800) && frame.len() >= INNER;
        let Some(outer) = Ip::read(frame, ETHERNET).filter(|_| gue) else { return Ok(Verdict::Pass) };
        let plain = outer.version == 4 && outer.header == 20 && !outer.is_fragment();
        if !plain || outer.protocol != 17 || word(frame, 36) != Some(GUE_PORT) {
            return Ok(Verdict::Pass);
        }
        let here = outer.destination;
        let ours = here == self.address || self.instances.contains_key(&here);
        let well_formed = frame[42..48] == [4, 4, 0, 0, 0, 0] && frame[48] <= 3 && frame[49] == 3;
        let Some(inner) = inner(frame, &outer).filter(|_| well_formed) else {
            return if ours { Err(Counter::Malformed) } else { Ok(Verdict::Pass) };
        };
        let list = (0..3).filter_map(|slot| address(frame, 50 + 4 * slot));
        // The hops that are left, next one first.
        let mut hops: Vec<Ipv4Addr> = list.skip(usize::from(frame[48])).collect();
        let mut hop = here;
        if !ours {
            if !self.is_vip(inner.flow.1) {
                return Ok(Verdict::Pass);
            }
            hop = self.next_hop(&mut hops)?;
        }
        for _ in 0..5 {
            if hop == self.address {
                hop = self.relay(&inner, &mut hops)?;
                continue;
            }
            let Some(mac) = self.instances.get(&hop).copied() else {
                if hop == here {
                    return Err(Counter::NoInstance);
                }
                return forward(frame, &outer, hop, &hops);
            };
            let (_, vip, _, vip_port, protocol) = inner.flow;
            if let Some(port) = self.ports.get(&(hop, (vip, vip_port, protocol))).copied() {
                let owned = self.flows.get(&inner.flow) == Some(&hop);
                if owned || inner.opens || hops.is_empty() {
                    if !owned && (inner.opens || inner.continues) {
                        self.flows.insert(inner.flow, hop);
                        self.count(Counter::NewFlows);
                    }
                    self.count(Counter::Delivered);
                    deliver(frame, &inner, hop, port, mac);
                    return Ok(Verdict::Redirect);
                }
            }
            hop = self.next_hop(&mut hops)?;
        }
        Err(Counter::TtlExceeded)
    }

    fn next_hop(&mut self, hops: &mut Vec<Ipv4Addr>) -> Result<Ipv4Addr, Counter> {
        if hops.is_empty() {
            return Err(Counter::NoInstance);
        }
        self.count(Counter::SecondHop);
        Ok(hops.remove(0))
    }

    fn relay(&mut self, inner: &Inner, hops: &mut Vec<Ipv4Addr>) -> Result<Ipv4Addr, Counter> {
        let (_, vip, _, vip_port, protocol) = inner.flow;
        let tables = self.vips.get(&(vip, vip_port, protocol));
        let Some((now, before)) = tables.and_then(|tables| bucket(&tables.local, &inner.flow)) else {
            return if hops.is_empty() { Err(Counter::NoBackend) } else { Ok(hops.remove(0)) };
        };
        self.count(Counter::Relayed);
        if before != now && !before.is_unspecified() {
            if hops.is_empty() {
                hops.push(now);
            }
            hops.insert(0, before);
            hops.truncate(3);
        }
        Ok(now)
    }
}

fn inner(frame: &[u8], outer: &Ip) -> Option<Inner> {
    let ip = Ip::read(frame, INNER)?;
    if ip.version != 4 || ip.header != 20 || !ip.has_ports() || ip.is_fragment() {
        return None;
    }
    let least = if ip.protocol == 6 { 20 } else { 8 };
    if ip.total < ip.header + least
        || ip.total + ENCAPSULATION_BYTES != outer.total
        || INNER + ip.total > frame.len()
    {
        return None;
    }
    let transport = INNER + ip.header;
    let flags = tcp_flags(frame, transport).filter(|_| ip.protocol == 6);
    Some(Inner {
        flow: (ip.source, ip.destination, word(frame, transport)?, word(frame, transport + 2)?, ip.protocol),
        transport,
        opens: flags.is_some_and(opens),
        continues: flags.is_none_or(continues),
    })
}

fn deliver(frame: &mut Vec<u8>, inner: &Inner, instance: Ipv4Addr, port: u16, mac: [u8; 6]) {
    let (_, vip, _, vip_port, protocol) = inner.flow;
    frame.drain(ETHERNET..INNER);
    let transport = inner.transport - ENCAPSULATION_BYTES;
    let (from, to) = (vip.octets(), instance.octets());
    replace_checksum(frame, ETHERNET + 10, &from, &to);
    for (from, to) in [(&from[..], &to[..]), (&vip_port.to_be_bytes(), &port.to_be_bytes())] {
        if protocol == 6 {
            replace_checksum(frame, transport + 16, from, to);
        } else {
            replace_udp_checksum(frame, transport + 6, from, to);
        }
    }
    put(frame, ETHERNET + 16, &to);
    put(frame, transport + 2, &port.to_be_bytes());
    put(frame, 0, &mac);
}

fn forward(frame: &mut [u8], outer: &Ip, hop: Ipv4Addr, hops: &[Ipv4Addr]) -> Result<Verdict, Counter> {
    if outer.ttl <= 1 {
        return Err(Counter::TtlExceeded);
    }
    replace_checksum(frame, ETHERNET + 10, &outer.destination.octets(), &hop.octets());
    replace_checksum(frame, ETHERNET + 10, &[outer.ttl, 17], &[outer.ttl - 1, 17]);
    put(frame, ETHERNET + 8, &[outer.ttl - 1]);
    put(frame, ETHERNET + 16, &hop.octets());
    let unused = 3 - hops.len();
    put(frame, 48, &[unused as u8, 3]);
    for slot in 0..3 {
        let hop = if slot < unused { Ipv4Addr::UNSPECIFIED } else { hops[slot - unused] };
        put(frame, 50 + 4 * slot, &hop.octets());
    }
    debug_assert_eq!(byte(frame, 49), Some(3));
    Ok(Verdict::Redirect)
}
