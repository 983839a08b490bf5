//! Requests and responses of the global scheduler's API.
//!
//! | Method and path | Body | Answer |
//! |---|---|---|
//! | `PUT /v1/deployments/{name}` | `DeploymentSpec` | `ApplyOutcome` |
//! | `GET /v1/deployments[/{name}]` | | `DeploymentView` (list: array) |
//! | `DELETE /v1/deployments/{name}` | | 204 |
//! | `POST /v1/jobs` (`Idempotency-Key`) | `JobSpec` | `JobView`; 409 `already_exists`, `conflict` |
//! | `GET /v1/jobs[/{name}]` | | `JobView` (list: array) |
//! | `GET /v1/jobs?array=` | | array of `JobView`: each index of an array |
//! | `POST /v1/jobs/{name}/cancel` | | `JobView` |
//! | `DELETE /v1/jobs/{name}` | | 204, once it has ended |
//! | `GET /v1/{deployments,jobs}/{name}/why` | | `Explanation` |
//! | `GET /v1/{deployments,jobs}/{name}/logs?instance=&follow=&tail=` | | `text/plain` stream |
//! | `GET /v1/deployments/{name}/routes` | | `RoutesView` |
//! | `GET /v1/instances` | | array of `InstanceStatus` with location |
//! | `GET /v1/teams[/{name}]` | | `TeamView` (list: array) |
//! | `PUT /v1/teams/{name}` | `TeamSettings` | `TeamView` |
//! | `GET /v1/locations[/{name}]` | | `LocationRecord` (list: array) |
//! | `PATCH /v1/locations/{name}` | `LocationSettings` | `LocationRecord` |
//! | `PUT /v1/prewarm` | `Prewarm` | `PrewarmView` |
//! | `GET /v1/prewarm` | | array of `PrewarmView` |
//! | `DELETE /v1/prewarm?image=` | | 204 |
//! | `GET /v1/images/in-use` | | array of image references, for registries |
//! | `GET /v1/capacity` | | array of `CapacityView` |
//! | `GET /v1/latency?from=` | | array of `LatencyView` |
//! | `GET /v1/events?subject=deployment/hello` | | array of `Event`, oldest first |
//! | `GET /v1/export` | | everything stored, as NDJSON; for admins |
//! | `POST /v1/tokens` | `TokenRequest` | `NewToken` |
//! | `GET /v1/watch/{deployments,jobs}?epoch=&from_revision=` | | NDJSON of `WatchEvent<DeploymentView / JobView>` |
//! | `GET /v1/watch/locations/{name}/desired?epoch=&from_revision=&patches=` | | NDJSON of `WatchEvent<LocationDesired>`, or frames with what differs |
//! | `PUT /v1/locations/{name}/report` | `LocationReport` | 204 |
//! | `GET /healthz`, `GET /openapi.json` | | without a token |

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyplace_model::{
    Advert, DeploymentName, DeploymentSpec, Held, ImageState, InstanceStatus, JobPhase, JobSpec, LocationId,
    MachineId, Prewarm, Refusal, Route, Team, TeamSettings, Traffic,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What `PUT /v1/deployments/{name}` did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ApplyOutcome {
    /// Whether it is new.
    pub created: bool,
    /// Whether anything changed.
    pub changed: bool,
    /// The deployment now.
    pub deployment: DeploymentView,
}

/// A deployment in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentPhase {
    /// Fewer instances placed than asked for; `reasons` say why.
    Pending,
    /// All are placed, and not all are ready in the present generation.
    Progressing,
    /// All are ready in the present generation.
    Ready,
}

/// What one location does for a deployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LocationShare {
    /// The location.
    pub location: LocationId,
    /// Instances that it was asked to run.
    pub wanted: u32,
    /// Instances ready in the present generation.
    pub ready: u32,
    /// Its instances.
    pub instances: Vec<InstanceStatus>,
    /// Why it runs fewer than wanted.
    pub refusals: Vec<Refusal>,
}

/// A deployment: what was asked for, and what is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeploymentView {
    /// Name (also in `spec`).
    pub name: DeploymentName,
    /// Grows with each change of the spec.
    pub generation: u64,
    /// The address that works from everywhere.
    #[schema(value_type = String)]
    pub vip: Ipv4Addr,
    /// The same for IPv6, where the platform has a pool of such addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vip6: Option<Ipv6Addr>,
    /// When it was first applied.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: jiff::Timestamp,
    /// In a word.
    pub phase: DeploymentPhase,
    /// Instances wanted.
    pub wanted: u32,
    /// Instances ready in the present generation.
    pub ready: u32,
    /// Why it isn't `ready`, most frequent first.
    pub reasons: Vec<Refusal>,
    /// What each location does.
    pub locations: Vec<LocationShare>,
    /// What was asked for.
    pub spec: DeploymentSpec,
}

/// The routes of a deployment's virtual IPs, as each location's routers follow them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RoutesView {
    /// The deployment.
    pub deployment: DeploymentName,
    /// Its virtual IPs.
    #[schema(value_type = Vec<String>)]
    pub vips: Vec<IpAddr>,
    /// Every location that has joined.
    pub locations: Vec<LocationRoutes>,
}

/// The routes of a deployment's virtual IPs in one location.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LocationRoutes {
    /// The location.
    pub location: LocationId,
    /// Withdrawn by an operator: no packet of a client enters there.
    pub withdrawn: bool,
    /// One for each virtual IP that the location knows.
    pub routes: Vec<Route>,
    /// What it said last of the deployment's new connections; none where load moves nothing to other locations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Traffic>,
    /// Measured round trips, in milliseconds, to the other locations that serve it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub latency_ms: BTreeMap<LocationId, f64>,
    /// Why the location couldn't be asked; its routers keep the last routes.
    pub problem: Option<String>,
}

/// The round trip between two locations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LatencyView {
    /// From this location,
    pub from: LocationId,
    /// to this one and back.
    pub to: LocationId,
    /// In milliseconds.
    pub latency_ms: f64,
    /// Measured by the routers of one of them; else estimated by the distance.
    pub measured: bool,
    /// Great-circle distance in kilometres.
    pub distance_km: f64,
}

/// Which round trips.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LatencyQuery {
    /// Only those from this location.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<LocationId>,
}

/// A job: what was asked for, and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobView {
    /// Name (also in `spec`).
    pub name: anyplace_model::JobName,
    /// In a word.
    pub phase: JobPhase,
    /// When it was submitted.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: jiff::Timestamp,
    /// Present or last attempt; 0 before the first.
    pub attempt: u32,
    /// Place in the queue, from 1, while queued: those that wait would start in this order, were there room.
    pub queue_position: Option<u32>,
    /// When it can start at the earliest, as far as is known, while it waits for a window.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub predicted_start: Option<jiff::Timestamp>,
    /// Where the attempt is.
    pub location: Option<LocationId>,
    /// The attempt's instance; kept after its end.
    pub instance: Option<InstanceStatus>,
    /// Status of the last attempt that ended.
    pub exit_code: Option<i32>,
    /// Why it waits or has failed.
    pub reasons: Vec<Refusal>,
    /// Attempts that made way for deployments; they don't count as tries.
    #[serde(default)]
    pub preemptions: u32,
    /// Of an array: where its indexes are in their life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub array: Option<ArrayCounts>,
    /// Of an index: which one it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index_of: Option<ArrayIndex>,
    /// What was asked for.
    pub spec: JobSpec,
}

/// How many of an array's indexes are where in their life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ArrayCounts {
    /// All indexes.
    pub size: u32,
    /// Wait for an attempt.
    pub queued: u32,
    /// Have an attempt in a location that doesn't run yet.
    pub starting: u32,
    /// Run.
    pub running: u32,
    /// Ended with status 0.
    pub succeeded: u32,
    /// Ended otherwise.
    pub failed: u32,
    /// Ended by a user.
    pub cancelled: u32,
}

impl ArrayCounts {
    /// The number of those in a phase.
    pub const fn of(&mut self, phase: JobPhase) -> &mut u32 {
        match phase {
            JobPhase::Queued => &mut self.queued,
            JobPhase::Starting => &mut self.starting,
            JobPhase::Running => &mut self.running,
            JobPhase::Succeeded => &mut self.succeeded,
            JobPhase::Failed => &mut self.failed,
            JobPhase::Cancelled => &mut self.cancelled,
        }
    }

    /// Those that haven't ended.
    pub const fn unfinished(&self) -> u32 {
        self.queued + self.starting + self.running
    }

    /// All of them in a word: where the furthest is that hasn't ended, else the worst end.
    pub const fn phase(&self) -> JobPhase {
        if self.running > 0 {
            JobPhase::Running
        } else if self.starting > 0 {
            JobPhase::Starting
        } else if self.queued > 0 {
            JobPhase::Queued
        } else if self.failed > 0 {
            JobPhase::Failed
        } else if self.cancelled > 0 {
            JobPhase::Cancelled
        } else {
            JobPhase::Succeeded
        }
    }
}

impl std::fmt::Display for ArrayCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { size, queued, starting, running, succeeded, failed, cancelled } = self;
        write!(f, "{size}:")?;
        let parts = [
            (queued, "queued"),
            (starting, "starting"),
            (running, "running"),
            (succeeded, "succeeded"),
            (failed, "failed"),
            (cancelled, "cancelled"),
        ];
        for (place, (count, word)) in parts.into_iter().filter(|(count, _)| **count > 0).enumerate() {
            write!(f, "{} {count} {word}", if place > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// Which index of which array a job is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ArrayIndex {
    /// The array.
    pub array: anyplace_model::JobName,
    /// From 0.
    pub index: u32,
}

/// Which jobs are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct JobQuery {
    /// The indexes of this array, in place of all jobs and arrays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub array: Option<anyplace_model::JobName>,
}

/// A team: what an operator set, and what its jobs hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TeamView {
    /// The team.
    pub team: Team,
    /// Weight and quota.
    pub settings: TeamSettings,
    /// What the attempts of its jobs hold.
    pub held: Held,
    /// Thousandths of what all locations have, of that resource of which it holds the largest part. Divided by the weight,
    /// it decides whose turn it is: the least goes first.
    pub share_permille: u32,
    /// Jobs with an attempt in a location.
    pub placed: u32,
    /// Jobs that wait for an attempt.
    pub queued: u32,
}

/// A wish for warm images: what was asked for, and how far it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PrewarmView {
    /// What was asked for.
    pub spec: Prewarm,
    /// Machines that have the image.
    pub warm: u32,
    /// Machines that should have it.
    pub machines: u32,
    /// How far it is in each location that reports.
    pub locations: Vec<PrewarmShare>,
}

/// How far a wish is in one location.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PrewarmShare {
    /// The location.
    pub location: LocationId,
    /// The image's state on each machine that was chosen for it.
    #[schema(value_type = BTreeMap<String, ImageState>)]
    pub machines: BTreeMap<MachineId, ImageState>,
}

/// Which wish to delete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PrewarmQuery {
    /// The image's reference.
    pub image: String,
}

/// Capacity of a location.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CapacityView {
    /// The location.
    pub location: LocationId,
    /// Whether it reports.
    pub alive: bool,
    /// Withdrawn by an operator.
    pub withdrawn: bool,
    /// Draining.
    pub draining: bool,
    /// Whether it is off-peak now: inside its window, or with less reserved than `off_peak_below_percent`.
    pub off_peak_now: bool,
    /// Instances there.
    pub instances: u32,
    /// What it could take.
    pub advert: Advert,
}

/// How much an event matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventSeverity {
    /// As planned.
    Normal,
    /// Someone may want to look.
    Warning,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
    /// To what, such as `deployment/hello` or `location/ams`.
    pub subject: String,
    /// How much it matters.
    pub severity: EventSeverity,
    /// What, as a sentence.
    pub message: String,
}

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Read everything.
    Viewer,
    /// And apply and delete deployments and jobs.
    Deployer,
    /// And everything else.
    Admin,
    /// A location scheduler: report and watch its own location.
    Location,
}

/// To what a token is limited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenScope {
    /// The only location, for the role `location`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<LocationId>,
}

/// A wish for a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// What it allows.
    pub role: Role,
    /// To what it is limited.
    #[serde(default)]
    pub scope: TokenScope,
    /// How long it is good; for ever without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<anyplace_model::DurationMs>,
}

/// A new token. The server keeps only its hash, so this is the only time that it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewToken {
    /// The secret.
    pub token: String,
    /// Until when it is good.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<jiff::Timestamp>,
}

/// Query of the log endpoints, at the global scheduler, the location scheduler and the machine agent alike.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogQuery {
    /// Only this instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// Keep the stream open and send what comes.
    pub follow: bool,
    /// Only the last lines; all that is kept without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tail: Option<u32>,
}
