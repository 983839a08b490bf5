//! The platform's vocabulary as types: identifiers, quantities with units, specs, desired and observed
//! records, and their validation.
//!
//! Every other crate speaks in these types. This crate must not know I/O, clocks, sockets or storage: it turns
//! text into values, and says precisely what is wrong with text that it refuses.

mod document;
mod id;
mod instance;
mod location;
mod machine;
mod moves;
mod naming;
mod off_peak;
mod place;
mod prewarm;
mod quantity;
mod reason;
mod route;
mod spec;
mod team;
mod traffic;
mod validate;
mod workload;

pub use document::{Format, Problem as InvalidSpec, SpecError, parse_spec};
pub use id::{DeploymentName, InstanceId, InvalidId, JobName, LocationId, MachineId, Team};
pub use instance::{AttemptStatus, InstancePhase, InstanceStatus, JobPhase};
pub use location::{
    Advert, GpuBlock, LocationDesired, LocationRecord, LocationReport, LocationSettings, MachineMode,
    Placement, PlacementStatus, Preemptible, RemoteBackend, RemoteRoute, vips,
};
pub use machine::{
    Assignment, Condition, Gpu, ImageState, MachineDesired, MachineRecord, MachineReport, Mark,
};
pub use moves::{MoveCause, MoveStatus, MoveStep};
pub use naming::{GATEWAY, GATEWAY6, INSTANCE_NET6, container_mac, host_interface, instance_address6};
pub use off_peak::{InvalidWindow, OffPeakWindow};
pub use place::{distance_km, estimated_latency_ms};
pub use prewarm::{DEFAULT_PRIORITY, PRIORITY_AWAITED, PRIORITY_MAX, Prewarm};
pub use quantity::{Bytes, DurationMs, InvalidQuantity, MilliCpu};
pub use reason::{Explanation, LocationExplanation, ReasonCode, Refusal};
pub use route::{
    Announcement, Away, Endpoint, FULL_WEIGHT, Nearest, PARTS, RemoteLocation, Route, RouteRecord, Span,
};
pub use spec::{
    Check, CheckKind, DeploymentSpec, ExecCheck, GpuRequest, Health, HttpCheck, Instances, Isolation,
    JobSpec, LoadMetric, LoadTarget, PlacementConstraints, Port, Protocol, Resources, SchedulingPolicy, Spec,
    TcpCheck,
};
pub use team::{Held, TeamSettings};
pub use traffic::{Grant, Probes, Traffic, TrafficReport};
pub use workload::{AttemptId, Workload};
