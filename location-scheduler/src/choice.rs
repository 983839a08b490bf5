//! Which parts of deployments' new connections go to other locations: measured by the routers, decided here every
//! second, nearest first, within the grants of the global scheduler, kept on disk, then published with the routes. Without news of
//! routers or the global scheduler, what was decided last stays in force.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_location_core::{Life, Sharing, capacity};
use anyplace_model::{Away, DeploymentName, Grant, LocationId, MachineId, Route, RouteRecord, Traffic};
use tokio::time::MissedTickBehavior;

use crate::{
    live::Live,
    scheduler::{Scheduler, now_ms},
};

/// Routers measure so often.
const PERIOD: Duration = Duration::from_secs(1);
/// So long after a start all routers have been heard, which retry within a second or two; until then nothing is said of
/// new connections, and what was said before stays in force.
const LISTEN: Duration = Duration::from_secs(3);

/// What is known of new connections.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    /// New connections a second that entered at each machine, by virtual IP.
    entering: BTreeMap<MachineId, BTreeMap<IpAddr, f64>>,
    grants: BTreeMap<DeploymentName, Grant>,
    sharing: BTreeMap<DeploymentName, Sharing>,
    /// What to tell the global scheduler.
    pub(crate) traffic: BTreeMap<DeploymentName, Traffic>,
    /// Instances that were found ready at the start are warm.
    warm_ms: Option<u64>,
}

impl Choice {
    /// Takes in what a machine's router measured.
    pub(crate) fn measured(&mut self, machine: MachineId, connections: BTreeMap<IpAddr, f64>) {
        self.entering.insert(machine, connections);
    }

    pub(crate) fn forget(&mut self, machine: &MachineId) {
        self.entering.remove(machine);
    }

    /// Takes over the grants.
    pub(crate) fn granted(&mut self, grants: BTreeMap<DeploymentName, Grant>) {
        self.grants = grants;
    }
}

/// What one round came to.
#[derive(Debug, Default)]
struct Decided {
    /// What changed, to be kept; none where a deployment is gone.
    away: Vec<(DeploymentName, Option<Vec<Away>>)>,
    traffic: BTreeMap<DeploymentName, Traffic>,
}

/// Decides every second, and when there are other grants, until the shutdown.
pub(crate) async fn run(scheduler: Arc<Scheduler>) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = scheduler.granted.notified() => {}
            () = scheduler.shutdown.cancelled() => return Ok(()),
        }
        round(&scheduler, started.elapsed() >= LISTEN).await?;
    }
}

async fn round(scheduler: &Scheduler, tells: bool) -> anyhow::Result<()> {
    let here = &scheduler.config.location;
    let (latency_ms, decided) = {
        let mut live = scheduler.live();
        if !live.is_warm() {
            return Ok(());
        }
        let latency_ms = live.latency.known(Instant::now());
        let latency_ms = (latency_ms != live.state.latency_ms).then_some(latency_ms);
        if let Some(latency_ms) = &latency_ms {
            live.state.latency_ms.clone_from(latency_ms);
        }
        let decided =
            decide(&mut live, here, now_ms(), |vip| match scheduler.routes.get(&format!("vips/{vip}")) {
                Some(RouteRecord::Vip(route)) => Some(route),
                _ => None,
            });
        (latency_ms, decided)
    };
    // Before any router knows: after a crash, flows that went elsewhere must still be found there.
    scheduler.disk.away(&decided.away).await?;
    if let Some(latency_ms) = &latency_ms {
        scheduler.disk.latency(latency_ms).await?;
    }
    let mut live = scheduler.live();
    let changes = !decided.away.is_empty() || latency_ms.is_some();
    for (name, away) in decided.away {
        match away {
            Some(away) => live.state.away.insert(name, away),
            None => live.state.away.remove(&name),
        };
    }
    if changes {
        scheduler.publish_routes(&live);
    }
    if tells && live.choice.traffic != decided.traffic {
        live.choice.traffic = decided.traffic;
        drop(live);
        scheduler.report.notify_one();
    }
    Ok(())
}

fn decide(
    live: &mut Live,
    here: &LocationId,
    now_ms: u64,
    published: impl Fn(IpAddr) -> Option<Route>,
) -> Decided {
    let Live { state, choice, .. } = live;
    let warm_ms = *choice.warm_ms.get_or_insert(now_ms);
    // A machine whose router is silent still forwards what comes.
    let there = |machine: &MachineId| state.machines.get(machine).is_some_and(|it| it.life != Life::Lost);
    let mut entering: BTreeMap<IpAddr, f64> = BTreeMap::new();
    for connections in choice.entering.iter().filter(|(machine, _)| there(machine)).map(|(_, it)| it) {
        connections.iter().for_each(|(vip, rate)| *entering.entry(*vip).or_default() += rate.max(0.0));
    }
    let mut decided = Decided::default();
    for (name, remote) in &state.remote {
        let kept = state.away.get(name);
        if remote.connections_per_second.is_none() && kept.is_none() {
            choice.sharing.remove(name);
            continue;
        }
        let Some(route) = published(remote.vip.into()) else { continue };
        let rate: f64 = remote.vips().filter_map(|vip| entering.get(&vip)).sum();
        // Whoever states no load any more has nothing granted: its connections come home, step by step.
        let grant = choice.grants.get(name).filter(|_| remote.connections_per_second.is_some());
        let grant = grant.cloned().unwrap_or_default();
        let sharing = choice.sharing.entry(name.clone()).or_insert_with(|| {
            Sharing::remembered(here, kept.map(Vec::as_slice).unwrap_or_default(), grant.asked, now_ms)
        });
        sharing.measured(now_ms, rate);
        if sharing.decide(now_ms, &grant, &route, &state.latency_ms) {
            let away = sharing.away();
            tracing::info!(deployment = %name, away = ?away.first().map(|it| &it.spans), "other parts go elsewhere");
            decided.away.push((name.clone(), Some(away)));
        }
        if let Some(each) = remote.connections_per_second {
            let capacity = capacity(&route, each, warm_ms, now_ms);
            decided.traffic.insert(name.clone(), sharing.traffic(rate, capacity, &grant, &route));
        }
    }
    let gone: Vec<DeploymentName> =
        state.away.keys().filter(|name| !state.remote.contains_key(*name)).cloned().collect();
    choice.sharing.retain(|name, _| state.remote.contains_key(name));
    decided.away.extend(gone.into_iter().map(|name| (name, None)));
    decided
}
