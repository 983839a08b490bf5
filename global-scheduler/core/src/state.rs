//! What the planner sees: one value, made by the caller from what is desired and what was last reported.

use std::{collections::BTreeMap, sync::Arc};

use anyplace_model::{
    Advert, DeploymentName, DeploymentSpec, Held, JobName, JobSpec, LocationId, LocationSettings, Refusal,
    Resources, Team, TeamSettings,
};
use jiff::{Timestamp, tz::TimeZone};

use crate::{JobLimits, Latency};

/// Everything a plan is made from.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Deployments.
    pub deployments: BTreeMap<DeploymentName, Deployment>,
    /// Jobs that wait for an attempt, in the order of their submission.
    pub queue: Vec<QueuedJob>,
    /// What jobs leave to deployments.
    pub job_limits: JobLimits,
    /// Teams for which something is set, or whose jobs hold something.
    pub teams: BTreeMap<Team, TeamState>,
    /// Locations.
    pub locations: BTreeMap<LocationId, Location>,
    /// Round trips between them.
    pub latency: Arc<Latency>,
}

/// A team.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TeamState {
    /// What the operator set.
    pub settings: TeamSettings,
    /// What the attempts of its jobs hold.
    pub held: Held,
}

/// A deployment and where it is now.
#[derive(Debug, Clone)]
pub struct Deployment {
    /// What was asked for.
    pub spec: DeploymentSpec,
    /// Where it was placed so far.
    pub shares: BTreeMap<LocationId, Share>,
    /// New connections a second, smoothed, by the location that they enter at. Empty where nobody counts them.
    pub demand: BTreeMap<LocationId, f64>,
}

/// What one location has of a deployment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Instances that it was asked to run.
    pub count: u32,
    /// How many of them its advert already accounts for. The others are on their way, and are deducted here.
    pub reserved: u32,
    /// How many of `count` it refuses to run.
    pub refused: u32,
    /// How many are ready.
    pub ready: u32,
}

/// A job that waits for an attempt.
#[derive(Debug, Clone)]
pub struct QueuedJob {
    /// Its name.
    pub name: JobName,
    /// What was asked for.
    pub spec: JobSpec,
    /// Locations that refused it of late.
    pub refused: BTreeMap<LocationId, RefusedUntil>,
}

/// Whether a location is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// It reports.
    Alive,
    /// Its lease has expired.
    Lost,
    /// It hasn't reported to this process yet, and its lease hasn't expired: what it has stays, and nothing new
    /// goes there.
    Unknown,
}

/// A location.
#[derive(Debug, Clone)]
pub struct Location {
    /// Whether it is there.
    pub liveness: Liveness,
    /// What the operator set.
    pub settings: LocationSettings,
    /// Its last advert.
    pub advert: Option<Advert>,
    /// The advert's time zone; none where its name isn't known.
    pub zone: Option<TimeZone>,
    /// Deployments that it refused of late.
    pub refused: BTreeMap<DeploymentName, RefusedUntil>,
    /// Deployments for which moves of other instances made no room there of late, and until when that is believed.
    pub hopeless: BTreeMap<DeploymentName, Timestamp>,
    /// Attempts of jobs that are on their way, and not in the advert yet.
    pub incoming: Vec<Resources>,
}

/// A refusal that is remembered for a while, so that the same wish isn't sent straight back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedUntil {
    /// When to try again.
    pub until: Timestamp,
    /// The location's reasons.
    pub refusals: Vec<Refusal>,
}

impl State {
    /// The deployment's instances in locations that aren't lost and don't refuse them.
    pub(crate) fn placed(&self, deployment: &Deployment) -> u32 {
        deployment
            .shares
            .iter()
            .filter(|(location, _)| {
                self.locations.get(*location).is_some_and(|location| location.liveness != Liveness::Lost)
            })
            .map(|(_, share)| share.count.saturating_sub(share.refused))
            .sum()
    }
}
