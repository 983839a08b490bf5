//! The plan: what to start, to drain, to end and to fetch, as a value.
//!
//! Order: first what ends by itself (drained, gone, lost), because it makes room; then deployments, those that need
//! the most GPU memory first; then moves of instances; then attempts of jobs on machines that have the image; then the images that the other
//! attempts wait for. Room is taken while planning, so that a plan never contradicts itself.

mod deployments;
mod endings;
mod images;
mod jobs;
mod moves;
mod preemption;

pub(crate) use preemption::is_off_peak;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use anyplace_model::{
    Assignment, AttemptId, DeploymentName, DeploymentSpec, InstanceId, JobSpec, MachineId, MoveCause,
    Refusal, Workload,
};

use crate::{
    moves::{Claim, Copies, Moving, Replaced, Waiting, copies, go_on},
    packing::Cost,
    refusal::Tally,
    room::{Demand, Misfit, Room, Rooms, Slot},
    state::{Observed, Reservation, Stage, State},
};

/// What to do. Carrying it out leaves nothing to decide but the names of new instances.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Revision of the state that it was made from.
    pub revision: u64,
    /// When it was made, in milliseconds since 1970.
    pub now_ms: u64,
    /// Instances to start.
    pub starts: Vec<Start>,
    /// Instances that take no new connections from now on.
    pub drains: Vec<InstanceId>,
    /// Instances whose assignment is taken from their machine.
    pub removals: Vec<InstanceId>,
    /// Instances that satisfy a new generation, or get an IPv6 address beside the other, as they are.
    pub adoptions: Vec<(InstanceId, u64)>,
    /// Off-peak attempts that make way for deployments.
    pub preemptions: Vec<InstanceId>,
    /// Attempts that made way, and have ended.
    pub preempted: Vec<InstanceId>,
    /// Attempts whose machine is lost.
    pub losses: Vec<InstanceId>,
    /// Instances that are gone and hold no room any more.
    pub releases: Vec<InstanceId>,
    /// Machines that should fetch the images of waiting attempts.
    pub prewarms: BTreeMap<AttemptId, MachineId>,
    /// Images that machines should keep warm, with their priorities.
    pub warm: BTreeMap<MachineId, BTreeMap<String, u8>>,
    /// What becomes of each placement.
    pub placements: BTreeMap<DeploymentName, Verdict>,
    /// Records of moves that change; none for one that ends.
    pub moves: BTreeMap<MoveCause, Option<Moving>>,
    /// Deployments that are refused, since when, and when room was last looked for.
    pub waiting: BTreeMap<DeploymentName, Waiting>,
    /// When moves for their own sake were last looked for, or were under way.
    pub tidied_ms: Option<u64>,
    /// Why attempts don't run yet; those that do are left out.
    pub attempts: BTreeMap<AttemptId, Vec<Refusal>>,
    /// When time alone changes the plan.
    pub wake_at_ms: Option<u64>,
}

/// An instance to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// What it belongs to.
    pub workload: Workload,
    /// Generation of the desired record; the attempt of a job.
    pub generation: u64,
    /// The machine.
    pub machine: MachineId,
    /// Indexes of its GPUs.
    pub gpus: Vec<u32>,
    /// The instance's address.
    pub address: Ipv4Addr,
    /// Whose place it takes.
    pub replaces: Option<Replaced>,
}

/// What becomes of a placement.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The generation that was planned.
    pub generation: u64,
    /// How many were wanted.
    pub count: u32,
    /// How many of them find no room.
    pub refused: u32,
    /// Why, counted over the machines.
    pub refusals: Vec<Refusal>,
}

/// One change of the reservations, or of what moves.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Make it, or replace it.
    Put(Box<Reservation>),
    /// It is gone.
    Delete(InstanceId),
    /// A record of moves changes, or ends.
    Moves(MoveCause, Option<Box<Moving>>),
}

impl Plan {
    /// Whether no reservation and no record of moves changes.
    pub fn changes_nothing(&self) -> bool {
        self.starts.is_empty()
            && self.drains.is_empty()
            && self.removals.is_empty()
            && self.preemptions.is_empty()
            && self.preempted.is_empty()
            && self.losses.is_empty()
            && self.adoptions.is_empty()
            && self.releases.is_empty()
            && self.moves.is_empty()
    }

    /// The changes, in an order of which every beginning is valid by itself: what frees room
    /// comes before what takes it. `name` gives new instances their names.
    pub fn changes(&self, state: &State, mut name: impl FnMut(&Start) -> InstanceId) -> Vec<Change> {
        let mut changes: Vec<Change> = self.releases.iter().cloned().map(Change::Delete).collect();
        let staged = |instances: &[InstanceId], stage: Stage| {
            let found = instances.iter().filter_map(|instance| state.reservations.get(instance));
            let put = |held: &Reservation| Change::Put(Box::new(Reservation { stage, ..held.clone() }));
            found.map(put).collect::<Vec<_>>()
        };
        changes.extend(staged(&self.preempted, Stage::Preempted));
        changes.extend(staged(&self.removals, Stage::Removing { since_ms: self.now_ms }));
        changes.extend(staged(&self.preemptions, Stage::Removing { since_ms: self.now_ms }));
        changes.extend(staged(&self.drains, Stage::Draining { since_ms: self.now_ms }));
        changes.extend(staged(&self.losses, Stage::Lost));
        changes.extend(self.adoptions.iter().filter_map(|(instance, generation)| {
            let held = state.reservations.get(instance)?.clone();
            let placement = state.placements.get(held.deployment()?)?;
            let vip6 = placement.vip6;
            Some(Change::Put(Box::new(Reservation { generation: *generation, vip6, ..held })))
        }));
        // What begins is known before its copies are there, and ends after them.
        let record = |(cause, moving): (&MoveCause, &Option<Moving>)| {
            Change::Moves(cause.clone(), moving.clone().map(Box::new))
        };
        let (ends, begins): (Vec<_>, Vec<_>) = self.moves.iter().partition(|(_, moving)| moving.is_none());
        changes.extend(begins.into_iter().map(record));
        // In most plans nothing starts: not worth a look at every instance.
        let mut slots = if self.starts.is_empty() { Slots::default() } else { Slots::of(state) };
        for start in &self.starts {
            let Some(mut made) = reserve(state, start, name(start)) else { continue };
            made.slot = made.vip.map_or(0, |vip| slots.take(vip));
            changes.push(Change::Put(Box::new(made)));
        }
        changes.extend(ends.into_iter().map(record));
        changes
    }
}

/// Plans. The same state gives the same plan.
pub fn plan(state: &State) -> Plan {
    let mut planner = Planner::new(state);
    planner.endings();
    planner.deployments();
    planner.moves();
    planner.jobs();
    planner.tidy();
    planner.images();
    planner.plan.wake_at_ms = planner.wake_at_ms();
    planner.plan
}

/// The best machine has the least score; the order of the fields is the policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Score<'a> {
    /// The loss of one machine should take as few copies as possible.
    same_generation: u32,
    same_deployment: u32,
    /// A warm image starts at once.
    cold: bool,
    /// Who needs no GPU keeps out of the way of those who do.
    wastes_gpus: bool,
    /// Then what leaves the most GPUs of use.
    cost: Cost,
    /// Then the tightest fit of memory and CPU.
    left: (i64, i64),
    name: &'a MachineId,
}

#[derive(Debug)]
struct Planner<'a> {
    state: &'a State,
    observed: Observed<'a>,
    copies: Copies<'a>,
    rooms: Rooms<'a>,
    /// Records of moves that go on.
    moving: BTreeMap<MoveCause, Moving>,
    /// Places that are kept for them.
    claims: BTreeMap<MoveCause, Vec<Claim<'a>>>,
    /// Attempts that hold room, and go on to after this plan.
    attempts: Vec<&'a Reservation>,
    /// Machines whose room is for an instance that waits for attempts to end there.
    kept: BTreeSet<&'a MachineId>,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn new(state: &'a State) -> Self {
        let plan = Plan { revision: state.revision, now_ms: state.now_ms, ..Plan::default() };
        let (observed, copies) = (Observed::new(state), copies(state));
        let going_on = go_on(state, &observed, &copies);
        let rooms = Rooms::unclaimed(state);
        let (moving, claims) = (BTreeMap::new(), BTreeMap::new());
        let (attempts, kept) = (Vec::new(), BTreeSet::new());
        let mut planner = Self { state, observed, copies, rooms, moving, claims, attempts, kept, plan };
        going_on.into_iter().for_each(|(cause, moving)| planner.take_up(cause, moving));
        planner
    }

    /// The best machine for one more, or why there is none.
    fn choose(
        &mut self,
        demand: Demand<'_>,
        of: Option<(&DeploymentName, u64)>,
    ) -> Result<(&'a MachineId, Slot), Tally> {
        let mut tally = Tally::default();
        let mut best: Option<(Score<'_>, &MachineId, Slot)> = None;
        let kept = &self.kept;
        self.rooms.fit_each(demand, |room, fit| match fit {
            Ok(_) if kept.contains(room.name) => tally.add(kept_for_others()),
            Ok(slot) => {
                let score = score(room, demand, of, &slot);
                if best.as_ref().is_none_or(|(least, ..)| score < *least) {
                    best = Some((score, room.name, slot));
                }
            }
            Err(misfit) => tally.add(misfit),
        });
        best.map(|(_, name, slot)| (name, slot)).ok_or(tally)
    }

    fn start(
        &mut self,
        workload: Workload,
        generation: u64,
        demand: Demand<'_>,
        machine: &MachineId,
        slot: Slot,
    ) {
        self.rooms.take(machine, demand.resources, &slot);
        let (gpus, address) = (slot.gpus, slot.address);
        self.plan.starts.push(Start {
            workload,
            generation,
            machine: machine.clone(),
            gpus,
            address,
            replaces: None,
        });
    }

    fn wake_at_ms(&self) -> Option<u64> {
        let timing = self.state.timing;
        let running = self.state.reservations.values().filter_map(|held| match held.stage {
            Stage::Draining { since_ms } => Some(since_ms.saturating_add(timing.drain_ms)),
            Stage::Serving | Stage::Removing { .. } | Stage::Lost | Stage::Preempted => None,
        });
        let now = self.state.now_ms;
        let drains = (!self.plan.drains.is_empty()).then(|| now.saturating_add(timing.drain_ms));
        running.filter(|at| *at > now).chain(drains).min()
    }
}

fn score<'a>(
    room: &Room<'a>,
    demand: Demand<'_>,
    of: Option<(&DeploymentName, u64)>,
    slot: &Slot,
) -> Score<'a> {
    let (same_generation, same_deployment) =
        of.map_or((0, 0), |(deployment, generation)| room.crowd(deployment, generation));
    Score {
        same_generation,
        same_deployment,
        cold: !room.is_warm(demand.image),
        wastes_gpus: demand.resources.gpu.is_none() && !room.report.gpus.is_empty(),
        cost: slot.cost,
        left: slot.left,
        name: room.name,
    }
}

/// What is said of a machine whose room is for another one.
fn kept_for_others() -> Misfit {
    misfit(anyplace_model::ReasonCode::AwaitingRoom, String::new())
}

pub(crate) fn deployment_demand(spec: &DeploymentSpec) -> Demand<'_> {
    Demand { image: &spec.image, isolation: spec.isolation, resources: &spec.resources }
}

fn job_demand(spec: &JobSpec) -> Demand<'_> {
    Demand { image: &spec.image, isolation: spec.isolation, resources: &spec.resources }
}

/// The order in which demands are served: the most GPU memory first (whole GPUs before slices), then memory.
fn size(demand: Demand<'_>) -> Reverse<(u64, u64)> {
    let gpu = demand.resources.gpu.as_ref().map_or(0, |gpu| {
        gpu.memory.map_or(u64::MAX, |memory| memory.0).saturating_mul(u64::from(gpu.count.max(1)))
    });
    Reverse((gpu, demand.resources.memory.0))
}

fn misfit(reason: anyplace_model::ReasonCode, note: String) -> Misfit {
    Misfit { reason, have: 0, note }
}

/// The slots of each virtual IP's tables that instances with connections have.
#[derive(Default)]
struct Slots(BTreeMap<Ipv4Addr, BTreeSet<u16>>);

impl Slots {
    fn of(state: &State) -> Self {
        let mut slots = BTreeMap::<_, BTreeSet<u16>>::new();
        for held in state.reservations.values() {
            if let (Some(vip), Stage::Serving | Stage::Draining { .. }) = (held.vip, held.stage) {
                slots.entry(vip).or_default().insert(held.slot);
            }
        }
        Self(slots)
    }

    /// Takes the lowest slot that is free.
    fn take(&mut self, vip: Ipv4Addr) -> u16 {
        let taken = self.0.entry(vip).or_default();
        let free = (0..u16::MAX).find(|slot| !taken.contains(slot)).unwrap_or(u16::MAX);
        taken.insert(free);
        free
    }
}

/// The reservation for a start; nothing if what it belongs to isn't wanted any more.
fn reserve(state: &State, start: &Start, instance: InstanceId) -> Option<Reservation> {
    let common = |assignment: Assignment, vip: Option<Ipv4Addr>, vip6: Option<Ipv6Addr>| Reservation {
        machine: start.machine.clone(),
        vip,
        vip6,
        created_ms: state.now_ms,
        stage: Stage::Serving,
        generation: start.generation,
        slot: 0,
        replaces: start.replaces.clone(),
        assignment,
    };
    let location = state.site.location.clone();
    let (workload, generation) = (start.workload.clone(), start.generation);
    let (gpus, address) = (start.gpus.clone(), start.address);
    match &start.workload {
        Workload::Deployment(name) => {
            let placement = state.placements.get(name)?;
            let spec = placement.spec.clone();
            let assignment = Assignment {
                instance,
                workload,
                location,
                generation,
                image: spec.image,
                command: spec.command,
                env: spec.env,
                isolation: spec.isolation,
                resources: spec.resources,
                gpus,
                address,
                ports: spec.ports,
                health: spec.health,
                restart: true,
                timeout_ms: None,
                draining: false,
            };
            Some(common(assignment, Some(placement.vip), placement.vip6))
        }
        Workload::Job(attempt) => {
            let spec = state.attempts.get(attempt)?.clone();
            let assignment = Assignment {
                instance,
                workload,
                location,
                generation,
                image: spec.image,
                command: spec.command,
                env: spec.env,
                isolation: spec.isolation,
                resources: spec.resources,
                gpus,
                address,
                ports: Vec::new(),
                health: anyplace_model::Health::default(),
                restart: false,
                timeout_ms: spec.timeout.map(|timeout| timeout.0),
                draining: false,
            };
            Some(common(assignment, None, None))
        }
    }
}
