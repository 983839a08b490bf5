//! Runs instances on one machine: runtimes, cgroups, network namespaces, images, health checks.
//!
//! The agent watches what its location scheduler wants this machine to have, makes it so, and reports what is.
//! Each instance is one task that drives a small pure state machine (`instance/lifecycle.rs`). A container belongs
//! to its shim ([`shim`]), one process for each, so that containers outlive the agent: a new agent finds them by the
//! files below `data_dir` and goes on.
//!
//! Layout below `data_dir`:
//! - `images/`: the image store
//! - `instances/<instance>/`: `record.json` (written first, removed last), `bundle/`, `merged/`, `upper/`, `work/`,
//!   and `run/`, the present shim's folder
//! - `netns/<instance>`: the instance's network namespace, bind-mounted
//! - `logs/<instance>/`: `log` and `log.1`; kept for the last hundred instances that are gone
//! - `runtime/`: the OCI runtimes' own state
//!
//! Disk is reserved for an instance and not yet limited: an instance that writes more than it asked for is not
//! stopped.
//!
//! This crate must not know why an instance is here, nor about virtual IPs, routes or other machines.

mod agent;
mod api;
mod board;
mod bundle;
mod cgroup;
mod cleanup;
mod config;
mod files;
mod firewall;
mod health;
mod images;
mod instance;
mod logs;
mod machine;
mod network;
mod paths;
mod pidfd;
mod report;
mod rootfs;
mod runtime;
pub mod shim;

pub use agent::run;
pub use config::{Config, MachineResources, Reserved};
