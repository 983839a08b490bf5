//! While no scheduler answers, instances that seem dead take no new connections.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use anyplace_model::MachineId;
use anyplace_router_core::without;

use crate::{liveness::Liveness, plane::Change, routes::Routes};

/// A scheduler that restarts is back within a second or two, and what it said last is as good as new.
const ALONE: Duration = Duration::from_secs(3);

/// Which routes differ from what the scheduler said last.
pub(crate) struct Suspicion {
    machine: MachineId,
    floor_percent: u8,
    liveness: Liveness,
    failing: Option<Instant>,
    /// Virtual IPs by instance, while no scheduler answers.
    vips: Option<HashMap<Ipv4Addr, Vec<IpAddr>>>,
    suspects: BTreeSet<Ipv4Addr>,
    /// Virtual IPs of which too few instances would be left.
    floored: BTreeSet<IpAddr>,
}

impl Suspicion {
    pub(crate) fn new(machine: MachineId, floor_percent: u8, liveness: Liveness) -> Self {
        let (failing, vips, suspects, floored) = Default::default();
        Self { machine, floor_percent, liveness, failing, vips, suspects, floored }
    }

    /// The scheduler doesn't answer. After a while instances are looked after.
    pub(crate) fn unanswered(&mut self, routes: &Routes) {
        let failing = *self.failing.get_or_insert_with(Instant::now);
        if self.vips.is_some() || failing.elapsed() < ALONE {
            return;
        }
        let (mut vips, mut instances) = (HashMap::<_, Vec<_>>::new(), BTreeMap::new());
        let read = routes.for_each(|route| {
            for endpoint in route.local.iter().filter(|it| it.ready && !it.draining) {
                vips.entry(endpoint.address).or_default().push(route.vip);
                instances.insert(endpoint.address, endpoint.machine.clone());
            }
        });
        if let Err(error) = read {
            tracing::warn!(%error, "not all routes could be read: their instances are not looked after");
        }
        let machines = routes.announcement().map(|it| it.machines.clone()).unwrap_or_default();
        let others = machines.into_iter().filter(|(machine, _)| *machine != self.machine).collect();
        tracing::warn!(
            instances = instances.len(),
            "no scheduler answers: looking after instances from here"
        );
        self.liveness.begin(&others, instances);
        self.vips = Some(vips);
    }

    /// The scheduler answers: what it said last holds again.
    pub(crate) fn answered(&mut self, routes: &Routes) -> Vec<Change> {
        self.failing = None;
        let Some(vips) = self.vips.take() else { return Vec::new() };
        self.liveness.end();
        self.floored.clear();
        let suspects = std::mem::take(&mut self.suspects);
        affected(&vips, suspects.iter())
            .into_iter()
            .filter_map(|vip| routes.get(vip).map(Change::Put))
            .collect()
    }

    /// Others are suspected now; the routes that change.
    pub(crate) fn suspect(&mut self, suspects: BTreeSet<Ipv4Addr>, routes: &Routes) -> Vec<Change> {
        let Some(vips) = &self.vips else { return Vec::new() };
        let differing = affected(vips, suspects.symmetric_difference(&self.suspects));
        self.suspects = suspects;
        let mut changes = Vec::with_capacity(differing.len());
        for route in differing.into_iter().filter_map(|vip| routes.get(vip)) {
            let without = without(&route, self.floor_percent, |it| self.suspects.contains(&it.address));
            let _ = match without {
                Some(_) => self.floored.remove(&route.vip),
                None => self.floored.insert(route.vip),
            };
            changes.push(Change::Put(without.unwrap_or(route)));
        }
        let suspects: Vec<String> = self.suspects.iter().take(10).map(ToString::to_string).collect();
        tracing::warn!(
            suspects = self.suspects.len(),
            first = suspects.join(" "),
            vips = changes.len(),
            floored = self.floored.len(),
            "other instances seem dead; virtual IPs of which too few would be left keep all"
        );
        changes
    }

    /// The data plane has the routes that changed.
    pub(crate) fn applied(&self) {
        self.liveness.applied(self.suspects.len(), self.floored.len());
    }
}

fn affected<'a>(
    vips: &HashMap<Ipv4Addr, Vec<IpAddr>>,
    instances: impl Iterator<Item = &'a Ipv4Addr>,
) -> BTreeSet<IpAddr> {
    instances.filter_map(|instance| vips.get(instance)).flatten().copied().collect()
}
