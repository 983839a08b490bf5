//! Encapsulated IPv6 packets: reading and delivering them. How hops are tried is the same for both families.

use std::net::{IpAddr, Ipv4Addr};

use anyplace_ebpf_common::{Counter, ENCAPSULATION_BYTES};

use crate::{
    Machine,
    bytes::{ETHERNET, continues, opens, put, replace_checksum, replace_udp_checksum, tcp_flags, word},
    bytes6::{Ip6, instance6, replace_address, replace_transport, walk},
    ingress6::{is_error6, quoted6},
    target::{INNER, Inner, Kind},
};

impl Machine {
    /// Reads the client's packet in an outer one of `length` bytes.
    pub(crate) fn inner6(&mut self, frame: &[u8], length: usize) -> Result<Inner, Counter> {
        let ip = Ip6::read(frame, INNER).ok_or(Counter::Malformed)?;
        let end = INNER + ip.total;
        if ip.total + ENCAPSULATION_BYTES != length || end > frame.len() {
            return Err(Counter::Malformed);
        }
        let transport = walk(frame, ip.next, INNER + 40, end)?;
        let at = transport.at;
        let mut inner = Inner {
            flow: (ip.source.into(), ip.destination.into(), 0, 0, 0),
            kind: Kind::Transport,
            transport: at,
            end,
            opens: false,
            continues: false,
        };
        if transport.is_later() {
            let first = *self.fragments.get(&transport.fragmented(&ip)).ok_or(Counter::FragmentUnknown)?;
            (inner.flow.2, inner.flow.3, inner.flow.4) = first;
            inner.kind = Kind::Fragment;
            return Ok(inner);
        }
        if transport.has_ports() {
            if at + if transport.protocol == 6 { 20 } else { 8 } > end {
                return Err(Counter::Malformed);
            }
            let port = |at| word(frame, at).ok_or(Counter::Malformed);
            let first = (port(at)?, port(at + 2)?, transport.protocol);
            (inner.flow.2, inner.flow.3, inner.flow.4) = first;
            if transport.is_first() {
                self.fragments.insert(transport.fragmented(&ip), first);
            }
            let flags = tcp_flags(frame, at).filter(|_| transport.protocol == 6);
            inner.opens = flags.is_some_and(opens);
            inner.continues = flags.is_none_or(continues);
            return Ok(inner);
        }
        let message = transport.protocol == 58 && !transport.is_first() && at + 8 <= end;
        if !message || !is_error6(frame[at]) {
            return Err(Counter::Malformed);
        }
        let vip = inner.flow.1;
        inner.flow = quoted6(frame, at + 8, end, vip).map_err(|_| Counter::Malformed)?.0;
        inner.kind = Kind::Error;
        Ok(inner)
    }
}

pub(crate) fn deliver6(frame: &mut Vec<u8>, inner: &Inner, instance: Ipv4Addr, port: u16, mac: [u8; 6]) {
    let (_, vip, _, vip_port, protocol) = inner.flow;
    let IpAddr::V6(vip) = vip else { return };
    let to = instance6(instance);
    let at = inner.transport - ENCAPSULATION_BYTES;
    if inner.kind == Kind::Error {
        rewrite_quoted(frame, inner, to, port);
    }
    frame.drain(ETHERNET..INNER);
    put(frame, 0, &mac);
    put(frame, 12, &[0x86, 0xdd]);
    put(frame, ETHERNET + 24, &to.octets());
    if inner.kind != Kind::Transport {
        return;
    }
    let (vip_port, new_port) = (vip_port.to_be_bytes(), port.to_be_bytes());
    if protocol == 6 {
        replace_transport(frame, at + 16, true, vip, to);
        replace_checksum(frame, at + 16, &vip_port, &new_port);
    } else {
        replace_transport(frame, at + 6, false, vip, to);
        replace_udp_checksum(frame, at + 6, &vip_port, &new_port);
    }
    put(frame, at + 2, &new_port);
}

/// Makes the quoted source an instance's address and port, in the packet that is still encapsulated.
fn rewrite_quoted(frame: &mut [u8], inner: &Inner, to: std::net::Ipv6Addr, port: u16) {
    let (icmp, end) = (inner.transport, inner.end);
    let Ok((flow, quoted)) = quoted6(frame, icmp + 8, end, inner.flow.1) else { return };
    let IpAddr::V6(vip) = flow.1 else { return };
    let (old_port, new_port) = (flow.3.to_be_bytes(), port.to_be_bytes());
    // Once for the message's own destination, once for the quoted source.
    replace_address(frame, icmp + 2, vip, to);
    replace_address(frame, icmp + 2, vip, to);
    replace_checksum(frame, icmp + 2, &old_port, &new_port);
    put(frame, icmp + 8 + 8, &to.octets());
    put(frame, quoted.at, &new_port);
    let tcp = quoted.protocol == 6;
    let checksum = quoted.at + if tcp { 16 } else { 6 };
    if checksum + 2 > end || !tcp && frame[checksum..checksum + 2] == [0, 0] {
        return;
    }
    let old = [frame[checksum], frame[checksum + 1]];
    replace_address(frame, checksum, vip, to);
    replace_checksum(frame, checksum, &old_port, &new_port);
    if !tcp && frame[checksum..checksum + 2] == [0, 0] {
        put(frame, checksum, &[0xff, 0xff]);
    }
    let new = [frame[checksum], frame[checksum + 1]];
    replace_checksum(frame, icmp + 2, &old, &new);
}
