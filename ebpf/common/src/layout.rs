//! Keys and values of the maps.

use crate::layout6::{Config6, FlowKey6, FragmentKey6, FragmentValue6, PortKey6, ReplyValue6, VipKey6, Walk};

/// Bytes of an interface name, its closing zero included (the kernel's IFNAMSIZ).
pub const INTERFACE_NAME_BYTES: usize = 16;

/// A type that may be copied to and from a map as bytes.
///
/// # Safety
/// `repr(C)`, no padding, and every bit pattern is a value.
pub unsafe trait Layout: Copy + 'static {}

macro_rules! layout {
    ($($type:ty: $size:literal),* $(,)?) => {
        $(
            const _: () = assert!(size_of::<$type>() == $size);
            // SAFETY: repr(C) of integers and byte arrays; the asserted size is the sum of the fields.
            unsafe impl Layout for $type {}
        )*
    };
}

layout! {
    VipKey: 8, VipValue: 24, Bucket: 8, InstanceValue: 28, PortKey: 12, PortValue: 4, ReplyKey: 8, ReplyValue: 8,
    FlowKey: 16, FlowValue: 4, FragmentKey: 12, crate::Ports: 4, FleetKey: 8, Config: 24,
    VipKey6: 20, PortKey6: 24, ReplyValue6: 20, FlowKey6: 40, FragmentKey6: 36, FragmentValue6: 8, Walk: 16, Config6: 16,
}

// SAFETY: plain integers.
unsafe impl Layout for u32 {}
// SAFETY: a plain integer.
unsafe impl Layout for u64 {}

/// A virtual IP and one of its ports. Port 0 and protocol 0 mark the address itself as a VIP (see [`VipKey::marker`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VipKey {
    /// The VIP.
    pub address: u32,
    /// Its port.
    pub port: u16,
    /// [`crate::TCP`] or [`crate::UDP`].
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

impl VipKey {
    /// A key as the packet names it.
    #[inline(always)]
    pub const fn new(address: u32, port: u16, protocol: u8) -> Self {
        Self { address, port, protocol, reserved: 0 }
    }

    /// The entry that says "this address is a VIP": packets for it that match no port are ours to refuse.
    pub const fn marker(address: u32) -> Self {
        Self::new(address, 0, 0)
    }
}

/// A run of buckets in the arena.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First slot.
    pub offset: u32,
    /// Number of slots; any number, zero means "no backend".
    pub len: u32,
}

/// Where a VIP's tables stand. One update of this value switches all of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipValue {
    /// Used at ingress: instances of this location and machines of others.
    pub full: Range,
    /// Used for packets relayed from another location: instances of this location only.
    pub local: Range,
    /// Counts the updates.
    pub generation: u32,
    /// Index into the per-VIP counters.
    pub counter: u32,
}

/// One slot of a table: who owns its flows now, and who did before the last change. 0.0.0.0 means nobody.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Serves new flows.
    pub now: u32,
    /// Keeps the flows it has.
    pub before: u32,
}

/// An instance of this machine; the key is its address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstanceValue {
    /// Index of the veth's end outside the container.
    pub interface: u32,
    /// MAC address of the end inside.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
    /// Name of the end outside, zero-filled; for the loader, which must find its way back after a restart.
    pub name: [u8; INTERFACE_NAME_BYTES],
}

/// "This instance serves this VIP port."
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// The instance's address.
    pub instance: u32,
    /// The VIP.
    pub vip: u32,
    /// The VIP's port.
    pub vip_port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

impl PortKey {
    /// A key as packets name it.
    #[inline(always)]
    pub const fn new(instance: u32, vip: u32, vip_port: u16, protocol: u8) -> Self {
        Self { instance, vip, vip_port, protocol, reserved: 0 }
    }
}

/// The port it listens on inside.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortValue {
    /// The container's port.
    pub port: u16,
    /// Index into the counters by instance, host byte order; 0 is the slot of all that have none.
    pub counter: u16,
}

/// The reverse of [`PortKey`]: what a reply's source is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReplyKey {
    /// The instance's address.
    pub instance: u32,
    /// The container's port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// What a reply's source becomes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyValue {
    /// The VIP.
    pub vip: u32,
    /// The VIP's port.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}

/// A flow served on this machine.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    /// The client.
    pub source: u32,
    /// The VIP.
    pub vip: u32,
    /// The client's port.
    pub source_port: u16,
    /// The VIP's port.
    pub vip_port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

impl FlowKey {
    /// A key as packets name it.
    #[inline(always)]
    pub const fn new(source: u32, vip: u32, ports: crate::Ports, protocol: u8) -> Self {
        let (source_port, vip_port) = (ports.source, ports.destination);
        Self { source, vip, source_port, vip_port, protocol, reserved: [0; 3] }
    }
}

/// The instance that owns a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowValue {
    /// Its address.
    pub instance: u32,
}

/// What the programs know of their machine.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The machine's address: source of what it encapsulates, and target of relayed packets.
    pub address: u32,
    /// Index of the uplink.
    pub uplink: u32,
    /// Largest IP packet that the uplink carries.
    pub uplink_mtu: u32,
    /// Nanoseconds between two ICMP answers of one kind on one CPU, in the long run; 0 for no limit.
    pub icmp_interval: u32,
    /// 1: packets with an encapsulation must come from a prefix in FLEET.
    pub fleet_only: u32,
    /// 0: no events of flows. Else an event is told if a random number isn't greater; the largest one tells of all.
    pub flow_sample: u32,
}

/// A packet that came in fragments; the first of them carries the ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentKey {
    /// Who sent it.
    pub source: u32,
    /// For whom.
    pub destination: u32,
    /// Identification.
    pub id: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// A prefix of addresses that may encapsulate.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FleetKey {
    /// Length of the prefix in bits, host byte order.
    pub bits: u32,
    /// Its address.
    pub address: u32,
}
