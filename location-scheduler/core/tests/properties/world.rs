//! A location with agents: what they run is the truth that the planner only hears about.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use anyplace_location_core::{
    Change, Life, Machine, MovePolicy, Moves, Plan, Reservation, Site, Stage, State, Timing, carry_out,
    desired, fall_silent, plan,
};
use anyplace_model::{
    Assignment, AttemptId, Bytes, Gpu, ImageState, InstanceId, InstancePhase, InstanceStatus, Isolation,
    LocationSettings, MachineDesired, MachineId, MachineMode, MachineReport, Mark, MilliCpu, Placement, Spec,
    Workload,
};

/// The scheduler's process.
const PROCESS: u64 = 7;

/// What happens.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    /// The agent reads what it should have, and does it.
    Sync(usize),
    /// The agent reports.
    Report(usize),
    /// The agent does all of it: reads, starts, gets everything ready, reports.
    Work(usize),
    /// Instances become ready or not.
    Health(usize, u8),
    /// The lease expires.
    Silence(usize),
    /// The grace is over.
    Lose(usize),
    /// The machine reports again.
    Return(usize),
    Time(u64),
    Scale(usize, u32),
    Change(usize, usize),
    Delete(usize),
    Submit(usize, usize),
    /// The attempt's record is deleted: cancelled or recorded.
    Forget(usize),
    /// Jobs on the machine end.
    Finish(usize),
    /// The machine gets the images that it was told to have.
    Fetch(usize),
    DrainLocation(bool),
    /// The operator closes a machine, or opens it again.
    Close(usize, Option<MachineMode>),
}

/// A container as the agent has it.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub(crate) assignment: Assignment,
    pub(crate) ready: bool,
    pub(crate) ended: bool,
    /// Told to stop, which takes a while: gone at the next look.
    pub(crate) stopping: bool,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Agent {
    pub(crate) containers: BTreeMap<InstanceId, Container>,
    pub(crate) images: BTreeSet<String>,
    pub(crate) wanted_images: BTreeSet<String>,
    pub(crate) silent: bool,
    mark: Option<Mark>,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) agents: BTreeMap<MachineId, Agent>,
    /// Containers that each attempt ever had.
    pub(crate) runs: BTreeMap<AttemptId, BTreeSet<InstanceId>>,
    names: u64,
    tries: u32,
}

const SHAPES: [&str; 8] = [
    "resources: {cpu: 500m, memory: 256Mi, disk: 1Gi}",
    "resources: {cpu: '1', memory: 1Gi, disk: 1Gi}",
    "resources: {cpu: '2', memory: 256Mi, disk: 1Gi}",
    "resources: {cpu: 100m, memory: 100Mi, disk: 6Gi}",
    "resources: {cpu: 100m, memory: 100Mi, disk: 1Gi, gpu: {count: 1, models: [A]}}",
    "resources: {cpu: 100m, memory: 100Mi, disk: 1Gi, gpu: {count: 1, memory: 30Gi}}",
    "resources: {cpu: 100m, memory: 100Mi, disk: 1Gi, gpu: {count: 2, memory: 10Gi}}",
    "resources: {cpu: 100m, memory: 100Mi, disk: 1Gi}\nisolation: sandbox",
];

fn machine_id(index: usize) -> MachineId {
    MachineId::new(format!("m{index}")).unwrap()
}

fn deployment(index: usize, shape: usize) -> anyplace_model::DeploymentSpec {
    let text = format!("kind: Deployment\nname: d{index}\nimage: i{index}\n{}\n", SHAPES[shape % 8]);
    match anyplace_model::parse_spec(&text, anyplace_model::Format::Yaml, "d.yaml").unwrap() {
        Spec::Deployment(spec) => *spec,
        Spec::Job(_) => unreachable!("the text says Deployment"),
    }
}

fn job(index: usize, shape: usize) -> anyplace_model::JobSpec {
    let policy = ["off-peak", "anytime"][index % 2];
    let text = format!(
        "kind: Job\nname: j{index}\nimage: j{}\nscheduling_policy: {policy}\n{}\n",
        index % 2,
        SHAPES[shape % 8]
    );
    match anyplace_model::parse_spec(&text, anyplace_model::Format::Yaml, "j.yaml").unwrap() {
        Spec::Job(spec) => *spec,
        Spec::Deployment(_) => unreachable!("the text says Job"),
    }
}

fn report(index: usize) -> MachineReport {
    let gpu = |model: &str| Gpu { model: model.into(), memory: Bytes(40 << 30) };
    MachineReport {
        machine: machine_id(index),
        epoch: 1,
        sequence: 1,
        address: Ipv4Addr::new(10, 1, 1 + index as u8, 1),
        // Six addresses: few enough to run out.
        instance_cidr: format!("10.1.{}.64/29", 1 + index).parse().unwrap(),
        advertise: "http://127.0.0.1:1".into(),
        cpu: MilliCpu(3_000),
        memory: Bytes(3 << 30),
        disk: Bytes(10 << 30),
        gpus: match index {
            0 => vec![gpu("A"), gpu("B")],
            1 => vec![gpu("B")],
            4 => vec![gpu("A")],
            5 => vec![gpu("A"), gpu("B")],
            _ => Vec::new(),
        },
        isolations: if index == 2 {
            vec![Isolation::Container, Isolation::Sandbox]
        } else {
            vec![Isolation::Container]
        },
        conditions: Vec::new(),
        images: BTreeMap::new(),
        instances: Vec::new(),
        mark: Some(Mark { process: PROCESS, number: 0 }),
    }
}

impl World {
    pub(crate) fn new(machines: usize) -> Self {
        let state = State {
            revision: 1,
            process: PROCESS,
            now_ms: 1_000_000,
            timing: Timing { drain_ms: 500 },
            site: Site {
                location: "ams".parse().unwrap(),
                region: "eu".into(),
                country: "NL".into(),
                labels: BTreeMap::new(),
                latitude: 52.0,
                longitude: 4.0,
                timezone: "Europe/Amsterdam".into(),
                off_peak: None,
            },
            settings: LocationSettings::default(),
            vip_prefixes: None,
            machines: (0..machines)
                .map(|index| (machine_id(index), Machine::new(Life::Alive, report(index))))
                .collect(),
            reservations: BTreeMap::new(),
            withdrawn: BTreeMap::new(),
            placements: BTreeMap::new(),
            attempts: BTreeMap::new(),
            remote: BTreeMap::new(),
            away: BTreeMap::new(),
            latency_ms: BTreeMap::new(),
            prewarms: BTreeMap::new(),
            warm: BTreeMap::new(),
            wishes: BTreeMap::new(),
            moves: Moves { policy: MovePolicy { ready_ms: 2_000, tidy_pause_ms: None }, ..Moves::default() },
        };
        let mark = Some(Mark { process: PROCESS, number: 0 });
        let agent = Agent { mark, ..Agent::default() };
        let agents = (0..machines).map(|index| (machine_id(index), agent.clone())).collect();
        Self { state, agents, runs: BTreeMap::new(), names: 0, tries: 0 }
    }

    pub(crate) fn act(&mut self, op: Op) {
        match op {
            Op::Sync(index) => self.sync(&machine_id(index)),
            Op::Report(index) => self.report(&machine_id(index)),
            Op::Work(index) => self.work(&machine_id(index)),
            Op::Health(index, mask) => {
                if let Some(agent) = self.agents.get_mut(&machine_id(index)) {
                    for (bit, container) in agent.containers.values_mut().enumerate() {
                        container.ready = !container.ended && mask >> (bit % 8) & 1 == 1;
                    }
                }
            }
            Op::Silence(index) => self.silence(&machine_id(index), Life::Suspect),
            Op::Lose(index) => self.silence(&machine_id(index), Life::Lost),
            Op::Return(index) => {
                let name = machine_id(index);
                if let Some(agent) = self.agents.get_mut(&name) {
                    agent.silent = false;
                    self.report(&name);
                }
            }
            Op::Time(ms) => self.state.now_ms += ms,
            Op::Scale(index, count) => match self.state.placements.values_mut().nth(index) {
                Some(placement) => placement.count = count,
                None => self.place(index, 0, count),
            },
            Op::Change(index, shape) => {
                let count = self.placement(index).map_or(2, |placement| placement.count);
                self.place(index, shape, count);
            }
            Op::Delete(index) => drop(self.state.placements.remove(format!("d{index}").as_str())),
            Op::Submit(index, shape) => {
                self.tries += 1;
                let spec = job(index, shape);
                let attempt = AttemptId { job: spec.name.clone(), attempt: self.tries };
                if self.state.attempts.len() < 6 {
                    self.state.attempts.insert(attempt, spec);
                }
            }
            Op::Forget(index) => {
                let attempt = self.state.attempts.keys().nth(index).cloned();
                drop(attempt.and_then(|attempt| self.state.attempts.remove(&attempt)));
            }
            Op::Finish(index) => {
                if let Some(agent) = self.agents.get_mut(&machine_id(index)) {
                    let jobs = agent.containers.values_mut().filter(|held| !held.assignment.restart);
                    jobs.for_each(|container| (container.ended, container.ready) = (true, false));
                }
            }
            Op::Fetch(index) => {
                if let Some(agent) = self.agents.get_mut(&machine_id(index)) {
                    agent.images.extend(agent.wanted_images.clone());
                }
            }
            Op::DrainLocation(draining) => self.state.settings.draining = draining,
            Op::Close(index, Some(mode)) => {
                self.state.settings.machines.insert(machine_id(index), mode);
            }
            Op::Close(index, None) => drop(self.state.settings.machines.remove(&machine_id(index))),
        }
    }

    /// Plans and carries it out.
    pub(crate) fn step(&mut self) -> Plan {
        let plan = plan(&self.state);
        let changes = plan.changes(&self.state, |_| {
            self.names += 1;
            InstanceId::new(format!("i-{}", self.names)).unwrap()
        });
        apply(&mut self.state, &plan, changes);
        plan
    }

    /// Everything works again, for long enough.
    pub(crate) fn heal(&mut self) {
        self.state.settings = LocationSettings::default();
        for agent in self.agents.values_mut() {
            agent.silent = false;
        }
        let names: Vec<MachineId> = self.agents.keys().cloned().collect();
        for _ in 0..120 {
            for name in &names {
                self.work(name);
            }
            self.state.now_ms += 300;
            self.step();
            self.record();
        }
    }

    /// The global scheduler takes what became of attempts, and no longer wants those that are over.
    fn record(&mut self) {
        let state = &self.state;
        let reported: Vec<_> =
            state.machines.values().flat_map(|machine| &machine.report.instances).collect();
        let ended = |held: &&Reservation| {
            let exited = |status: &&&InstanceStatus| {
                status.instance == held.assignment.instance && status.phase == InstancePhase::Exited
            };
            !matches!(held.stage, Stage::Serving | Stage::Lost) || reported.iter().any(|it| exited(&it))
        };
        let over = state.reservations.values().filter(ended);
        let over: Vec<AttemptId> = over.filter_map(|held| held.attempt().cloned()).collect();
        self.state.attempts.retain(|attempt, _| !over.contains(attempt));
    }

    fn work(&mut self, name: &MachineId) {
        self.sync(name);
        if let Some(agent) = self.agents.get_mut(name) {
            agent.images.extend(agent.wanted_images.clone());
            agent.containers.values_mut().for_each(|container| container.ready = !container.ended);
        }
        self.report(name);
    }

    fn placement(&self, index: usize) -> Option<&Placement> {
        self.state.placements.get(format!("d{index}").as_str())
    }

    fn place(&mut self, index: usize, shape: usize, count: u32) {
        let generation = self.placement(index).map_or(1, |placement| placement.generation + 1);
        let spec = deployment(index, shape);
        let vip = Ipv4Addr::new(203, 0, 113, index as u8);
        self.state
            .placements
            .insert(spec.name.clone(), Placement { generation, spec, vip, vip6: None, count });
    }

    fn silence(&mut self, name: &MachineId, life: Life) {
        if let (Some(machine), Some(agent)) = (self.state.machines.get_mut(name), self.agents.get_mut(name)) {
            fall_silent(machine, life);
            agent.silent = true;
        }
    }

    fn sync(&mut self, name: &MachineId) {
        let desired = desired(&self.state).remove(name).unwrap_or_default();
        let Some(agent) = self.agents.get_mut(name).filter(|agent| !agent.silent) else { return };
        agent.containers.retain(|_, container| !container.stopping);
        for (instance, container) in &mut agent.containers {
            container.stopping = !desired.contains_key(&format!("instances/{instance}"));
        }
        agent.wanted_images.clear();
        for item in desired.into_values() {
            match item {
                MachineDesired::Image { image, .. } => drop(agent.wanted_images.insert(image)),
                MachineDesired::Mark(mark) => agent.mark = Some(mark),
                MachineDesired::Instance(assignment) => {
                    if let Workload::Job(attempt) = &assignment.workload {
                        self.runs.entry(attempt.clone()).or_default().insert(assignment.instance.clone());
                    }
                    agent.images.insert(assignment.image.clone());
                    let draining = assignment.draining;
                    let container =
                        agent.containers.entry(assignment.instance.clone()).or_insert_with(|| Container {
                            assignment: *assignment,
                            ready: false,
                            ended: false,
                            stopping: false,
                        });
                    container.assignment.draining = draining;
                }
            }
        }
    }

    fn report(&mut self, name: &MachineId) {
        let Some(agent) = self.agents.get(name).filter(|agent| !agent.silent) else { return };
        let machine = self.state.machines.get_mut(name).unwrap();
        machine.life = Life::Alive;
        machine.report.sequence += 1;
        machine.report.mark = agent.mark;
        machine.report.images = agent.images.iter().map(|image| (image.clone(), ImageState::Warm)).collect();
        machine.report.instances = agent.containers.values().map(|held| status(name, held)).collect();
    }
}

fn status(machine: &MachineId, container: &Container) -> InstanceStatus {
    let assignment = &container.assignment;
    InstanceStatus {
        instance: assignment.instance.clone(),
        workload: assignment.workload.clone(),
        generation: assignment.generation,
        machine: machine.clone(),
        address: assignment.address,
        phase: match container {
            Container { ended: true, .. } => InstancePhase::Exited,
            // As the machine agent does: what drains still runs.
            _ if assignment.draining => InstancePhase::Stopping,
            _ => InstancePhase::Running,
        },
        ready: container.ready,
        restarts: 0,
        exit_code: container.ended.then_some(0),
        started_at: None,
        ended_at: None,
        reason: None,
    }
}

/// Carries a plan out on a state.
pub(crate) fn apply(state: &mut State, plan: &Plan, changes: Vec<Change>) {
    let (revision, now_ms) = (state.revision, state.now_ms);
    carry_out(state, changes, revision, now_ms);
    state.prewarms = plan.prewarms.clone();
    state.warm = plan.warm.clone();
    state.moves.waiting = plan.waiting.clone();
    state.moves.tidied_ms = plan.tidied_ms;
}
