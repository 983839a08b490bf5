//! Images that machines keep warm: those that the global scheduler wishes for, and one spare machine for each
//! deployment, so that an instance that has to move starts without a pull.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use anyplace_model::{ImageState, MachineId};

use super::{Planner, deployment_demand};
use crate::{room::Rooms, state::State};

/// Below the default of a wish: somebody asked for that.
const SPARE_PRIORITY: u8 = 40;

impl Planner<'_> {
    pub(super) fn images(&mut self) {
        let (state, keepers) = (self.state, Keepers::of(self.state, &self.rooms));
        for (image, wish) in &state.wishes {
            let all = usize::MAX;
            let most = wish.machines.map_or(all, |machines| usize::try_from(machines).unwrap_or(all));
            self.keep(image, wish.priority, keepers.of_image(image).take(most));
        }
        for placement in state.placements.values().filter(|placement| placement.count > 0) {
            let spec = &placement.spec;
            let demand = deployment_demand(spec);
            let spare = keepers
                .of_image(&spec.image)
                .find(|machine| !self.rooms.has(machine, &spec.name) && self.rooms.fits(machine, demand));
            self.keep(&spec.image, SPARE_PRIORITY, spare.into_iter());
        }
    }

    fn keep<'a>(&mut self, image: &str, priority: u8, machines: impl Iterator<Item = &'a MachineId>) {
        for machine in machines {
            let kept =
                self.plan.warm.entry(machine.clone()).or_default().entry(image.to_owned()).or_default();
            *kept = (*kept).max(priority);
        }
    }
}

/// Who may keep images: those that keep one already before those that have it, and those before the ones with the most
/// room for it; last where fetching it failed.
struct Keepers<'a> {
    /// Open machines, those with the most free disk first.
    by_disk: Vec<&'a MachineId>,
    /// Machines that know something of an image.
    known: HashMap<&'a str, Known>,
}

/// Machines by their place in the order by disk, beside whether it isn't kept there and isn't there.
#[derive(Default)]
struct Known {
    good: Vec<(bool, bool, usize)>,
    failed: Vec<(bool, bool, usize)>,
}

impl<'a> Keepers<'a> {
    fn of(state: &'a State, rooms: &Rooms<'a>) -> Self {
        let open = rooms.iter().filter(|room| room.is_open());
        let mut by_disk: Vec<_> = open.map(|room| (Reverse(rooms.free(room).disk), room)).collect();
        by_disk.sort_by_key(|(disk, room)| (*disk, room.name));
        let placed = state.placements.values().map(|placement| placement.spec.image.as_str());
        let mut known: HashMap<&str, Known> = state
            .wishes
            .keys()
            .map(String::as_str)
            .chain(placed)
            .map(|image| (image, Known::default()))
            .collect();
        let none = BTreeMap::new();
        for (place, (_, room)) in by_disk.iter().enumerate() {
            let kept = state.warm.get(room.name).unwrap_or(&none);
            let there = room
                .report
                .images
                .keys()
                .chain(kept.keys().filter(|it| !room.report.images.contains_key(*it)));
            for image in there {
                let Some(known) = known.get_mut(image.as_str()) else { continue };
                let failed = matches!(room.report.images.get(image), Some(ImageState::Failed(_)));
                let list = if failed { &mut known.failed } else { &mut known.good };
                list.push((!kept.contains_key(image), !room.is_warm(image), place));
            }
        }
        for Known { good, failed } in known.values_mut() {
            // What is only on its way there is nothing that speaks for a machine.
            good.retain(|(other, cold, _)| !other || !cold);
            good.sort_unstable();
            failed.sort_unstable();
        }
        Self { by_disk: by_disk.into_iter().map(|(_, room)| room.name).collect(), known }
    }

    /// The best first.
    fn of_image(&self, image: &str) -> impl Iterator<Item = &'a MachineId> {
        let Known { good, failed } = self.known.get(image).unwrap_or(&NOTHING);
        let named: BTreeSet<usize> = good.iter().chain(failed).map(|(.., place)| *place).collect();
        let at = |(.., place): &(bool, bool, usize)| self.by_disk[*place];
        let others = self.by_disk.iter().enumerate().filter(move |(place, _)| !named.contains(place));
        good.iter().map(at).chain(others.map(|(_, name)| *name)).chain(failed.iter().map(at))
    }
}

static NOTHING: Known = Known { good: Vec::new(), failed: Vec::new() };
