//! Why something is not as asked: an enumerated code, how many candidates it ruled out, and a sentence.

use serde::{Deserialize, Serialize};

use crate::{LocationId, MoveStatus};

/// Every reason for which work can wait, be refused or fail. Stable: clients match on it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum ReasonCode {
    /// Not looked at yet by the scheduler.
    Unscheduled,
    /// No location has joined.
    NoLocations,
    /// The location's region, country or labels aren't among those asked for.
    PlacementConstraint,
    /// The location or machine is draining or withdrawn.
    Draining,
    /// The location or machine has stopped reporting.
    Lost,
    /// Free CPU is less than asked for.
    InsufficientCpu,
    /// Free memory is less than asked for.
    InsufficientMemory,
    /// Free disk is less than asked for.
    InsufficientDisk,
    /// No GPU there at all.
    NoGpu,
    /// No GPU of an allowed model there.
    NoGpuModel,
    /// GPUs of the model are there, but not enough of them have enough free memory.
    InsufficientGpu,
    /// No machine there offers the isolation asked for.
    IsolationUnavailable,
    /// The machine can't limit resources (no usable cgroup hierarchy).
    NoCgroups,
    /// No free instance address on the machine.
    NoAddress,
    /// The location has no machine that reports.
    NoMachines,
    /// The scheduler of that level took it, and the next level hasn't answered yet.
    AwaitingLocation,
    /// The machine is fetching the image.
    PullingImage,
    /// The image isn't in the registry.
    ImageNotFound,
    /// What the registry served doesn't have the digest that was asked for.
    DigestMismatch,
    /// The registry doesn't answer.
    RegistryUnreachable,
    /// The registry refused the credentials.
    RegistryUnauthorized,
    /// The container is starting.
    Starting,
    /// The runtime refused to start the container.
    StartFailed,
    /// The readiness check fails.
    NotReady,
    /// The liveness check failed, so the instance is restarted.
    Unhealthy,
    /// It exited and waits for its next start.
    BackOff,
    /// It exited with a status other than 0.
    ExitedNonZero,
    /// It ran longer than its `timeout`.
    TimedOut,
    /// It used more memory than its limit.
    OutOfMemory,
    /// No location is in its off-peak window, or used so little that it is off-peak all the same.
    OutsideOffPeakWindow,
    /// Its team's jobs hold as much as the team's quota allows.
    OverQuota,
    /// It hadn't started by its deadline.
    DeadlinePassed,
    /// What it asks for is kept free for deployments.
    Headroom,
    /// Off-peak jobs are ending to make room for it.
    AwaitingRoom,
    /// It made way for a deployment.
    Preempted,
    /// A user cancelled it.
    Cancelled,
    /// No free virtual IP is left in the pools.
    NoVirtualIp,
    /// Other instances move to other machines, so that it fits.
    MakingRoom,
    /// No few moves of other instances would make room there.
    NoMoves,
}

impl std::fmt::Display for ReasonCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The serialised form is the name that users see everywhere.
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => f.pad(&name),
            _ => write!(f, "{self:?}"),
        }
    }
}

/// Candidates ruled out for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// Why.
    pub reason: ReasonCode,
    /// How many candidates (locations, machines or instances) it concerns.
    pub count: u32,
    /// What was asked for and what is there, as a sentence.
    pub message: String,
}

/// What the scheduler thought of one location.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LocationExplanation {
    /// The location.
    pub location: LocationId,
    /// Instances placed there now.
    pub placed: u32,
    /// Further instances that would fit there now.
    pub room_for: u32,
    /// New connections of the deployment that enter there, a second, smoothed over a minute; none where nobody counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entering: Option<f64>,
    /// By how many milliseconds an instance there would shorten the average connection's round trip to the nearest
    /// instance; none without demand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearer_ms: Option<f64>,
    /// Why not more, or why none.
    pub refusals: Vec<Refusal>,
    /// Its instances that move or moved there, and those of others that make room for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub moves: Vec<MoveStatus>,
}

/// Answer to `anyplace why`: where something is, or why it isn't.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Explanation {
    /// What was asked about, such as `deployment/hello`.
    pub subject: String,
    /// The answer in one sentence.
    pub summary: String,
    /// Instances or attempts asked for.
    pub wanted: u32,
    /// Instances or attempts placed.
    pub placed: u32,
    /// Instances ready.
    pub ready: u32,
    /// Reasons summed over all locations, most candidates first.
    pub refusals: Vec<Refusal>,
    /// Each location's part.
    pub locations: Vec<LocationExplanation>,
    /// What comes nearest to fitting, as a sentence, where nothing fits.
    pub nearest_fit: Option<String>,
}
