//! Which instances may move where, and what that costs: room for a deployment that fits nowhere, and moves that pay by
//! themselves.
//!
//! Only ready instances of deployments move, and only of those that have as many ready ones as are wanted and no old ones:
//! the replacement comes first, so there are never fewer. A job's attempt runs once and stays. A machine that takes
//! nothing new gets nothing that moves either, nor does one that would have more of the deployment then than the old one
//! has now.

use std::collections::{BTreeMap, BTreeSet};

use anyplace_model::{DeploymentName, InstanceId, MachineId};
use serde::{Deserialize, Serialize};

use super::{Demand, Rooms};
use crate::{
    moves::{busy, copies},
    packing::{GpuSet, Limits, Move, PARTS, Tenant, defragment, make_room},
    state::{Observed, Reservation, Stage, State},
};

/// What each move costs, in parts of a GPU: as in `cargo xtask bench packing`, where 50,000 do as well.
const PRICE: i64 = 40_000;
/// A whole GPU costs as much again: what is in its memory has to be loaded anew.
const PRICE_OF_SIZE: i64 = 25;

/// An instance to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceMove {
    /// Which one.
    pub instance: InstanceId,
    /// The new machine.
    pub machine: MachineId,
    /// Indexes of its GPUs there.
    pub gpus: Vec<u32>,
}

/// How room can be made for one more instance of a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomPlan {
    /// Revision of the state that it was made from.
    pub revision: u64,
    /// The moves, in an order in which each fits once those before it are done; each starts the new one first.
    pub moves: Vec<InstanceMove>,
    /// The machine where the newcomer fits then.
    pub machine: MachineId,
    /// Indexes of its GPUs.
    pub gpus: Vec<u32>,
}

/// Plans room for one more instance of a deployment that fits nowhere; none where it fits, isn't wanted, or no moves help.
pub fn plan_room(state: &State, deployment: &DeploymentName, limits: Limits) -> Option<RoomPlan> {
    let (rooms, observed) = (Rooms::all(state), Observed::new(state));
    find_room(&rooms, state, &observed, &busy(state, &copies(state)), deployment, limits)
}

/// The same with these rooms, where nothing of the `busy` deployments moves.
pub(crate) fn find_room(
    rooms: &Rooms<'_>,
    state: &State,
    observed: &Observed<'_>,
    busy: &BTreeSet<&DeploymentName>,
    deployment: &DeploymentName,
    limits: Limits,
) -> Option<RoomPlan> {
    let spec = &state.placements.get(deployment)?.spec;
    let demand = Demand { image: &spec.image, isolation: spec.isolation, resources: &spec.resources };
    let movable = Movable::of(rooms, state, observed, busy);
    let takes = |room: &super::Room<'_>| room.misfit(demand).is_none() && room.addresses_left() > 0;
    let ask = rooms.models.ask(demand.resources);
    if rooms.iter().any(|room| takes(room) && rooms.packer.free(room.place).check(&ask).is_ok()) {
        return None;
    }
    let rank = |who: Option<usize>, machine: usize| match who {
        None => takes(movable.room(machine)?).then_some(0),
        Some(who) => movable.rank(who, machine, limits.moves),
    };
    let made = make_room(&rooms.packer, &movable.tenants, &ask, limits, &rank)?;
    let moves = movable.named(&made.moves)?;
    let machine = movable.room(made.machine)?.name.clone();
    Some(RoomPlan { revision: state.revision, moves, machine, gpus: made.gpus.iter().collect() })
}

/// At most `most` moves, each of which lessens fragments by more than it costs.
pub fn plan_tidying(state: &State, most: usize) -> Vec<InstanceMove> {
    let (rooms, observed) = (Rooms::all(state), Observed::new(state));
    find_tidying(&rooms, state, &observed, &busy(state, &copies(state)), most)
}

/// The same with these rooms, where nothing of the `busy` deployments moves.
pub(crate) fn find_tidying(
    rooms: &Rooms<'_>,
    state: &State,
    observed: &Observed<'_>,
    busy: &BTreeSet<&DeploymentName>,
    most: usize,
) -> Vec<InstanceMove> {
    let movable = Movable::of(rooms, state, observed, busy);
    let mut packer = rooms.packer.clone();
    let may = |who: usize, machine: usize| movable.rank(who, machine, most).is_some();
    let moves = defragment(&mut packer, &movable.tenants, most, &may);
    movable.named(&moves).unwrap_or_default()
}

/// Who is where, and who may go.
struct Movable<'r, 'a> {
    rooms: &'r Rooms<'a>,
    /// By their index among the packer's machines.
    names: Vec<&'a MachineId>,
    tenants: Vec<Tenant>,
    /// The reservations of the tenants.
    held: Vec<&'a Reservation>,
}

impl<'r, 'a> Movable<'r, 'a> {
    fn of(
        rooms: &'r Rooms<'a>,
        state: &'a State,
        observed: &Observed<'_>,
        busy: &BTreeSet<&DeploymentName>,
    ) -> Self {
        let whole = whole(state, observed, busy);
        let mut names: Vec<(usize, &MachineId)> = rooms.iter().map(|room| (room.place, room.name)).collect();
        names.sort_unstable();
        let (mut tenants, mut held) = (Vec::new(), Vec::new());
        let holding = |held: &&Reservation| held.stage != Stage::Preempted;
        for reservation in state.reservations.values().filter(holding) {
            let Some(room) = rooms.rooms.get(&reservation.machine) else { continue };
            let ask = rooms.models.ask(&reservation.assignment.resources);
            let may = observed.ready(reservation)
                && reservation.deployment().is_some_and(|deployment| whole.contains(deployment));
            let gpus = GpuSet::of(reservation.assignment.gpus.iter().copied());
            let part = |gpu: u32| match (ask.slice, room.report.gpus.get(gpu as usize)) {
                (Some(slice), Some(gpu)) => {
                    let size_mib = super::signed(gpu.memory.0 >> 20).max(1);
                    (slice >> 20).saturating_mul(PARTS) / size_mib
                }
                _ => PARTS,
            };
            let parts = gpus.iter().map(part);
            let price = PRICE.saturating_add(parts.fold(0, i64::saturating_add) / PRICE_OF_SIZE);
            let price = u64::try_from(price).ok().filter(|_| may);
            tenants.push(Tenant { ask, machine: room.place, gpus, price });
            held.push(reservation);
        }
        Self { names: names.into_iter().map(|(_, name)| name).collect(), rooms, tenants, held }
    }

    fn room(&self, machine: usize) -> Option<&super::Room<'a>> {
        self.rooms.rooms.get(self.names.get(machine)?)
    }

    /// Whether a machine may take a tenant, while at most so many move: less is better.
    fn rank(&self, who: usize, machine: usize, moves: usize) -> Option<u32> {
        let (held, room) = (self.held[who], self.room(machine)?);
        let made = &held.assignment;
        let demand = Demand { image: &made.image, isolation: made.isolation, resources: &made.resources };
        let deployment = held.deployment()?;
        let spreads = held.machine == *room.name
            || room.crowd(deployment, 0).1 < self.rooms.rooms.get(&held.machine)?.crowd(deployment, 0).1;
        // For each of them, and for the newcomer.
        let takes = room.misfit(demand).is_none() && room.addresses_left() > moves;
        (takes && spreads).then(|| u32::from(!room.is_warm(demand.image)))
    }

    /// The moves by names; none where two of them crowd a deployment on one machine, which each alone doesn't.
    fn named(&self, moves: &[Move]) -> Option<Vec<InstanceMove>> {
        let mut entered = BTreeSet::new();
        let named = moves.iter().map(|step| {
            let held = self.held[step.tenant];
            let machine = self.names.get(step.machine).copied()?;
            entered.insert((held.deployment()?, machine)).then(|| InstanceMove {
                instance: held.assignment.instance.clone(),
                machine: machine.clone(),
                gpus: step.gpus.iter().collect(),
            })
        });
        named.collect()
    }
}

/// Deployments that have all that is wanted, ready and up to date, and of which nothing moves.
fn whole<'a>(
    state: &'a State,
    observed: &Observed<'_>,
    busy: &BTreeSet<&DeploymentName>,
) -> BTreeSet<&'a DeploymentName> {
    let mut ready: BTreeMap<&DeploymentName, (u32, bool)> = BTreeMap::new();
    for held in state.reservations.values().filter(|held| held.stage == Stage::Serving) {
        let Some((name, placement)) =
            held.deployment().and_then(|deployment| state.placements.get_key_value(deployment))
        else {
            continue;
        };
        let (count, current) = ready.entry(name).or_insert((0, true));
        *count += u32::from(observed.ready(held));
        *current &= held.satisfies(placement) && !state.leaves(held);
    }
    let is_whole = |(name, (ready, current)): (&'a DeploymentName, (u32, bool))| {
        let wanted = state.placements.get(name).map(|placement| placement.count);
        let is_whole = current && wanted.is_some_and(|wanted| ready >= wanted);
        (is_whole && !busy.contains(name)).then_some(name)
    };
    ready.into_iter().filter_map(is_whole).collect()
}
