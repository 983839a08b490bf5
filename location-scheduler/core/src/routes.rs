//! Who serves each virtual IP, as the location's routers see it.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
};

use anyplace_model::{
    Announcement, DeploymentName, Endpoint, FULL_WEIGHT, LocationId, Nearest, Placement, Port,
    RemoteLocation, RemoteRoute, Route, RouteRecord, distance_km, estimated_latency_ms,
};

use crate::state::{Life, Observed, Site, Stage, State};

/// Another location becomes the nearest only if the present one is further by more than this, and this much.
const NEARLY: f64 = 1.1;
const NEARLY_MS: f64 = 1.0;
/// How many are remembered. A flow that outlives more changes of the nearest may break.
const MAX_NEAREST: usize = 4;

/// The routes now, by the key of the routers' watch.
pub fn routes(state: &State) -> BTreeMap<String, RouteRecord> {
    let mut records: BTreeMap<String, RouteRecord> = vips(state)
        .into_values()
        .map(|route| (format!("vips/{}", route.vip), RouteRecord::Vip(route)))
        .collect();
    if let Some(prefixes) = &state.vip_prefixes {
        let prefixes = if state.settings.withdrawn { Vec::new() } else { prefixes.clone() };
        let alive = state.machines.iter().filter(|(_, machine)| machine.life == Life::Alive);
        let machines = alive.map(|(name, machine)| (name.clone(), machine.report.address)).collect();
        records.insert("announcement".into(), RouteRecord::Announcement(Announcement { prefixes, machines }));
    }
    records
}

/// Says when each instance began and stopped taking new connections, and when which other location became the nearest by
/// measured `latency_ms`: as the routes published last say, where nothing has changed since, else now. Routers tell by it
/// which change of a table came last.
pub fn stamp(
    records: &mut BTreeMap<String, RouteRecord>,
    last: &BTreeMap<String, RouteRecord>,
    latency_ms: &BTreeMap<LocationId, f64>,
    now_ms: u64,
) {
    for (key, record) in records {
        let RouteRecord::Vip(route) = record else { continue };
        let last = match last.get(key) {
            Some(RouteRecord::Vip(last)) => Some(last),
            _ => None,
        };
        let known = last.map_or(&[][..], |last| last.local.as_slice());
        // Of two changes in one millisecond, or after the clock was set back, the later one still is the later.
        let nearest = last.and_then(|last| last.nearest.first()).map_or(0, |newest| newest.since_ms);
        let newest = known.iter().map(|it| it.began_ms.max(it.stopped_ms)).fold(nearest, u64::max);
        let now = now_ms.max(newest + 1);
        route.nearest = nearest_of(route, last, latency_ms, now);
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

/// Which other location gets what nothing here is ready for, and which got it before.
fn nearest_of(
    route: &Route,
    last: Option<&Route>,
    latency_ms: &BTreeMap<LocationId, f64>,
    now_ms: u64,
) -> Vec<Nearest> {
    let mut nearest = last.map(|last| last.nearest.clone()).unwrap_or_default();
    let order = by_latency(latency_ms);
    let Some(first) = route.serving().min_by(|a, b| order(a, b)) else { return nearest };
    let present = match nearest.first() {
        Some(newest) => Some(newest.location.clone()),
        None => last.and_then(Route::takes_over).map(|it| it.location.clone()),
    };
    // Connections stay where they are, but each change is one more that their packets must survive.
    let near_enough = latency(latency_ms, first) * NEARLY + NEARLY_MS;
    let stays = route.serving().find(|it| Some(&it.location) == present.as_ref());
    let chosen = stays.filter(|it| latency(latency_ms, it) <= near_enough).unwrap_or(first);
    if nearest.is_empty() {
        let by_distance = Route { nearest: Vec::new(), ..route.clone() };
        let is_plain = by_distance.takes_over().is_some_and(|it| it.location == chosen.location);
        if is_plain && present.as_ref().is_none_or(|present| *present == chosen.location) {
            return nearest;
        }
        nearest.extend(present.map(|location| Nearest { since_ms: 0, location }));
    }
    if nearest.first().is_none_or(|newest| newest.location != chosen.location) {
        nearest.insert(0, Nearest { since_ms: now_ms, location: chosen.location.clone() });
        nearest.truncate(MAX_NEAREST);
    }
    nearest
}

/// The round trip to another location in milliseconds, measured or else estimated.
fn latency(measured_ms: &BTreeMap<LocationId, f64>, remote: &RemoteLocation) -> f64 {
    let measured = measured_ms.get(&remote.location).copied();
    measured.unwrap_or_else(|| estimated_latency_ms(remote.distance_km))
}

/// Nearest first.
pub(crate) fn by_latency(
    measured_ms: &BTreeMap<LocationId, f64>,
) -> impl Fn(&RemoteLocation, &RemoteLocation) -> Ordering + '_ {
    move |a, b| {
        let by = latency(measured_ms, a).total_cmp(&latency(measured_ms, b));
        by.then_with(|| a.location.cmp(&b.location))
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
                Route {
                    vip,
                    ports: ports.to_vec(),
                    local: Vec::new(),
                    remote: Vec::new(),
                    away: Vec::new(),
                    nearest: Vec::new(),
                },
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
            Stage::Removing { .. } | Stage::Lost | Stage::Preempted => continue,
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
        .map(|backend| {
            let here = (site.latitude, site.longitude);
            let distance_km = distance_km(here, (backend.latitude, backend.longitude));
            RemoteLocation {
                location: backend.location.clone(),
                // To 100 m: every route says it, and nobody needs it to the atom.
                distance_km: (distance_km * 10.0).round() / 10.0,
                ready: backend.ready,
                ingress: backend.ingress.clone(),
            }
        })
        .collect();
    locations
        .sort_by(|a, b| a.distance_km.total_cmp(&b.distance_km).then_with(|| a.location.cmp(&b.location)));
    locations
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A virtual IP that others serve: name, distance and ready instances of each.
    fn records(others: &[(&str, f64, u32)]) -> BTreeMap<String, RouteRecord> {
        let remote = others.iter().map(|(name, distance_km, ready)| {
            json!({"location": name, "distance_km": distance_km, "ready": ready, "ingress": ["10.2.1.1"]})
        });
        let remote: Vec<_> = remote.collect();
        let route = json!({"vip": "203.0.113.1", "ports": [{"port": 80}], "local": [], "remote": remote});
        BTreeMap::from([(
            "vips/203.0.113.1".into(),
            RouteRecord::Vip(serde_json::from_value(route).unwrap()),
        )])
    }

    fn route(records: &BTreeMap<String, RouteRecord>) -> &Route {
        match records.values().next() {
            Some(RouteRecord::Vip(route)) => route,
            other => panic!("{other:?}"),
        }
    }

    /// Stamps what others serve; who takes over, and the history.
    fn next(
        last: &mut BTreeMap<String, RouteRecord>,
        others: &[(&str, f64, u32)],
        measured: &[(&str, f64)],
        now_ms: u64,
    ) -> (String, Vec<(u64, String)>) {
        let mut records = records(others);
        let measured = measured.iter().map(|(name, ms)| (name.parse().unwrap(), *ms)).collect();
        stamp(&mut records, last, &measured, now_ms);
        *last = records;
        let route = route(last);
        let first = route.takes_over().map_or("-".into(), |it| it.location.to_string());
        (first, route.nearest.iter().map(|it| (it.since_ms, it.location.to_string())).collect())
    }

    fn history(entries: &[(u64, &str)]) -> Vec<(u64, String)> {
        entries.iter().map(|(since_ms, name)| (*since_ms, (*name).into())).collect()
    }

    #[test]
    fn the_nearest_is_the_one_by_measurement_and_changes_are_dated() {
        let both = [("nrt", 9_340.0, 1), ("gru", 9_780.0, 1)];
        let mut last = BTreeMap::new();
        assert_eq!(next(&mut last, &both, &[], 5), ("nrt".into(), vec![]), "by distance, nothing to say");
        let measured = [("nrt", 120.0), ("gru", 100.0)];
        let moved = history(&[(10, "gru"), (0, "nrt")]);
        assert_eq!(next(&mut last, &both, &measured, 10), ("gru".into(), moved.clone()));
        assert_eq!(
            next(&mut last, &both, &[("nrt", 99.0), ("gru", 105.0)], 11),
            ("gru".into(), moved.clone())
        );
        // With one measured, the other is as far as its distance says: 140.6 ms.
        assert_eq!(next(&mut last, &both, &[("gru", 100.0)], 12), ("gru".into(), moved.clone()));
        assert_eq!(
            next(&mut last, &[], &measured, 13),
            ("-".into(), moved.clone()),
            "an outage forgets nothing"
        );
        assert_eq!(next(&mut last, &both, &measured, 14), ("gru".into(), moved));
        let back = history(&[(15, "nrt"), (10, "gru"), (0, "nrt")]);
        assert_eq!(
            next(&mut last, &both, &[("nrt", 50.0), ("gru", 100.0)], 2),
            ("nrt".into(), {
                let mut back = back.clone();
                // The clock was set back: still the later one.
                back[0].0 = 11;
                back
            })
        );
        for (now_ms, ms) in [(20, 300.0), (30, 10.0), (40, 300.0)] {
            next(&mut last, &both, &[("nrt", ms), ("gru", 100.0)], now_ms);
        }
        assert_eq!(route(&last).nearest.len(), MAX_NEAREST);
    }

    #[test]
    fn who_was_the_nearest_stays_it_beside_a_neighbour_of_equal_distance() {
        let mut last = BTreeMap::new();
        let one = [("ams", 500.0, 2)];
        assert_eq!(next(&mut last, &one, &[], 1), ("ams".into(), vec![]));
        let two = [("fra", 480.0, 1), ("ams", 500.0, 2)];
        assert_eq!(next(&mut last, &two, &[], 2), ("ams".into(), history(&[(0, "ams")])));
        let third = [("bru", 100.0, 1), ("fra", 480.0, 1), ("ams", 500.0, 2)];
        assert_eq!(next(&mut last, &third, &[], 3), ("bru".into(), history(&[(3, "bru"), (0, "ams")])));
        // Who serves no more is replaced at once.
        assert_eq!(next(&mut last, &two, &[], 4).0, "fra");
    }
}
