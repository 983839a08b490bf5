//! Clients' IPv6 packets, and what ingress answers itself.

use std::net::IpAddr;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, TTL};

use crate::{
    Flow, Machine, Verdict,
    bytes::{ETHERNET, opens, put, sum, tcp_flags, word},
    bytes6::{Ip6, Transport, walk},
    icmp::{NoQuote, swap_ethernet, update},
    ingress::Packet,
};

/// Whether a type is one of the errors that quote a packet.
pub(crate) fn is_error6(kind: u8) -> bool {
    (1..=4).contains(&kind)
}

/// The flow of the packet that is quoted `at` in a message that ends at `end`, and where its transport header stands.
pub(crate) fn quoted6(
    frame: &[u8],
    at: usize,
    end: usize,
    vip: IpAddr,
) -> Result<(Flow, Transport), NoQuote> {
    if at + 40 > end {
        return Err(NoQuote::Short);
    }
    let ip = Ip6::read(frame, at).ok_or(NoQuote::Short)?;
    let transport = walk(frame, ip.next, at + 40, end).map_err(|_| NoQuote::Short)?;
    if IpAddr::from(ip.source) != vip || !transport.has_ports() || transport.is_later() {
        return Err(NoQuote::Foreign);
    }
    if transport.at + 8 > end {
        return Err(NoQuote::Short);
    }
    let port = |at| word(frame, at).ok_or(NoQuote::Short);
    let (from, to) = (port(transport.at)?, port(transport.at + 2)?);
    Ok(((ip.destination.into(), vip, to, from, transport.protocol), transport))
}

impl Machine {
    pub(crate) fn ingress6(&mut self, frame: &mut Vec<u8>) -> Result<Verdict, Counter> {
        let Some(ip) = Ip6::read(frame, ETHERNET) else { return Ok(Verdict::Pass) };
        let vip_address = IpAddr::from(ip.destination);
        if !self.is_vip(vip_address) {
            return Ok(Verdict::Pass);
        }
        let end = ETHERNET + ip.total;
        let plain = matches!(ip.next, 6 | 17);
        if !plain && end > frame.len() {
            return Err(Counter::Malformed);
        }
        // A plain packet's port is looked at before its lengths, as far as it is there.
        let transport = walk(frame, ip.next, ETHERNET + 40, end.max(ETHERNET + 40))?;
        let at = transport.at;
        let mut tell = true;
        let mut opening = false;
        let mut error = false;
        let flow = if transport.is_later() {
            tell = false;
            let first = self.fragments.get(&transport.fragmented(&ip)).ok_or(Counter::FragmentUnknown)?;
            (ip.source.into(), vip_address, first.0, first.1, first.2)
        } else if transport.protocol == 58 {
            if transport.is_first() {
                return Err(Counter::Fragment);
            }
            if at + 8 > end {
                return Err(Counter::Malformed);
            }
            match (frame[at], frame[at + 1]) {
                (128, 0) if transport.extended => return Err(Counter::Options),
                (128, 0) => return Ok(self.echo6(frame, &ip)),
                (kind, _) if is_error6(kind) => {}
                _ => return Ok(Verdict::Pass),
            }
            (tell, error) = (false, true);
            let quoted = quoted6(frame, at + 8, end, vip_address).map_err(|reason| match reason {
                NoQuote::Short => Counter::Malformed,
                NoQuote::Foreign => Counter::IcmpUnmatched,
            });
            quoted?.0
        } else if transport.has_ports() {
            let least = if transport.protocol == 6 { 20 } else { 8 };
            let whole = at + least <= end && end <= frame.len();
            let (Some(from), Some(to)) = (word(frame, at), word(frame, at + 2)) else {
                return Err(Counter::Malformed);
            };
            if !whole && (!plain || self.vips.contains_key(&(vip_address, to, transport.protocol))) {
                return Err(Counter::Malformed);
            }
            opening = transport.protocol == 6 && tcp_flags(frame, at).is_some_and(opens);
            (ip.source.into(), vip_address, from, to, transport.protocol)
        } else {
            return Ok(Verdict::Pass);
        };
        let vip = (vip_address, flow.3, flow.4);
        if !self.vips.contains_key(&vip) {
            return Err(if error { Counter::IcmpUnmatched } else { Counter::UnknownPort });
        }
        if error {
            self.count(Counter::IcmpErrors);
        } else if transport.is_first() {
            self.fragments.insert(transport.fragmented(&ip), (flow.2, flow.3, flow.4));
        }
        if !self.admit(vip, ip.total, opening) {
            return self.too_big6(frame, &ip, tell);
        }
        let result = self.encapsulate(frame, Packet { class: ip.class, total: ip.total, six: true }, &flow);
        if let Err(reason) = result
            && plain
        {
            self.refuse(reason, flow);
        }
        result
    }

    /// Answers an echo request.
    fn echo6(&mut self, frame: &mut [u8], ip: &Ip6) -> Verdict {
        swap_ethernet(frame);
        put(frame, ETHERNET + 7, &[TTL]);
        put(frame, ETHERNET + 8, &ip.destination.octets());
        put(frame, ETHERNET + 24, &ip.source.octets());
        put(frame, ETHERNET + 40, &[129]);
        update(frame, ETHERNET + 42, &[128, 0], &[129, 0]);
        self.count(Counter::EchoReplies);
        Verdict::Transmit
    }

    /// Tells a client that its packet is too big.
    fn too_big6(&mut self, frame: &mut Vec<u8>, ip: &Ip6, tell: bool) -> Result<Verdict, Counter> {
        if !tell {
            return Err(Counter::TooBig);
        }
        self.count(Counter::TooBig);
        let mut message = vec![2, 0, 0, 0, 0, 0];
        message.extend(((self.mtu - ENCAPSULATION_BYTES) as u16).to_be_bytes());
        message.extend(&frame[ETHERNET..ETHERNET + 128]);
        let (from, to) = (ip.destination.octets(), ip.source.octets());
        let length = (message.len() as u16).to_be_bytes();
        let checksum = !sum(&[&from, &to, &[0, 58], &length, &message]);
        put(&mut message, 2, &checksum.to_be_bytes());
        swap_ethernet(frame);
        frame.truncate(ETHERNET);
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(length);
        frame.extend([58, TTL]);
        frame.extend(from);
        frame.extend(to);
        frame.extend(message);
        self.count(Counter::TooBigSent);
        Ok(Verdict::Transmit)
    }
}
