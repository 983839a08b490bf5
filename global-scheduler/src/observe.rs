//! Reports of locations, and their leases.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_api::{Event, EventSeverity};
use anyplace_global_core::RefusedUntil;
use anyplace_model::{LocationId, LocationReport, ReasonCode};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};

use crate::{
    app::App,
    batch::Batch,
    choice, publish,
    records::LocationKnown,
    world::{LocationState, Observed, World},
};

/// How long a refusal is remembered: a location isn't asked again at once, and it is asked again soon.
pub(crate) const REFUSAL_KEPT: SignedDuration = SignedDuration::from_secs(10);
/// A location that couldn't make room isn't asked to for so long: a search costs it some 30 ms, and us a write.
const HOPELESS_KEPT: SignedDuration = SignedDuration::from_mins(1);
/// Events of reports that may wait for the next reconciliation; more say nothing new.
const MAX_PENDING_EVENTS: usize = 256;

impl App {
    /// Takes a report. Routes of other locations follow before this returns; all else follows by reconciliation.
    pub(crate) fn observe(&self, report: LocationReport) {
        let mut world = self.world();
        let position = (report.epoch, report.sequence);
        let id = report.location.clone();
        let location = world.locations.entry(id.clone()).or_default();
        // A lost location may come back with its clock set back: then its epoch counts, whatever it is.
        let older = |observed: &Observed| observed.position >= position;
        if location.is_alive() && location.observed.as_ref().is_some_and(older) {
            return;
        }
        let mut observed = Observed {
            position,
            at: Instant::now(),
            zone: TimeZone::get(&report.advert.timezone).ok(),
            advertise: report.advertise,
            log_token: report.log_token,
            advert: report.advert,
            ingress: report.ingress,
            placements: report.placements.into_iter().map(|it| (it.deployment.clone(), it)).collect(),
            attempts: report.attempts.into_iter().map(|it| (it.attempt.clone(), it)).collect(),
            moves: report.moves,
            prewarms: report.prewarms,
            traffic: report.traffic,
            latency_ms: Arc::new(report.latency_ms),
        };
        if let Some(before) = &mut location.observed {
            // After a start, a location says nothing of new connections until it has measured.
            let mut traffic = std::mem::take(&mut before.traffic);
            traffic.append(&mut observed.traffic);
            observed.traffic = traffic;
        }
        let was_alive = location.alive.replace(true) == Some(true);
        let before = location.observed.replace(observed);
        remember_refusals(&mut world, &id);
        choice::adopt_all(&mut world, &id);
        let location = &world.locations[&id];
        let (Some(now), before) = (&location.observed, before.filter(|_| was_alive)) else { return };
        if let Some(before) = &before
            && before.ingress == now.ingress
            && before.advert == now.advert
            && before.placements == now.placements
            && before.attempts == now.attempts
        {
            return;
        }
        // Whatever else has to be done, others must know at once where traffic can go.
        match before {
            Some(before) if before.ingress == now.ingress => {
                let changed = now
                    .placements
                    .iter()
                    .filter(|(name, status)| before.placements.get(*name) != Some(status))
                    .map(|(name, _)| name)
                    .chain(before.placements.keys().filter(|name| !now.placements.contains_key(*name)));
                publish::routes(&world, changed);
            }
            _ => publish::routes(&world, world.deployments.keys()),
        }
        drop(world);
        self.wake.notify_one();
    }

    /// Declares locations lost whose lease has expired, and writes who is lost, back or new.
    pub(crate) fn check_leases(&self) -> anyhow::Result<Batch> {
        let mut world = self.world();
        let (now, lease) = (Instant::now(), self.config.lease());
        let elapsed = world.checked.replace(now).map_or(Duration::ZERO, |checked| now - checked);
        // A pause far over the loop's interval is one of this process or machine, not of the locations.
        let paused = if elapsed > lease / 2 + self.interval() { elapsed } else { Duration::ZERO };
        for location in world.locations.values_mut() {
            if let Some(observed) = &mut location.observed {
                // While this process was stopped nobody could report: the lease stood still.
                observed.at = (observed.at + paused).min(now);
            }
            let last = location.observed.as_ref().map_or(self.started, |observed| observed.at);
            if location.alive != Some(false) && now.duration_since(last) > lease {
                location.alive = Some(false);
            }
        }
        let waits = |location: &LocationState| location.alive.is_none() && location.known.is_some();
        if !*self.settled.borrow() && !world.locations.values().any(waits) {
            self.settled.send_replace(true);
        }
        let mut batch = Batch::default();
        batch.events.append(&mut world.pending_events);
        for (id, location) in &world.locations {
            let subject = format!("location/{id}");
            match (location.known, location.alive) {
                (None, Some(true)) => {
                    batch.event(EventSeverity::Normal, subject, "joined");
                    let known = LocationKnown { joined_at: Timestamp::now(), alive: true };
                    batch.put_location(id.clone(), known)?;
                }
                (Some(known), Some(alive)) if known.alive != alive => {
                    if alive {
                        batch.event(EventSeverity::Normal, subject, "reports again");
                    } else {
                        let message = format!("lost: no report for {} ms", self.config.location_lease_ms);
                        batch.event(EventSeverity::Warning, subject, message);
                    }
                    batch.put_location(id.clone(), LocationKnown { alive, ..known })?;
                }
                _ => {}
            }
        }
        Ok(batch)
    }
}

/// Remembers what the location refuses now, and forgets what is over.
fn remember_refusals(world: &mut World, id: &LocationId) {
    let now = Timestamp::now();
    let Some(until) = now.checked_add(REFUSAL_KEPT).ok() else { return };
    let World { locations, deployments, pending_events, .. } = world;
    let Some(location) = locations.get_mut(id) else { return };
    location.refused.retain(|_, refused| refused.until > now);
    location.refused_jobs.retain(|_, refused| refused.until > now);
    location.hopeless.retain(|_, until| *until > now);
    let Some(observed) = &location.observed else { return };
    for (name, status) in observed.placements.iter().filter(|(_, status)| status.refused > 0) {
        let current = |stored: &crate::world::Stored<crate::records::DeploymentRecord>| {
            stored.value.generation == status.generation
        };
        if !deployments.get(name).is_some_and(current) {
            continue;
        }
        let no_moves = status.refusals.iter().any(|it| it.reason == ReasonCode::NoMoves);
        if let Some(until) = now.checked_add(HOPELESS_KEPT).ok().filter(|_| no_moves) {
            location.hopeless.insert(name.clone(), until);
        }
        let refused = RefusedUntil { until, refusals: status.refusals.clone() };
        let new = location.refused.insert(name.clone(), refused).is_none();
        if new && pending_events.len() < MAX_PENDING_EVENTS {
            let reasons: Vec<String> =
                status.refusals.iter().map(|it| format!("{} ({})", it.message, it.reason)).collect();
            pending_events.push(Event {
                at: now,
                subject: format!("deployment/{name}"),
                severity: EventSeverity::Warning,
                message: format!("{id} can't run {} of it: {}", status.refused, reasons.join("; ")),
            });
        }
    }
}
