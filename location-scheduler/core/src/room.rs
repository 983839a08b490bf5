//! The room on a machine: what is free, whether something fits, and where.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use anyplace_model::{
    Bytes, DeploymentName, GpuRequest, ImageState, Isolation, MachineId, MachineReport, MilliCpu, ReasonCode,
    Resources,
};

use crate::state::{Life, Machine, Reservation, State};

/// What a workload asks of a machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Demand<'a> {
    pub(crate) image: &'a str,
    pub(crate) isolation: Isolation,
    pub(crate) resources: &'a Resources,
}

/// Where on a machine something fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) gpus: Vec<u32>,
    pub(crate) address: Ipv4Addr,
    /// Free memory that stays on the chosen GPUs, in bytes.
    pub(crate) gpu_left: i64,
}

/// Why something doesn't fit, and what comes nearest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Misfit {
    pub(crate) reason: ReasonCode,
    /// What is there of the thing that lacks, in its own unit.
    pub(crate) have: u64,
    /// Said where the reason alone doesn't tell.
    pub(crate) note: String,
}

impl Misfit {
    fn lacks(reason: ReasonCode, have: i64) -> Self {
        Self { reason, have: u64::try_from(have).unwrap_or(0), note: String::new() }
    }

    fn because(reason: ReasonCode, note: impl Into<String>) -> Self {
        Self { reason, have: 0, note: note.into() }
    }
}

/// Room that nobody has reserved on one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeRoom {
    /// CPU.
    pub cpu: MilliCpu,
    /// Memory.
    pub memory: Bytes,
    /// Disk.
    pub disk: Bytes,
    /// Memory of each GPU by index.
    pub gpu_memory: Vec<Bytes>,
    /// Whether each GPU is entirely free.
    pub gpu_whole: Vec<bool>,
}

impl FreeRoom {
    /// What is free on a machine; nothing on one that isn't known.
    pub fn of(state: &State, machine: &MachineId) -> Self {
        let found = state.machines.get_key_value(machine);
        let room = found.map(|(name, machine)| Room::new(state, name, machine));
        room.map_or_else(
            || Self {
                cpu: MilliCpu(0),
                memory: Bytes(0),
                disk: Bytes(0),
                gpu_memory: Vec::new(),
                gpu_whole: Vec::new(),
            },
            |room| room.free(),
        )
    }
}

/// The room on a machine while a plan is being made. Signed, because a machine may come back smaller than what is
/// reserved on it.
#[derive(Debug, Clone)]
pub(crate) struct Room<'a> {
    pub(crate) name: &'a MachineId,
    pub(crate) report: &'a MachineReport,
    closed: Option<Misfit>,
    cpu: i64,
    memory: i64,
    disk: i64,
    gpus: Vec<GpuRoom>,
    addresses: BTreeSet<Ipv4Addr>,
    /// Instances by deployment and generation, for the spread.
    deployments: BTreeMap<&'a DeploymentName, BTreeMap<u64, u32>>,
}

#[derive(Debug, Clone, Copy)]
struct GpuRoom {
    free: i64,
    slices: u32,
    whole: u32,
}

impl GpuRoom {
    const fn is_whole(self) -> bool {
        self.slices == 0 && self.whole == 0
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl<'a> Room<'a> {
    /// All rooms, with everything taken that holds a reservation, except the instances in `released`.
    pub(crate) fn all(state: &'a State) -> BTreeMap<&'a MachineId, Self> {
        let mut rooms: BTreeMap<_, _> =
            state.machines.iter().map(|(name, machine)| (name, Self::empty(state, name, machine))).collect();
        for reservation in state.reservations.values() {
            if let Some(room) = rooms.get_mut(&reservation.machine) {
                room.hold(reservation);
            }
        }
        rooms
    }

    /// One machine's room.
    pub(crate) fn new(state: &'a State, name: &'a MachineId, machine: &'a Machine) -> Self {
        let mut room = Self::empty(state, name, machine);
        state.reservations.values().filter(|held| held.machine == *name).for_each(|held| room.hold(held));
        room
    }

    fn empty(state: &State, name: &'a MachineId, machine: &'a Machine) -> Self {
        let report = &machine.report;
        let gpu = |gpu: &anyplace_model::Gpu| GpuRoom { free: signed(gpu.memory.0), slices: 0, whole: 0 };
        Self {
            name,
            report,
            closed: closed(state, name, machine),
            cpu: signed(report.cpu.0),
            memory: signed(report.memory.0),
            disk: signed(report.disk.0),
            gpus: report.gpus.iter().map(gpu).collect(),
            // Also what the machine has without our knowing: an address is free when nothing answers there.
            addresses: report.instances.iter().map(|status| status.address).collect(),
            deployments: BTreeMap::new(),
        }
    }

    fn hold(&mut self, reservation: &'a Reservation) {
        let assignment = &reservation.assignment;
        self.take(&assignment.resources, &assignment.gpus, assignment.address);
        if let Some(deployment) =
            reservation.deployment().filter(|_| reservation.stage == crate::Stage::Serving)
        {
            self.count(deployment, reservation.generation);
        }
    }

    /// Takes room.
    pub(crate) fn take(&mut self, resources: &Resources, gpus: &[u32], address: Ipv4Addr) {
        self.add(resources, gpus, -1);
        self.addresses.insert(address);
    }

    /// Gives room back, to see what would fit then. The spread is left as it is.
    pub(crate) fn give_back(&mut self, reservation: &Reservation) {
        self.add(&reservation.assignment.resources, &reservation.assignment.gpus, 1);
        self.addresses.remove(&reservation.assignment.address);
    }

    fn add(&mut self, resources: &Resources, gpus: &[u32], sign: i64) {
        let change = |value: u64| signed(value).saturating_mul(sign);
        self.cpu = self.cpu.saturating_add(change(resources.cpu.0));
        self.memory = self.memory.saturating_add(change(resources.memory.0));
        self.disk = self.disk.saturating_add(change(resources.disk.0));
        let slice = resources.gpu.as_ref().and_then(|gpu| gpu.memory);
        for index in gpus {
            let Some(gpu) = usize::try_from(*index).ok().and_then(|index| self.gpus.get_mut(index)) else {
                continue;
            };
            let counter = match slice {
                Some(memory) => {
                    gpu.free = gpu.free.saturating_add(change(memory.0));
                    &mut gpu.slices
                }
                None => &mut gpu.whole,
            };
            *counter = if sign < 0 { counter.saturating_add(1) } else { counter.saturating_sub(1) };
        }
    }

    /// Counts an instance for the spread.
    pub(crate) fn count(&mut self, deployment: &'a DeploymentName, generation: u64) {
        *self.deployments.entry(deployment).or_default().entry(generation).or_default() += 1;
    }

    /// Instances of the deployment here: of this generation, and of all.
    pub(crate) fn crowd(&self, deployment: &DeploymentName, generation: u64) -> (u32, u32) {
        self.deployments
            .get(deployment)
            .map_or((0, 0), |counts| (counts.get(&generation).copied().unwrap_or(0), counts.values().sum()))
    }

    pub(crate) fn is_warm(&self, image: &str) -> bool {
        matches!(self.report.images.get(image), Some(ImageState::Warm))
    }

    pub(crate) const fn is_open(&self) -> bool {
        self.closed.is_none()
    }

    /// Free CPU in thousandths and memory in bytes; below nothing where the machine shrank.
    pub(crate) const fn cpu_and_memory(&self) -> (i64, i64) {
        (self.cpu, self.memory)
    }

    pub(crate) fn free(&self) -> FreeRoom {
        let unsigned = |value: i64| u64::try_from(value).unwrap_or(0);
        FreeRoom {
            cpu: MilliCpu(unsigned(self.cpu)),
            memory: Bytes(unsigned(self.memory)),
            disk: Bytes(unsigned(self.disk)),
            gpu_memory: self
                .gpus
                .iter()
                .map(|gpu| Bytes(if gpu.whole > 0 { 0 } else { unsigned(gpu.free) }))
                .collect(),
            gpu_whole: self.gpus.iter().map(|gpu| gpu.is_whole()).collect(),
        }
    }

    /// Whether something fits, and where. The first thing that lacks is the reason.
    pub(crate) fn fit(&self, demand: Demand<'_>) -> Result<Slot, Misfit> {
        if let Some(misfit) = &self.closed {
            return Err(misfit.clone());
        }
        let resources = demand.resources;
        if !self.report.isolations.contains(&demand.isolation) {
            return Err(Misfit::because(ReasonCode::IsolationUnavailable, ""));
        }
        let (gpus, gpu_left) = match &resources.gpu {
            Some(request) => self.fit_gpus(request)?,
            None => (Vec::new(), 0),
        };
        if self.cpu < signed(resources.cpu.0) {
            return Err(Misfit::lacks(ReasonCode::InsufficientCpu, self.cpu));
        }
        if self.memory < signed(resources.memory.0) {
            return Err(Misfit::lacks(ReasonCode::InsufficientMemory, self.memory));
        }
        if self.disk < signed(resources.disk.0) {
            return Err(Misfit::lacks(ReasonCode::InsufficientDisk, self.disk));
        }
        let address = self.free_address().ok_or_else(|| Misfit::because(ReasonCode::NoAddress, ""))?;
        Ok(Slot { gpus, address, gpu_left })
    }

    /// The GPUs with the least memory to spare, so that large blocks stay whole.
    fn fit_gpus(&self, request: &GpuRequest) -> Result<(Vec<u32>, i64), Misfit> {
        let here = &self.report.gpus;
        if here.is_empty() {
            return Err(Misfit::because(ReasonCode::NoGpu, ""));
        }
        let allowed = |model: &String| request.models.is_empty() || request.models.contains(model);
        if !here.iter().any(|gpu| allowed(&gpu.model)) {
            let mut models: Vec<&str> = here.iter().map(|gpu| gpu.model.as_str()).collect();
            models.sort_unstable();
            models.dedup();
            return Err(Misfit::because(ReasonCode::NoGpuModel, models.join(", ")));
        }
        let mut fitting: Vec<(i64, u32)> = (0_u32..)
            .zip(here.iter().zip(&self.gpus))
            .filter(|(_, (gpu, _))| allowed(&gpu.model))
            .filter_map(|(index, (_, room))| match request.memory {
                Some(memory) => {
                    let left = room.free - signed(memory.0);
                    (room.whole == 0 && left >= 0).then_some((left, index))
                }
                None => room.is_whole().then_some((room.free, index)),
            })
            .collect();
        let count = usize::try_from(request.count).unwrap_or(usize::MAX);
        if fitting.len() < count {
            return Err(Misfit::lacks(
                ReasonCode::InsufficientGpu,
                i64::try_from(fitting.len()).unwrap_or(i64::MAX),
            ));
        }
        fitting.sort_unstable();
        fitting.truncate(count);
        let left = fitting.iter().map(|(left, _)| *left).fold(0, i64::saturating_add);
        let mut gpus: Vec<u32> = fitting.into_iter().map(|(_, index)| index).collect();
        gpus.sort_unstable();
        Ok((gpus, left))
    }

    fn free_address(&self) -> Option<Ipv4Addr> {
        let cidr = self.report.instance_cidr;
        let (network, broadcast) = (u32::from(cidr.network()), u32::from(cidr.broadcast()));
        // At most one step for each address in use, plus one.
        (network.saturating_add(1)..broadcast)
            .map(Ipv4Addr::from)
            .find(|address| !self.addresses.contains(address) && *address != self.report.address)
    }
}

/// Why a machine takes nothing at all.
fn closed(state: &State, name: &MachineId, machine: &Machine) -> Option<Misfit> {
    if machine.life != Life::Alive {
        return Some(Misfit::because(ReasonCode::Lost, ""));
    }
    if state.settings.draining {
        return Some(Misfit::because(ReasonCode::Draining, "the location is draining"));
    }
    if let Some(condition) = machine.report.conditions.first() {
        return Some(Misfit::because(condition.reason, condition.message.clone()));
    }
    let stranger = machine
        .report
        .instances
        .iter()
        .find(|status| state.reservations.get(&status.instance).is_none_or(|held| held.machine != *name));
    // A machine that came back still runs what was replaced meanwhile, and nobody knows how much room that takes.
    stranger.map(|status| {
        let note = format!("machine {name} is still ending {}, which runs elsewhere by now", status.instance);
        Misfit::because(ReasonCode::Draining, note)
    })
}
