//! Whether all is as it should be.

use anyplace_location_core::{Reservation, Stage, Verdict};

use super::{Judged, Location};
use crate::oracle;

impl Location {
    pub(super) fn judge(&self) -> Judged {
        for agent in &self.agents {
            let name = &agent.name;
            let runs = agent.containers.values().filter(|held| held.started);
            oracle::fits(&agent.report, runs.map(|held| &held.assignment)).map_err(|why| {
                format!("location {}: {name} really runs what doesn't fit: {why}", self.index)
            })?;
            let books = |held: &&Reservation| held.machine == *name && held.stage != Stage::Preempted;
            let held = self.store.reservations.values().filter(books);
            oracle::fits(&agent.report, held.map(|held| &held.assignment))
                .map_err(|why| format!("location {}: {name} is booked twice: {why}", self.index))?;
        }
        let Some(process) = &self.process else { return Ok(()) };
        if !process.committing && process.state.revision != self.store.revision {
            let (knows, is) = (process.state.revision, self.store.revision);
            return Err(format!("location {}: the scheduler knows revision {knows} of {is}", self.index));
        }
        let silent = |it: &&Verdict| it.refused > 0 && it.refusals.is_empty();
        if let Some(verdict) = process.plan.placements.values().find(silent) {
            return Err(format!("{} instances wait without a reason", verdict.refused));
        }
        match process.plan.attempts.iter().find(|(_, refusals)| refusals.is_empty()) {
            Some((attempt, _)) => Err(format!("{attempt} waits without a reason")),
            None => Ok(()),
        }
    }

    /// After the calm: everything that is wanted runs or has a reason, and nothing else does.
    ///
    /// # Errors
    /// What is otherwise.
    pub(crate) fn converged(&self) -> Judged {
        let process = self.process.as_ref().ok_or("the scheduler doesn't run")?;
        // Waits that memory counts and the store doesn't are over by now.
        if process.state.reservations != self.store.reservations {
            return Err("memory and store differ".into());
        }
        for (name, held) in &self.store.reservations {
            let agent = self.agents.iter().find(|agent| agent.name == held.machine);
            let runs = agent.is_some_and(|it| it.containers.get(name).is_some_and(|held| held.started));
            // An attempt that is over waits until the global scheduler knows.
            let is_over = matches!(held.stage, Stage::Lost | Stage::Preempted);
            if !is_over && (held.stage != Stage::Serving || !runs) {
                return Err(format!("{name} is {:?} on {} and doesn't run", held.stage, held.machine));
            }
        }
        let names = self.agents.iter().flat_map(|agent| agent.containers.keys());
        if let Some(name) = names.into_iter().find(|name| !self.store.reservations.contains_key(*name)) {
            return Err(format!("{name} runs and isn't wanted"));
        }
        for (name, wanted) in &self.store.wanted.placements {
            let of = |held: &&Reservation| held.deployment() == Some(name);
            let serving = self.store.reservations.values().filter(of).count();
            let refused = process.plan.placements.get(name).map_or(0, |verdict| verdict.refused as usize);
            if serving > wanted.count as usize || serving + refused < wanted.count as usize {
                return Err(format!("{name} has {serving} of {}, {refused} refused", wanted.count));
            }
        }
        for attempt in self.store.wanted.attempts.keys() {
            let runs = self.store.reservations.values().any(|held| held.attempt() == Some(attempt));
            if !runs && !process.plan.attempts.contains_key(attempt) {
                return Err(format!("{attempt} doesn't run, for no reason"));
            }
        }
        Ok(())
    }
}
