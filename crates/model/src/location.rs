//! Records between the global scheduler and the location schedulers.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    AttemptId, AttemptStatus, Bytes, DeploymentName, DeploymentSpec, Grant, ImageState, InstanceStatus,
    Isolation, JobSpec, LocationId, MachineId, MilliCpu, MoveStatus, OffPeakWindow, Port, Prewarm, Refusal,
    Traffic,
};

/// Free blocks of one size on GPUs of one model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct GpuBlock {
    /// Model.
    pub model: String,
    /// Free memory of each.
    pub memory: Bytes,
    /// Whether the GPUs are entirely free.
    pub whole: bool,
    /// How many GPUs have so much free.
    pub count: u32,
    /// The most of them in one machine.
    pub most_in_one_machine: u32,
}

/// What a location could take now: a compact hint. The location itself decides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Advert {
    /// Region, such as `eu`.
    pub region: String,
    /// Country (ISO 3166-1 alpha-2).
    pub country: String,
    /// Labels for placement constraints.
    pub labels: BTreeMap<String, String>,
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
    /// IANA time zone of the off-peak window.
    pub timezone: String,
    /// Daily window for off-peak jobs; never off-peak without one.
    pub off_peak: Option<OffPeakWindow>,
    /// Machines that report.
    pub machines: u32,
    /// CPU of them all.
    pub cpu: MilliCpu,
    /// Memory of them all.
    pub memory: Bytes,
    /// CPU that nobody has reserved.
    pub free_cpu: MilliCpu,
    /// Memory that nobody has reserved.
    pub free_memory: Bytes,
    /// Disk that nobody has reserved.
    pub free_disk: Bytes,
    /// The most free CPU in one machine.
    pub largest_free_cpu: MilliCpu,
    /// The most free memory in one machine.
    pub largest_free_memory: Bytes,
    /// The most free disk in one machine.
    pub largest_free_disk: Bytes,
    /// All GPUs by model.
    pub gpus: BTreeMap<String, u32>,
    /// Free blocks of GPU memory.
    pub gpu_blocks: Vec<GpuBlock>,
    /// Isolations that at least one machine offers.
    pub isolations: Vec<Isolation>,
    /// Images that are warm on at least one machine.
    pub warm_images: Vec<String>,
    /// Why machines that report take no work, counted by reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Refusal>,
    /// What would be free if the off-peak jobs there made way for deployments; none where there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preemptible: Option<Preemptible>,
}

/// What would be free in a location without its off-peak jobs: what nobody else has reserved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Preemptible {
    /// CPU.
    pub free_cpu: MilliCpu,
    /// Memory.
    pub free_memory: Bytes,
    /// Disk.
    pub free_disk: Bytes,
    /// The most CPU in one machine.
    pub largest_free_cpu: MilliCpu,
    /// The most memory in one machine.
    pub largest_free_memory: Bytes,
    /// The most disk in one machine.
    pub largest_free_disk: Bytes,
    /// Blocks of GPU memory.
    pub gpu_blocks: Vec<GpuBlock>,
}

/// What the operator set for a location.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LocationSettings {
    /// Withdrawn: announces no virtual IP, and gets no traffic from other locations.
    pub withdrawn: bool,
    /// Draining: gets no new instances or jobs.
    pub draining: bool,
    /// Replaces the off-peak window of the location's own configuration.
    pub off_peak: Option<OffPeakWindow>,
    /// Machines that take nothing new; those that aren't in it are open.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub machines: BTreeMap<MachineId, MachineMode>,
}

/// What the operator set for a machine that takes nothing new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineMode {
    /// What it has stays.
    Cordoned,
    /// Instances of deployments leave once others are ready; jobs run to their end.
    Draining,
}

/// A location as the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LocationRecord {
    /// The location.
    pub location: LocationId,
    /// Whether its lease is alive.
    pub alive: bool,
    /// Milliseconds since its last report.
    pub last_report_ms: Option<u64>,
    /// The operator's settings.
    pub settings: LocationSettings,
    /// Its last advert.
    pub advert: Option<Advert>,
    /// Base URL of its location scheduler, by which logs are fetched.
    pub advertise: Option<String>,
}

/// What the global scheduler wants of a location: items of its watch stream, by key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LocationDesired {
    /// Key `placements/<deployment>`; deleted when the location should run none.
    Placement(Box<Placement>),
    /// Key `attempts/<job>/<attempt>`; deleted when it was cancelled or its result was recorded.
    Attempt {
        /// The attempt.
        attempt: AttemptId,
        /// What to run.
        spec: Box<JobSpec>,
    },
    /// An image that machines should have. Key `prewarms/<reference>`.
    Prewarm(Prewarm),
    /// Where else a deployment is served. Key `routes/<deployment>`.
    Route(RemoteRoute),
    /// What may go where of a deployment's new connections. Key `grants/<deployment>`.
    Grant {
        /// The deployment.
        deployment: DeploymentName,
        /// What it may send where.
        grant: Grant,
    },
    /// Key `term`. The number of the term in which this was decided: each start of a global scheduler, and each change of
    /// the one that leads, begins a higher one. What an earlier term decided is void.
    Term(u64),
    /// Key `settings`.
    Settings {
        /// The operator's settings.
        settings: LocationSettings,
        /// Prefixes of the virtual IP pools, to announce.
        #[schema(value_type = Vec<String>)]
        vip_prefixes: Vec<IpNet>,
    },
}

/// Instances of a deployment that a location should run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Placement {
    /// Grows with each change of the deployment's spec.
    pub generation: u64,
    /// What to run.
    pub spec: DeploymentSpec,
    /// The deployment's virtual IP.
    #[schema(value_type = String)]
    pub vip: Ipv4Addr,
    /// Its IPv6 one, where there is a pool of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vip6: Option<Ipv6Addr>,
    /// How many instances here.
    pub count: u32,
}

impl Placement {
    /// The virtual IPs of both families.
    pub fn vips(&self) -> impl Iterator<Item = IpAddr> {
        vips(self.vip, self.vip6)
    }
}

/// Virtual IPs of both families, as one list.
pub fn vips(vip: Ipv4Addr, vip6: Option<Ipv6Addr>) -> impl Iterator<Item = IpAddr> {
    std::iter::once(vip.into()).chain(vip6.map(IpAddr::from))
}

/// Where a deployment is served in all locations. A location ignores its own entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RemoteRoute {
    /// The deployment.
    pub deployment: DeploymentName,
    /// Its virtual IP.
    #[schema(value_type = String)]
    pub vip: Ipv4Addr,
    /// Its IPv6 one, where there is a pool of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vip6: Option<Ipv6Addr>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// New connections a second that an instance should have; none where load moves nothing to other locations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_per_second: Option<f64>,
    /// Locations with ready instances, alive and not withdrawn, by name.
    pub backends: Vec<RemoteBackend>,
}

impl RemoteRoute {
    /// The virtual IPs of both families.
    pub fn vips(&self) -> impl Iterator<Item = IpAddr> {
        vips(self.vip, self.vip6)
    }
}

/// A location that serves a deployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RemoteBackend {
    /// The location.
    pub location: LocationId,
    /// Degrees north and east.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
    /// Ready instances there.
    pub ready: u32,
    /// Addresses of its live machines, to which traffic may be sent.
    #[schema(value_type = Vec<String>)]
    pub ingress: Vec<Ipv4Addr>,
}

/// What a location scheduler tells the global scheduler: at every change, and at every heartbeat. Complete: what
/// isn't in it isn't there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LocationReport {
    /// The location.
    pub location: LocationId,
    /// Changes at each start of the location scheduler.
    pub epoch: u64,
    /// Grows by one with each report; an older one never overwrites a newer one.
    pub sequence: u64,
    /// Base URL of the location scheduler's API.
    pub advertise: String,
    /// Secret of this epoch with which the global scheduler may read logs and routes there, and do nothing else. No
    /// API shows it.
    pub log_token: String,
    /// What it could take.
    pub advert: Advert,
    /// Addresses of its live machines.
    #[schema(value_type = Vec<String>)]
    pub ingress: Vec<Ipv4Addr>,
    /// What became of each placement.
    pub placements: Vec<PlacementStatus>,
    /// What became of each attempt.
    pub attempts: Vec<AttemptStatus>,
    /// Instances that move to other machines, and those that did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub moves: Vec<MoveStatus>,
    /// How far each wished image is on the machines chosen for it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub prewarms: BTreeMap<String, BTreeMap<MachineId, ImageState>>,
    /// New connections of the deployments that say how many an instance should have. One that isn't in it is as it was:
    /// after a start nothing has been measured for a moment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub traffic: BTreeMap<DeploymentName, Traffic>,
    /// Measured round trips to other locations in milliseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub latency_ms: BTreeMap<LocationId, f64>,
}

/// What became of a placement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlacementStatus {
    /// The deployment.
    pub deployment: DeploymentName,
    /// Generation that the location has acted on.
    pub generation: u64,
    /// How many it was asked to run, in that generation.
    pub count: u32,
    /// Its instances.
    pub instances: Vec<InstanceStatus>,
    /// How many it can't run, and why; empty where it runs all.
    pub refused: u32,
    /// Reasons of the refusal, counted over its machines.
    pub refusals: Vec<Refusal>,
}
