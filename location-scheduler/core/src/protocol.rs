//! What a scheduler concludes from messages and from their absence: rules that safety depends on, as plain functions.
//!
//! What a machine should have is sent on one connection, what it has is reported on another: either may be late by any
//! time. So each taking back of something has a number, the machine's mark, which travels with the wish and comes back
//! with the reports of those who know of it. Room is free only by such a report.

use std::{collections::BTreeSet, time::Duration};

use anyplace_model::{InstanceId, MachineId, Mark};

use crate::{
    plan::Change,
    state::{Life, Machine, Reservation, Stage, State},
};

/// Whether a report of these numbers and this mark says nothing new, because one that was written later, or the same one,
/// came before it. `process` is the scheduler's.
pub fn is_stale(process: u64, machine: &Machine, numbers: (u64, u64), mark: Option<Mark>) -> bool {
    match machine.life {
        // Only one that was written after the loss counts, also of an agent whose clock was set back.
        Life::Lost => !mark.is_some_and(|mark| mark.process == process && mark.number >= machine.given_away),
        Life::Alive | Life::Suspect => numbers <= (machine.report.epoch, machine.report.sequence),
    }
}

/// What a machine's silence means: suspect after its lease, lost after twice that.
pub fn life_after(silence: Duration, lease: Duration) -> Life {
    if silence >= lease * 2 {
        Life::Lost
    } else if silence >= lease {
        Life::Suspect
    } else {
        Life::Alive
    }
}

/// A machine's life is over, or hangs by a thread: true where it wasn't known yet. What the machine should have must be
/// published anew after a loss.
pub fn fall_silent(machine: &mut Machine, life: Life) -> bool {
    if life <= machine.life {
        return false;
    }
    machine.life = life;
    if life == Life::Lost {
        machine.mark += 1;
        machine.given_away = machine.mark;
    }
    true
}

/// A plan's changes are written: makes them part of the state. What waits begins to wait now, at `now_ms`: what it waits
/// for follows from the change, and isn't published before.
pub fn carry_out(state: &mut State, changes: Vec<Change>, revision: u64, now_ms: u64) {
    let mut taken: BTreeSet<MachineId> = BTreeSet::new();
    let assigned = |held: &Reservation| matches!(held.stage, Stage::Serving | Stage::Draining { .. });
    for change in changes {
        let (instance, now) = match change {
            Change::Put(mut held) => {
                if let Stage::Draining { since_ms } = &mut held.stage {
                    *since_ms = now_ms.max(*since_ms);
                }
                (held.assignment.instance.clone(), Some(*held))
            }
            Change::Delete(instance) => (instance, None),
            Change::Moves(cause, Some(moving)) => {
                state.moves.under_way.insert(cause, *moving);
                continue;
            }
            Change::Moves(cause, None) => {
                state.moves.under_way.remove(&cause);
                continue;
            }
        };
        let (is_gone, is_assigned) = (now.is_none(), now.as_ref().is_some_and(assigned));
        let number = state.withdrawn.get(&instance).copied().unwrap_or(0);
        let Some(before) = replace(state, instance.clone(), now) else { continue };
        let Some(machine) = state.machines.get_mut(&before.machine) else { continue };
        let was_assigned = assigned(&before);
        if was_assigned && !is_assigned {
            machine.mark += u64::from(taken.insert(before.machine));
            if !is_gone {
                state.withdrawn.insert(instance, machine.mark);
            }
        }
        if is_gone && (was_assigned || !machine.knew(state.process, number)) {
            machine.given_away = machine.mark;
        }
    }
    state.revision = revision;
}

fn replace(state: &mut State, instance: InstanceId, held: Option<Reservation>) -> Option<Reservation> {
    match held {
        Some(held) => state.reservations.insert(instance, held),
        None => {
            state.withdrawn.remove(&instance);
            state.reservations.remove(&instance)
        }
    }
}

/// The process has just begun to publish: what was waiting before it began waits anew, since nobody counted the time
/// between, and the clock may have been set.
pub fn wait_anew(state: &mut State) {
    for held in state.reservations.values_mut() {
        if let Stage::Draining { since_ms } = &mut held.stage {
            *since_ms = state.now_ms;
        }
    }
}
