//! Clients' packets.

use std::net::Ipv4Addr;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, GUE_PORT, TTL};

use crate::{
    Flow, Machine, Verdict, Vip, bucket,
    bytes::{ETHERNET, Ip, flow_hash, opens, put, sum, tcp_flags, word},
    icmp::{NoQuote, is_error, quoted, swap_ethernet},
};

impl Machine {
    pub(crate) fn ingress(&mut self, frame: &mut Vec<u8>) -> Result<Verdict, Counter> {
        match word(frame, 12) {
            Some(0x0800) => {}
            Some(0x86dd) => return self.ingress6(frame),
            _ => return Ok(Verdict::Pass),
        }
        let ours = |ip: &Ip| ip.version == 4 && (ip.has_ports() || ip.protocol == 1);
        let Some(ip) = Ip::read(frame, ETHERNET).filter(ours) else { return Ok(Verdict::Pass) };
        // What isn't for a VIP is the stack's.
        if !self.is_vip(ip.destination.into()) {
            return Ok(Verdict::Pass);
        }
        let end = ETHERNET + ip.total;
        let plain = ip.header == 20 && !ip.is_fragment() && ip.has_ports();
        let complete = ip.is_valid() && ip.total >= ip.header && end <= frame.len();
        // A plain packet's port is looked at before its lengths, as far as it is there.
        if !plain && !complete {
            return Err(Counter::Malformed);
        }
        let transport = ETHERNET + ip.header;
        let mut opening = false;
        let flow = if ip.protocol == 1 {
            if ip.is_fragment() {
                return Err(Counter::Fragment);
            }
            if ip.total < ip.header + 8 {
                return Err(Counter::Malformed);
            }
            match frame[transport] {
                8 if frame[transport + 1] == 0 && ip.header == 20 => return Ok(self.echo(frame, &ip)),
                8 if frame[transport + 1] == 0 => return Err(Counter::Options),
                kind if is_error(kind) => {
                    quoted(frame, transport + 8, end, ip.destination).map_err(|reason| match reason {
                        NoQuote::Short => Counter::Malformed,
                        NoQuote::Foreign => Counter::IcmpUnmatched,
                    })?
                }
                _ => return Ok(Verdict::Pass),
            }
        } else if ip.offset != 0 {
            let ports = self.fragments.get(&ip.fragmented()).ok_or(Counter::FragmentUnknown)?;
            (ip.source.into(), ip.destination.into(), ports.0, ports.1, ip.protocol)
        } else {
            let least = if ip.protocol == 6 { 20 } else { 8 };
            let whole = complete && ip.total >= ip.header + least;
            let (Some(from), Some(to)) = (word(frame, transport), word(frame, transport + 2)) else {
                return Err(Counter::Malformed);
            };
            if !whole && (!plain || self.vips.contains_key(&(ip.destination.into(), to, ip.protocol))) {
                return Err(Counter::Malformed);
            }
            opening = ip.protocol == 6 && tcp_flags(frame, transport).is_some_and(opens);
            (ip.source.into(), ip.destination.into(), from, to, ip.protocol)
        };
        let vip = (ip.destination.into(), flow.3, flow.4);
        if !self.vips.contains_key(&vip) {
            return Err(if ip.protocol == 1 { Counter::IcmpUnmatched } else { Counter::UnknownPort });
        }
        if ip.protocol == 1 {
            self.count(Counter::IcmpErrors);
        } else if ip.is_first_fragment() {
            self.fragments.insert(ip.fragmented(), (flow.2, flow.3, flow.4));
        }
        if !self.admit(vip, ip.total, opening) {
            return self.too_big(frame, &ip);
        }
        let packet = Packet { class: ip.tos, total: ip.total, six: false };
        let result = self.encapsulate(frame, packet, &flow);
        if let Err(reason) = result
            && plain
        {
            self.refuse(reason, flow);
        }
        result
    }

    /// Counts a packet that is for a VIP's port; false if it is too big.
    pub(crate) fn admit(&mut self, vip: Vip, total: usize, opening: bool) -> bool {
        let count = self.vip_counters.entry(vip).or_default();
        count.packets += 1;
        count.bytes += total as u64;
        count.connections += u64::from(opening);
        self.count(Counter::Packets);
        self.add(Counter::Bytes, total as u64);
        total + ENCAPSULATION_BYTES <= self.mtu
    }

    /// Puts the encapsulation in front of a packet.
    pub(crate) fn encapsulate(
        &self,
        frame: &mut Vec<u8>,
        packet: Packet,
        flow: &Flow,
    ) -> Result<Verdict, Counter> {
        let tables = self.vips.get(&(flow.1, flow.3, flow.4));
        let (now, before) = tables.and_then(|tables| bucket(&tables.full, flow)).ok_or(Counter::NoBackend)?;
        let length = packet.total + ENCAPSULATION_BYTES;
        let two = before != now && !before.is_unspecified();
        let mut outer = vec![0x45, packet.class];
        outer.extend((length as u16).to_be_bytes());
        outer.extend([0, 0, 0x40, 0, TTL, 17, 0, 0]);
        outer.extend(self.address.octets());
        outer.extend(now.octets());
        let checksum = !sum(&[&outer]);
        put(&mut outer, 10, &checksum.to_be_bytes());
        outer.extend((0xc000 | (flow_hash(flow) & 0x3fff) as u16).to_be_bytes());
        outer.extend(GUE_PORT.to_be_bytes());
        outer.extend((length as u16 - 20).to_be_bytes());
        outer.extend([0, 0]);
        outer.extend([4, if packet.six { 41 } else { 4 }, 0, 0, 0, 0, if two { 1 } else { 3 }, 3]);
        let none = Ipv4Addr::UNSPECIFIED;
        for hop in if two { [none, before, now] } else { [none; 3] } {
            outer.extend(hop.octets());
        }
        let local = now == self.address || self.instances.contains_key(&now);
        if !local {
            swap_ethernet(frame);
        }
        put(frame, 12, &[8, 0]);
        frame.splice(ETHERNET..ETHERNET, outer);
        Ok(if local { Verdict::Pass } else { Verdict::Transmit })
    }
}

/// A packet, as far as its encapsulation depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) class: u8,
    pub(crate) total: usize,
    pub(crate) six: bool,
}
