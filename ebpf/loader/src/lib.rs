//! Loads, pins and updates the data plane: the eBPF programs of `ebpf/programs` and their maps.
//!
//! Everything that forwards packets is pinned in a bpffs, so the process that owns a [`DataPlane`] may be killed at
//! any moment: the last tables stay in force. The next process adopts the maps, and puts its own programs into the
//! existing links, each in one atomic step.
//!
//! ```text
//! PIN_DIR/v2/                  one folder for each layout version
//!   CONFIG CONFIG6 BUCKETS INSTANCES FLEET RATES COUNTERS VIP_COUNTERS INSTANCE_COUNTERS WALK
//!   INSTANCE_FILTER FLOW_EVENTS FLOW_EVENTS_LOST
//!   VIPS PORTS REPLIES FLOWS EMBRYONIC FRAGMENTS, and with a 6 behind the name those for VIPs that are IPv6 addresses
//!   links/ingress_IFINDEX  links/target_IFINDEX  links/target6_IFINDEX  links/reply_IFINDEX
//! ```
//!
//! All calls are synchronous and must come from a thread in the machine's network namespace. This crate must not know
//! why a table looks as it does: it takes finished buckets.

mod allocator;
mod arena;
mod attach;
mod counter_slots;
mod counters;
mod error;
mod filter;
mod fleet;
mod flow;
mod flow_events;
mod instances;
mod maps;
mod plane;
mod sys;
mod types;
mod vips;

pub use anyplace_ebpf_common::{
    Counter, InstanceCounters, Outcome, VipCounters, bucket_index, flow_hash, flow_hash6,
};
pub use attach::XdpMode;
pub use counters::{Meters, Totals};
pub use error::Error;
pub use flow_events::{FlowEvent, FlowEvents};
pub use maps::MapMemory;
pub use plane::{Capacity, DataPlane, Options};
pub use types::{Bucket, Instance, Port, Protocol, VipKey, VipTable};
