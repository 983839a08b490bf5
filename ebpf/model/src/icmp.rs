//! ICMP: errors about a VIP's packets, and what ingress answers itself.

use std::net::Ipv4Addr;

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES, TTL};

use crate::{
    Flow, Machine, Verdict,
    bytes::{ETHERNET, Ip, address, byte, put, replace_checksum, sum, word},
};

/// Whether a type is one of the errors that quote a packet.
pub(crate) fn is_error(kind: u8) -> bool {
    [3, 11, 12].contains(&kind)
}

/// Why a quoted packet isn't one of a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoQuote {
    Short,
    Foreign,
}

/// The flow of the packet that is quoted `at` in a message that ends at `end`: the VIP's address is its source.
pub(crate) fn quoted(frame: &[u8], at: usize, end: usize, vip: Ipv4Addr) -> Result<Flow, NoQuote> {
    if at + 20 > end {
        return Err(NoQuote::Short);
    }
    let ip = Ip::read(frame, at).ok_or(NoQuote::Short)?;
    if !ip.is_valid() || at + ip.header + 8 > end {
        return Err(NoQuote::Short);
    }
    if ip.source != vip || !ip.has_ports() || ip.offset != 0 {
        return Err(NoQuote::Foreign);
    }
    let port = |at| word(frame, at).ok_or(NoQuote::Short);
    let (from, to) = (port(at + ip.header)?, port(at + ip.header + 2)?);
    Ok((ip.destination.into(), vip.into(), to, from, ip.protocol))
}

/// Makes the quoted source an instance's address and port.
pub(crate) fn rewrite_quoted(frame: &mut [u8], icmp: usize, end: usize, to: Ipv4Addr, port: u16) {
    let at = icmp + 8;
    let Some(ip) = Ip::read(frame, at) else { return };
    let transport = at + ip.header;
    let before = frame[at..end].to_vec();
    let (old, new) = (ip.source.octets(), to.octets());
    let old_port = word(frame, transport).unwrap_or(0).to_be_bytes();
    update(frame, at + 10, &old, &new);
    put(frame, at + 12, &new);
    put(frame, transport, &port.to_be_bytes());
    let (checksum, tcp) = if ip.protocol == 6 { (transport + 16, true) } else { (transport + 6, false) };
    if checksum + 2 <= end && (tcp || frame[checksum..checksum + 2] != [0, 0]) {
        update(frame, checksum, &old, &new);
        update(frame, checksum, &old_port, &port.to_be_bytes());
        if !tcp && frame[checksum..checksum + 2] == [0, 0] {
            put(frame, checksum, &[0xff, 0xff]);
        }
    }
    // The message's own checksum, in the order in which the kernel's helper is asked: it decides between zeroes.
    let old_ip_checksum = [before[10], before[11]];
    let new_ip_checksum = [frame[at + 10], frame[at + 11]];
    replace_checksum(frame, icmp + 2, &old, &new);
    replace_checksum(frame, icmp + 2, &old_ip_checksum, &new_ip_checksum);
    replace_checksum(frame, icmp + 2, &old_port, &port.to_be_bytes());
    if checksum + 2 <= end {
        let old = [before[checksum - at], before[checksum - at + 1]];
        if tcp || old != [0, 0] {
            let new = [frame[checksum], frame[checksum + 1]];
            replace_checksum(frame, icmp + 2, &old, &new);
        }
    }
}

/// Changes a checksum for words that changed, by RFC 1624.
pub(crate) fn update(frame: &mut [u8], at: usize, from: &[u8], to: &[u8]) {
    for (from, to) in from.chunks(2).zip(to.chunks(2)) {
        let inverted = [!frame[at], !frame[at + 1], !from[0], !from[1]];
        let new = !sum(&[&inverted, to]);
        put(frame, at, &new.to_be_bytes());
    }
}

impl Machine {
    /// Answers an echo request.
    pub(crate) fn echo(&mut self, frame: &mut [u8], ip: &Ip) -> Verdict {
        answer_header(frame, ip);
        put(frame, ETHERNET + 20, &[0, 0]);
        update(frame, ETHERNET + 22, &[8, 0], &[0, 0]);
        self.count(Counter::EchoReplies);
        Verdict::Transmit
    }

    /// Tells a client that its packet is too big.
    pub(crate) fn too_big(&mut self, frame: &mut Vec<u8>, ip: &Ip) -> Result<Verdict, Counter> {
        if ip.protocol == 1 || ip.offset != 0 || !ip.dont {
            return Err(Counter::TooBig);
        }
        self.count(Counter::TooBig);
        let quote = frame[ETHERNET..ETHERNET + ip.header + 8].to_vec();
        let mtu = (self.mtu - ENCAPSULATION_BYTES) as u16;
        let mut message = vec![3, 4, 0, 0, 0, 0];
        message.extend(mtu.to_be_bytes());
        message.extend(&quote);
        let checksum = !sum(&[&message]);
        put(&mut message, 2, &checksum.to_be_bytes());
        frame.truncate(ETHERNET + 20);
        put(frame, ETHERNET + 1, &[0]);
        put(frame, ETHERNET + 2, &(20 + message.len() as u16).to_be_bytes());
        put(frame, ETHERNET + 4, &[0, 0, 0, 0]);
        answer_header(frame, ip);
        frame.extend(message);
        self.count(Counter::TooBigSent);
        Ok(Verdict::Transmit)
    }
}

/// Makes the headers those of an ICMP answer: back to the sender, from the VIP.
fn answer_header(frame: &mut [u8], ip: &Ip) {
    swap_ethernet(frame);
    put(frame, ETHERNET, &[0x45]);
    put(frame, ETHERNET + 8, &[TTL, 1, 0, 0]);
    put(frame, ETHERNET + 12, &ip.destination.octets());
    put(frame, ETHERNET + 16, &ip.source.octets());
    let checksum = !sum(&[&frame[ETHERNET..ETHERNET + 20]]);
    put(frame, ETHERNET + 10, &checksum.to_be_bytes());
    debug_assert_eq!(address(frame, ETHERNET + 16), Some(ip.source));
}

/// Back to where it came from.
pub(crate) fn swap_ethernet(frame: &mut [u8]) {
    let (destination, rest) = frame.split_at_mut(6);
    destination.swap_with_slice(&mut rest[..6]);
    debug_assert!(byte(frame, 11).is_some());
}
