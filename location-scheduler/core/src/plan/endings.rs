//! What ends by itself: instances that have drained, that their machine has ended, or whose machine is lost.

use anyplace_model::InstancePhase;

use super::Planner;
use crate::state::{Life, Reservation, Stage};

/// What time and observation make of a reservation.
#[derive(Clone, Copy)]
enum Ending {
    Remove,
    Release,
    Lose,
    MadeWay,
}

impl Planner<'_> {
    pub(super) fn endings(&mut self) {
        let state = self.state;
        for (instance, held) in &state.reservations {
            let ending = self.ending(held);
            match ending {
                Some(Ending::Remove) => self.plan.removals.push(instance.clone()),
                Some(Ending::Lose) => self.plan.losses.push(instance.clone()),
                Some(Ending::MadeWay) => {
                    self.plan.preempted.push(instance.clone());
                    self.rooms.give_back(held);
                }
                Some(Ending::Release) => {
                    self.plan.releases.push(instance.clone());
                    if held.stage != Stage::Preempted {
                        self.rooms.give_back(held);
                    }
                }
                None => {}
            }
            let releases = matches!(ending, Some(Ending::Release | Ending::MadeWay));
            if held.attempt().is_some() && !releases && held.stage != Stage::Preempted {
                self.attempts.push(held);
            }
        }
    }

    fn ending(&self, held: &Reservation) -> Option<Ending> {
        let (state, life) = (self.state, self.observed.life(held));
        let phase = self.observed.status(held).map(|status| status.phase);
        let wanted = held.attempt().map(|attempt| state.attempts.contains_key(attempt));
        let since = |since_ms: u64, wait_ms: u64| state.now_ms >= since_ms.saturating_add(wait_ms);
        if life == Life::Lost {
            let ended = matches!(phase, Some(InstancePhase::Exited | InstancePhase::Failed));
            return match wanted {
                // What the machine said last still counts: it ended before the machine was lost.
                Some(true) => (held.stage == Stage::Serving && !ended).then_some(Ending::Lose),
                Some(false) | None => Some(Ending::Release),
            };
        }
        match held.stage {
            Stage::Serving | Stage::Lost => (wanted == Some(false)).then_some(Ending::Remove),
            Stage::Preempted => (wanted != Some(true)).then_some(Ending::Release),
            Stage::Draining { since_ms } => {
                // Where no container runs, there are no connections to wait for. A machine that knows of the drain
                // calls the container that still runs `stopping`.
                let runs = matches!(phase, Some(InstancePhase::Running | InstancePhase::Stopping));
                let idle = life == Life::Alive && !runs;
                (idle || since(since_ms, state.timing.drain_ms)).then_some(Ending::Remove)
            }
            Stage::Removing { .. } => {
                let gone = life == Life::Alive && phase.is_none();
                // Wanted, it made way for a deployment.
                let ending = if wanted == Some(true) { Ending::MadeWay } else { Ending::Release };
                // A report from before may leave the instance out because it wasn't known yet.
                (gone && self.observed.knew_of_end(state, held)).then_some(ending)
            }
        }
    }
}
