//! Which bucket a flow is in: what the programs compute for each packet, for those who ask beforehand.

use std::net::{IpAddr, SocketAddr};

use anyplace_ebpf_common as common;

use crate::{VipKey, types::address};

impl VipKey {
    /// The bucket, of a table of `buckets`, that a client's flow to this VIP port is in; `None` where the table is empty,
    /// or client and VIP are of different families.
    pub fn bucket(&self, client: SocketAddr, buckets: usize) -> Option<usize> {
        let (from, to, protocol) =
            (common::port(client.port()), common::port(self.port), self.protocol.number());
        let hash = match (client.ip(), self.address) {
            (IpAddr::V4(client), IpAddr::V4(vip)) => {
                common::flow_hash(address(client), address(vip), from, to, protocol)
            }
            (IpAddr::V6(client), IpAddr::V6(vip)) => {
                let (client, vip) = (common::address6(client.octets()), common::address6(vip.octets()));
                common::flow_hash6(&client, &vip, from, to, protocol)
            }
            _ => return None,
        };
        let buckets = u32::try_from(buckets).ok().filter(|buckets| *buckets > 0)?;
        Some(common::bucket_index(hash, buckets) as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use anyplace_ebpf_model::{Machine, Program, Tables, Verdict, opening};

    use super::*;
    use crate::Protocol;

    const BUCKETS: usize = 97;
    /// Of the destination in what ingress sends: behind the Ethernet header.
    const OUTER_DESTINATION: usize = 14 + 16;

    /// The bucket that the model of the data plane takes: each of its buckets has a hop of its own.
    fn taken(client: SocketAddr, vip: &VipKey) -> usize {
        let hop = |bucket: usize| Ipv4Addr::new(10, 9, 0, bucket as u8);
        let full = (0..BUCKETS).map(|bucket| (hop(bucket), hop(bucket))).collect();
        let mut machine = Machine::new(Ipv4Addr::new(10, 1, 1, 1), 1_500);
        let key = (vip.address, vip.port, vip.protocol.number());
        machine.vips.insert(key, Tables { full, local: Vec::new() });
        let mut frame = opening(&(client.ip(), vip.address, client.port(), vip.port, vip.protocol.number()));
        assert_eq!(machine.run(Program::Ingress, &mut frame), Verdict::Transmit, "{client} {vip}");
        usize::from(frame[OUTER_DESTINATION + 3])
    }

    #[test]
    fn it_is_the_bucket_that_the_data_plane_takes() {
        for number in 0..500_u16 {
            let port = 1_024 + number * 97;
            let protocol = if number % 3 == 0 { Protocol::Udp } else { Protocol::Tcp };
            let four = Ipv4Addr::new(198, 51, (number >> 8) as u8, number as u8);
            let six = Ipv6Addr::new(0x2001, 0xdb8, number, 0, 0, 7, 0, number ^ 0x55);
            let vips: [IpAddr; 2] =
                [Ipv4Addr::new(203, 0, 113, 7).into(), "2001:db8:cafe::7".parse().unwrap()];
            for (client, address) in [IpAddr::V4(four), IpAddr::V6(six)].into_iter().zip(vips) {
                let (client, vip) =
                    (SocketAddr::new(client, port), VipKey { address, port: 80 + number, protocol });
                assert_eq!(vip.bucket(client, BUCKETS), Some(taken(client, &vip)), "{client} {vip}");
            }
        }
    }

    #[test]
    fn there_is_none_without_buckets_or_across_families() {
        let vip = VipKey { address: Ipv4Addr::new(203, 0, 113, 7).into(), port: 80, protocol: Protocol::Tcp };
        assert_eq!(vip.bucket("198.51.100.1:4000".parse().unwrap(), 0), None);
        assert_eq!(vip.bucket("[2001:db8::1]:4000".parse().unwrap(), 64), None);
    }
}
