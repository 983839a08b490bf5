//! The room on a machine: what is free, whether something fits, and where.

mod moving;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
};

use anyplace_model::{
    Bytes, DeploymentName, ImageState, InstanceId, Isolation, MachineId, MachineMode, MachineReport,
    MilliCpu, ReasonCode, Resources,
};

use crate::{
    moves::{Claim, copies},
    packing::{Ask, Cost, Free, Gpu, GpuSet, Lack, Mix, Models, Packer},
    state::{Life, Machine, Reservation, Stage, State},
};
pub use moving::{InstanceMove, RoomPlan, plan_room, plan_tidying};
pub(crate) use moving::{find_room, find_tidying};

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
    /// What it costs the location.
    pub(crate) cost: Cost,
    /// Memory in bytes and CPU in thousandths that are free there.
    pub(crate) left: (i64, i64),
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
    /// What is free on each machine.
    pub fn all(state: &State) -> BTreeMap<&MachineId, Self> {
        let rooms = Rooms::to_look_at(state);
        rooms.rooms.iter().map(|(name, room)| (*name, rooms.free(room))).collect()
    }
}

/// The rooms of all machines while a plan is being made.
#[derive(Debug)]
pub(crate) struct Rooms<'a> {
    rooms: BTreeMap<&'a MachineId, Room<'a>>,
    packer: Packer,
    models: ModelNumbers<'a>,
}

/// The room on one machine.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    pub(crate) name: &'a MachineId,
    pub(crate) report: &'a MachineReport,
    /// Its index among the packer's machines.
    place: usize,
    closed: Option<Misfit>,
    addresses: BTreeSet<Ipv4Addr>,
    next_address: Option<Ipv4Addr>,
    /// Addresses that are kept for who has a claim.
    claimed: usize,
    /// Instances by deployment and generation, for the spread.
    deployments: BTreeMap<&'a DeploymentName, BTreeMap<u64, u32>>,
}

impl<'a> Rooms<'a> {
    /// All rooms, with everything taken that holds a reservation or is claimed.
    pub(crate) fn all(state: &'a State) -> Self {
        let mut rooms = Self::unclaimed(state);
        rooms.claim_all(state);
        rooms
    }

    /// All rooms, with everything taken that holds a reservation.
    pub(crate) fn unclaimed(state: &'a State) -> Self {
        let models = ModelNumbers::of(state);
        let placed = state.placements.values().map(|it| (&it.spec.resources, u64::from(it.count)));
        let waiting = state.attempts.values().map(|spec| (&spec.resources, 1));
        let mix = Mix::of(placed.chain(waiting).map(|(resources, count)| (models.ask(resources), count)));
        Self::taken(state, models, mix)
    }

    /// The same for who only asks what is free: what costs least isn't worked out.
    pub(crate) fn to_look_at(state: &'a State) -> Self {
        let mut rooms = Self::taken(state, ModelNumbers::of(state), Mix::default());
        rooms.claim_all(state);
        rooms
    }

    fn claim_all(&mut self, state: &State) {
        if state.moves.under_way.is_empty() {
            return;
        }
        let copies = copies(state);
        for moving in state.moves.under_way.values() {
            moving.claims(state, &copies).iter().for_each(|claim| self.claim(claim));
        }
    }

    fn taken(state: &'a State, models: ModelNumbers<'a>, mix: Mix) -> Self {
        let reserved: HashMap<&InstanceId, &MachineId> =
            state.reservations.values().map(|held| (&held.assignment.instance, &held.machine)).collect();
        let empty = |(name, machine): (&'a MachineId, &'a Machine)| {
            let report = &machine.report;
            let gpu = |gpu: &anyplace_model::Gpu| Gpu::new(models.number(&gpu.model), signed(gpu.memory.0));
            let free = Free {
                cpu: signed(report.cpu.0),
                memory: signed(report.memory.0),
                disk: signed(report.disk.0),
                gpus: report.gpus.iter().map(gpu).collect(),
                all_cpu: signed(report.cpu.0),
            };
            let room = Room {
                name,
                report,
                place: 0,
                closed: closed(state, name, machine, &reserved),
                // Also what the machine has without our knowing: an address is free when nothing answers there.
                addresses: report.instances.iter().map(|status| status.address).collect(),
                next_address: None,
                claimed: 0,
                deployments: BTreeMap::new(),
            };
            (name, (free, room))
        };
        let mut rooms: BTreeMap<&MachineId, (Free, Room<'a>)> = state.machines.iter().map(empty).collect();
        for held in state.reservations.values().filter(|held| held.stage != Stage::Preempted) {
            let Some((free, room)) = rooms.get_mut(&held.machine) else { continue };
            let assignment = &held.assignment;
            free.take(&models.ask(&assignment.resources), GpuSet::of(assignment.gpus.iter().copied()));
            room.addresses.insert(assignment.address);
            if let Some(deployment) = held.deployment().filter(|_| held.stage == Stage::Serving) {
                room.count(deployment, held.generation);
            }
        }
        // The packer looks at each machine once, when it is as full as it is.
        let mut packer = Packer::new(mix);
        let rooms = rooms
            .into_iter()
            .map(|(name, (free, mut room))| {
                room.place = packer.add(free);
                room.find_address();
                (name, room)
            })
            .collect();
        Self { rooms, packer, models }
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Room<'a>> {
        self.rooms.values()
    }

    /// What is free in one.
    pub(crate) fn free(&self, room: &Room<'_>) -> FreeRoom {
        free_room(self.packer.free(room.place))
    }

    /// Shows each room, and whether and where something fits there. The first thing that lacks is the reason.
    pub(crate) fn fit_each(
        &mut self,
        demand: Demand<'_>,
        mut take: impl FnMut(&Room<'a>, Result<Slot, Misfit>),
    ) {
        let ask = self.models.ask(demand.resources);
        let Self { rooms, packer, models } = self;
        for room in rooms.values() {
            take(room, room.fit(packer, models, demand, &ask));
        }
    }

    /// Whether something fits on this machine.
    pub(crate) fn fits(&mut self, machine: &MachineId, demand: Demand<'_>) -> bool {
        let ask = self.models.ask(demand.resources);
        let Self { rooms, packer, models } = self;
        rooms.get(machine).is_some_and(|room| room.fit(packer, models, demand, &ask).is_ok())
    }

    /// Takes room.
    pub(crate) fn take(&mut self, machine: &MachineId, resources: &Resources, slot: &Slot) {
        let Some(room) = self.rooms.get_mut(machine) else { return };
        self.packer.take(room.place, &self.models.ask(resources), GpuSet::of(slot.gpus.iter().copied()));
        room.occupy(slot.address);
    }

    /// Gives back what a reservation holds. The spread is left as it is.
    pub(crate) fn give_back(&mut self, reservation: &Reservation) {
        let Some(room) = self.rooms.get_mut(&reservation.machine) else { return };
        let assignment = &reservation.assignment;
        let gpus = GpuSet::of(assignment.gpus.iter().copied());
        self.packer.give_back(room.place, &self.models.ask(&assignment.resources), gpus);
        room.vacate(assignment.address);
    }

    /// Keeps a place from everything else.
    pub(crate) fn claim(&mut self, claim: &Claim<'_>) {
        let Some(room) = self.rooms.get_mut(&claim.machine) else { return };
        room.claimed += 1;
        self.packer.take(room.place, &self.models.ask(claim.demand.resources), claim.gpus);
    }

    /// Takes back a claim.
    pub(crate) fn unclaim(&mut self, claim: &Claim<'_>) {
        let Some(room) = self.rooms.get_mut(&claim.machine) else { return };
        room.claimed = room.claimed.saturating_sub(1);
        self.packer.give_back(room.place, &self.models.ask(claim.demand.resources), claim.gpus);
    }

    /// Whether a claimed place is free, while its claim isn't counted.
    pub(crate) fn fit_claim(&self, claim: &Claim<'_>) -> Option<Slot> {
        let room = self.rooms.get(&claim.machine).filter(|room| room.misfit(claim.demand).is_none())?;
        let ask = self.models.ask(claim.demand.resources);
        let free = self.packer.free(room.place);
        let has_address = room.addresses_left() > 0;
        let (cost, left) = (Cost::default(), (free.memory, free.cpu));
        let slot = Slot { gpus: claim.gpus.iter().collect(), address: room.next_address?, cost, left };
        (has_address && free.fits_on(&ask, claim.gpus)).then_some(slot)
    }

    /// Whether a deployment has an instance on this machine.
    pub(crate) fn has(&self, machine: &MachineId, deployment: &DeploymentName) -> bool {
        self.rooms.get(machine).is_some_and(|room| room.deployments.contains_key(deployment))
    }

    /// Counts an instance for the spread.
    pub(crate) fn count(&mut self, machine: &MachineId, deployment: &'a DeploymentName, generation: u64) {
        if let Some(room) = self.rooms.get_mut(machine) {
            room.count(deployment, generation);
        }
    }

    /// Whether something would fit anywhere where some of `leaving` are, without them.
    pub(crate) fn fits_without(&self, leaving: &[&Reservation], demand: Demand<'_>) -> bool {
        let ask = self.models.ask(demand.resources);
        self.rooms.iter().any(|(name, room)| {
            let mut here = leaving.iter().filter(|held| held.machine == **name).peekable();
            if here.peek().is_none() || room.misfit(demand).is_some() {
                return false;
            }
            let mut free = self.packer.free(room.place).clone();
            for held in here {
                let assignment = &held.assignment;
                let gpus = GpuSet::of(assignment.gpus.iter().copied());
                free.give_back(&self.models.ask(&assignment.resources), gpus);
            }
            free.check(&ask).is_ok()
        })
    }
}

impl<'a> Room<'a> {
    fn occupy(&mut self, address: Ipv4Addr) {
        self.addresses.insert(address);
        if self.next_address == Some(address) {
            self.find_address();
        }
    }

    fn vacate(&mut self, address: Ipv4Addr) {
        if self.addresses.remove(&address) {
            self.next_address = None;
            self.find_address();
        }
    }

    /// The lowest address that nobody has.
    fn find_address(&mut self) {
        let cidr = self.report.instance_cidr;
        let (network, broadcast) = (u32::from(cidr.network()), u32::from(cidr.broadcast()));
        let first = self.next_address.map_or(network.saturating_add(1), u32::from);
        // At most one step for each address in use, plus one.
        self.next_address = (first..broadcast)
            .map(Ipv4Addr::from)
            .find(|address| !self.addresses.contains(address) && *address != self.report.address);
    }

    /// How many addresses nobody has or claims, at least.
    fn addresses_left(&self) -> usize {
        let cidr = self.report.instance_cidr;
        let hosts = u32::from(cidr.broadcast()).saturating_sub(u32::from(cidr.network())).saturating_sub(1);
        let own = u32::from(cidr.contains(&self.report.address));
        (hosts.saturating_sub(own) as usize).saturating_sub(self.addresses.len()).saturating_sub(self.claimed)
    }

    fn count(&mut self, deployment: &'a DeploymentName, generation: u64) {
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

    /// What keeps something out whatever is free.
    fn misfit(&self, demand: Demand<'_>) -> Option<Misfit> {
        if self.closed.is_some() {
            return self.closed.clone();
        }
        let has_it = self.report.isolations.contains(&demand.isolation);
        (!has_it).then(|| Misfit::because(ReasonCode::IsolationUnavailable, ""))
    }

    fn fit(
        &self,
        packer: &mut Packer,
        models: &ModelNumbers<'_>,
        demand: Demand<'_>,
        ask: &Ask,
    ) -> Result<Slot, Misfit> {
        if let Some(misfit) = self.misfit(demand) {
            return Err(misfit);
        }
        let fit = packer.fit(self.place, ask).map_err(|lack| self.explain(models, ask, lack))?;
        let next_address = self.next_address.filter(|_| self.claimed == 0 || self.addresses_left() > 0);
        let address = next_address.ok_or_else(|| Misfit::because(ReasonCode::NoAddress, ""))?;
        let free = packer.free(self.place);
        let left = (free.memory, free.cpu);
        Ok(Slot { gpus: fit.gpus.iter().collect(), address, cost: fit.cost, left })
    }

    fn explain(&self, models: &ModelNumbers<'_>, ask: &Ask, lack: Lack) -> Misfit {
        match lack {
            Lack::Gpus(_) if self.report.gpus.is_empty() => Misfit::because(ReasonCode::NoGpu, ""),
            Lack::Gpus(0)
                if !self.report.gpus.iter().any(|it| ask.models.allow(models.number(&it.model))) =>
            {
                let names: BTreeSet<&str> = self.report.gpus.iter().map(|gpu| gpu.model.as_str()).collect();
                let names: Vec<&str> = names.into_iter().collect();
                Misfit::because(ReasonCode::NoGpuModel, names.join(", "))
            }
            Lack::Gpus(able) => Misfit::lacks(ReasonCode::InsufficientGpu, i64::from(able)),
            Lack::Cpu(free) => Misfit::lacks(ReasonCode::InsufficientCpu, free),
            Lack::Memory(free) => Misfit::lacks(ReasonCode::InsufficientMemory, free),
            Lack::Disk(free) => Misfit::lacks(ReasonCode::InsufficientDisk, free),
        }
    }
}

/// The GPU models of a location as numbers. Those from the 64th on are used only by who names no model.
#[derive(Debug)]
struct ModelNumbers<'a>(BTreeMap<&'a str, u8>);

impl<'a> ModelNumbers<'a> {
    fn of(state: &'a State) -> Self {
        let gpus = state.machines.values().flat_map(|machine| &machine.report.gpus);
        let names: BTreeSet<&str> = gpus.map(|gpu| gpu.model.as_str()).collect();
        Self(names.into_iter().zip(0..Models::UNNAMED).collect())
    }

    fn number(&self, model: &str) -> u8 {
        self.0.get(model).copied().unwrap_or(Models::UNNAMED)
    }

    fn ask(&self, resources: &Resources) -> Ask {
        let gpu = resources.gpu.as_ref();
        let models = match gpu {
            Some(gpu) if !gpu.models.is_empty() => {
                Models::these(gpu.models.iter().filter_map(|model| self.0.get(model.as_str()).copied()))
            }
            _ => Models::ANY,
        };
        Ask {
            cpu: signed(resources.cpu.0),
            memory: signed(resources.memory.0),
            disk: signed(resources.disk.0),
            gpus: gpu.map_or(0, |gpu| gpu.count),
            slice: gpu.and_then(|gpu| gpu.memory).map(|memory| signed(memory.0)),
            models,
        }
    }
}

fn free_room(free: &Free) -> FreeRoom {
    let unsigned = |value: i64| u64::try_from(value).unwrap_or(0);
    FreeRoom {
        cpu: MilliCpu(unsigned(free.cpu)),
        memory: Bytes(unsigned(free.memory)),
        disk: Bytes(unsigned(free.disk)),
        gpu_memory: free.gpus.iter().map(|gpu| Bytes(unsigned(gpu.free()))).collect(),
        gpu_whole: free.gpus.iter().map(Gpu::is_whole).collect(),
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Why a machine takes nothing at all.
fn closed(
    state: &State,
    name: &MachineId,
    machine: &Machine,
    reserved: &HashMap<&InstanceId, &MachineId>,
) -> Option<Misfit> {
    if machine.life != Life::Alive {
        return Some(Misfit::because(ReasonCode::Lost, ""));
    }
    if state.settings.draining {
        return Some(Misfit::because(ReasonCode::Draining, "the location is draining"));
    }
    if let Some(mode) = state.settings.machines.get(name) {
        let what = match mode {
            MachineMode::Cordoned => "cordoned",
            MachineMode::Draining => "draining",
        };
        return Some(Misfit::because(ReasonCode::Draining, format!("an operator has machine {name} {what}")));
    }
    if !machine.knew(state.process, machine.given_away) {
        // What its report leaves out may still begin, or end later.
        let note = format!("machine {name} hasn't said yet that it knows what was taken from it");
        return Some(Misfit::because(ReasonCode::Draining, note));
    }
    if let Some(condition) = machine.report.conditions.first() {
        return Some(Misfit::because(condition.reason, condition.message.clone()));
    }
    let stranger = machine
        .report
        .instances
        .iter()
        .find(|status| reserved.get(&status.instance).is_none_or(|machine| *machine != name));
    // A machine that came back still runs what was replaced meanwhile, and nobody knows how much room that takes.
    stranger.map(|status| {
        let note = format!("machine {name} is still ending {}, which runs elsewhere by now", status.instance);
        Misfit::because(ReasonCode::Draining, note)
    })
}
