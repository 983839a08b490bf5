//! Images that machines keep warm: those that the global scheduler wishes for, and one spare machine for each
//! deployment, so that an instance that has to move starts without a pull.

use std::collections::BTreeSet;

use anyplace_model::{Bytes, ImageState, MachineId};

use super::Planner;
use crate::room::{Demand, Room};

/// Below the default of a wish: somebody asked for that.
const SPARE_PRIORITY: u8 = 40;

impl Planner<'_> {
    pub(super) fn images(&mut self) {
        let state = self.state;
        for (image, wish) in &state.wishes {
            let all = usize::MAX;
            let most = wish.machines.map_or(all, |machines| usize::try_from(machines).unwrap_or(all));
            let chosen = self.keepers(image, most, |_| true);
            self.keep(image, wish.priority, chosen);
        }
        for placement in state.placements.values().filter(|placement| placement.count > 0) {
            let spec = &placement.spec;
            let demand = Demand { image: &spec.image, isolation: spec.isolation, resources: &spec.resources };
            let running: BTreeSet<&MachineId> = state
                .reservations
                .values()
                .filter(|held| held.deployment() == Some(&spec.name))
                .map(|held| &held.machine)
                .collect();
            let mut able = BTreeSet::new();
            self.rooms.fit_each(demand, |room, fit| {
                if fit.is_ok() && !running.contains(room.name) {
                    able.insert(room.name);
                }
            });
            let chosen = self.keepers(&spec.image, 1, |room| able.contains(room.name));
            self.keep(&spec.image, SPARE_PRIORITY, chosen);
        }
    }

    /// The machines that keep an image: those that do already before those that have it, and those before the ones
    /// with the most room for it.
    fn keepers(&self, image: &str, most: usize, may: impl Fn(&Room<'_>) -> bool) -> Vec<MachineId> {
        let mut rooms: Vec<_> = self.rooms.iter().filter(|room| room.is_open() && may(room)).collect();
        rooms.sort_by_key(|room| {
            let keeps = self.state.warm.get(room.name).is_some_and(|images| images.contains_key(image));
            let failed = matches!(room.report.images.get(image), Some(ImageState::Failed(_)));
            let Bytes(disk) = self.rooms.free(room).disk;
            (failed, !keeps, !room.is_warm(image), std::cmp::Reverse(disk), room.name)
        });
        rooms.into_iter().take(most).map(|room| room.name.clone()).collect()
    }

    fn keep(&mut self, image: &str, priority: u8, machines: Vec<MachineId>) {
        for machine in machines {
            let kept = self.plan.warm.entry(machine).or_default().entry(image.to_owned()).or_default();
            *kept = (*kept).max(priority);
        }
    }
}
