//! Everything a decision is made from.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyplace_model::{
    Assignment, AttemptId, Away, DeploymentName, InstanceId, InstanceStatus, JobSpec, LocationId,
    LocationSettings, MachineId, MachineMode, MachineReport, OffPeakWindow, Placement, Prewarm, RemoteRoute,
    Workload,
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::moves::{Moves, Replaced};

/// The whole of a location at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Revision of the store that the reservations were read at; a plan may be carried out only on it.
    pub revision: u64,
    /// Names the scheduler's process: a machine's mark of another one says nothing.
    pub process: u64,
    /// Milliseconds since 1970 when the process began, and from then on as they passed, whatever is done to the clock.
    pub now_ms: u64,
    /// How long the steps of an ending take.
    pub timing: Timing,
    /// What doesn't change while the scheduler runs.
    pub site: Site,
    /// The operator's settings.
    pub settings: LocationSettings,
    /// Prefixes to announce; unknown until the global scheduler has told them once.
    pub vip_prefixes: Option<Vec<IpNet>>,
    /// Every machine that has reported and isn't forgotten.
    pub machines: BTreeMap<MachineId, Machine>,
    /// Every instance that holds room on a machine.
    pub reservations: BTreeMap<InstanceId, Reservation>,
    /// Which mark of its machine came with the end of an instance's assignment, for those that this process has ended.
    pub withdrawn: BTreeMap<InstanceId, u64>,
    /// What the global scheduler wants of deployments.
    pub placements: BTreeMap<DeploymentName, Placement>,
    /// What it wants of jobs.
    pub attempts: BTreeMap<AttemptId, JobSpec>,
    /// Images that it wants warm, by reference.
    pub wishes: BTreeMap<String, Prewarm>,
    /// Where else deployments are served.
    pub remote: BTreeMap<DeploymentName, RemoteRoute>,
    /// Which parts of deployments' new connections go to other locations, and did before; the newest first.
    pub away: BTreeMap<DeploymentName, Vec<Away>>,
    /// Measured round trips to other locations, in milliseconds.
    pub latency_ms: BTreeMap<LocationId, f64>,
    /// Machines that the last plan had fetch the images of waiting attempts.
    pub prewarms: BTreeMap<AttemptId, MachineId>,
    /// Images that the last plan had machines keep warm, with their priorities.
    pub warm: BTreeMap<MachineId, BTreeMap<String, u8>>,
    /// Instances that move to other machines.
    pub moves: Moves,
}

impl State {
    /// Whether an instance is to leave its machine, which an operator drains.
    pub(crate) fn leaves(&self, held: &Reservation) -> bool {
        self.settings.machines.get(&held.machine) == Some(&MachineMode::Draining)
    }
}

/// How long the steps of an ending take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between "no new connections" and the end of an instance.
    pub drain_ms: u64,
}

/// Where the location is and what it calls itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Its name.
    pub location: LocationId,
    /// Region, such as `eu`.
    pub region: String,
    /// Country (ISO 3166-1 alpha-2).
    pub country: String,
    /// Labels for placement constraints.
    pub labels: BTreeMap<String, String>,
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
    /// IANA time zone.
    pub timezone: String,
    /// Daily window for off-peak jobs.
    pub off_peak: Option<OffPeakWindow>,
}

/// Whether a machine is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Life {
    /// Its lease holds.
    Alive,
    /// Its lease has expired (or it hasn't reported since the scheduler started): it gets no traffic and no new
    /// work, and isn't replaced yet.
    Suspect,
    /// Silent for longer than the grace: its instances are replaced.
    Lost,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Whether it is there.
    pub life: Life,
    /// Number of its mark: grows whenever an assignment is taken from it, and when it is lost.
    pub mark: u64,
    /// Number of the mark with which room was last given away that it wasn't known to have freed: until it knows that, it
    /// takes nothing.
    pub given_away: u64,
    /// Its last report.
    pub report: MachineReport,
}

impl Machine {
    /// A machine that this process hasn't told anything yet.
    pub const fn new(life: Life, report: MachineReport) -> Self {
        Self { life, mark: 0, given_away: 0, report }
    }

    /// Whether it wrote its report when it knew of everything that was taken from it up to this number.
    pub(crate) fn knew(&self, process: u64, number: u64) -> bool {
        self.report.mark.is_some_and(|mark| mark.process == process && mark.number >= number)
    }
}

/// Where a reservation is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Wanted.
    Serving,
    /// Takes no new connections.
    Draining {
        /// Since when, in milliseconds since 1970.
        since_ms: u64,
    },
    /// No longer assigned; holds its room until its machine has ended it.
    Removing {
        /// Since when, in milliseconds since 1970. Nothing follows from it.
        since_ms: u64,
    },
    /// An attempt whose machine was lost: never runs again, and stays until the global scheduler knows.
    Lost,
    /// An attempt that made way for a deployment and has ended: the same, and holds nothing.
    Preempted,
}

/// Room on a machine for one instance. Kept in the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reservation {
    /// The machine.
    pub machine: MachineId,
    /// The deployment's virtual IP; none for an attempt.
    pub vip: Option<Ipv4Addr>,
    /// The deployment's IPv6 one, where it has one.
    #[serde(default)]
    pub vip6: Option<Ipv6Addr>,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Where it is in its life.
    pub stage: Stage,
    /// The newest generation of the desired record that it satisfies. The machine knows only the one that it was
    /// started for: a change that the instance itself can't notice (such as of the count) doesn't restart it.
    pub generation: u64,
    /// The instance's place in the tables of its virtual IP: the lowest number that was free when it was made.
    #[serde(default)]
    pub slot: u16,
    /// Whose place it took, where it was started to take one's place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Replaced>,
    /// What the machine is told.
    pub assignment: Assignment,
}

impl Reservation {
    /// The deployment, unless it is a job's.
    pub fn deployment(&self) -> Option<&DeploymentName> {
        match &self.assignment.workload {
            Workload::Deployment(name) => Some(name),
            Workload::Job(_) => None,
        }
    }

    /// The deployment's virtual IPs of both families.
    pub(crate) fn vips(&self) -> impl Iterator<Item = IpAddr> {
        self.vip.into_iter().flat_map(|vip| anyplace_model::vips(vip, self.vip6))
    }

    /// Whether an instance made for this placement would be the same.
    pub(crate) fn satisfies(&self, placement: &Placement) -> bool {
        let (spec, made) = (&placement.spec, &self.assignment);
        self.vip == Some(placement.vip)
            && spec.image == made.image
            && spec.command == made.command
            && spec.env == made.env
            && spec.isolation == made.isolation
            && spec.resources == made.resources
            && spec.ports == made.ports
            && spec.health == made.health
    }

    /// The attempt, unless it is a deployment's.
    pub fn attempt(&self) -> Option<&AttemptId> {
        match &self.assignment.workload {
            Workload::Job(attempt) => Some(attempt),
            Workload::Deployment(_) => None,
        }
    }
}

/// What is observed of the instances that hold a reservation.
#[derive(Debug)]
pub(crate) struct Observed<'a> {
    /// Only the machine that has the reservation may speak for the instance.
    statuses: HashMap<(&'a MachineId, &'a InstanceId), &'a InstanceStatus>,
    machines: &'a BTreeMap<MachineId, Machine>,
}

impl<'a> Observed<'a> {
    pub(crate) fn new(state: &'a State) -> Self {
        let of = |(name, machine): (&'a MachineId, &'a Machine)| {
            machine.report.instances.iter().map(move |status| ((name, &status.instance), status))
        };
        let statuses = state.machines.iter().flat_map(of).collect();
        Self { statuses, machines: &state.machines }
    }

    pub(crate) fn status(&self, reservation: &Reservation) -> Option<&'a InstanceStatus> {
        self.statuses.get(&(&reservation.machine, &reservation.assignment.instance)).copied()
    }

    /// A machine that was forgotten is as good as lost.
    pub(crate) fn life(&self, reservation: &Reservation) -> Life {
        self.machines.get(&reservation.machine).map_or(Life::Lost, |machine| machine.life)
    }

    /// Whether the machine's report was written when it knew that the instance's assignment was gone.
    pub(crate) fn knew_of_end(&self, state: &State, reservation: &Reservation) -> bool {
        let number = state.withdrawn.get(&reservation.assignment.instance).copied().unwrap_or(0);
        self.machines.get(&reservation.machine).is_some_and(|machine| machine.knew(state.process, number))
    }

    /// Whether the instance takes new connections.
    pub(crate) fn ready(&self, reservation: &Reservation) -> bool {
        reservation.stage == Stage::Serving
            && self.life(reservation) == Life::Alive
            && self.status(reservation).is_some_and(|status| status.ready)
    }
}
