//! What instances send by IPv6.

use std::net::IpAddr;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, INSTANCE_PREFIX};

use crate::{
    Machine, Verdict,
    bytes::{ETHERNET, opens, put, replace_checksum, replace_udp_checksum, tcp_flags, word},
    bytes6::{Ip6, replace_transport, walk},
};

impl Machine {
    pub(crate) fn reply6(&mut self, frame: &mut [u8]) -> Result<Verdict, Counter> {
        let from_instance = |ip: &Ip6| ip.source.octets().starts_with(&INSTANCE_PREFIX);
        let Some(ip) = Ip6::read(frame, ETHERNET).filter(from_instance) else { return Ok(Verdict::Pass) };
        let Ok(transport) = walk(frame, ip.next, ETHERNET + 40, frame.len()) else {
            return Ok(Verdict::Pass);
        };
        let (at, later) = (transport.at, transport.is_later());
        let ports = match (word(frame, at), word(frame, at + 2)) {
            _ if later => self.fragments.get(&transport.fragmented(&ip)).copied(),
            (Some(from), Some(to)) if transport.has_ports() => Some((from, to, transport.protocol)),
            _ => None,
        };
        let Some((port, client_port, protocol)) = ports else { return Ok(Verdict::Pass) };
        let Some(&(vip, vip_port)) = self.replies.get(&(ip.source.into(), port, protocol)) else {
            return Ok(Verdict::Pass);
        };
        let IpAddr::V6(vip) = vip else { return Ok(Verdict::Pass) };
        let tcp = protocol == 6;
        let flags = tcp_flags(frame, at).filter(|_| tcp && !later);
        if flags.is_some_and(opens) {
            return Ok(Verdict::Pass);
        }
        if transport.is_first() {
            self.fragments.insert(transport.fragmented(&ip), (port, client_port, protocol));
        }
        if !later {
            let checksum = at + if tcp { 16 } else { 6 };
            if frame.len() < checksum + 2 {
                return Err(Counter::HelperFailed);
            }
            replace_transport(frame, checksum, tcp, ip.source, vip);
            let (old, new) = (port.to_be_bytes(), vip_port.to_be_bytes());
            if tcp {
                replace_checksum(frame, checksum, &old, &new);
            } else {
                replace_udp_checksum(frame, checksum, &old, &new);
            }
            put(frame, at, &new);
            if flags.is_some_and(|flags| flags & 2 != 0) {
                self.clamp(frame, self.mtu.saturating_sub(ENCAPSULATION_BYTES + 60), at + 20, checksum);
            }
        }
        put(frame, ETHERNET + 8, &vip.octets());
        self.count(Counter::Replies);
        // This machine's own stack takes what is for its address.
        Ok(if ip.destination == self.address6 { Verdict::Pass } else { Verdict::Redirect })
    }
}
