//! The programs in the kernel and their loader: packet by packet with BPF_PROG_TEST_RUN, and between namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

#[path = "../support/bed.rs"]
mod bed;
#[path = "../support/namespaces.rs"]
mod namespaces;
#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/packets6.rs"]
mod packets6;
#[path = "../support/random.rs"]
mod random;
#[path = "../support/random6.rs"]
mod random6;
#[path = "../support/world.rs"]
mod world;

mod cells;
mod differential;
mod flow_events;
mod instances;
mod ipv6;
mod live;
mod ordinary;
mod unusual;
mod upgrade;
mod vips;
