//! Instances that move to another machine of their location: a copy starts there first.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{DeploymentName, InstanceId, MachineId};

/// Why instances move.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MoveCause {
    /// An instance of this deployment fits nowhere else.
    Room(DeploymentName),
    /// An operator drains its machine.
    Drain,
    /// Less GPU memory is left in pieces that are of no use.
    Tidying,
}

impl std::fmt::Display for MoveCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Room(newcomer) => write!(f, "makes room for {newcomer}"),
            Self::Tidying => write!(f, "so that less GPU memory is in useless pieces"),
            Self::Drain => write!(f, "leaves a machine that an operator drains"),
        }
    }
}

/// How far a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MoveStep {
    /// The copy's place isn't free yet, or isn't known.
    Waiting,
    /// The copy runs, and isn't ready yet.
    Starting,
    /// The copy takes the new connections, the old instance keeps its own.
    Draining,
    /// The old instance is gone.
    Done,
}

/// A move, under way or done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MoveStatus {
    /// Whose instance moves.
    pub deployment: DeploymentName,
    /// The instance that leaves.
    pub instance: InstanceId,
    /// Its machine.
    pub from: MachineId,
    /// The copy that takes its place, once it is there.
    pub copy: Option<InstanceId>,
    /// The copy's machine, once it is known.
    pub to: Option<MachineId>,
    /// How far it is.
    pub step: MoveStep,
    /// Why.
    pub cause: MoveCause,
    /// All that as a sentence.
    pub message: String,
}
