//! Clients' packets.

use std::net::Ipv4Addr;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, GUE_PORT, TTL};

use crate::{
    Bucket, Flow, Machine, Verdict, bucket,
    bytes::{ETHERNET, Ip, byte, flow_hash, opens, put, sum, tcp_flags, word},
};

impl Machine {
    pub(crate) fn ingress(&mut self, frame: &mut Vec<u8>) -> Result<Verdict, Counter> {
        if word(frame, 12) != Some(0x0800) {
            return Ok(Verdict::Pass);
        }
        let Some(ip) = Ip::read(frame, ETHERNET).filter(|ip| ip.version == 4 && ip.has_ports()) else {
            return Ok(Verdict::Pass);
        };
        self.client_packet(frame, &ip).or_else(|reason| {
            // What can't be forwarded is the stack's, unless it is for a VIP.
            if self.is_vip(ip.destination) { Err(reason) } else { Ok(Verdict::Pass) }
        })
    }

    fn client_packet(&mut self, frame: &mut Vec<u8>, ip: &Ip) -> Result<Verdict, Counter> {
        if ip.header != 20 {
            return Err(Counter::Options);
        }
        if ip.is_fragment() {
            return Err(Counter::Fragment);
        }
        let transport = ETHERNET + ip.header;
        let (Some(from), Some(to)) = (word(frame, transport), word(frame, transport + 2)) else {
            return Err(Counter::Malformed);
        };
        let vip = (ip.destination, to, ip.protocol);
        let Some(tables) = self.vips.get(&vip) else { return Err(Counter::UnknownPort) };
        let least = if ip.protocol == 6 { 20 } else { 8 };
        if ip.total < ip.header + least || ETHERNET + ip.total > frame.len() {
            return Err(Counter::Malformed);
        }
        let flow = (ip.source, ip.destination, from, to, ip.protocol);
        let bucket = bucket(&tables.full, &flow);

        let count = self.vip_counters.entry(vip).or_default();
        count.packets += 1;
        count.bytes += ip.total as u64;
        if ip.protocol == 6 && tcp_flags(frame, transport).is_some_and(opens) {
            count.connections += 1;
        }
        self.count(Counter::Packets);
        self.add(Counter::Bytes, ip.total as u64);
        if ip.total + ENCAPSULATION_BYTES > self.mtu {
            return Err(Counter::TooBig);
        }
        let bucket = bucket.ok_or(Counter::NoBackend)?;
        Ok(self.encapsulate(frame, ip, &flow, bucket))
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

/// Back to where it came from.
fn swap_ethernet(frame: &mut [u8]) {
    let (destination, rest) = frame.split_at_mut(6);
    destination.swap_with_slice(&mut rest[..6]);
    debug_assert!(byte(frame, 11).is_some());
}
