//! The ledgers of grants: what each location may send where of each deployment's new connections.
//!
//! A ledger is in memory. After a restart it goes on with the grants that locations report, and makes none before all of
//! them have reported. Grants are published like all that a location should have, under `grants/<deployment>`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_choice::{self as choice, Ledger, View};
use anyplace_model::{DeploymentName, Grant, LocationDesired, LocationId, Traffic};
use tokio::time::MissedTickBehavior;

use crate::{
    app::App,
    latency::latency,
    world::{LocationState, World},
};

/// Grants are made so often.
const ROUND: Duration = Duration::from_millis(500);

/// All ledgers.
#[derive(Debug, Default)]
pub(crate) struct Ledgers {
    /// Locations by their number in the ledgers. Only grows.
    sites: Vec<LocationId>,
    /// Revisions of this run's grants are larger than those of earlier ones.
    first_revision: u64,
    by_deployment: BTreeMap<DeploymentName, Ledger>,
}

impl Ledgers {
    pub(crate) fn starting_at(first_revision: u64) -> Self {
        Self { first_revision, ..Self::default() }
    }

    /// A location's grant of each deployment that it may share.
    pub(crate) fn grants<'a>(
        &'a self,
        location: &LocationId,
    ) -> impl Iterator<Item = (String, LocationDesired)> + use<'a> {
        let site = self.sites.iter().position(|site| site == location);
        self.by_deployment.iter().filter_map(move |(name, ledger)| {
            let grant = ledger.grant(site?).filter(|grant| grant.revision > 0)?;
            Some((key(name), self.desired(name, grant)))
        })
    }

    fn desired(&self, name: &DeploymentName, grant: &choice::Grant) -> LocationDesired {
        let quotas = grant.quotas.iter().map(|(site, quota)| (self.sites[*site].clone(), *quota));
        let grant = Grant { revision: grant.revision, asked: grant.asked, quotas: quotas.collect() };
        LocationDesired::Grant { deployment: name.clone(), grant }
    }

    fn ledger(&self, name: &DeploymentName) -> Ledger {
        let known = self.by_deployment.get(name).cloned();
        known.unwrap_or_else(|| Ledger::starting_at(self.first_revision))
    }

    fn number(&mut self, location: &LocationId) -> usize {
        self.sites.iter().position(|site| site == location).unwrap_or_else(|| {
            self.sites.push(location.clone());
            self.sites.len() - 1
        })
    }
}

/// What a round of one deployment starts from, by number of the location.
#[derive(Default)]
struct Seen {
    asked: Vec<f64>,
    away: Vec<Vec<(usize, usize)>>,
    known: Vec<u64>,
    capacity: Vec<f64>,
}

/// Makes grants until the shutdown.
pub(crate) async fn run(app: Arc<App>) {
    let mut ticks = tokio::time::interval(ROUND);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = app.shutdown.cancelled() => return,
        }
        // Before that, locations that are only slow to report look as if they needed and had nothing.
        if *app.settled.borrow() {
            let app = app.clone();
            // In a large fleet a round takes some 10 ms for each deployment.
            if let Err(error) = tokio::task::spawn_blocking(move || round(&app)).await {
                tracing::error!(%error, "no grants were made; trying again");
            }
        }
    }
}

fn round(app: &App) {
    let (names, latency) = {
        let mut world = app.world();
        let shared =
            world.deployments.iter().filter(|(_, it)| it.value.spec.connections_per_second().is_some());
        let names: BTreeSet<DeploymentName> = shared.map(|(name, _)| name.clone()).collect();
        forget(&mut world, &names);
        let World { locations, ledgers, demand, .. } = &mut *world;
        demand.follow(names.iter(), locations, Instant::now());
        for id in locations.keys() {
            ledgers.number(id);
        }
        (names, latency(&world, &world.ledgers.sites))
    };
    if names.is_empty() {
        return;
    }
    let latency = Arc::new(latency());
    app.world().demand.latency = latency.clone();
    for name in names {
        let (mut ledger, seen) = {
            let mut world = app.world();
            (world.ledgers.ledger(&name), see(&mut world, &name))
        };
        let changed = ledger.round(&seen.view(&|from, to| latency.ms(from, to)));
        let mut world = app.world();
        if !world.deployments.contains_key(&name) {
            continue;
        }
        for site in changed {
            let Some(grant) = ledger.grant(site) else { continue };
            let desired = world.ledgers.desired(&name, grant);
            if let Some(location) = world.locations.get(&world.ledgers.sites[site]) {
                location.feed.set(key(&name), desired);
            }
        }
        world.ledgers.by_deployment.insert(name.clone(), ledger);
        // What came in the meantime.
        for id in world.locations.keys().cloned().collect::<Vec<_>>() {
            adopt(&mut world, &id, &name);
        }
    }
}

/// Goes on with the grants that a location says it has, where an earlier run of this process made them: at once, since the
/// location must not find itself without.
pub(crate) fn adopt_all(world: &mut World, id: &LocationId) {
    let traffic = world.locations.get(id).and_then(|location| location.observed.as_ref());
    let names = traffic.map_or(Vec::new(), |observed| observed.traffic.keys().cloned().collect());
    names.iter().for_each(|name| adopt(world, id, name));
}

fn adopt(world: &mut World, id: &LocationId, name: &DeploymentName) {
    let World { deployments, locations, ledgers, .. } = world;
    let shared = deployments.get(name).is_some_and(|it| it.value.spec.connections_per_second().is_some());
    let Some(location) = locations.get(id).filter(|_| shared) else { return };
    let Some(Traffic { grant, .. }) = traffic(location, name) else { return };
    let site = ledgers.number(id);
    let known = ledgers.by_deployment.get(name).and_then(|ledger| ledger.grant(site));
    if known.map_or(0, |known| known.revision) >= grant.revision {
        return;
    }
    let quotas = grant.quotas.iter().map(|(to, quota)| (ledgers.number(to), *quota)).collect();
    let mut ledger = ledgers.ledger(name);
    ledger.adopt(site, &choice::Grant { revision: grant.revision, asked: grant.asked, quotas });
    ledgers.by_deployment.insert(name.clone(), ledger);
    location.feed.set(key(name), LocationDesired::Grant { deployment: name.clone(), grant: grant.clone() });
}

/// Takes back the grants of deployments that say no load any more, or are gone, and what was said of them.
fn forget(world: &mut World, shared: &BTreeSet<DeploymentName>) {
    let known = world.ledgers.by_deployment.keys();
    for name in known.filter(|name| !shared.contains(*name)).cloned().collect::<Vec<_>>() {
        world.ledgers.by_deployment.remove(&name);
        for location in world.locations.values() {
            location.feed.remove(&key(&name));
        }
    }
    for observed in world.locations.values_mut().filter_map(|location| location.observed.as_mut()) {
        observed.traffic.retain(|name, _| shared.contains(name));
    }
}

fn see(world: &mut World, name: &DeploymentName) -> Seen {
    let World { locations, ledgers, .. } = world;
    for id in locations.keys() {
        ledgers.number(id);
    }
    // Locations that others have parts at are known; a stranger's name in a report is not counted.
    let numbers: BTreeMap<&LocationId, usize> =
        ledgers.sites.iter().enumerate().map(|(number, id)| (id, number)).collect();
    let mut seen = Seen::default();
    for id in &ledgers.sites {
        let location = locations.get(id);
        let traffic = location.and_then(|location| traffic(location, name));
        let away = traffic.into_iter().flat_map(|traffic| &traffic.away);
        let away = away.filter_map(|(to, parts)| Some((*numbers.get(to)?, usize::from(*parts))));
        seen.asked.push(traffic.map_or(0.0, |traffic| traffic.asked));
        seen.away.push(away.collect());
        seen.known.push(traffic.map_or(0, |traffic| traffic.grant.revision));
        seen.capacity.push(match location {
            Some(location) if location.is_open() => traffic.map_or(0.0, |traffic| traffic.capacity),
            _ => 0.0,
        });
    }
    seen
}

fn traffic<'a>(location: &'a LocationState, name: &DeploymentName) -> Option<&'a Traffic> {
    location.observed.as_ref()?.traffic.get(name)
}

impl Seen {
    fn view<'a>(&'a self, latency_ms: &'a dyn Fn(usize, usize) -> f64) -> View<'a> {
        let Self { asked, away, known, capacity } = self;
        View { asked, away, known, capacity, latency_ms }
    }
}

fn key(name: &DeploymentName) -> String {
    format!("grants/{name}")
}
