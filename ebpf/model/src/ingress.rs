//! Clients' packets.

use std::net::Ipv4Addr;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, GUE_PORT, TTL};

use crate::{
    Bucket, Flow, Machine, Verdict, bucket,
    bytes::{ETHERNET, Ip, flow_hash, opens, put, sum, tcp_flags, word},
    icmp::{NoQuote, is_error, quoted, swap_ethernet},
};

impl Machine {
    pub(crate) fn ingress(&mut self, frame: &mut Vec<u8>) -> Result<Verdict, Counter> {
        if word(frame, 12) != Some(0x0800) {
            return Ok(Verdict::Pass);
        }
        let ours = |ip: &Ip| ip.version == 4 && (ip.has_ports() || ip.protocol == 1);
        let Some(ip) = Ip::read(frame, ETHERNET).filter(ours) else { return Ok(Verdict::Pass) };
        // What isn't for a VIP is the stack's.
        if !self.is_vip(ip.destination) {
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
            (ip.source, ip.destination, ports.0, ports.1, ip.protocol)
        } else {
            let least = if ip.protocol == 6 { 20 } else { 8 };
            let whole = complete && ip.total >= ip.header + least;
            let (Some(from), Some(to)) = (word(frame, transport), word(frame, transport + 2)) else {
                return Err(Counter::Malformed);
            };
            if !whole && (!plain || self.vips.contains_key(&(ip.destination, to, ip.protocol))) {
                return Err(Counter::Malformed);
            }
            opening = ip.protocol == 6 && tcp_flags(frame, transport).is_some_and(opens);
            (ip.source, ip.destination, from, to, ip.protocol)
        };
        let vip = (ip.destination, flow.3, flow.4);
        let Some(tables) = self.vips.get(&vip) else {
            return Err(if ip.protocol == 1 { Counter::IcmpUnmatched } else { Counter::UnknownPort });
        };
        let bucket = bucket(&tables.full, &flow);
        if ip.protocol == 1 {
            self.count(Counter::IcmpErrors);
        } else if ip.is_first_fragment() {
            self.fragments.insert(ip.fragmented(), (flow.2, flow.3));
        }

        let count = self.vip_counters.entry(vip).or_default();
        count.packets += 1;
        count.bytes += ip.total as u64;
        count.connections += u64::from(opening);
        self.count(Counter::Packets);
        self.add(Counter::Bytes, ip.total as u64);
        if ip.total + ENCAPSULATION_BYTES > self.mtu {
            return self.too_big(frame, &ip);
        }
        let bucket = bucket.ok_or(Counter::NoBackend)?;
        Ok(self.encapsulate(frame, &ip, &flow, bucket))
    }

    fn encapsulate(&self, frame: &mut Vec<u8>, ip: &Ip, flow: &Flow, (now, before): Bucket) -> Verdict {
        let length = ip.total + ENCAPSULATION_BYTES;
        let two = before != now && !before.is_unspecified();
        let mut outer = vec![0x45, ip.tos];
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
        outer.extend([4, 4, 0, 0, 0, 0, if two { 1 } else { 3 }, 3]);
        let none = Ipv4Addr::UNSPECIFIED;
        for hop in if two { [none, before, now] } else { [none; 3] } {
            outer.extend(hop.octets());
        }
        let local = now == self.address || self.instances.contains_key(&now);
        if !local {
            swap_ethernet(frame);
        }
        frame.splice(ETHERNET..ETHERNET, outer);
        if local { Verdict::Pass } else { Verdict::Transmit }
    }
}
