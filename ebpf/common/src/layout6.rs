//! Keys and values of the maps for VIPs that are IPv6 addresses. Hops are IPv4 addresses here too.

use crate::Ports;

/// An IPv6 address as it stands in a packet, in four pieces.
pub type Address6 = [u32; 4];

/// As [`crate::VipKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VipKey6 {
    /// The VIP.
    pub address: Address6,
    /// Its port.
    pub port: u16,
    /// [`crate::TCP`] or [`crate::UDP`].
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

impl VipKey6 {
    /// A key as the packet names it.
    #[inline(always)]
    pub const fn new(address: Address6, port: u16, protocol: u8) -> Self {
        Self { address, port, protocol, reserved: 0 }
    }

    /// The entry that says "this address is a VIP".
    #[inline(always)]
    pub const fn marker(address: Address6) -> Self {
        Self::new(address, 0, 0)
    }
}

/// As [`crate::PortKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey6 {
    /// The instance's address, as hops name it.
    pub instance: u32,
    /// The VIP.
    pub vip: Address6,
    /// The VIP's port.
    pub vip_port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// As [`crate::ReplyValue`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyValue6 {
    /// The VIP.
    pub vip: Address6,
    /// The VIP's port.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}

/// As [`crate::FlowKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey6 {
    /// The client.
    pub source: Address6,
    /// The VIP.
    pub vip: Address6,
    /// The client's port.
    pub source_port: u16,
    /// The VIP's port.
    pub vip_port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// A packet that came in fragments. A later fragment needn't name the protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentKey6 {
    /// Who sent it.
    pub source: Address6,
    /// For whom.
    pub destination: Address6,
    /// Identification.
    pub id: u32,
}

/// What its first fragment said.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentValue6 {
    /// The ports.
    pub ports: Ports,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// What the programs know of their machine beside [`crate::Config`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config6 {
    /// The machine's IPv6 address, by which it and its instances are clients; zeroes if it has none.
    pub address: Address6,
}

/// Scratch memory of one CPU: where a walk along extension headers has come to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Type of the header that stands at `at`.
    pub next: u32,
    /// Offset in the frame.
    pub at: u32,
    /// Bits of what was met on the way.
    pub met: u32,
    /// Identification of the packet whose fragment this is.
    pub id: u32,
}
