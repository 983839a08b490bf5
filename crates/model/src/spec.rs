//! What users write: deployments and jobs. One model for YAML, TOML, JSON and the API.

use std::{collections::BTreeMap, num::NonZeroU16};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Bytes, DEFAULT_PRIORITY, DeploymentName, DurationMs, JobName, MilliCpu, Team, prewarm::default_priority,
};

/// A parsed spec file.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Spec {
    /// `kind: Deployment`.
    Deployment(Box<DeploymentSpec>),
    /// `kind: Job`.
    Job(Box<JobSpec>),
}

/// A long-running app behind one virtual IP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeploymentSpec {
    /// Always `Deployment`.
    pub kind: DeploymentKind,
    /// Unique name.
    pub name: DeploymentName,
    /// The team that owns it.
    #[serde(default)]
    pub team: Team,
    /// Image reference: `[host/]repository[:tag][@digest]`; without a host, in the platform's registry.
    pub image: String,
    /// Replaces the image's entrypoint and arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Environment variables, added to the image's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// How strongly instances are separated from the machine.
    #[serde(default)]
    pub isolation: Isolation,
    /// What each instance gets, and is limited to.
    #[serde(default)]
    pub resources: Resources,
    /// Where the virtual IP listens and what it leads to.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// How many instances.
    #[serde(default)]
    pub instances: Instances,
    /// Where instances may run.
    #[serde(default)]
    pub placement: PlacementConstraints,
    /// How to tell that an instance works.
    #[serde(default)]
    pub health: Health,
    /// How loaded an instance is, and how loaded it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadTarget>,
}

/// Work that runs once to its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Always `Job`.
    pub kind: JobKind,
    /// Unique name.
    pub name: JobName,
    /// The team that owns it.
    #[serde(default)]
    pub team: Team,
    /// Image reference: `[host/]repository[:tag][@digest]`; without a host, in the platform's registry.
    pub image: String,
    /// Replaces the image's entrypoint and arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Environment variables, added to the image's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// How strongly it is separated from the machine.
    #[serde(default)]
    pub isolation: Isolation,
    /// What it gets, and is limited to.
    #[serde(default)]
    pub resources: Resources,
    /// Where it may run.
    #[serde(default)]
    pub placement: PlacementConstraints,
    /// When it may run.
    #[serde(default)]
    pub scheduling_policy: SchedulingPolicy,
    /// 0 to 100: of one team's jobs that wait, one of higher priority goes first. 50 unless said.
    #[serde(default = "default_priority", skip_serializing_if = "is_default_priority")]
    #[schema(minimum = 0, maximum = 100)]
    pub priority: u8,
    /// No attempt starts after this time: a job that hasn't started by then has failed. Without it, it waits as long as
    /// it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub deadline: Option<Timestamp>,
    /// So many jobs from one submission: 1 to 1000 indexes, from 0, each with attempts of its own. Index 7 of the array
    /// `sweep` is the job `sweep-7`; its container finds 7 in `ANYPLACE_JOB_INDEX`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1000)]
    pub array: Option<u32>,
    /// How often it is tried in all when it fails or its machine is lost: 1 to 10.
    #[serde(default = "one")]
    pub max_attempts: u32,
    /// How long an attempt may run; without it, as long as it wants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationMs>,
}

/// The constant `Deployment`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum DeploymentKind {
    /// The only value.
    #[default]
    Deployment,
}

/// The constant `Job`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum JobKind {
    /// The only value.
    #[default]
    Job,
}

const fn one() -> u32 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_default_priority(priority: &u8) -> bool {
    *priority == DEFAULT_PRIORITY
}

/// How strongly an instance is separated from the machine; the runtime follows from it.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Namespaces, cgroups, seccomp on the machine's kernel (crun or runc).
    #[default]
    Container,
    /// A kernel of its own in user space (gVisor's runsc).
    Sandbox,
    /// A virtual machine.
    Microvm,
}

/// Resources of one instance: reserved for it, and its limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// CPU; 100m unless said.
    pub cpu: MilliCpu,
    /// Memory; 64Mi unless said.
    pub memory: Bytes,
    /// Disk for what the instance writes; 256Mi unless said.
    pub disk: Bytes,
    /// GPUs; none unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuRequest>,
}

impl Default for Resources {
    fn default() -> Self {
        Self { cpu: MilliCpu(100), memory: Bytes(64 << 20), disk: Bytes(256 << 20), gpu: None }
    }
}

/// GPUs of one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuRequest {
    /// How many different GPUs: 1 to 16.
    #[serde(default = "one")]
    pub count: u32,
    /// Memory on each of them; without it, whole GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// Allowed models; any where empty.
    #[serde(default)]
    pub models: Vec<String>,
}

/// Transport protocol of a port.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the virtual IP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// On the virtual IP: 1 to 65535.
    #[schema(value_type = u16, minimum = 1)]
    pub port: NonZeroU16,
    /// Inside the container; the same as `port` unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u16>, minimum = 1)]
    pub container_port: Option<NonZeroU16>,
    /// `tcp` or `udp`.
    #[serde(default)]
    pub protocol: Protocol,
}

impl Port {
    /// The port that the container listens on.
    pub fn container_port(&self) -> u16 {
        self.container_port.unwrap_or(self.port).get()
    }
}

/// How many instances a deployment has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Instances {
    /// At least so many.
    #[serde(default = "one")]
    pub min: u32,
    /// At most so many; the same as `min` unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
}

impl DeploymentSpec {
    /// New connections a second that an instance should have, where the spec says it.
    pub fn connections_per_second(&self) -> Option<f64> {
        let load = self.load.as_ref().filter(|load| load.metric == LoadMetric::ConnectionsPerSecond)?;
        Some(load.target)
    }
}

impl Default for Instances {
    fn default() -> Self {
        Self { min: 1, max: None }
    }
}

/// Where instances may run; each empty list or map allows everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PlacementConstraints {
    /// Allowed regions, such as `eu`.
    pub regions: Vec<String>,
    /// Allowed countries (ISO 3166-1 alpha-2), such as `NL`.
    pub countries: Vec<String>,
    /// Labels that the location must have.
    pub labels: BTreeMap<String, String>,
}

/// How to tell that an instance works.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Failing restarts the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness: Option<Check>,
    /// Traffic comes only while it passes; without one, from the start of the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Check>,
}

/// One health check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// GET this path and port inside the container; a status from 200 to 399 passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    /// Connect to this port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpCheck>,
    /// Run this inside the container; status 0 passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecCheck>,
    /// Time between checks; 1s unless said.
    #[serde(default = "second")]
    pub interval: DurationMs,
    /// Time after which a check has failed; 1s unless said.
    #[serde(default = "second")]
    pub timeout: DurationMs,
    /// Failures in a row until it counts; 3 unless said.
    #[serde(default = "three")]
    pub failures: u32,
    /// How long after the start failures don't count; 0s unless said.
    #[serde(default)]
    pub initial_delay: DurationMs,
}

const fn second() -> DurationMs {
    DurationMs(1_000)
}

const fn three() -> u32 {
    3
}

/// What a check does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckKind<'a> {
    /// An HTTP request.
    Http(&'a HttpCheck),
    /// A TCP connection.
    Tcp(&'a TcpCheck),
    /// A command.
    Exec(&'a ExecCheck),
}

impl Check {
    /// What the check does; validation made sure that it is exactly one thing.
    pub fn kind(&self) -> Option<CheckKind<'_>> {
        match (&self.http, &self.tcp, &self.exec) {
            (Some(http), None, None) => Some(CheckKind::Http(http)),
            (None, Some(tcp), None) => Some(CheckKind::Tcp(tcp)),
            (None, None, Some(exec)) => Some(CheckKind::Exec(exec)),
            _ => None,
        }
    }
}

/// An HTTP request as a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpCheck {
    /// Path and query; `/` unless said.
    #[serde(default = "root_path")]
    pub path: String,
    /// Port inside the container.
    #[schema(value_type = u16, minimum = 1)]
    pub port: NonZeroU16,
}

fn root_path() -> String {
    "/".into()
}

/// A TCP connection as a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TcpCheck {
    /// Port inside the container.
    #[schema(value_type = u16, minimum = 1)]
    pub port: NonZeroU16,
}

/// A command as a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecCheck {
    /// Program and arguments.
    pub command: Vec<String>,
}

/// The load that one instance should carry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadTarget {
    /// What is counted.
    pub metric: LoadMetric,
    /// The load that an instance should have: requests, connections/s, requests/s, or percent of its CPU.
    pub target: f64,
}

/// What load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoadMetric {
    /// Open connections or requests at once.
    Concurrency,
    /// New TCP connections each second. Where more enter a location than its instances should have, the rest goes to
    /// other locations.
    ConnectionsPerSecond,
    /// Requests each second.
    RequestsPerSecond,
    /// Percent of the CPU that it asked for.
    Cpu,
}

/// When a job may run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SchedulingPolicy {
    /// As soon as there is room.
    #[default]
    Anytime,
    /// Only in a location that is inside its off-peak window, or of which less is reserved than the operator's
    /// `off_peak_below_percent`. It makes way for deployments: its attempt is asked to end
    /// (SIGTERM), killed after five seconds, and is no try of `max_attempts`.
    OffPeak,
}
