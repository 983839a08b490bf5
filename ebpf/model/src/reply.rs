//! What instances send.

use std::net::IpAddr;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES};

use crate::{
    Machine, Verdict,
    bytes::{ETHERNET, Ip, opens, put, replace_checksum, replace_udp_checksum, tcp_flags, word},
};

impl Machine {
    pub(crate) fn reply(&mut self, frame: &mut [u8]) -> Result<Verdict, Counter> {
        match word(frame, 12) {
            Some(0x0800) => {}
            Some(0x86dd) => return self.reply6(frame),
            _ => return Ok(Verdict::Pass),
        }
        let Some(ip) = Ip::read(frame, ETHERNET).filter(|ip| ip.is_valid() && ip.has_ports()) else {
            return Ok(Verdict::Pass);
        };
        let health_check = ip.destination.is_link_local();
        if health_check {
            return Ok(Verdict::Pass);
        }
        let transport = ETHERNET + ip.header;
        let later = ip.offset != 0;
        let ports = match (word(frame, transport), word(frame, transport + 2)) {
            _ if later => self.fragments.get(&ip.fragmented()).copied(),
            (Some(from), Some(to)) => Some((from, to, ip.protocol)),
            _ => None,
        };
        let Some((port, client_port, _)) = ports else { return Ok(Verdict::Pass) };
        let Some(&(IpAddr::V4(vip), vip_port)) = self.replies.get(&(ip.source.into(), port, ip.protocol))
        else {
            return Ok(Verdict::Pass);
        };
        let flags = tcp_flags(frame, transport).filter(|_| ip.protocol == 6 && !later);
        if flags.is_some_and(opens) {
            return Ok(Verdict::Pass);
        }
        if ip.is_first_fragment() {
            self.fragments.insert(ip.fragmented(), (port, client_port, ip.protocol));
        }
        if later {
            replace_checksum(frame, ETHERNET + 10, &ip.source.octets(), &vip.octets());
            put(frame, ETHERNET + 12, &vip.octets());
            self.count(Counter::Replies);
            return Ok(self.way_of_reply(&ip));
        }
        let checksum = transport + if ip.protocol == 6 { 16 } else { 6 };
        if frame.len() < checksum + 2 {
            return Err(Counter::HelperFailed);
        }
        let (from, to) = (ip.source.octets(), vip.octets());
        replace_checksum(frame, ETHERNET + 10, &from, &to);
        for (from, to) in [(&from[..], &to[..]), (&port.to_be_bytes(), &vip_port.to_be_bytes())] {
            if ip.protocol == 6 {
                replace_checksum(frame, checksum, from, to);
            } else {
                replace_udp_checksum(frame, checksum, from, to);
            }
        }
        put(frame, ETHERNET + 12, &to);
        put(frame, transport, &vip_port.to_be_bytes());
        if flags.is_some_and(|flags| flags & 2 != 0) {
            self.clamp(frame, self.mtu.saturating_sub(ENCAPSULATION_BYTES + 40), transport + 20, checksum);
        }
        self.count(Counter::Replies);
        Ok(self.way_of_reply(&ip))
    }

    /// This machine's own stack takes what is for its address.
    fn way_of_reply(&self, ip: &Ip) -> Verdict {
        if ip.destination == self.address { Verdict::Pass } else { Verdict::Redirect }
    }

    /// Lowers the segment size where the option comes first.
    pub(crate) fn clamp(&self, frame: &mut [u8], limit: usize, options: usize, checksum: usize) {
        let limit = limit as u16;
        let (Some(kind), Some(size)) = (word(frame, options), word(frame, options + 2)) else { return };
        if kind == 0x0204 && size > limit {
            replace_checksum(frame, checksum, &size.to_be_bytes(), &limit.to_be_bytes());
            put(frame, options + 2, &limit.to_be_bytes());
        }
    }
}
