//! A machine: its agent, its containers, and its watch of the scheduler.
//!
//! As the product's agent, it has containers that outlive it, starts nothing under an address that another container still
//! has, and reports at each change and each heartbeat.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
};

use anyplace_model::{
    Assignment, ImageState, InstanceId, InstancePhase, InstanceStatus, MachineDesired, MachineId,
    MachineReport, Workload,
};
use anyplace_seed::Seed;

/// A container is ready within this time, and gone within that one once it is told to stop.
const START_MS: u64 = 800;
const STOP_MS: u64 = 300;
/// Jobs end by themselves within this time; images arrive within that one.
const JOB_MS: u64 = 5_000;
const FETCH_MS: u64 = 1_500;

/// What a machine should have, by the key of its watch.
pub(crate) type Desired = BTreeMap<String, MachineDesired>;

pub(crate) struct Container {
    pub(crate) assignment: Assignment,
    /// Whether it has begun: until then it waits for its address.
    pub(crate) started: bool,
    /// When it runs, is ready, ends by itself, and is gone.
    runs_ms: u64,
    ready_ms: u64,
    ends_ms: Option<u64>,
    gone_ms: Option<u64>,
}

pub(crate) struct Agent {
    pub(crate) name: MachineId,
    /// What never changes of its reports, and the numbers of the last one.
    pub(crate) report: MachineReport,
    pub(crate) containers: BTreeMap<InstanceId, Container>,
    /// From when on they are there.
    images: BTreeMap<String, u64>,
    wanted_images: BTreeSet<String>,
    /// The report as it was last, and whether anything may have changed since.
    composed: Rc<MachineReport>,
    changed: bool,
    /// When the machine is looked at because time changes something.
    pub(crate) wakes_ms: u64,
    /// What came on which connection and isn't read yet.
    pub(crate) inbox: VecDeque<(u64, Rc<Desired>)>,
    /// The agent's process.
    pub(crate) boot: u64,
    pub(crate) frozen_until_ms: u64,
    pub(crate) cut_until_ms: u64,
    /// Reports that were lost in a row.
    pub(crate) losses: u32,
    pub(crate) stream: Stream,
}

/// The connection of a watch: what is sent on it arrives in order.
#[derive(Default)]
pub(crate) struct Stream {
    pub(crate) number: u64,
    /// The scheduler's process at the other end.
    pub(crate) served_by: Option<u64>,
    /// When what was sent last arrives.
    pub(crate) last_ms: u64,
    pub(crate) stalled_until_ms: u64,
    pub(crate) sent: Option<Rc<Desired>>,
}

/// What an agent has just done, for the judge.
pub(crate) enum Deed {
    Started(Box<Assignment>),
    /// Told an instance to stop; whether connections may have been on it.
    Stopping(InstanceId, bool),
}

impl Agent {
    pub(crate) fn new(report: MachineReport) -> Self {
        Self {
            name: report.machine.clone(),
            containers: BTreeMap::new(),
            images: BTreeMap::new(),
            wanted_images: BTreeSet::new(),
            composed: Rc::new(report.clone()),
            changed: true,
            wakes_ms: 0,
            report,
            inbox: VecDeque::new(),
            boot: 0,
            frozen_until_ms: 0,
            cut_until_ms: 0,
            losses: 0,
            stream: Stream::default(),
        }
    }

    /// The agent is killed and starts again; its containers run on.
    pub(crate) fn restart(&mut self, epoch: u64) {
        self.boot += 1;
        (self.report.epoch, self.report.sequence) = (epoch, 0);
        self.report.mark = None;
        self.stream.number += 1;
        self.stream.served_by = None;
        self.changed = true;
    }

    /// Takes over what it should have; what it does then.
    pub(crate) fn told(&mut self, now_ms: u64, wanted: &Desired, seed: &mut Seed) -> Vec<Deed> {
        let mut deeds = Vec::new();
        for (name, held) in &mut self.containers {
            if held.gone_ms.is_none() && !wanted.contains_key(&format!("instances/{name}")) {
                held.gone_ms = Some(now_ms + 1 + seed.below(STOP_MS));
                let serves = held.assignment.restart && held.started && held.ready_ms <= now_ms;
                deeds.push(Deed::Stopping(name.clone(), serves));
            }
        }
        self.wanted_images.clear();
        for item in wanted.values() {
            match item {
                MachineDesired::Image { image, .. } => {
                    self.wanted_images.insert(image.clone());
                    self.images.entry(image.clone()).or_insert_with(|| now_ms + seed.below(FETCH_MS));
                }
                MachineDesired::Mark(mark) => self.report.mark = Some(*mark),
                MachineDesired::Instance(assignment) => {
                    let held = self.containers.entry(assignment.instance.clone());
                    let held = held.or_insert_with(|| Container {
                        assignment: (**assignment).clone(),
                        started: false,
                        runs_ms: u64::MAX,
                        ready_ms: u64::MAX,
                        ends_ms: None,
                        gone_ms: None,
                    });
                    held.assignment.draining = assignment.draining;
                }
            }
        }
        self.changed = true;
        deeds.extend(self.start_waiting(now_ms, seed));
        deeds
    }

    /// Time has gone on; what has started for it.
    pub(crate) fn tidy(&mut self, now_ms: u64, seed: &mut Seed) -> Vec<Deed> {
        self.changed = true;
        self.containers.retain(|_, held| held.gone_ms.is_none_or(|gone_ms| gone_ms > now_ms));
        self.start_waiting(now_ms, seed)
    }

    fn start_waiting(&mut self, now_ms: u64, seed: &mut Seed) -> Vec<Deed> {
        let mut taken: BTreeSet<_> = self
            .containers
            .values()
            .filter(|held| held.started)
            .map(|held| held.assignment.address)
            .collect();
        let mut deeds = Vec::new();
        for held in self.containers.values_mut().filter(|held| !held.started && held.gone_ms.is_none()) {
            if taken.insert(held.assignment.address) {
                held.started = true;
                held.runs_ms = now_ms + seed.below(START_MS);
                held.ready_ms = held.runs_ms + seed.below(START_MS);
                let is_job = matches!(held.assignment.workload, Workload::Job(_));
                held.ends_ms = is_job.then(|| held.ready_ms + seed.below(JOB_MS));
                self.images.entry(held.assignment.image.clone()).or_insert(now_ms);
                deeds.push(Deed::Started(Box::new(held.assignment.clone())));
            }
        }
        deeds
    }

    /// When time alone changes something here.
    pub(crate) fn next_ms(&self, now_ms: u64) -> Option<u64> {
        let held = self.containers.values();
        let times = held
            .flat_map(|held| [Some(held.runs_ms), Some(held.ready_ms), held.ends_ms, held.gone_ms])
            .flatten();
        times.chain(self.images.values().copied()).filter(|at| *at > now_ms && *at < u64::MAX).min()
    }

    /// The agent stands still; what comes meanwhile waits.
    pub(crate) fn freeze(&mut self, until_ms: u64) {
        self.frozen_until_ms = self.frozen_until_ms.max(until_ms);
    }

    /// Nothing gets to the machine or away from it.
    pub(crate) fn cut_off(&mut self, until_ms: u64) {
        self.cut_until_ms = self.cut_until_ms.max(until_ms);
    }

    /// An instance stops being ready for a while.
    pub(crate) fn ails(&mut self, now_ms: u64, for_ms: u64, which: usize) {
        let mut held = self.containers.values_mut().filter(|held| held.started && held.ready_ms <= now_ms);
        if let Some(held) = held.nth(which) {
            held.ready_ms = now_ms + for_ms;
            self.changed = true;
        }
    }

    /// Looks at what is here; whether that is something else than in the last report.
    pub(crate) fn look(&mut self, now_ms: u64) -> bool {
        if !std::mem::take(&mut self.changed) {
            return false;
        }
        let is_here = |image: &String| self.images.get(image).is_some_and(|at_ms| *at_ms <= now_ms);
        let state = |image: &String| if is_here(image) { ImageState::Warm } else { ImageState::Cold };
        let used = self.containers.values().filter(|held| held.started).map(|held| &held.assignment.image);
        let images = self.wanted_images.iter().chain(used);
        let images = images.map(|image| (image.clone(), state(image))).collect();
        let instances = self.containers.values().map(|held| held.status(&self.name, now_ms)).collect();
        let now = MachineReport { images, instances, epoch: 0, sequence: 0, ..self.report.clone() };
        let differs = now != *self.composed;
        if differs {
            self.composed = Rc::new(now);
        }
        differs
    }

    /// Writes a report: it gets numbers of its own.
    pub(crate) fn report(&mut self, now_ms: u64) -> ((u64, u64), Rc<MachineReport>) {
        self.look(now_ms);
        self.report.sequence += 1;
        ((self.report.epoch, self.report.sequence), self.composed.clone())
    }
}

impl Container {
    fn status(&self, machine: &MachineId, now_ms: u64) -> InstanceStatus {
        let assignment = &self.assignment;
        let ended = self.ends_ms.is_some_and(|ends_ms| ends_ms <= now_ms);
        let phase = match self {
            _ if ended => InstancePhase::Exited,
            Self { gone_ms: Some(_), .. } => InstancePhase::Stopping,
            Self { started: false, .. } => InstancePhase::Pulling,
            _ if assignment.draining => InstancePhase::Stopping,
            Self { runs_ms, .. } if *runs_ms <= now_ms => InstancePhase::Running,
            _ => InstancePhase::Starting,
        };
        InstanceStatus {
            instance: assignment.instance.clone(),
            workload: assignment.workload.clone(),
            generation: assignment.generation,
            machine: machine.clone(),
            address: assignment.address,
            phase,
            ready: self.started && !ended && self.gone_ms.is_none() && self.ready_ms <= now_ms,
            restarts: 0,
            exit_code: ended.then_some(0),
            started_at: None,
            ended_at: None,
            reason: None,
        }
    }
}
