//! Where one flow goes: its bucket, the hops, and the instance that a new connection gets. Pure: the locations' routes
//! in, and out of them the tables that routers build, looked up by the hash of the data plane.
//!
//! A new connection goes to the owner now. One of before the last change is known at its instance, and reaches it as the
//! second hop. A location's bucket leads to one of its machines, which looks the flow up in its own table, where only
//! instances of that location are.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use anyplace_ebpf::VipKey;
use anyplace_model::{InstanceId, LocationId, MachineId, Protocol, Route};
use anyplace_router_core::{Bucket, tables};
use serde::Serialize;

use crate::{Owner, plane::protocol};

/// A client's flow to a port of a virtual IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// The client.
    pub client: SocketAddr,
    /// The virtual IP.
    pub vip: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
}

/// What becomes of a flow that enters one location.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trace {
    /// Where it enters.
    pub location: LocationId,
    /// The bucket and its hops; none where the table is empty.
    #[serde(flatten)]
    pub step: Option<Step>,
    /// Who gets it, if it is a new connection.
    pub instance: Option<Served>,
    /// Why nobody gets it, or why that isn't known.
    pub why_not: Option<String>,
}

/// A flow in a table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// The bucket that it is in, from 0.
    pub bucket: usize,
    /// Buckets of the table.
    pub buckets: usize,
    /// Who has new flows of the bucket.
    pub now: Hop,
    /// Who had them before the last change of the bucket, and may have older flows.
    pub before: Option<Hop>,
}

/// Who a packet is sent to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hop {
    /// The address that it is sent to: of an instance, or of a machine of another location.
    pub to: Ipv4Addr,
    /// Whose that is.
    #[serde(flatten)]
    pub owner: Owner,
    /// The other location's own table; none for an instance, or where that table is empty or isn't known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub there: Option<Box<Step>>,
}

/// An instance and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Served {
    /// Its location.
    pub location: LocationId,
    /// Its machine.
    pub machine: MachineId,
    /// The instance.
    pub instance: InstanceId,
    /// Its address in the fabric.
    pub address: Ipv4Addr,
}

/// Traces a flow that enters `location`; `routes` has the virtual IP's route in each location that is known.
pub fn trace(location: &LocationId, routes: &BTreeMap<LocationId, Route>, flow: &Flow) -> Trace {
    let step = routes.get(location).and_then(|route| {
        let mut step = step(route, &tables(route).full, flow)?;
        for hop in std::iter::once(&mut step.now).chain(&mut step.before) {
            if let Owner::Location { location, .. } = &hop.owner
                && let Some(route) = routes.get(location)
            {
                hop.there = self::step(route, &tables(route).local, flow).map(Box::new);
            }
        }
        Some(step)
    });
    let (instance, why_not) = match &step {
        Some(step) => match new_connection(location, routes, step) {
            Ok(served) => (Some(served), None),
            Err(why) => (None, Some(why)),
        },
        None if routes.contains_key(location) => {
            (None, Some("no bucket has an owner: nothing is ready anywhere".into()))
        }
        None => (None, Some(format!("the table of {location} is not known"))),
    };
    Trace { location: location.clone(), step, instance, why_not }
}

fn step(route: &Route, table: &[Bucket], flow: &Flow) -> Option<Step> {
    let key = VipKey { address: flow.vip, port: flow.port, protocol: protocol(flow.protocol) };
    let bucket = key.bucket(flow.client, table.len())?;
    let Bucket { now, before } = *table.get(bucket)?;
    Some(Step {
        bucket,
        buckets: table.len(),
        now: hop(route, now)?,
        before: before.and_then(|before| hop(route, before)),
    })
}

/// Whose address it is. Tables are made of nothing but their route.
fn hop(route: &Route, to: Ipv4Addr) -> Option<Hop> {
    let here = route.local.iter().find(|it| it.address == to).map(Owner::from);
    let elsewhere = || route.remote.iter().find(|it| it.ingress.contains(&to)).map(Owner::from);
    here.or_else(elsewhere).map(|owner| Hop { to, owner, there: None })
}

/// Where the first packet of a connection ends: at the first hop that is an instance, or whose own table has one.
fn new_connection(
    location: &LocationId,
    routes: &BTreeMap<LocationId, Route>,
    step: &Step,
) -> Result<Served, String> {
    let mut refused = Vec::new();
    for hop in std::iter::once(&step.now).chain(&step.before) {
        let (at, owner) = match &hop.owner {
            Owner::Instance { .. } => (location, &hop.owner),
            Owner::Location { location, .. } => match &hop.there {
                Some(there) => (location, &there.now.owner),
                None if routes.contains_key(location) => {
                    refused.push(format!("{location} has no instance in its own table"));
                    continue;
                }
                None => return Err(format!("{location} gets it, and its table is not known")),
            },
        };
        if let Owner::Instance { instance, machine, address } = owner {
            return Ok(Served {
                location: at.clone(),
                machine: machine.clone(),
                instance: instance.clone(),
                address: *address,
            });
        }
    }
    Err(refused.join("; "))
}

#[cfg(test)]
pub(crate) mod tests;
