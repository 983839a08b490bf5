//! Who serves each virtual IP, as the location's routers see it.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
};

use anyplace_model::{
    Announcement, DeploymentName, Endpoint, FULL_WEIGHT, Placement, Port, RemoteLocation, RemoteRoute, Route,
    RouteRecord, distance_km,
};

use crate::state::{Observed, Site, Stage, State};

/// The routes now, by the key of the routers' watch.
pub fn routes(state: &State) -> BTreeMap<String, RouteRecord> {
    let mut records: BTreeMap<String, RouteRecord> = vips(state)
        .into_values()
        .map(|route| (format!("vips/{}", route.vip), RouteRecord::Vip(route)))
        .collect();
    if let Some(prefixes) = &state.vip_prefixes {
        let prefixes = if state.settings.withdrawn { Vec::new() } else { prefixes.clone() };
        records.insert("announcement".into(), RouteRecord::Announcement(Announcement { prefixes }));
    }
    records
}

/// Says when each instance began and stopped taking new connections: as the routes published last say, where nothing
/// has changed since, else now. Routers tell by it which change of a table came last.
pub fn stamp(records: &mut BTreeMap<String, RouteRecord>, last: &BTreeMap<String, RouteRecord>, now_ms: u64) {
    for (key, record) in records {
        let RouteRecord::Vip(route) = record else { continue };
        let known = match last.get(key) {
            Some(RouteRecord::Vip(known)) => known.local.as_slice(),
            _ => &[],
        };
        // Of two changes in one millisecond, or after the clock was set back, the later one still is the later.
        let newest = known.iter().map(|it| it.began_ms.max(it.stopped_ms)).max().unwrap_or(0);
        let now = now_ms.max(newest + 1);
        for endpoint in &mut route.local {
            let before = known.iter().find(|it| it.instance == endpoint.instance);
            let takes = |it: &Endpoint| it.ready && !it.draining;
            (endpoint.began_ms, endpoint.stopped_ms) = match (before, takes(endpoint)) {
                (Some(before), takes_now) if takes(before) == takes_now => {
                    (before.began_ms, before.stopped_ms)
                }
                (_, true) => (now, 0),
                (Some(before), false) => (before.began_ms, now),
                (None, false) => (0, now),
            };
        }
    }
}

fn vips(state: &State) -> BTreeMap<IpAddr, Route> {
    let mut vips: BTreeMap<IpAddr, Route> = BTreeMap::new();
    let mut owners: BTreeMap<IpAddr, &DeploymentName> = BTreeMap::new();
    let mut claim = |vip: IpAddr, deployment, ports: &[Port]| match owners.entry(vip) {
        Entry::Vacant(entry) => {
            entry.insert(deployment);
            vips.insert(
                vip,
                Route { vip, ports: ports.to_vec(), local: Vec::new(), remote: Vec::new(), away: Vec::new() },
            );
        }
        // Where a virtual IP went to another deployment, what is left of the one before gets no traffic.
        Entry::Occupied(_) => {}
    };
    for (name, placement) in &state.placements {
        placement.vips().for_each(|vip| claim(vip, name, &placement.spec.ports));
    }
    for (name, route) in &state.remote {
        route.vips().for_each(|vip| claim(vip, name, &route.ports));
    }
    // Instances that drain keep their connections after the placement is gone.
    for held in state.reservations.values() {
        if let Some(name) = held.deployment() {
            held.vips().for_each(|vip| claim(vip, name, &held.assignment.ports));
        }
    }
    let observed = Observed::new(state);
    for held in state.reservations.values() {
        let Some(name) = held.deployment() else { continue };
        let draining = match held.stage {
            Stage::Serving => false,
            Stage::Draining { .. } => true,
            Stage::Removing { .. } | Stage::Lost => continue,
        };
        for vip in held.vips().filter(|vip| owners.get(vip) == Some(&name)) {
            let Some(route) = vips.get_mut(&vip) else { continue };
            route.local.push(Endpoint {
                instance: held.assignment.instance.clone(),
                machine: held.machine.clone(),
                address: held.assignment.address,
                ready: observed.ready(held),
                draining,
                began_ms: 0,
                stopped_ms: 0,
                slot: held.slot,
                weight: FULL_WEIGHT,
            });
        }
    }
    for (vip, name) in &owners {
        if let (Some(away), Some(route)) = (state.away.get(*name), vips.get_mut(vip)) {
            route.away.clone_from(away);
        }
    }
    for (name, remote) in &state.remote {
        for vip in remote.vips().filter(|vip| owners.get(vip) == Some(&name)) {
            if let Some(route) = vips.get_mut(&vip) {
                route.remote = elsewhere(&state.site, remote);
            }
        }
    }
    // A virtual IP that only an ended instance remembers leads nowhere.
    let wanted: BTreeSet<IpAddr> = state
        .placements
        .values()
        .flat_map(Placement::vips)
        .chain(state.remote.values().flat_map(RemoteRoute::vips))
        .collect();
    vips.retain(|vip, route| !route.local.is_empty() || wanted.contains(vip));
    vips
}

fn elsewhere(site: &Site, remote: &RemoteRoute) -> Vec<RemoteLocation> {
    let mut locations: Vec<RemoteLocation> = remote
        .backends
        .iter()
        .filter(|backend| backend.location != site.location)
        .map(|backend| RemoteLocation {
            location: backend.location.clone(),
            distance_km: distance_km((site.latitude, site.longitude), (backend.latitude, backend.longitude)),
            ready: backend.ready,
            ingress: backend.ingress.clone(),
        })
        .collect();
    locations
        .sort_by(|a, b| a.distance_km.total_cmp(&b.distance_km).then_with(|| a.location.cmp(&b.location)));
    locations
}
