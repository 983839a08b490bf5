//! Encapsulated packets.

use std::net::{IpAddr, Ipv4Addr};

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, GUE_PORT, Outcome};

use crate::{
    Flow, Machine, Verdict, bucket,
    bytes::{
        ETHERNET, Ip, address, byte, continues, opens, put, replace_checksum, replace_udp_checksum,
        tcp_flags, word,
    },
};

use crate::{
    icmp::{is_error, quoted, rewrite_quoted},
    target6::deliver6,
};

/// Where the client's packet stands.
pub(crate) const INNER: usize = ETHERNET + ENCAPSULATION_BYTES;

/// The client's packet.
pub(crate) struct Inner {
    pub(crate) flow: Flow,
    pub(crate) kind: Kind,
    /// Where its transport header stands.
    pub(crate) transport: usize,
    /// Where it ends.
    pub(crate) end: usize,
    pub(crate) opens: bool,
    pub(crate) continues: bool,
}

/// What is rewritten beside the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The transport header.
    Transport,
    /// Nothing: a fragment after the first.
    Fragment,
    /// The packet that an ICMP error quotes.
    Error,
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
        let six = frame[42..46] == [4, 41, 0, 0];
        let well_formed = (six || frame[42..46] == [4, 4, 0, 0])
            && frame[46..48] == [0, 0]
            && frame[48] <= 3
            && frame[49] == 3;
        let foreign = !self.may_encapsulate(outer.source);
        if ours && foreign {
            return Err(Counter::ForeignSource);
        }
        let inner = match (well_formed, six) {
            (false, _) => Err(Counter::Malformed),
            (true, true) => self.inner6(frame, outer.total),
            (true, false) => self.inner(frame, &outer),
        };
        let inner = match inner {
            Ok(inner) => inner,
            Err(reason) if ours => return Err(reason),
            Err(_) => return Ok(Verdict::Pass),
        };
        let result = self.serve(frame, &outer, &inner, (ours, foreign));
        if let Err(reason) = result {
            self.refuse(reason, inner.flow);
        }
        result
    }

    /// Tries the hops.
    fn serve(
        &mut self,
        frame: &mut Vec<u8>,
        outer: &Ip,
        inner: &Inner,
        (ours, foreign): (bool, bool),
    ) -> Result<Verdict, Counter> {
        let list = (0..3).filter_map(|slot| address(frame, 50 + 4 * slot));
        // The hops that are left, next one first.
        let mut hops: Vec<Ipv4Addr> = list.skip(usize::from(frame[48])).collect();
        let here = outer.destination;
        let mut hop = here;
        if !ours {
            if !self.is_vip(inner.flow.1) {
                return Ok(Verdict::Pass);
            }
            if foreign {
                return Err(Counter::ForeignSource);
            }
            hop = self.next_hop(&mut hops)?;
        }
        for _ in 0..5 {
            if hop == self.address {
                hop = self.relay(inner, &mut hops)?;
                continue;
            }
            let Some(mac) = self.instances.get(&hop).copied() else {
                if hop == here {
                    return Err(Counter::NoInstance);
                }
                return forward(frame, outer, hop, &hops);
            };
            let (_, vip, _, vip_port, protocol) = inner.flow;
            if let Some(port) = self.ports.get(&(hop, (vip, vip_port, protocol))).copied() {
                let owner = self.flows.get(&inner.flow).or_else(|| self.embryonic.get(&inner.flow));
                let owned = owner == Some(&hop);
                if owned || inner.opens || hops.is_empty() {
                    let known = self.counters[Counter::NewFlows as usize];
                    self.remember(inner, hop);
                    self.count(Counter::Delivered);
                    let new_flows = self.counters[Counter::NewFlows as usize] - known;
                    if new_flows > 0 {
                        self.events.push((Outcome::Established, inner.flow, Some(hop)));
                    }
                    let count = self.instance_counters.entry((hop, (vip, vip_port, protocol))).or_default();
                    count.packets += 1;
                    count.bytes += (inner.end - INNER) as u64;
                    count.new_flows += new_flows;
                    let deliver = if vip.is_ipv6() { deliver6 } else { deliver };
                    deliver(frame, inner, hop, port, mac);
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

impl Machine {
    fn inner(&mut self, frame: &[u8], outer: &Ip) -> Result<Inner, Counter> {
        let ip = Ip::read(frame, INNER).ok_or(Counter::Malformed)?;
        let end = INNER + ip.total;
        let transport = INNER + ip.header;
        if !ip.is_valid()
            || ip.total < ip.header
            || ip.total + ENCAPSULATION_BYTES != outer.total
            || end > frame.len()
        {
            return Err(Counter::Malformed);
        }
        if ip.protocol == 1 {
            if ip.is_fragment() || ip.total < ip.header + 8 || !is_error(frame[transport]) {
                return Err(Counter::Malformed);
            }
            let flow = quoted(frame, transport + 8, end, ip.destination).map_err(|_| Counter::Malformed)?;
            let (opens, continues) = (false, false);
            return Ok(Inner { flow, kind: Kind::Error, transport, end, opens, continues });
        }
        if !ip.has_ports() {
            return Err(Counter::Malformed);
        }
        let least = if ip.protocol == 6 { 20 } else { 8 };
        let ports = if ip.offset != 0 {
            *self.fragments.get(&ip.fragmented()).ok_or(Counter::FragmentUnknown)?
        } else if ip.total < ip.header + least {
            return Err(Counter::Malformed);
        } else {
            let port = |at| word(frame, at).ok_or(Counter::Malformed);
            (port(transport)?, port(transport + 2)?, ip.protocol)
        };
        if ip.is_first_fragment() {
            self.fragments.insert(ip.fragmented(), ports);
        }
        let whole = ip.offset == 0;
        let flags = tcp_flags(frame, transport).filter(|_| whole && ip.protocol == 6);
        Ok(Inner {
            flow: (ip.source.into(), ip.destination.into(), ports.0, ports.1, ip.protocol),
            kind: if whole { Kind::Transport } else { Kind::Fragment },
            transport,
            end,
            opens: flags.is_some_and(opens),
            continues: whole && flags.is_none_or(continues),
        })
    }

    fn may_encapsulate(&self, source: Ipv4Addr) -> bool {
        let inside = |&(prefix, bits): &(Ipv4Addr, u8)| {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            (u32::from(prefix) ^ u32::from(source)) & mask == 0
        };
        self.fleet.is_empty() || source == self.address || self.fleet.iter().any(inside)
    }

    /// Keeps in mind that an instance was given a flow's packet.
    fn remember(&mut self, inner: &Inner, instance: Ipv4Addr) {
        if !inner.opens && !inner.continues {
            return;
        }
        match self.flows.get(&inner.flow) {
            Some(owner) if *owner == instance => {}
            Some(_) => {
                self.flows.insert(inner.flow, instance);
                self.count(Counter::NewFlows);
            }
            None if self.embryonic.get(&inner.flow) != Some(&instance) => {
                self.embryonic.insert(inner.flow, instance);
                self.count(Counter::Embryonic);
            }
            None if inner.continues => {
                self.embryonic.remove(&inner.flow);
                self.flows.insert(inner.flow, instance);
                self.count(Counter::NewFlows);
            }
            None => {}
        }
    }
}

fn deliver(frame: &mut Vec<u8>, inner: &Inner, instance: Ipv4Addr, port: u16, mac: [u8; 6]) {
    let (_, vip, _, vip_port, protocol) = inner.flow;
    frame.drain(ETHERNET..INNER);
    let transport = inner.transport - ENCAPSULATION_BYTES;
    let IpAddr::V4(vip) = vip else { return };
    let (from, to) = (vip.octets(), instance.octets());
    replace_checksum(frame, ETHERNET + 10, &from, &to);
    put(frame, ETHERNET + 16, &to);
    put(frame, 0, &mac);
    if inner.kind == Kind::Error {
        rewrite_quoted(frame, transport, inner.end - ENCAPSULATION_BYTES, instance, port);
    } else if inner.kind == Kind::Transport {
        for (from, to) in [(&from[..], &to[..]), (&vip_port.to_be_bytes(), &port.to_be_bytes())] {
            if protocol == 6 {
                replace_checksum(frame, transport + 16, from, to);
            } else {
                replace_udp_checksum(frame, transport + 6, from, to);
            }
        }
        put(frame, transport + 2, &port.to_be_bytes());
    }
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
