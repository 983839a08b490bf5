//! The router's configuration file.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    path::PathBuf,
};

use anyhow::ensure;
use anyplace_ebpf::Capacity;
use anyplace_model::{Bytes, MachineId};
use ipnet::Ipv4Net;
use serde::Deserialize;

/// `state-router.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Folder for the snapshot of the routes.
    pub data_dir: PathBuf,
    /// This machine.
    pub machine: MachineId,
    /// Base URL of the location scheduler.
    pub location_scheduler: String,
    /// File with the machine's token.
    pub token_file: PathBuf,
    /// The machine's address in the fabric.
    pub address: Ipv4Addr,
    /// Its IPv6 address, if it and its containers are to reach IPv6 virtual IPs; the agent's configuration must have it
    /// too.
    #[serde(default)]
    pub address6: Option<Ipv6Addr>,
    /// The interface to the fabric.
    pub uplink: String,
    /// A folder on a bpffs, for this machine alone.
    #[serde(default = "pin_dir")]
    pub pin_dir: PathBuf,
    /// Where `GET /metrics` answers.
    #[serde(default = "listen")]
    pub listen: SocketAddr,
    /// Ports of virtual IPs that fit. Sizes the kernel's maps when they are made (about 0.8 KiB each, at least 12 MiB); a
    /// change takes effect once the pinned maps are gone, after a reboot for instance.
    #[serde(default = "max_vip_ports")]
    pub max_vip_ports: u32,
    /// Where the machines of all locations are. Encapsulated packets from elsewhere are dropped and counted; empty: taken
    /// from anywhere.
    #[serde(default)]
    pub fleet: Vec<Ipv4Net>,
    /// While no scheduler answers, instances that seem dead take no new connections, unless less than this part of a virtual
    /// IP's instances would be left.
    #[serde(default = "liveness_floor_percent")]
    pub liveness_floor_percent: u8,
    /// The BGP daemon; without it, something else must bring packets for VIPs to the machine.
    #[serde(default)]
    pub bgp: Option<BgpConfig>,
    /// What is written of flows; nothing without it.
    #[serde(default)]
    pub flow_log: Option<FlowLogConfig>,
}

/// A log of some of the flows that are established at this machine's instances, and of some of the packets that are refused.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowLogConfig {
    /// One event in so many is written, chosen by chance.
    #[serde(default = "one_in")]
    pub one_in: NonZeroU32,
    /// The file; `flows.jsonl` in `data_dir` unless said. Older ones have a number behind their name, from 1.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Largest size of a file.
    #[serde(default = "file_size")]
    pub file_size: Bytes,
    /// How many files are kept, with the one that is written.
    #[serde(default = "files")]
    pub files: u32,
}

impl FlowLogConfig {
    /// Shortest that a file may be: some events.
    const MIN_FILE_BYTES: u64 = 4 << 10;
    /// Most files: each has to be renamed when one is full.
    const MAX_FILES: u32 = 1_000;

    /// Refuses what makes no log.
    ///
    /// # Errors
    /// A field is out of its range.
    pub fn check(&self) -> anyhow::Result<()> {
        let (size, files) = (self.file_size, self.files);
        let least = Bytes(Self::MIN_FILE_BYTES);
        ensure!(size >= least, "flow_log.file_size is {size}; set it to {least} or more");
        let most = Self::MAX_FILES;
        ensure!((1..=most).contains(&files), "flow_log.files is {files}; set it to 1 to {most}");
        Ok(())
    }
}

/// How to drive bird2.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BgpConfig {
    /// File that `bird.conf` includes and the router writes.
    pub include: PathBuf,
    /// Bird's control socket.
    pub control_socket: PathBuf,
}

fn listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7630))
}

fn max_vip_ports() -> u32 {
    Capacity::default().vips
}

const fn liveness_floor_percent() -> u8 {
    50
}

fn pin_dir() -> PathBuf {
    "/sys/fs/bpf/anyplace".into()
}

fn one_in() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(999)
}

fn file_size() -> Bytes {
    Bytes(16 << 20)
}

fn files() -> u32 {
    4
}
