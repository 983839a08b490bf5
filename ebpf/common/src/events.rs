//! Events of flows: what the programs tell the flow log through a ring buffer.

use crate::{Address6, Counter};

/// Bytes of the ring buffer, a power of two: 4,096 events, which take their 56 bytes and a header of 8 each.
pub const FLOW_EVENTS_BYTES: u32 = 1 << 18;

/// A flow that was established at an instance, or a packet that was refused.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// When, on the kernel's monotonic clock.
    pub time_ns: u64,
    /// The client; an IPv4 address in the form of an IPv6 one, see [`mapped`].
    pub source: Address6,
    /// The VIP, likewise.
    pub vip: Address6,
    /// The instance that got the flow; 0 if it was refused.
    pub instance: u32,
    /// The client's port.
    pub source_port: u16,
    /// The VIP's port.
    pub vip_port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// An [`Outcome`].
    pub outcome: u8,
    /// Zero.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<FlowEvent>() == 56);
// SAFETY: repr(C) of integers; the asserted size is the sum of the fields.
unsafe impl crate::Layout for FlowEvent {}

/// What became of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// Established at an instance: its second packet came there.
    Established,
    /// A packet was dropped because the VIP has no backend.
    NoBackend,
    /// A packet was dropped because the last hop's instance isn't there or doesn't serve that port.
    NoInstance,
}

impl Outcome {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Established, Self::NoBackend, Self::NoInstance];

    /// The name that logs use: for refusals, that of their counter.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::NoBackend => Counter::NoBackend.name(),
            Self::NoInstance => Counter::NoInstance.name(),
        }
    }
}

/// An IPv4 address in the form of an IPv6 one (RFC 4291, 2.5.5.2).
#[inline(always)]
pub const fn mapped(address: u32) -> Address6 {
    [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), address]
}

/// What [`crate::Config::flow_sample`] is for one event in so many; 0 events for 0.
pub const fn flow_sample(one_in: u32) -> u32 {
    match u32::MAX.checked_div(one_in) {
        Some(sample) => sample,
        None => 0,
    }
}
