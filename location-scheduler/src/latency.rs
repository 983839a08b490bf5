//! How far other locations are: which router measures it, and what it found.
//!
//! One router measures for all: of the machines that are alive, and whose routers report, the one with the first name. Each
//! router is told in the answer to its report, so there is nothing to keep in step; two that measure for a moment do no
//! harm. Measured are locations that serve anything. What was found stays in force for a while without news, and across
//! a restart; after that, and before it, the distance counts.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyplace_location_core::{Life, Machine};
use anyplace_model::{LocationId, MachineId, Probes, RemoteRoute};

/// A router reports every second or so; one that has been silent for longer is gone, or busy with its maps.
const SILENCE: Duration = Duration::from_secs(5);
/// What was found says nothing any more after this time without news.
const KEPT: Duration = Duration::from_secs(60);
/// Machines of a location that may be asked: one answers unless all of these are down.
const ADDRESSES: usize = 3;

/// What is known of the ways to other locations.
#[derive(Debug, Default)]
pub(crate) struct Latency {
    probes: Probes,
    /// When each machine's router reported last.
    heard: BTreeMap<MachineId, Instant>,
    /// In milliseconds, and since when there has been no news.
    found: BTreeMap<LocationId, (f64, Instant)>,
}

impl Latency {
    /// Goes on with what was known before a restart.
    pub(crate) fn remembered(latency_ms: &BTreeMap<LocationId, f64>, now: Instant) -> Self {
        let found = latency_ms.iter().map(|(location, ms)| (location.clone(), (*ms, now)));
        Self { found: found.collect(), ..Self::default() }
    }

    /// Has the locations measured to which traffic may go.
    pub(crate) fn aim<'a>(&mut self, here: &LocationId, routes: impl Iterator<Item = &'a RemoteRoute>) {
        let others = routes.flat_map(|route| &route.backends).filter(|backend| backend.location != *here);
        let mut targets = BTreeMap::new();
        for backend in others {
            if !targets.contains_key(&backend.location) {
                let addresses = backend.ingress.iter().take(ADDRESSES).copied().collect();
                targets.insert(backend.location.clone(), addresses);
            }
        }
        self.probes = Probes { targets };
    }

    /// Takes in what a machine's router found; what it should measure.
    pub(crate) fn measured(
        &mut self,
        machines: &BTreeMap<MachineId, Machine>,
        machine: &MachineId,
        latency_ms: BTreeMap<LocationId, f64>,
        now: Instant,
    ) -> Probes {
        self.heard.insert(machine.clone(), now);
        let there = |name: &MachineId| machines.get(name).is_some_and(|it| it.life == Life::Alive);
        let reports = |at: Instant| now.saturating_duration_since(at) <= SILENCE;
        let first = self.heard.iter().find(|(name, at)| there(name) && reports(**at)).map(|(name, _)| name);
        if first != Some(machine) {
            return Probes::default();
        }
        for (location, ms) in latency_ms {
            if self.probes.targets.contains_key(&location) && ms.is_finite() && ms >= 0.0 {
                self.found.insert(location, (ms, now));
            }
        }
        self.probes.clone()
    }

    /// Round trips to other locations now, in milliseconds.
    pub(crate) fn known(&mut self, now: Instant) -> BTreeMap<LocationId, f64> {
        self.found.retain(|_, (_, at)| now.saturating_duration_since(*at) <= KEPT);
        self.found.iter().map(|(location, (ms, _))| (location.clone(), *ms)).collect()
    }

    pub(crate) fn forget(&mut self, machine: &MachineId) {
        self.heard.remove(machine);
    }
}

#[cfg(test)]
mod tests {
    use anyplace_model::MachineReport;
    use serde_json::json;

    use super::*;

    fn machine(name: &str, life: Life) -> (MachineId, Machine) {
        let report = json!({"machine": name, "epoch": 1, "sequence": 1, "advertise": "http://x", "address": "10.1.1.1",
            "instance_cidr": "10.1.1.64/26", "cpu": 1_000, "memory": "1Gi", "disk": "1Gi", "gpus": [], "isolations": [],
            "images": {}, "instances": [], "conditions": []});
        let report: MachineReport = serde_json::from_value(report).unwrap();
        (name.parse().unwrap(), Machine::new(life, report))
    }

    fn aimed() -> Latency {
        let backend = |name: &str, ingress: &[&str]| json!({"location": name, "latitude": 0.0, "longitude": 0.0, "ready": 1, "ingress": ingress});
        let route: RemoteRoute = serde_json::from_value(json!({"deployment": "hello", "vip": "203.0.113.1",
            "ports": [], "backends": [backend("ams", &["10.1.1.1"]),
                backend("nrt", &["10.2.1.1", "10.2.2.1", "10.2.3.1", "10.2.4.1"])]}))
        .unwrap();
        let mut latency = Latency::default();
        latency.aim(&"ams".parse().unwrap(), [&route, &route].into_iter());
        latency
    }

    fn found(ms: f64) -> BTreeMap<LocationId, f64> {
        BTreeMap::from([
            ("nrt".parse().unwrap(), ms),
            ("ams".parse().unwrap(), 0.0),
            ("xyz".parse().unwrap(), 1.0),
        ])
    }

    #[test]
    fn the_first_machine_that_is_there_and_whose_router_reports_measures() {
        let (mut latency, start) = (aimed(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut machines = BTreeMap::from([
            machine("m1", Life::Alive),
            machine("m2", Life::Alive),
            machine("m3", Life::Alive),
        ]);
        let m = |index: usize| -> MachineId { format!("m{index}").parse().unwrap() };
        let asked = latency.measured(&machines, &m(3), BTreeMap::new(), at(0));
        assert_eq!(asked.targets.len(), 1, "the only one that reports; itself is not measured: {asked:?}");
        assert_eq!(asked.targets.values().next().unwrap().len(), ADDRESSES);
        assert_eq!(latency.measured(&machines, &m(2), BTreeMap::new(), at(0)), asked);
        assert_eq!(latency.measured(&machines, &m(3), found(9.0), at(1)), Probes::default());
        assert!(latency.known(at(1)).is_empty(), "what others found is old");
        latency.measured(&machines, &m(2), found(120.0), at(2));
        assert_eq!(latency.known(at(2)), BTreeMap::from([("nrt".parse().unwrap(), 120.0)]));
        // The router of m2 falls silent; then m3's machine is lost, and m2's comes back.
        assert_eq!(latency.measured(&machines, &m(3), BTreeMap::new(), at(8)), asked);
        machines.extend([machine("m3", Life::Suspect)]);
        assert_eq!(latency.measured(&machines, &m(3), BTreeMap::new(), at(9)), Probes::default());
        assert_eq!(latency.measured(&machines, &m(2), BTreeMap::new(), at(10)), asked);
        assert_eq!(latency.known(at(60)).len(), 1);
        assert!(latency.known(at(63)).is_empty(), "a minute without news");
    }
}
