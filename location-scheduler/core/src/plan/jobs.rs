//! Attempts of jobs: each runs once, on a machine that has its image already.

use std::collections::BTreeSet;

use anyplace_model::{AttemptId, ImageState, JobSpec, MachineId, ReasonCode, Workload};

use super::{Planner, Score, job_demand, kept_for_others, misfit, score, size};
use crate::{
    refusal::Tally,
    room::{Demand, Misfit, Room, Slot},
};

impl<'a> Planner<'a> {
    pub(super) fn jobs(&mut self) {
        let state = self.state;
        let placed: BTreeSet<&AttemptId> =
            state.reservations.values().filter_map(|held| held.attempt()).collect();
        let mut waiting: Vec<(&AttemptId, &JobSpec)> =
            state.attempts.iter().filter(|(attempt, _)| !placed.contains(attempt)).collect();
        waiting.sort_by_key(|(attempt, spec)| (size(job_demand(spec)), *attempt));
        // Those that can start come first, so that one that waits for its image keeps no room from them.
        waiting.retain(|(attempt, spec)| !self.start_where_warm(attempt, spec));
        for (attempt, spec) in waiting {
            self.prewarm(attempt, spec);
        }
    }

    fn start_where_warm(&mut self, attempt: &AttemptId, spec: &JobSpec) -> bool {
        let demand = job_demand(spec);
        let mut best: Option<(Score<'_>, &MachineId, Slot)> = None;
        let kept = &self.kept;
        self.rooms.fit_each(demand, |room, fit| {
            if let Ok(slot) = fit
                && !kept.contains(room.name)
                && room.is_warm(demand.image)
            {
                let score = score(room, demand, None, &slot);
                if best.as_ref().is_none_or(|(least, ..)| score < *least) {
                    best = Some((score, room.name, slot));
                }
            }
        });
        let Some((_, machine, slot)) = best else { return false };
        let workload = Workload::Job(attempt.clone());
        self.start(workload, u64::from(attempt.attempt), demand, machine, slot);
        true
    }

    /// Chooses the machine that fetches the image; counts every machine as one that lacks something.
    fn prewarm(&mut self, attempt: &AttemptId, spec: &JobSpec) {
        let demand = job_demand(spec);
        let mut tally = Tally::default();
        let mut best: Option<((bool, bool, Score<'_>), &MachineId, Slot)> = None;
        let begun = self.state.prewarms.get(attempt);
        let kept = &self.kept;
        self.rooms.fit_each(demand, |room, fit| match fit {
            Ok(_) if kept.contains(room.name) => tally.add(kept_for_others()),
            Ok(slot) => {
                tally.add(image_misfit(room, demand));
                // A machine that has begun goes on, whatever looks better by now.
                let told = room.report.images.contains_key(demand.image);
                let rank = (begun != Some(room.name), !told, score(room, demand, None, &slot));
                if best.as_ref().is_none_or(|(least, ..)| rank < *least) {
                    best = Some((rank, room.name, slot));
                }
            }
            Err(misfit) => tally.add(misfit),
        });
        if let Some((_, machine, slot)) = best {
            self.plan.prewarms.insert(attempt.clone(), machine.clone());
            // Kept from the attempts after it in this plan, so that they look elsewhere.
            self.rooms.take(machine, demand.resources, &slot);
        }
        self.plan.attempts.insert(attempt.clone(), tally.refusals(demand));
    }
}

fn image_misfit(room: &Room<'_>, demand: Demand<'_>) -> Misfit {
    match room.report.images.get(demand.image) {
        Some(ImageState::Failed(condition)) => misfit(condition.reason, condition.message.clone()),
        _ => misfit(ReasonCode::PullingImage, String::new()),
    }
}
