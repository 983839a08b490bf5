//! The HTTP API: versioned request and response types, the error body, watch streams, and the typed client.
//!
//! Servers and clients share these types, so that they can't drift apart. This crate must not know how anything
//! is stored or served.

mod client;
mod error;
mod global;
mod patch;
mod watch;

pub use client::{Client, ClientError, IDEMPOTENCY_KEY, LogOptions};
pub use error::{ErrorCode, Problem};
pub use global::{
    ApplyOutcome, ArrayCounts, ArrayIndex, CapacityView, DeploymentPhase, DeploymentView, Event,
    EventSeverity, JobQuery, JobView, LatencyQuery, LatencyView, LocationRoutes, LocationShare, LogQuery,
    NewToken, PrewarmQuery, PrewarmShare, PrewarmView, Role, RoutesView, TeamView, TokenRequest, TokenScope,
};
pub use patch::{Frame, PATCHES, Patch};
pub use reqwest::Method;
pub use watch::{WatchEvent, WatchQuery, Watcher};

/// Prefix of all paths of this version.
pub const V1: &str = "/v1";
