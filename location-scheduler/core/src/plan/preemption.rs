//! Off-peak attempts make way for deployments: where one more instance finds no room, and would have it on a machine
//! without some of the off-peak attempts there, those end. Nothing else comes onto that machine until it is in.
//!
//! An attempt that made way is no longer assigned: its machine asks it to end, and kills it after its grace. It keeps its
//! reservation until the global scheduler, which is told at once, no longer wants this attempt. So it never runs again,
//! and the room that it held goes to the deployment.

use std::{cmp::Reverse, collections::BTreeMap};

use anyplace_model::{InstanceId, InstancePhase, MachineId, SchedulingPolicy};

use super::Planner;
use crate::{
    room::Demand,
    state::{Reservation, Stage, State},
};

/// The most attempts that end for one instance: for a large one, hours of many others' work would be lost.
const MOST: usize = 16;

/// What ends on one machine; the least is chosen.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Way<'a> {
    /// The fewest attempts lose their work,
    attempts: usize,
    /// and the least of it: the latest start of the oldest of them.
    oldest_ms: Reverse<u64>,
    machine: &'a MachineId,
    instances: Vec<&'a InstanceId>,
}

/// Whether it is an off-peak attempt that is still wanted.
pub(crate) fn is_off_peak(state: &State, held: &Reservation) -> bool {
    let spec = held.attempt().and_then(|attempt| state.attempts.get(attempt));
    spec.is_some_and(|spec| spec.scheduling_policy == SchedulingPolicy::OffPeak)
}

impl<'a> Planner<'a> {
    /// Whether attempts are ending, or begin to end, where one more fits without them.
    pub(super) fn preempt(&mut self, demand: Demand<'_>) -> bool {
        let mut ending: BTreeMap<&'a MachineId, Vec<&'a Reservation>> = BTreeMap::new();
        let mut serving: BTreeMap<&'a MachineId, Vec<&'a Reservation>> = BTreeMap::new();
        for held in self.attempts.iter().copied().filter(|held| !self.kept.contains(&held.machine)) {
            let phase = self.observed.status(held).map(|status| status.phase);
            let ended = matches!(phase, Some(InstancePhase::Exited | InstancePhase::Failed));
            let removed = self.plan.removals.contains(&held.assignment.instance);
            let list = match held.stage {
                Stage::Removing { .. } => &mut ending,
                // The global scheduler is about to take its result.
                Stage::Serving if ended || removed => &mut ending,
                Stage::Serving if is_off_peak(self.state, held) => &mut serving,
                _ => continue,
            };
            list.entry(&held.machine).or_default().push(held);
        }
        let fits = |held: &[&Reservation]| self.rooms.fits_without(held, demand);
        if let Some((machine, _)) = ending.iter().find(|(_, held)| fits(held)) {
            self.kept.insert(machine);
            return true;
        }
        let ways = serving.into_iter().filter_map(|(machine, mut here)| {
            let already = ending.get(machine).cloned().unwrap_or_default();
            // The youngest first: it has done the least.
            here.sort_by_key(|held| (Reverse(held.created_ms), &held.assignment.instance));
            let all = |some: &[&'a Reservation]| [already.as_slice(), some].concat();
            let enough = (1..=here.len().min(MOST)).find(|count| fits(&all(&here[..*count])))?;
            here.truncate(enough);
            // Small ones among them may not be needed beside the last, large one.
            for index in (0..here.len()).rev() {
                let mut fewer = here.clone();
                fewer.remove(index);
                if !fewer.is_empty() && fits(&all(&fewer)) {
                    here = fewer;
                }
            }
            let oldest_ms = Reverse(here.iter().map(|held| held.created_ms).min().unwrap_or(0));
            let instances: Vec<_> = here.iter().map(|held| &held.assignment.instance).collect();
            Some(Way { attempts: instances.len(), oldest_ms, machine, instances })
        });
        let Some(way) = ways.min() else { return false };
        self.kept.insert(way.machine);
        self.plan.preemptions.extend(way.instances.into_iter().cloned());
        true
    }
}
