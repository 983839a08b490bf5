//! What is published from the world: each location's desired state, and the views of deployments and jobs.
//!
//! Always called with the world locked, so that an older view never replaces a newer one.

use std::collections::BTreeMap;

use anyplace_model::{
    AttemptId, DeploymentName, InstancePhase, LocationDesired, LocationId, Placement, Prewarm, RemoteBackend,
    RemoteRoute,
};
use ipnet::IpNet;

use crate::{app::App, views, world::World};

/// Queued jobs whose images a location fetches before its window opens.
const QUEUE_AHEAD: usize = 32;
/// Above the default of a wish: it is known that these will run.
const QUEUE_PRIORITY: u8 = 60;

/// Publishes everything.
pub(crate) fn all(app: &App, world: &World) {
    let routes: BTreeMap<String, LocationDesired> = world
        .deployments
        .keys()
        .filter_map(|name| Some((route_key(name), LocationDesired::Route(route(world, name)?))))
        .collect();
    for (id, location) in &world.locations {
        let mut desired = routes.clone();
        desired.insert("term".into(), LocationDesired::Term(app.term.number));
        desired.insert(
            "settings".into(),
            LocationDesired::Settings {
                settings: location.settings.clone(),
                vip_prefixes: app.config.vip_pools.iter().map(IpNet::trunc).collect(),
            },
        );
        desired.extend(placements(world, id));
        desired.extend(attempts(world, id));
        desired.extend(prewarms(world, id));
        desired.extend(world.ledgers.grants(id));
        location.feed.replace(desired);
    }
    app.deployments.replace(views::deployments(world).map(|view| (view.name.to_string(), view)).collect());
    app.jobs.replace(views::jobs(world).into_iter().map(|view| (view.name.to_string(), view)).collect());
}

/// Publishes the routes of some deployments.
pub(crate) fn routes<'a>(world: &World, names: impl Iterator<Item = &'a DeploymentName>) {
    for name in names {
        let Some(route) = route(world, name) else { continue };
        for location in world.locations.values() {
            location.feed.set(route_key(name), LocationDesired::Route(route.clone()));
        }
    }
}

fn route_key(name: &DeploymentName) -> String {
    format!("routes/{name}")
}

/// Where a deployment is served: locations that are there, not withdrawn, and have ready instances.
fn route(world: &World, name: &DeploymentName) -> Option<RemoteRoute> {
    let record = &world.deployments.get(name)?.value;
    let backends = world.locations.iter().filter_map(|(id, location)| {
        let observed = location.observed.as_ref()?;
        let serving = |instance: &&anyplace_model::InstanceStatus| {
            instance.ready && instance.phase == InstancePhase::Running
        };
        let ready = observed.placements.get(name)?.instances.iter().filter(serving).count();
        (location.is_open() && ready > 0).then(|| RemoteBackend {
            location: id.clone(),
            latitude: observed.advert.latitude,
            longitude: observed.advert.longitude,
            ready: u32::try_from(ready).unwrap_or(u32::MAX),
            ingress: observed.ingress.clone(),
        })
    });
    Some(RemoteRoute {
        deployment: name.clone(),
        vip: record.vip,
        vip6: record.vip6,
        ports: record.spec.ports.clone(),
        connections_per_second: record.spec.connections_per_second(),
        backends: backends.collect(),
    })
}

fn placements<'a>(
    world: &'a World,
    id: &'a LocationId,
) -> impl Iterator<Item = (String, LocationDesired)> + use<'a> {
    world.placements.iter().filter_map(move |(name, placements)| {
        let count = placements.get(id)?.count;
        let record = &world.deployments.get(name)?.value;
        let placement = Placement {
            generation: record.generation,
            spec: record.spec.clone(),
            vip: record.vip,
            vip6: record.vip6,
            count,
        };
        Some((format!("placements/{name}"), LocationDesired::Placement(Box::new(placement))))
    })
}

/// The operators' wishes, and the images of the first jobs that wait for this location's window.
fn prewarms(world: &World, id: &LocationId) -> BTreeMap<String, LocationDesired> {
    let mut next: Vec<_> = world
        .waiting
        .iter()
        .filter(|(_, waiting)| waiting.next_location.as_ref() == Some(id))
        .filter_map(|(name, waiting)| Some((waiting.position, &world.jobs.get(name)?.value.spec)))
        .collect();
    next.sort_by_key(|(position, _)| *position);
    let queued = next.into_iter().take(QUEUE_AHEAD).map(|(_, job)| Prewarm {
        image: job.image.clone(),
        locations: vec![id.clone()],
        machines: Some(1),
        priority: QUEUE_PRIORITY,
    });
    let wished = world.prewarms.values().filter(|wish| wish.covers(id)).cloned();
    // A wish says more than the queue.
    queued
        .chain(wished)
        .map(|wish| (format!("prewarms/{}", wish.image), LocationDesired::Prewarm(wish)))
        .collect()
}

fn attempts<'a>(
    world: &'a World,
    id: &'a LocationId,
) -> impl Iterator<Item = (String, LocationDesired)> + use<'a> {
    let here = world.jobs.placed().filter(move |job| job.location.as_ref() == Some(id));
    here.map(|job| {
        let attempt: AttemptId = job.attempt_id();
        let desired =
            LocationDesired::Attempt { attempt: attempt.clone(), spec: Box::new(job.spec.for_location()) };
        (format!("attempts/{attempt}"), desired)
    })
}
