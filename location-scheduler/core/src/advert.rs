//! What the location could take now, in short.

use std::collections::{BTreeMap, BTreeSet};

use anyplace_model::{
    Advert, Bytes, GpuBlock, ImageState, Isolation, MilliCpu, Preemptible, ReasonCode, Refusal,
};

use crate::{
    plan::is_off_peak,
    room::{FreeRoom, Room, Rooms},
    state::{Life, Stage, State},
};

/// Images named in an advert: a hint, so that a bound costs at most a slower start.
const MAX_WARM_IMAGES: usize = 1_000;

/// The advert of a state. Machines that take nothing count in the totals, not in what is free.
pub fn advert(state: &State) -> Advert {
    let rooms = Rooms::to_look_at(state);
    let alive: Vec<&Room<'_>> = rooms
        .iter()
        .filter(|room| state.machines.get(room.name).is_some_and(|machine| machine.life == Life::Alive))
        .collect();
    let open: Vec<(&Room<'_>, FreeRoom)> =
        alive.iter().filter(|room| room.is_open()).map(|room| (*room, rooms.free(room))).collect();
    let mut gpus: BTreeMap<String, u32> = BTreeMap::new();
    for gpu in alive.iter().flat_map(|room| &room.report.gpus) {
        *gpus.entry(gpu.model.clone()).or_default() += 1;
    }
    let isolations: BTreeSet<Isolation> =
        open.iter().flat_map(|(room, _)| room.report.isolations.iter().copied()).collect();
    let warm_images: BTreeSet<&String> = open
        .iter()
        .flat_map(|(room, _)| &room.report.images)
        .filter(|(_, image)| matches!(image, ImageState::Warm))
        .map(|(name, _)| name)
        .collect();
    let site = &state.site;
    let cpu = |values: &mut dyn Iterator<Item = u64>| MilliCpu(values.fold(0, u64::saturating_add));
    let bytes = |values: &mut dyn Iterator<Item = u64>| Bytes(values.fold(0, u64::saturating_add));
    Advert {
        region: site.region.clone(),
        country: site.country.clone(),
        labels: site.labels.clone(),
        latitude: site.latitude,
        longitude: site.longitude,
        timezone: site.timezone.clone(),
        off_peak: state.settings.off_peak.or(site.off_peak),
        machines: u32::try_from(alive.len()).unwrap_or(u32::MAX),
        cpu: cpu(&mut alive.iter().map(|room| room.report.cpu.0)),
        memory: bytes(&mut alive.iter().map(|room| room.report.memory.0)),
        free_cpu: cpu(&mut open.iter().map(|(_, free)| free.cpu.0)),
        free_memory: bytes(&mut open.iter().map(|(_, free)| free.memory.0)),
        free_disk: bytes(&mut open.iter().map(|(_, free)| free.disk.0)),
        largest_free_cpu: open.iter().map(|(_, free)| free.cpu).max().unwrap_or_default(),
        largest_free_memory: open.iter().map(|(_, free)| free.memory).max().unwrap_or_default(),
        largest_free_disk: open.iter().map(|(_, free)| free.disk).max().unwrap_or_default(),
        gpus,
        gpu_blocks: gpu_blocks(&open),
        isolations: isolations.into_iter().collect(),
        warm_images: warm_images.into_iter().take(MAX_WARM_IMAGES).cloned().collect(),
        conditions: conditions(&alive),
        preemptible: preemptible(state),
    }
}

/// What would be free without off-peak attempts; none where there are none.
fn preemptible(state: &State) -> Option<Preemptible> {
    let attempts = state.reservations.values().filter(|held| held.attempt().is_some());
    let off_peak: Vec<_> =
        attempts.filter(|held| held.stage != Stage::Preempted && is_off_peak(state, held)).collect();
    if off_peak.is_empty() {
        return None;
    }
    let mut rooms = Rooms::to_look_at(state);
    off_peak.into_iter().for_each(|held| rooms.give_back(held));
    let is_alive =
        |room: &&Room<'_>| state.machines.get(room.name).is_some_and(|machine| machine.life == Life::Alive);
    let open = rooms.iter().filter(is_alive).filter(|room| room.is_open());
    let open: Vec<(&Room<'_>, FreeRoom)> = open.map(|room| (room, rooms.free(room))).collect();
    let free = || open.iter().map(|(_, free)| free);
    Some(Preemptible {
        free_cpu: MilliCpu(free().fold(0, |sum, free| sum.saturating_add(free.cpu.0))),
        free_memory: Bytes(free().fold(0, |sum, free| sum.saturating_add(free.memory.0))),
        free_disk: Bytes(free().fold(0, |sum, free| sum.saturating_add(free.disk.0))),
        largest_free_cpu: free().map(|free| free.cpu).max().unwrap_or_default(),
        largest_free_memory: free().map(|free| free.memory).max().unwrap_or_default(),
        largest_free_disk: free().map(|free| free.disk).max().unwrap_or_default(),
        gpu_blocks: gpu_blocks(&open),
    })
}

/// What keeps reporting machines from taking work; of each reason, one machine's words.
fn conditions(alive: &[&Room<'_>]) -> Vec<Refusal> {
    let mut by_reason: BTreeMap<ReasonCode, Refusal> = BTreeMap::new();
    for condition in alive.iter().flat_map(|room| &room.report.conditions) {
        let new = || Refusal { reason: condition.reason, count: 0, message: condition.message.clone() };
        by_reason.entry(condition.reason).or_insert_with(new).count += 1;
    }
    by_reason.into_values().collect()
}

fn gpu_blocks(open: &[(&Room<'_>, FreeRoom)]) -> Vec<GpuBlock> {
    // Model, free memory and whether whole: GPUs in all, and the most in one machine.
    let mut blocks: BTreeMap<(&str, Bytes, bool), (u32, u32)> = BTreeMap::new();
    for (room, free) in open {
        let mut here: BTreeMap<(&str, Bytes, bool), u32> = BTreeMap::new();
        for ((gpu, memory), whole) in room.report.gpus.iter().zip(&free.gpu_memory).zip(&free.gpu_whole) {
            if memory.0 > 0 || *whole {
                *here.entry((gpu.model.as_str(), *memory, *whole)).or_default() += 1;
            }
        }
        for (block, count) in here {
            let (all, most) = blocks.entry(block).or_default();
            *all += count;
            *most = (*most).max(count);
        }
    }
    blocks
        .into_iter()
        .map(|((model, memory, whole), (count, most_in_one_machine))| GpuBlock {
            model: model.into(),
            memory,
            whole,
            count,
            most_in_one_machine,
        })
        .collect()
}
