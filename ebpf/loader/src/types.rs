//! The types that user space speaks in; host byte order, `std::net` addresses.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyplace_ebpf_common as common;

/// A transport protocol that VIPs serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Tcp => common::TCP,
            Self::Udp => common::UDP,
        }
    }

    pub(crate) const fn from_number(number: u8) -> Option<Self> {
        match number {
            common::TCP => Some(Self::Tcp),
            common::UDP => Some(Self::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One port of a virtual IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VipKey {
    /// The virtual IP.
    pub address: IpAddr,
    /// The port, not 0.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

impl fmt::Display for VipKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", std::net::SocketAddr::new(self.address, self.port), self.protocol)
    }
}

impl VipKey {
    /// The least key of an address.
    pub(crate) const fn first(address: IpAddr) -> Self {
        Self { address, port: 0, protocol: Protocol::Tcp }
    }
}

/// A VIP's key as a map has it.
pub(crate) trait MapKey: common::Layout {
    /// The address as it stands in a packet.
    type Address: Copy + PartialEq;

    /// The address of a key, if it is of this family.
    fn address_of(address: IpAddr) -> Option<Self::Address>;
    /// Its way back.
    fn address(&self) -> IpAddr;
    /// Port, as it stands in a packet, and protocol.
    fn port(&self) -> (u16, u8);
    /// A key.
    fn new(address: Self::Address, port: u16, protocol: u8) -> Self;

    /// `None` for one of the other family.
    fn of(key: VipKey) -> Option<Self> {
        let address = Self::address_of(key.address)?;
        Some(Self::new(address, common::port(key.port), key.protocol.number()))
    }

    /// The entry that makes an address a VIP.
    fn marker_of(address: IpAddr) -> Option<Self> {
        Some(Self::new(Self::address_of(address)?, 0, 0))
    }

    /// `None` for an address marker.
    fn vip(&self) -> Option<VipKey> {
        let (port, protocol) = self.port();
        let protocol = Protocol::from_number(protocol)?;
        Some(VipKey { address: self.address(), port: common::port(port), protocol })
    }
}

impl MapKey for common::VipKey {
    type Address = u32;

    fn address_of(ip: IpAddr) -> Option<u32> {
        match ip {
            IpAddr::V4(ip) => Some(address(ip)),
            IpAddr::V6(_) => None,
        }
    }

    fn address(&self) -> IpAddr {
        ipv4(self.address).into()
    }

    fn port(&self) -> (u16, u8) {
        (self.port, self.protocol)
    }

    fn new(address: u32, port: u16, protocol: u8) -> Self {
        Self::new(address, port, protocol)
    }
}

impl MapKey for common::VipKey6 {
    type Address = common::Address6;

    fn address_of(ip: IpAddr) -> Option<common::Address6> {
        match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(common::address6(ip.octets())),
        }
    }

    fn address(&self) -> IpAddr {
        ipv6(self.address).into()
    }

    fn port(&self) -> (u16, u8) {
        (self.port, self.protocol)
    }

    fn new(address: common::Address6, port: u16, protocol: u8) -> Self {
        Self::new(address, port, protocol)
    }
}

/// One slot of a table. A hop is the address of an instance, or of a machine in another location that will choose one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Serves new flows; 0.0.0.0 for nobody.
    pub now: Ipv4Addr,
    /// Keeps the flows it has; equal to `now` when nothing changed lately.
    pub before: Ipv4Addr,
}

impl Bucket {
    /// A bucket whose owner did not change.
    pub const fn steady(hop: Ipv4Addr) -> Self {
        Self { now: hop, before: hop }
    }

    pub(crate) fn to_map(self) -> common::Bucket {
        common::Bucket { now: address(self.now), before: address(self.before) }
    }

    pub(crate) fn from_map(bucket: common::Bucket) -> Self {
        Self { now: ipv4(bucket.now), before: ipv4(bucket.before) }
    }
}

/// The tables of a VIP. Any length works; every machine of a location must use the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VipTable {
    /// For packets of clients: instances of this location, machines of others.
    pub buckets: Vec<Bucket>,
    /// For packets that another location relayed: instances of this location only. A machine's address in here could
    /// send packets in circles, until their time to live ends them.
    pub local: Vec<Bucket>,
}

/// A port that an instance serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// The VIP port.
    pub vip: VipKey,
    /// The port inside the container.
    pub container_port: u16,
}

/// An instance of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Its address.
    pub address: Ipv4Addr,
    /// Name of the outer end of its veth.
    pub host_interface: String,
    /// What it serves.
    pub ports: Vec<Port>,
}

pub(crate) fn address(address: Ipv4Addr) -> u32 {
    common::address(address.octets())
}

pub(crate) fn ipv4(address: u32) -> Ipv4Addr {
    Ipv4Addr::from(address.to_ne_bytes())
}

pub(crate) fn ipv6(address: common::Address6) -> Ipv6Addr {
    let mut octets = [0; 16];
    for (place, piece) in octets.chunks_mut(4).zip(address) {
        place.copy_from_slice(&piece.to_ne_bytes());
    }
    octets.into()
}

/// MAC address of a container's interface, by convention with the agent: `02:61:` and the instance's address.
pub(crate) fn container_mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x61, a, b, c, d]
}
