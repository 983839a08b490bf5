//! What the programs count. Each counter exists once for each CPU; the loader adds them up.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident => $text:literal),* $(,)?) => {
        /// A global counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Counter {
            $($(#[$doc])* $name),*
        }

        impl Counter {
            /// All of them, in the order of the array.
            pub const ALL: &[Counter] = &[$(Counter::$name),*];

            /// The name that metrics use.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Counter::$name => $text),*
                }
            }
        }
    };
}

counters! {
    /// Packets for a VIP that entered the fleet at this machine.
    Packets => "packets",
    /// Their bytes, from the IP header on.
    Bytes => "bytes",
    /// Packets handed to an instance of this machine.
    Delivered => "delivered",
    /// Packets passed on because this hop doesn't own the flow.
    SecondHop => "second_hop",
    /// Packets from another location that were given an instance here.
    Relayed => "relayed",
    /// Replies rewritten and sent.
    Replies => "replies",
    /// Flows established at an instance of this machine: more than their first packet was seen.
    NewFlows => "new_flows",
    /// Flows of which one packet was seen: a SYN, a datagram, or the middle of a connection that was forgotten.
    Embryonic => "embryonic",
    /// ICMP errors about a VIP's packets, sent on to the instance that sent those.
    IcmpErrors => "icmp_errors",
    /// Echo requests to a VIP that were answered.
    EchoReplies => "echo_replies",
    /// Clients told to send smaller packets.
    TooBigSent => "too_big_sent",
    /// Dropped: the VIP has no backend (for relayed packets: none in this location).
    NoBackend => "no_backend",
    /// Dropped: the last hop names an instance that isn't here or doesn't serve that port.
    NoInstance => "no_instance",
    /// Dropped: a VIP's address, but none of its ports.
    UnknownPort => "unknown_port",
    /// Dropped: shorter than its headers say, or an encapsulation that isn't ours.
    Malformed => "malformed",
    /// Dropped: a fragment of an ICMP message to a VIP.
    Fragment => "fragment",
    /// Dropped: a fragment to a VIP whose first part wasn't seen here, or not recently.
    FragmentUnknown => "fragment_unknown",
    /// Dropped: an echo request with IP options or IPv6 extension headers; an IPv6 packet with more of those than are
    /// read, or with hops of its own (a routing header).
    Options => "options",
    /// Dropped: an ICMP error that quotes no packet of a VIP's port.
    IcmpUnmatched => "icmp_unmatched",
    /// Dropped: an echo request beyond the rate limit, or a packet too big beyond the rate of telling.
    IcmpLimited => "icmp_limited",
    /// Dropped: an encapsulation from outside the fleet.
    ForeignSource => "foreign_source",
    /// Dropped: with the encapsulation it wouldn't fit the uplink.
    TooBig => "too_big",
    /// Dropped: passed on too often.
    TtlExceeded => "ttl_exceeded",
    /// Dropped: a helper of the kernel failed.
    HelperFailed => "helper_failed",
}

/// Number of global counters.
const COUNT: usize = Counter::ALL.len();

/// All global counters of one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Indexed by [`Counter`].
    pub values: [u64; COUNT],
}

/// Counters of one VIP on one CPU, at ingress.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipCounters {
    /// Packets.
    pub packets: u64,
    /// Bytes from the IP header on.
    pub bytes: u64,
    /// TCP connection attempts (SYN), repeats included.
    pub connections: u64,
}

/// Counters of one VIP port at one instance of this machine on one CPU, at the target.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InstanceCounters {
    /// Clients' packets handed to the instance.
    pub packets: u64,
    /// Their bytes from the IP header on, without the encapsulation.
    pub bytes: u64,
    /// Flows established there: more than their first packet was seen.
    pub new_flows: u64,
}

// SAFETY: repr(C) of u64 only.
unsafe impl crate::Layout for Counters {}
// SAFETY: repr(C) of u64 only.
unsafe impl crate::Layout for InstanceCounters {}
// SAFETY: repr(C) of u64 only.
unsafe impl crate::Layout for VipCounters {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_stands_at_its_own_index() {
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
        }
    }
}
