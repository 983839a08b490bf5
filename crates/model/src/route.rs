//! Records between a location scheduler and its state routers.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

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
    /// Other locations with ready instances, by distance.
    pub remote: Vec<RemoteLocation>,
    /// Which parts of the new connections that enter the location go to others, and did before; the newest first. None
    /// where all stay; where nothing is ready in the location, what stays goes to the nearest other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub away: Vec<Away>,
    /// Which other location gets what nothing in this one is ready for, and which got it before; the newest first.
    /// Without any, and where that one doesn't serve, it is the one at the least distance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nearest: Vec<Nearest>,
}

/// Which other location was the nearest from one time on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Nearest {
    /// Since when, on the same clock as the endpoints' times.
    pub since_ms: u64,
    /// The location.
    pub location: LocationId,
}

/// The new connections of a virtual IP that enter a location are shared in so many parts.
pub const PARTS: u16 = 256;

/// Which parts go to other locations, from one time on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Away {
    /// Since when, on the same clock as the endpoints' times.
    pub since_ms: u64,
    /// Who has the first parts, the next, and so on; those that are left stay.
    pub spans: Vec<Span>,
}

/// Parts that are next to each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Span {
    /// How many.
    pub parts: u16,
    /// Where they go; none where they stay.
    pub to: Option<LocationId>,
}

/// The weight of an instance that takes its full part of new connections.
pub const FULL_WEIGHT: u16 = 100;

const fn full_weight() -> u16 {
    FULL_WEIGHT
}

impl Route {
    /// How many parts of the new connections that enter here go to a location.
    pub fn parts_to(&self, location: &LocationId) -> u16 {
        let spans = self.away.first().map_or(&[][..], |away| &away.spans);
        spans.iter().filter(|span| span.to.as_ref() == Some(location)).map(|span| span.parts).sum()
    }

    /// Other locations that can take connections.
    pub fn serving(&self) -> impl Iterator<Item = &RemoteLocation> {
        self.remote.iter().filter(|remote| remote.ready > 0 && !remote.ingress.is_empty())
    }

    /// The other location that gets what nothing in this one is ready for.
    pub fn takes_over(&self) -> Option<&RemoteLocation> {
        let newest = self.nearest.first();
        newest.and_then(|newest| self.serving().find(|it| it.location == newest.location)).or_else(|| {
            let order = |a: &&RemoteLocation, b: &&RemoteLocation| {
                a.distance_km.total_cmp(&b.distance_km).then_with(|| a.location.cmp(&b.location))
            };
            self.serving().min_by(order)
        })
    }
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
}

/// What the location announces to its BGP neighbours, and where its machines are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Announcement {
    /// Prefixes; empty when the location is withdrawn.
    #[schema(value_type = Vec<String>)]
    pub prefixes: Vec<IpNet>,
    /// Addresses of its live machines, whose routers ask each other while no scheduler answers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub machines: BTreeMap<MachineId, Ipv4Addr>,
}
