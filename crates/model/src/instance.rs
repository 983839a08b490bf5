//! What is observed of instances.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Assignment, AttemptId, InstanceId, LocationId, MachineId, Refusal, Workload};

/// Where an instance is in its life. Written by its machine agent; `Assigned` and `Lost` by the location
/// scheduler, for an instance that the agent hasn't reported yet or no longer reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstancePhase {
    /// Given to a machine.
    Assigned,
    /// The machine is fetching the image.
    Pulling,
    /// The container is being created.
    Starting,
    /// The container runs; `ready` says whether it takes traffic.
    Running,
    /// Between two starts.
    BackOff,
    /// Being ended: takes no new connections.
    Stopping,
    /// Ended by itself, with an exit code.
    Exited,
    /// Can't start, and the reason won't pass by itself.
    Failed,
    /// Its machine has stopped reporting.
    Lost,
}

/// One instance as its machine reports it, completed by the location scheduler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceStatus {
    /// The instance.
    pub instance: InstanceId,
    /// What it belongs to.
    pub workload: Workload,
    /// Generation of the desired record that it runs.
    pub generation: u64,
    /// The machine.
    pub machine: MachineId,
    /// Its address in the location's fabric.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// Where it is in its life.
    pub phase: InstancePhase,
    /// Whether it takes traffic.
    pub ready: bool,
    /// Starts after the first.
    pub restarts: u32,
    /// Of the last container that ended; 128 + n after signal n.
    pub exit_code: Option<i32>,
    /// When the present container started.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    /// When the last container ended.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
    /// Why it is not running or not ready.
    pub reason: Option<Refusal>,
}

impl InstanceStatus {
    /// Of an instance that nothing is known of but that a machine should run it.
    pub fn assigned(machine: &MachineId, assignment: &Assignment) -> Self {
        Self {
            instance: assignment.instance.clone(),
            workload: assignment.workload.clone(),
            generation: assignment.generation,
            machine: machine.clone(),
            address: assignment.address,
            phase: InstancePhase::Assigned,
            ready: false,
            restarts: 0,
            exit_code: None,
            started_at: None,
            ended_at: None,
            reason: None,
        }
    }
}

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobPhase {
    /// Waits for its window, for room, or for its next attempt.
    Queued,
    /// An attempt is placed in a location: its image is fetched, or its container starts.
    Starting,
    /// An attempt's container runs.
    Running,
    /// Ended with status 0.
    Succeeded,
    /// Ended with another status, or can't run, in every attempt.
    Failed,
    /// Ended by a user.
    Cancelled,
}

/// One attempt of a job as its location reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AttemptStatus {
    /// The attempt.
    pub attempt: AttemptId,
    /// The location that runs it.
    pub location: LocationId,
    /// Its instance, once a machine has it.
    pub instance: Option<InstanceStatus>,
    /// Why no machine has it.
    pub refusals: Vec<Refusal>,
}
