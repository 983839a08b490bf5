//! Records about new connections: how many come, how many can be served, and how many may go where.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::LocationId;

/// What a state router tells its location scheduler every second or so. Complete: a virtual IP that isn't in it has none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TrafficReport {
    /// New TCP connections a second that entered at the machine since the report before, by virtual IP.
    #[schema(value_type = BTreeMap<String, f64>)]
    pub connections: BTreeMap<IpAddr, f64>,
    /// Round trips to other locations in milliseconds, where this router is the one that measures them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub latency_ms: BTreeMap<LocationId, f64>,
}

/// The answer to a router's report: the other locations to which it should measure round trips. None, where another
/// router does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Probes {
    /// Some addresses of each location's machines; one that answers is enough.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, Vec<String>>)]
    pub targets: BTreeMap<LocationId, Vec<Ipv4Addr>>,
}

/// What a location says of a deployment's new connections. All figures but parts are new connections a second.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Traffic {
    /// What entered here lately.
    pub entering: f64,
    /// What it asks for: that with head-room, held while it flaps.
    pub asked: f64,
    /// What its ready instances can serve, those that have just started less.
    pub capacity: f64,
    /// How many parts of what enters go to each other location.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub away: BTreeMap<LocationId, u16>,
    /// The grant that it goes by.
    #[serde(default)]
    pub grant: Grant,
}

/// What a location may send where of a deployment's new connections, in each second.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Grant {
    /// Grows with each change; 0 before the first.
    pub revision: u64,
    /// What the location asked for when it was made.
    pub asked: f64,
    /// By location, itself included; empty where all may stay.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub quotas: BTreeMap<LocationId, f64>,
}
