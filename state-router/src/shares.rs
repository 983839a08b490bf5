//! What a location's table means in words: who takes which part of new connections to a virtual IP, and why. Pure: a
//! route in, and out of it the very table that the location's routers build from it.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyplace_model::{Endpoint, InstanceId, LocationId, MachineId, PARTS, RemoteLocation, Route};
use anyplace_router_core::tables;
use serde::Serialize;

/// Who takes the new connections to a virtual IP that enter one location.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shares {
    /// Buckets of the table; 0 where nobody takes connections.
    pub buckets: usize,
    /// Instances of the location, then other locations; those that take nothing too.
    pub backends: Vec<Backend>,
}

/// An instance or another location, as one location's table has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Backend {
    /// Who.
    #[serde(flatten)]
    pub owner: Owner,
    /// In a word.
    pub state: BackendState,
    /// How many new connections it takes, relative to other instances; none for a location.
    pub weight: Option<u16>,
    /// Buckets that it owns: their new flows are its.
    pub buckets: usize,
    /// The same in percent of all.
    pub percent: f64,
    /// Buckets that it owned before their last change: it may have older flows of them.
    pub buckets_before: usize,
    /// Why it takes that part.
    pub why: String,
}

/// Who may own a bucket.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Owner {
    /// An instance in the location.
    Instance {
        /// The instance.
        instance: InstanceId,
        /// Its machine.
        machine: MachineId,
        /// Its address in the fabric.
        address: Ipv4Addr,
    },
    /// Another location; one of its machines chooses the instance.
    Location {
        /// The location.
        location: LocationId,
        /// Great-circle distance in kilometres.
        distance_km: f64,
        /// Round trip in milliseconds as it was measured; not in the route, so whoever knows it fills it in.
        latency_ms: Option<f64>,
        /// Ready instances there.
        ready: u32,
    },
}

/// Whether a backend takes connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendState {
    /// Takes new connections.
    Ready,
    /// Keeps its connections and takes no new ones.
    Draining,
    /// Takes none.
    NotReady,
    /// A location with ready instances and no live machine to send to.
    Unreachable,
}

impl From<&Endpoint> for Owner {
    fn from(endpoint: &Endpoint) -> Self {
        Self::Instance {
            instance: endpoint.instance.clone(),
            machine: endpoint.machine.clone(),
            address: endpoint.address,
        }
    }
}

impl From<&RemoteLocation> for Owner {
    fn from(remote: &RemoteLocation) -> Self {
        Self::Location {
            location: remote.location.clone(),
            distance_km: remote.distance_km,
            latency_ms: None,
            ready: remote.ready,
        }
    }
}

/// Buckets by the address of their hop, now and before.
#[derive(Default)]
struct Held(BTreeMap<Ipv4Addr, (usize, usize)>);

impl Held {
    fn by(&self, addresses: &[Ipv4Addr]) -> (usize, usize) {
        let held = addresses.iter().filter_map(|address| self.0.get(address));
        held.fold((0, 0), |(now, before), held| (now + held.0, before + held.1))
    }
}

/// Who takes the new connections to a route's virtual IP that enter its location.
pub fn shares(route: &Route) -> Shares {
    let table = tables(route).full;
    let mut held = Held::default();
    for bucket in &table {
        held.0.entry(bucket.now).or_default().0 += 1;
        if let Some(before) = bucket.before {
            held.0.entry(before).or_default().1 += 1;
        }
    }
    let backend = |owner: Owner, state, weight, (buckets, buckets_before), why| Backend {
        owner,
        state,
        weight,
        buckets,
        percent: buckets as f64 * 100.0 / table.len().max(1) as f64,
        buckets_before,
        why,
    };
    let local = route.local.iter().map(|endpoint| {
        let (state, held) = (state(endpoint), held.by(&[endpoint.address]));
        backend(endpoint.into(), state, Some(endpoint.weight), held, why_instance(state, held))
    });
    let remote = route.remote.iter().map(|remote| {
        let reachable = remote.ready > 0 && !remote.ingress.is_empty();
        let state = if reachable { BackendState::Ready } else { BackendState::Unreachable };
        let held = held.by(&remote.ingress);
        backend(remote.into(), state, None, held, why_location(route, remote, held.0))
    });
    let backends = local.chain(remote).collect();
    Shares { buckets: table.len(), backends }
}

fn state(endpoint: &Endpoint) -> BackendState {
    match (endpoint.draining, endpoint.ready) {
        (true, _) => BackendState::Draining,
        (false, true) => BackendState::Ready,
        (false, false) => BackendState::NotReady,
    }
}

fn why_instance(state: BackendState, (buckets, before): (usize, usize)) -> String {
    let text = match state {
        BackendState::Ready if buckets > 0 => "ready: takes new connections by its weight",
        BackendState::Ready => "ready, but other locations' shares leave it none",
        BackendState::Draining if buckets > 0 => {
            "drains, and takes new connections all the same: nothing is ready anywhere"
        }
        BackendState::Draining if before > 0 => "drains: keeps its connections, takes no new ones",
        BackendState::Draining => "drains: takes no new connections, and no bucket leads to it any more",
        BackendState::NotReady | BackendState::Unreachable => "not ready: takes no connections",
    };
    text.into()
}

fn why_location(route: &Route, remote: &RemoteLocation, buckets: usize) -> String {
    let some_ready = route.local.iter().any(|it| state(it) == BackendState::Ready);
    let parts = route.parts_to(&remote.location);
    let percent = f64::from(parts) * 100.0 / f64::from(PARTS);
    if remote.ingress.is_empty() {
        "none of its machines can be sent to".into()
    } else if parts > 0 {
        format!("has a share of {percent:.1}% of what enters here")
    } else if buckets > 0 {
        "the nearest with ready instances: nothing is ready here".into()
    } else if some_ready {
        "nothing is sent there while instances here are ready".into()
    } else {
        "others with ready instances are nearer".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::tests::{endpoint, remote, route};

    fn found(shares: &Shares, name: &str) -> (usize, f64, BackendState) {
        let named = |backend: &&Backend| match &backend.owner {
            Owner::Instance { instance, .. } => instance.as_str() == name,
            Owner::Location { location, .. } => location.as_str() == name,
        };
        let backend = shares.backends.iter().find(named).unwrap();
        (backend.buckets, backend.percent, backend.state)
    }

    #[test]
    fn instances_share_the_buckets_and_all_of_them_are_accounted_for() {
        let mut drained = endpoint("three", 3);
        (drained.draining, drained.began_ms, drained.stopped_ms) = (true, 1, 9);
        let route =
            route(vec![endpoint("one", 1), endpoint("two", 2), drained], vec![remote("nrt", 9_340.0)]);
        let shares = shares(&route);
        assert_eq!(shares.backends.iter().map(|it| it.buckets).sum::<usize>(), shares.buckets);
        assert!((shares.backends.iter().map(|it| it.percent).sum::<f64>() - 100.0).abs() < 1e-9);
        let half = shares.buckets / 2;
        assert_eq!(found(&shares, "one"), (half, 50.0, BackendState::Ready));
        assert_eq!(found(&shares, "three"), (0, 0.0, BackendState::Draining));
        assert_eq!(found(&shares, "nrt"), (0, 0.0, BackendState::Ready));
        assert!(shares.backends[2].buckets_before > 0, "{shares:?}");
        assert!(shares.backends[2].why.contains("keeps its connections"), "{shares:?}");
        assert!(shares.backends[3].why.contains("while instances here are ready"), "{shares:?}");
    }

    #[test]
    fn where_nothing_is_ready_the_nearest_location_has_all() {
        let mut broken = endpoint("one", 1);
        broken.ready = false;
        let route = route(vec![broken], vec![remote("nrt", 9_340.0), remote("ams", 700.0)]);
        let shares = shares(&route);
        assert_eq!(found(&shares, "ams"), (shares.buckets, 100.0, BackendState::Ready));
        assert_eq!(found(&shares, "one").2, BackendState::NotReady);
        assert_eq!(found(&shares, "nrt").0, 0);
        let why: Vec<&str> = shares.backends.iter().map(|it| it.why.as_str()).collect();
        assert!(why[1].contains("nearer") && why[2].contains("nothing is ready here"), "{why:?}");
    }

    #[test]
    fn a_table_of_nobody_is_empty() {
        let mut dead = remote("nrt", 9_340.0);
        dead.ingress.clear();
        let shares = shares(&route(vec![], vec![dead]));
        assert_eq!((shares.buckets, found(&shares, "nrt").2), (0, BackendState::Unreachable));
    }
}
