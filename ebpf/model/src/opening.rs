//! A frame to begin with.

use std::net::IpAddr;

use crate::Flow;

/// The first packet of a flow, without payload: a SYN or a datagram.
///
/// # Panics
/// Client and VIP are of different families.
pub fn opening(flow: &Flow) -> Vec<u8> {
    let (client, vip, client_port, vip_port, protocol) = *flow;
    let tcp = protocol == 6;
    let length: u8 = if tcp { 20 } else { 8 };
    let mut frame = vec![0; 12];
    match (client, vip) {
        (IpAddr::V4(client), IpAddr::V4(vip)) => {
            frame.extend([8, 0, 0x45, 0, 0, 20 + length, 0, 0, 0, 0, 64, protocol, 0, 0]);
            frame.extend(client.octets());
            frame.extend(vip.octets());
        }
        (IpAddr::V6(client), IpAddr::V6(vip)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, length, protocol, 64]);
            frame.extend(client.octets());
            frame.extend(vip.octets());
        }
        _ => panic!("a flow from {client} to {vip}"),
    }
    let start = frame.len();
    frame.extend(client_port.to_be_bytes());
    frame.extend(vip_port.to_be_bytes());
    frame.resize(start + usize::from(length), 0);
    if tcp {
        (frame[start + 12], frame[start + 13]) = (0x50, 2);
    } else {
        frame[start + 5] = length;
    }
    frame
}
