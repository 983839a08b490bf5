//! The state in memory: a mirror of the store, and what locations reported.

use std::{
    collections::{BTreeMap, VecDeque},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Instant,
};

use anyhow::Context as _;
use anyplace_api::Event;
use anyplace_global_core::{
    Deployment, JobLimits, Liveness, Location, Missing, QueuedJob, RefusedUntil, Share, State, TeamState,
};
use anyplace_model::{
    Advert, AttemptId, AttemptStatus, DeploymentName, ImageState, InstancePhase, JobName, LocationDesired,
    LocationId, LocationSettings, MachineId, MoveStatus, PlacementStatus, Prewarm, Refusal, Team,
    TeamSettings, Traffic,
};
use anyplace_service::Feed;
use anyplace_store::{Revision, Store, StoreExt as _};
use jiff::{Timestamp, tz::TimeZone};
use serde::de::DeserializeOwned;

use crate::{
    choice::Ledgers,
    demand::Demand,
    job_table::JobTable,
    records::{AttemptRecord, DeploymentRecord, LocationKnown, PlacementRecord, TokenRecord, Tombstone},
};

/// A stored value with the revision that a conditional write needs.
#[derive(Debug, Clone)]
pub(crate) struct Stored<T> {
    pub(crate) value: T,
    pub(crate) revision: Revision,
}

/// Why a queued job waits, from the last plan.
#[derive(Debug, Clone, Default)]
pub(crate) struct Waiting {
    pub(crate) position: u32,
    pub(crate) refusals: Vec<Refusal>,
    pub(crate) predicted_start: Option<Timestamp>,
    /// Where that will be.
    pub(crate) next_location: Option<LocationId>,
}

/// A location's last report, taken apart for look-up.
#[derive(Debug, Clone)]
pub(crate) struct Observed {
    pub(crate) position: (u64, u64),
    pub(crate) at: Instant,
    pub(crate) advertise: String,
    pub(crate) log_token: String,
    pub(crate) advert: Advert,
    pub(crate) zone: Option<TimeZone>,
    pub(crate) ingress: Vec<Ipv4Addr>,
    pub(crate) placements: BTreeMap<DeploymentName, PlacementStatus>,
    pub(crate) attempts: BTreeMap<AttemptId, AttemptStatus>,
    pub(crate) moves: Vec<MoveStatus>,
    pub(crate) prewarms: BTreeMap<String, BTreeMap<MachineId, ImageState>>,
    pub(crate) traffic: BTreeMap<DeploymentName, Traffic>,
    /// Round trips to other locations.
    pub(crate) latency_ms: Arc<BTreeMap<LocationId, f64>>,
}

/// A location.
#[derive(Debug, Default)]
pub(crate) struct LocationState {
    /// Stored once it has reported.
    pub(crate) known: Option<LocationKnown>,
    pub(crate) settings: LocationSettings,
    /// None until it is decided: not reported to this process yet, and its lease not expired.
    pub(crate) alive: Option<bool>,
    pub(crate) observed: Option<Observed>,
    pub(crate) refused: BTreeMap<DeploymentName, RefusedUntil>,
    pub(crate) hopeless: BTreeMap<DeploymentName, Timestamp>,
    pub(crate) refused_jobs: BTreeMap<JobName, RefusedUntil>,
    pub(crate) feed: Arc<Feed<LocationDesired>>,
}

impl LocationState {
    pub(crate) fn is_alive(&self) -> bool {
        self.alive == Some(true)
    }

    /// Whether other locations may send traffic there.
    pub(crate) fn is_open(&self) -> bool {
        let reachable = self.observed.as_ref().is_some_and(|observed| !observed.ingress.is_empty());
        self.is_alive() && !self.settings.withdrawn && reachable
    }

    /// The status of a deployment, where the location is there to vouch for it.
    pub(crate) fn status(&self, name: &DeploymentName) -> Option<&PlacementStatus> {
        self.observed.as_ref()?.placements.get(name)
    }
}

/// Everything in memory.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) deployments: BTreeMap<DeploymentName, Stored<DeploymentRecord>>,
    pub(crate) placements: BTreeMap<DeploymentName, BTreeMap<LocationId, PlacementRecord>>,
    pub(crate) vips: BTreeMap<IpAddr, DeploymentName>,
    pub(crate) jobs: JobTable,
    pub(crate) attempts: BTreeMap<AttemptId, Stored<AttemptRecord>>,
    /// Of the configuration.
    pub(crate) job_limits: JobLimits,
    /// What is set for teams; others have what is set for nobody.
    pub(crate) teams: BTreeMap<Team, TeamSettings>,
    /// Wishes for warm images, by reference.
    pub(crate) prewarms: BTreeMap<String, Prewarm>,
    pub(crate) tokens: BTreeMap<String, TokenRecord>,
    /// By key below `tombstones/`.
    pub(crate) tombstones: BTreeMap<String, Tombstone>,
    /// With their numbers, oldest first.
    pub(crate) events: VecDeque<(u64, Event)>,
    pub(crate) locations: BTreeMap<LocationId, LocationState>,
    /// What locations may send to each other.
    pub(crate) ledgers: Ledgers,
    /// Where new connections enter.
    pub(crate) demand: Demand,
    /// From the last plan.
    pub(crate) missing: BTreeMap<DeploymentName, Missing>,
    /// From the last plan.
    pub(crate) waiting: BTreeMap<JobName, Waiting>,
    /// When leases were last looked at.
    pub(crate) checked: Option<Instant>,
    /// Events of reports, to be written by the next reconciliation.
    pub(crate) pending_events: Vec<Event>,
}

async fn read<T: DeserializeOwned>(
    store: &dyn Store,
    prefix: &str,
) -> anyhow::Result<Vec<(String, Stored<T>)>> {
    let (entries, _) = store.list_json::<T>(prefix).await.with_context(|| format!("reading {prefix}"))?;
    let entries = entries
        .into_iter()
        .map(|(key, value, revision)| (key[prefix.len()..].to_string(), Stored { value, revision }));
    Ok(entries.collect())
}

impl World {
    /// Reads the store.
    pub(crate) async fn load(store: &dyn Store) -> anyhow::Result<Self> {
        let mut world = Self::default();
        for (name, stored) in read::<DeploymentRecord>(store, "deployments/").await? {
            let name: DeploymentName = name.parse()?;
            world.vips.extend(stored.value.vips().map(|vip| (vip, name.clone())));
            world.deployments.insert(name, stored);
        }
        for (key, stored) in read(store, "placements/").await? {
            let (name, location) = key.split_once('/').with_context(|| format!("key placements/{key}"))?;
            let location: LocationId = location.parse()?;
            world.locations.entry(location.clone()).or_default();
            world.placements.entry(name.parse()?).or_default().insert(location, stored.value);
        }
        for (_, stored) in read(store, "jobs/").await? {
            world.jobs.insert(stored);
        }
        for (team, stored) in read(store, "teams/").await? {
            world.teams.insert(team.parse()?, stored.value);
        }
        for (key, stored) in read::<AttemptRecord>(store, "attempts/").await? {
            let (job, attempt) = key.split_once('/').with_context(|| format!("key attempts/{key}"))?;
            world.locations.entry(stored.value.location.clone()).or_default();
            world.attempts.insert(AttemptId { job: job.parse()?, attempt: attempt.parse()? }, stored);
        }
        for (image, stored) in read(store, "prewarms/").await? {
            world.prewarms.insert(image, stored.value);
        }
        for (name, stored) in read(store, "settings/").await? {
            world.locations.entry(name.parse()?).or_default().settings = stored.value;
        }
        for (name, stored) in read::<LocationKnown>(store, "locations/").await? {
            let location = world.locations.entry(name.parse()?).or_default();
            location.known = Some(stored.value);
            // Who was alive gets a lease to report; who was lost stays so until it does.
            location.alive = if stored.value.alive { None } else { Some(false) };
        }
        for (hash, stored) in read(store, "tokens/").await? {
            world.tokens.insert(hash, stored.value);
        }
        for (key, stored) in read(store, "tombstones/").await? {
            world.tombstones.insert(key, stored.value);
        }
        for (number, stored) in read(store, "events/").await? {
            world.events.push_back((number.parse().context("an event's number")?, stored.value));
        }
        Ok(world)
    }

    /// The location's settings, where it is known.
    pub(crate) fn location(&self, id: &LocationId) -> Option<&LocationState> {
        self.locations.get(id).filter(|location| location.known.is_some())
    }

    pub(crate) fn next_event(&self) -> u64 {
        self.events.back().map_or(0, |(number, _)| number + 1)
    }

    /// What the planner sees.
    pub(crate) fn state(&self) -> State {
        let deployments = self.deployments.iter().map(|(name, stored)| {
            let placements = self.placements.get(name).into_iter().flatten();
            let shares = placements
                .map(|(location, placement)| {
                    (location.clone(), self.share(name, stored.value.generation, location, placement.count))
                })
                .collect();
            (
                name.clone(),
                Deployment { spec: stored.value.spec.clone(), shares, demand: self.demand.of(name) },
            )
        });
        let queue = self.jobs.queue().into_iter().map(|job| {
            let name = job.spec.name.clone();
            let refused = self.locations.iter();
            let refused = refused
                .filter_map(|(id, location)| Some((id.clone(), location.refused_jobs.get(&name)?.clone())));
            QueuedJob { refused: refused.collect(), name, spec: job.spec.clone() }
        });
        let queue = queue.collect();
        let mut locations: BTreeMap<LocationId, Location> = self
            .locations
            .iter()
            .filter(|(id, location)| location.known.is_some() || self.is_used(id))
            .map(|(id, location)| (id.clone(), self.planned_location(location)))
            .collect();
        for job in self.jobs.placed() {
            let Some(id) = &job.location else { continue };
            let there = self.locations.get(id).and_then(|location| location.observed.as_ref());
            let reserved = there
                .and_then(|observed| observed.attempts.get(&job.attempt_id()))
                .is_some_and(|status| status.instance.is_some());
            if let Some(location) = locations.get_mut(id)
                && !reserved
            {
                location.incoming.push(job.spec.resources.clone());
            }
        }
        let latency = self.demand.latency.clone();
        State {
            deployments: deployments.collect(),
            queue,
            job_limits: self.job_limits,
            teams: self.planned_teams(),
            locations,
            latency,
        }
    }

    fn planned_teams(&self) -> BTreeMap<Team, TeamState> {
        let mut teams: BTreeMap<Team, TeamState> = BTreeMap::new();
        for (team, settings) in &self.teams {
            teams.entry(team.clone()).or_default().settings = settings.clone();
        }
        for (team, jobs) in self.jobs.teams() {
            teams.entry(team.clone()).or_default().held = jobs.held;
        }
        teams
    }

    fn is_used(&self, id: &LocationId) -> bool {
        self.placements.values().any(|placements| placements.contains_key(id))
    }

    pub(crate) fn planned_location(&self, location: &LocationState) -> Location {
        Location {
            liveness: match location.alive {
                Some(true) => Liveness::Alive,
                Some(false) => Liveness::Lost,
                None => Liveness::Unknown,
            },
            settings: location.settings.clone(),
            advert: location.observed.as_ref().map(|observed| observed.advert.clone()),
            zone: location.observed.as_ref().and_then(|observed| observed.zone.clone()),
            refused: location.refused.clone(),
            hopeless: location.hopeless.clone(),
            incoming: Vec::new(),
        }
    }

    /// The oldest generation of a deployment of which instances may run: 0 where a location hasn't said yet.
    pub(crate) fn oldest(&self, name: &DeploymentName, generation: u64) -> u64 {
        let unheard = |id| self.locations.get(id).is_none_or(|location| location.status(name).is_none());
        if self.placements.get(name).is_some_and(|placed| placed.keys().any(unheard)) {
            return 0;
        }
        let statuses = self.locations.values().filter_map(|location| location.status(name));
        let running = statuses.flat_map(|status| &status.instances).map(|instance| instance.generation);
        running.min().unwrap_or(generation)
    }

    fn share(&self, name: &DeploymentName, generation: u64, location: &LocationId, count: u32) -> Share {
        let status = self.locations.get(location).and_then(|location| location.status(name));
        let Some(status) = status else { return Share { count, ..Share::default() } };
        let booked = |phase| phase != InstancePhase::Lost;
        let reserved = status.instances.iter().filter(|instance| booked(instance.phase)).count();
        let ready = status.instances.iter().filter(|instance| instance.ready).count();
        Share {
            count,
            reserved: u32::try_from(reserved).unwrap_or(u32::MAX).min(count),
            ready: u32::try_from(ready).unwrap_or(u32::MAX),
            refused: if status.generation == generation { refused(status, count) } else { 0 },
        }
    }
}

/// How many of `count` the location refuses. A status may be older than the count: what it accepted of a larger
/// count is enough for a smaller one.
pub(crate) fn refused(status: &PlacementStatus, count: u32) -> u32 {
    let accepted = status.count.saturating_sub(status.refused);
    status.refused.min(count.saturating_sub(accepted))
}
