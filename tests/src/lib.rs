//! The testbed: locations, machines, edges and clients in network namespaces.
//!
//! Everything is real but the distance: routing daemons speak BGP, machines have uplinks, packets cross links whose
//! delay a user-space relay adds. The end-to-end scenarios and `cargo xtask demo` run on it. It needs root, and sends
//! traffic inside its own namespaces only.
//!
//! The testbed is synchronous and small on purpose: `xtask` links it, and `xtask` has to build on a machine where
//! nothing is installed yet.
//!
//! This crate must not know how a role works inside: it writes the documented config files, starts the one binary, and
//! looks from outside.

mod bird;
mod cgroups;
mod cleanup;
mod http;
mod image;
mod leftovers;
mod load;
mod mounts;
mod netns;
mod network;
mod node;
pub mod platform;
mod procs;
pub mod relay;
mod testbed;
mod topology;
mod xdp_pass;

pub use bird::vip_include;
pub use cleanup::cleanup;
pub use http::{Response, http_get};
pub use image::{HELLO_ENTRY, write_hello_image};
pub use leftovers::leftovers;
pub use load::{Load, LoadReport, Request, combine};
pub use node::{Node, Process};
pub use platform::Platform;
pub use testbed::{Testbed, require_root, target_dir};
pub use topology::{Location, Machine, Topology, VIP_PREFIX, VIP_PREFIX6};
pub use xdp_pass::attach_pass;
