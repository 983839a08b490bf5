//! Records between a location scheduler and its machine agents.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Bytes, Health, InstanceId, InstanceStatus, Isolation, LocationId, MachineId, MilliCpu, Port, ReasonCode,
    Resources, Workload,
};

/// One GPU of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Model, such as `H100`.
    pub model: String,
    /// Its whole memory.
    pub memory: Bytes,
}

/// Why a machine takes no work although it reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Condition {
    /// The reason.
    pub reason: ReasonCode,
    /// What was found, and what to do, as a sentence.
    pub message: String,
}

/// An image on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageState {
    /// Wanted, and nothing of it is there yet. Said by the location scheduler of machines that have said nothing.
    Cold,
    /// Being fetched: bytes there and in all.
    Pulling {
        /// Bytes on the machine.
        done: u64,
        /// Bytes in all, 0 while unknown.
        total: u64,
    },
    /// Ready to run.
    Warm,
    /// The last try to fetch it failed; it is tried again.
    Failed(Condition),
}

/// What a machine tells its location scheduler: at every change, and at every heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineReport {
    /// The machine.
    pub machine: MachineId,
    /// Changes at each start of the agent; a sequence starts anew with it.
    pub epoch: u64,
    /// Grows by one with each report; an older one never overwrites a newer one.
    pub sequence: u64,
    /// The machine's address in the fabric, to which routers send.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// Where instances get their addresses from.
    #[schema(value_type = String)]
    pub instance_cidr: Ipv4Net,
    /// Base URL of the agent's API.
    pub advertise: String,
    /// CPU for instances.
    pub cpu: MilliCpu,
    /// Memory for instances.
    pub memory: Bytes,
    /// Disk for instances.
    pub disk: Bytes,
    /// GPUs, by index.
    pub gpus: Vec<Gpu>,
    /// Isolations that its runtimes offer.
    pub isolations: Vec<Isolation>,
    /// Why it takes no work; empty where it does.
    pub conditions: Vec<Condition>,
    /// Images that it was told to have, by reference.
    pub images: BTreeMap<String, ImageState>,
    /// Every instance that it has, ended ones included until their assignment is gone.
    pub instances: Vec<InstanceStatus>,
    /// Up to where its agent knew what it should have before it wrote this; none before the agent has been told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
}

/// How much of what a machine should have has been taken back. Who knows a mark knows all that was taken back before it,
/// and says so by reporting it: time proves nothing about that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Mark {
    /// The location scheduler's process that says it. Numbers of different processes can't be compared.
    pub process: u64,
    /// Grows whenever something is taken back from the machine.
    pub number: u64,
}

/// A machine as the location scheduler shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineRecord {
    /// Its location.
    pub location: LocationId,
    /// Its last report.
    pub report: MachineReport,
    /// Whether its lease is alive.
    pub alive: bool,
    /// CPU that nobody has reserved.
    pub free_cpu: MilliCpu,
    /// Memory that nobody has reserved.
    pub free_memory: Bytes,
    /// Memory that nobody has reserved, for each GPU.
    pub free_gpu_memory: Vec<Bytes>,
}

/// What a machine should have: items of its watch stream, by key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineDesired {
    /// Run this. Key `instances/<instance>`; deleted when it should stop.
    Instance(Box<Assignment>),
    /// Have this image. Key `images/<reference>`.
    Image {
        /// Its reference.
        image: String,
        /// The higher, the sooner; [`crate::PRIORITY_AWAITED`] where something waits for it.
        priority: u8,
    },
    /// Report this from now on, with what is so once all of the rest is known. Key `mark`.
    Mark(Mark),
}

/// An instance that a machine should run: everything the agent needs, nothing about why it is here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Assignment {
    /// The instance.
    pub instance: InstanceId,
    /// What it belongs to (for logs and labels).
    pub workload: Workload,
    /// The location (for the container's environment).
    pub location: LocationId,
    /// Generation of the desired record.
    pub generation: u64,
    /// Image reference.
    pub image: String,
    /// Replaces the image's entrypoint and arguments.
    pub command: Option<Vec<String>>,
    /// Environment variables, added to the image's.
    pub env: BTreeMap<String, String>,
    /// Separation from the machine.
    pub isolation: Isolation,
    /// Limits.
    pub resources: Resources,
    /// Indexes of the machine's GPUs that it gets.
    pub gpus: Vec<u32>,
    /// Its address, out of the machine's instance CIDR.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// Ports that it serves.
    pub ports: Vec<Port>,
    /// Health checks.
    pub health: Health,
    /// Whether it is started again when it ends: true for deployments, false for jobs.
    pub restart: bool,
    /// How long it may run, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Takes no new connections and is about to be deleted.
    pub draining: bool,
}
