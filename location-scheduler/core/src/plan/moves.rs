//! Moves: copies start where their places are free, and room is looked for where something has been refused for a while.

use std::collections::{BTreeMap, BTreeSet};

use anyplace_model::{DeploymentName, MoveCause, ReasonCode, Refusal, Workload};

use super::Planner;
use crate::{
    moves::{
        MAX_UNDER_WAY, Moving, PATIENCE_MS, Place, Replaced, SEARCH_AGAIN_MS, SEARCH_PAUSE_MS, STAYS_PAUSES,
        TIDY_MOVES, Waiting, busy,
    },
    packing::Limits,
    room::{Slot, find_room, find_tidying},
    state::Reservation,
};

impl<'a> Planner<'a> {
    /// Carries on with what is under way, and begins to make room for one more.
    pub(super) fn moves(&mut self) {
        let causes: Vec<MoveCause> = self.claims.keys().cloned().collect();
        causes.iter().for_each(|cause| self.start_copies(cause));
        self.make_room();
        self.explain_moves();
        let before = &self.state.moves.under_way;
        for (cause, moving) in &self.moving {
            if before.get(cause) != Some(moving) {
                self.plan.moves.insert(cause.clone(), Some(moving.clone()));
            }
        }
        let ended = before.keys().filter(|cause| !self.moving.contains_key(cause));
        self.plan.moves.extend(ended.map(|cause| (cause.clone(), None)));
    }

    /// Whether others move, or were to move, for this deployment.
    pub(super) fn has_room_made(&self, name: &DeploymentName) -> bool {
        !self.moving.is_empty() && self.moving.contains_key(&MoveCause::Room(name.clone()))
    }

    /// Whether an instance moves.
    pub(super) fn is_moving(&self, held: &Reservation) -> bool {
        let instance = &held.assignment.instance;
        self.moving.values().any(|moving| moving.is_active() && moving.involves(instance))
    }

    /// The room that was made for a deployment, once it is there; the moves have served their purpose then.
    pub(super) fn enter(&mut self, name: &DeploymentName) -> Option<(&'a anyplace_model::MachineId, Slot)> {
        if self.claims.is_empty() {
            return None;
        }
        let cause = MoveCause::Room(name.clone());
        let claim = self.claims.get(&cause)?.last()?.clone();
        self.rooms.unclaim(&claim);
        let slot = self.rooms.fit_claim(&claim);
        self.rooms.claim(&claim);
        let (machine, _) = self.state.machines.get_key_value(&claim.machine)?;
        let slot = slot?;
        self.end_moves(&cause);
        Some((machine, slot))
    }

    /// Nothing moves for this cause any more: what was kept for it is free.
    pub(super) fn end_moves(&mut self, cause: &MoveCause) {
        self.moving.remove(cause);
        for claim in self.claims.remove(cause).unwrap_or_default() {
            self.rooms.unclaim(&claim);
        }
    }

    fn start_copies(&mut self, cause: &MoveCause) {
        let Some(mut waiting) = self.claims.remove(cause) else { return };
        let mut left = Vec::new();
        while !waiting.is_empty() {
            // Those that come later don't stand in its way, those before do.
            waiting.iter().for_each(|claim| self.rooms.unclaim(claim));
            let claim = waiting.remove(0);
            let held = claim.who.filter(|held| !self.plan.drains.contains(&held.assignment.instance));
            let slot = held.and_then(|_| self.rooms.fit_claim(&claim));
            if let (Some(held), Some(slot)) = (held, slot) {
                self.start_copy(cause, held, &claim.machine, slot);
            } else if held.is_some() || claim.who.is_none() {
                self.rooms.claim(&claim);
                left.push(claim);
            }
            waiting.iter().for_each(|claim| self.rooms.claim(claim));
        }
        self.claims.insert(cause.clone(), left);
    }

    fn start_copy(
        &mut self,
        cause: &MoveCause,
        held: &'a Reservation,
        machine: &anyplace_model::MachineId,
        slot: Slot,
    ) {
        let (Some(name), demand) = (held.deployment(), crate::moves::made(&held.assignment)) else { return };
        let Some(placement) = self.state.placements.get(name) else { return };
        let workload = Workload::Deployment(name.clone());
        self.start(workload, placement.generation, demand, machine, slot);
        self.rooms.count(machine, name, placement.generation);
        if let Some(start) = self.plan.starts.last_mut() {
            start.replaces = Some(Replaced {
                instance: held.assignment.instance.clone(),
                machine: held.machine.clone(),
                cause: cause.clone(),
            });
        }
    }

    /// Looks for room for the deployment that was looked after longest ago.
    fn make_room(&mut self) {
        let (state, now_ms) = (self.state, self.state.now_ms);
        let refused = self.plan.placements.iter().filter(|(_, verdict)| verdict.refused > 0);
        let new = Waiting { since_ms: now_ms, searched_ms: None };
        let mut waiting: BTreeMap<DeploymentName, Waiting> = refused
            .map(|(name, _)| (name.clone(), state.moves.waiting.get(name).copied().unwrap_or(new)))
            .collect();
        let is_over = |at_ms: u64, wait_ms: u64| now_ms >= at_ms.saturating_add(wait_ms);
        let is_due = |name: &DeploymentName, it: &Waiting| {
            is_over(it.since_ms, PATIENCE_MS)
                && it.searched_ms.is_none_or(|at_ms| is_over(at_ms, SEARCH_AGAIN_MS))
                && !self.moving.contains_key(&MoveCause::Room(name.clone()))
        };
        let last = state.moves.waiting.values().filter_map(|it| it.searched_ms).max();
        let under_way = self.moving.values().filter(|moving| moving.is_active()).count();
        // Who waits for attempts to end gets in first: a move could take what is free beside them.
        let quiet = self.kept.is_empty();
        if quiet && under_way < MAX_UNDER_WAY && last.is_none_or(|at_ms| is_over(at_ms, SEARCH_PAUSE_MS)) {
            let due = waiting.iter_mut().filter(|(name, it)| is_due(name, it));
            if let Some((name, it)) = due.min_by_key(|(_, it)| (it.searched_ms, it.since_ms)) {
                it.searched_ms = Some(now_ms);
                let name = name.clone();
                self.make_room_for(&name);
            }
        }
        self.plan.waiting = waiting;
    }

    fn make_room_for(&mut self, name: &DeploymentName) {
        let state = self.state;
        let Some(placement) = state.placements.get(name) else { return };
        // What changes in this plan isn't in the state that the moves are planned from.
        let mut busy = busy(state, &self.copies);
        let drained = self.plan.drains.iter().filter_map(|instance| state.reservations.get(instance));
        busy.extend(drained.filter_map(Reservation::deployment));
        let started: BTreeSet<&DeploymentName> = self
            .plan
            .starts
            .iter()
            .filter_map(|start| match &start.workload {
                Workload::Deployment(name) => state.placements.get_key_value(name).map(|(name, _)| name),
                Workload::Job(_) => None,
            })
            .collect();
        busy.extend(started);
        let found = find_room(&self.rooms, state, &self.observed, &busy, name, Limits::default());
        let Some(found) = found else { return };
        let cause = MoveCause::Room(name.clone());
        let moving = Moving {
            cause: cause.clone(),
            since_ms: state.now_ms,
            moves: found.moves,
            place: Some(Place {
                machine: found.machine,
                gpus: found.gpus,
                resources: placement.spec.resources.clone(),
            }),
            gave_up: None,
        };
        self.take_up(cause.clone(), moving);
        self.start_copies(&cause);
    }

    /// Begins moves for their own sake, where nothing else happens and the last ones are long ago.
    pub(super) fn tidy(&mut self) {
        let (state, now_ms) = (self.state, self.state.now_ms);
        self.plan.tidied_ms = Some(state.moves.tidied_ms.unwrap_or(now_ms));
        if self.moving.contains_key(&MoveCause::Tidying) {
            self.plan.tidied_ms = Some(now_ms);
            return;
        }
        let (Some(pause_ms), Some(last_ms)) = (state.moves.policy.tidy_pause_ms, state.moves.tidied_ms)
        else {
            return;
        };
        if now_ms < last_ms.saturating_add(pause_ms) {
            return;
        }
        let is_calm = self.plan.changes_nothing() && self.moving.is_empty() && self.plan.waiting.is_empty();
        if !is_calm || !self.kept.is_empty() {
            // What changes now settles first.
            self.plan.tidied_ms = Some(now_ms.saturating_sub(pause_ms).saturating_add(SEARCH_AGAIN_MS));
            return;
        }
        self.plan.tidied_ms = Some(now_ms);
        let mut busy = busy(state, &self.copies);
        let tidied = state.reservations.values().filter(|held| {
            let stays_ms = pause_ms.saturating_mul(STAYS_PAUSES);
            let cause = held.replaces.as_ref().map(|replaced| &replaced.cause);
            cause == Some(&MoveCause::Tidying) && now_ms < held.created_ms.saturating_add(stays_ms)
        });
        busy.extend(tidied.filter_map(Reservation::deployment));
        let moves = find_tidying(&self.rooms, state, &self.observed, &busy, TIDY_MOVES);
        if moves.is_empty() {
            return;
        }
        let cause = MoveCause::Tidying;
        let moving = Moving { cause: cause.clone(), since_ms: now_ms, moves, place: None, gave_up: None };
        self.plan.moves.insert(cause.clone(), Some(moving.clone()));
        self.take_up(cause.clone(), moving);
        self.start_copies(&cause);
    }

    /// Keeps the places of a record.
    pub(super) fn take_up(&mut self, cause: MoveCause, moving: Moving) {
        let claims = moving.claims(self.state, &self.copies);
        claims.iter().for_each(|claim| self.rooms.claim(claim));
        if moving.is_active() {
            self.claims.insert(cause.clone(), claims);
        }
        self.moving.insert(cause, moving);
    }

    /// Adds to what is refused what is done about it.
    fn explain_moves(&mut self) {
        for (name, verdict) in self.plan.placements.iter_mut().filter(|(_, verdict)| verdict.refused > 0) {
            let moving = self.moving.get(&MoveCause::Room(name.clone()));
            let searched = self.plan.waiting.get(name).is_some_and(|it| it.searched_ms.is_some());
            let (reason, count, message) = match moving {
                Some(moving) => {
                    let reason =
                        if moving.is_active() { ReasonCode::MakingRoom } else { ReasonCode::NoMoves };
                    (reason, moving.moves.len(), moving.sentence(self.state))
                }
                None if searched => {
                    let most = Limits::default().moves;
                    (ReasonCode::NoMoves, 1, format!("no {most} moves of other instances would make room"))
                }
                None => continue,
            };
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            verdict.refusals.push(Refusal { reason, count, message });
        }
    }
}
