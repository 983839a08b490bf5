//! Names of an instance's network devices, derived from its address, so that the machine agent (which makes them)
//! and the state router (which delivers packets into them) agree without talking to each other.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv6Net;

/// The default gateway inside every instance: a link-local address of the host's end of the pair.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The same for IPv6.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x61);

/// The instances' IPv6 addresses, in every fleet: no packet leaves its machine with one.
pub const INSTANCE_NET6: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd5b, 0x27d6, 0x914c, 0, 0, 0, 0, 0), 96);

/// The instance's IPv6 address: the prefix of [`INSTANCE_NET6`] and its IPv4 address.
pub fn instance_address6(address: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(INSTANCE_NET6.addr()) | u128::from(u32::from(address)))
}

/// The host's end of an instance's veth pair: `apv` and the address in hexadecimal (11 of the 15 bytes allowed).
pub fn host_interface(address: Ipv4Addr) -> String {
    format!("apv{:08x}", u32::from(address))
}

/// The hardware address of `eth0` inside the instance: locally administered, `02:61` and the address.
pub fn container_mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x61, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_address() {
        let address = Ipv4Addr::new(10, 1, 1, 5);
        assert_eq!(host_interface(address), "apv0a010105");
        assert_eq!(container_mac(address), [0x02, 0x61, 10, 1, 1, 5]);
        assert_eq!(instance_address6(address).to_string(), "fd5b:27d6:914c::a01:105");
    }
}
