//! Records between a location scheduler and its state routers.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{InstanceId, LocationId, MachineId, Port};

/// Items of a router's watch stream, by key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouteRecord {
    /// Key `vips/<address>`.
    Vip(Route),
    /// Key `announcement`.
    Announcement(Announcement),
}

/// Who serves a virtual IP, as seen from one location.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Route {
    /// The virtual IP.
    #[schema(value_type = String)]
    pub vip: IpAddr,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Instances in this location, ended ones excluded.
    pub local: Vec<Endpoint>,
    /// Other locations with ready instances, nearest first.
    pub remote: Vec<RemoteLocation>,
    /// When the shares of other locations last changed, on the same clock as the endpoints' times.
    #[serde(default)]
    pub shared_ms: u64,
}

/// A share of all new connections of a virtual IP that enter a location is given in parts of this.
pub const WHOLE_SHARE: u16 = 4_096;

/// The weight of an instance that takes its full part of new connections.
pub const FULL_WEIGHT: u16 = 100;

const fn full_weight() -> u16 {
    FULL_WEIGHT
}

/// One instance behind a virtual IP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    /// The instance.
    pub instance: InstanceId,
    /// The machine that runs it.
    pub machine: MachineId,
    /// Its address.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// Takes new connections.
    pub ready: bool,
    /// Keeps its connections and takes no new ones.
    pub draining: bool,
    /// When it last began to take new connections: milliseconds since 1970 on the location scheduler's clock. Orders
    /// changes; nothing is measured by it.
    #[serde(default)]
    pub began_ms: u64,
    /// When it last stopped taking them; 0 while it takes them.
    #[serde(default)]
    pub stopped_ms: u64,
    /// Its place in the table: the lowest number that no other instance of the virtual IP in this location has. Tables
    /// whose slots have no gaps move the fewest buckets.
    #[serde(default)]
    pub slot: u16,
    /// How many new connections it takes, relative to others.
    #[serde(default = "full_weight")]
    pub weight: u16,
}

/// Another location that serves a virtual IP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RemoteLocation {
    /// The location.
    pub location: LocationId,
    /// Great-circle distance in kilometres.
    pub distance_km: f64,
    /// Ready instances there.
    pub ready: u32,
    /// Addresses of its live machines.
    #[schema(value_type = Vec<String>)]
    pub ingress: Vec<Ipv4Addr>,
    /// Its share of new connections, in parts of [`WHOLE_SHARE`]; those that are left stay in the location. Where
    /// nothing is ready in the location and no share is given, the nearest gets all.
    #[serde(default)]
    pub share: u16,
    /// Its share until `shared_ms`.
    #[serde(default)]
    pub earlier_share: u16,
}

/// What the location announces to its BGP neighbours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Announcement {
    /// Prefixes; empty when the location is withdrawn.
    #[schema(value_type = Vec<String>)]
    pub prefixes: Vec<IpNet>,
}
