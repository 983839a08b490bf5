//! What the eBPF programs and their loader must agree on: map layouts, the wire format, the flow hash.
//!
//! Addresses and ports in these structures hold the bytes of the packet (network byte order) in a `u32` or `u16`,
//! so that the programs compare and copy them without swapping. [`address`] and [`port`] convert.
//!
//! A change of any layout needs a new [`SCHEMA`]: maps outlive the process that made them, and a loader adopts the
//! maps that it finds only under its own schema's folder.

#![cfg_attr(not(test), no_std)]

mod counters;
mod events;
mod filter;
mod hash;
mod layout;
mod layout6;
mod wire;

pub use counters::{Counter, Counters, InstanceCounters, VipCounters};
pub use events::{FLOW_EVENTS_BYTES, FlowEvent, Outcome, flow_sample, mapped};
pub use filter::{FILTER_WORDS, filter_bit};
pub use hash::{bucket_index, flow_hash, flow_hash6, source_port};
pub use layout::{
    Bucket, Config, FleetKey, FlowKey, FlowValue, FragmentKey, INTERFACE_NAME_BYTES, InstanceValue, Layout,
    PortKey, PortValue, Range, ReplyKey, ReplyValue, VipKey, VipValue,
};
pub use layout6::{
    Address6, Config6, FlowKey6, FragmentKey6, FragmentValue6, PortKey6, ReplyValue6, VipKey6, Walk,
};
pub use wire::{
    ENCAPSULATION_BYTES, Encapsulation, GUE_FLAGS_AND_PROTOCOL, GUE_FLAGS_AND_PROTOCOL_IPV6, GUE_PORT, HOPS,
    INSTANCE_PREFIX, Ipv4Header, Ipv6Header, Ports, TTL, UdpHeader, instance_address, ipv4_checksum,
};

/// Version of the map layouts and of the wire format; also the name of the pin folder.
pub const SCHEMA: &str = "v2";

/// Slots of the bucket arena (8 bytes each): 8 MiB. 1,024 VIP ports with two tables of 256 take half of it; an update
/// needs room for the new tables beside the old.
pub const ARENA_BUCKETS: u32 = 1 << 20;
/// Bound on VIPs (address, port, protocol), address markers included.
pub const MAX_VIPS: u32 = 16_384;
/// Bound on instances of one machine.
pub const MAX_INSTANCES: u32 = 4_096;
/// Bound on served ports of all instances of one machine.
pub const MAX_PORTS: u32 = 16_384;
/// Slots of the counters by VIP port and instance (24 bytes on each CPU). The first is that of ports without a slot of their
/// own: those beyond the others, and those from a router that had no such counters.
pub const MAX_INSTANCE_COUNTERS: u32 = 16_384;
/// Bound on established flows of one machine (88 bytes each); the least recently used is forgotten first.
pub const MAX_FLOWS: u32 = 131_072;
/// Bound on flows of which one packet was seen; a flood of those forgets only its like.
pub const MAX_EMBRYONIC: u32 = 65_536;
/// Bound on packets whose fragments are on their way.
pub const MAX_FRAGMENTS: u32 = 16_384;
/// Extension headers of an IPv6 packet that are read; one with more is dropped.
pub const MAX_EXTENSIONS: u8 = 6;
/// Bound on prefixes of the fleet.
pub const MAX_FLEET: u32 = 4_096;
/// ICMP answers of one kind on one CPU that may follow each other at once.
pub const ICMP_BURST: u32 = 100;

const _: () = assert!(MAX_INSTANCE_COUNTERS <= 1 << 16, "PortValue::counter names each of them");

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// An IPv4 address as it stands in a packet.
pub const fn address(octets: [u8; 4]) -> u32 {
    u32::from_ne_bytes(octets)
}

/// An IPv6 address as it stands in a packet.
pub const fn address6(octets: [u8; 16]) -> Address6 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
    [address([a, b, c, d]), address([e, f, g, h]), address([i, j, k, l]), address([m, n, o, p])]
}

/// A port as it stands in a packet; its own inverse.
pub const fn port(host_order: u16) -> u16 {
    host_order.to_be()
}
