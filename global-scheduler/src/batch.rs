//! One conditional write to the store together with the same change in memory.

use anyplace_api::{Event, EventSeverity};
use anyplace_model::{
    AttemptId, DeploymentName, JobName, LocationId, LocationSettings, Prewarm, Team, TeamSettings,
};
use anyplace_store::{MAX_TXN_BYTES, MAX_TXN_OPS, Revision, Txn};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    records::{
        AttemptRecord, DeploymentRecord, JobRecord, LocationKnown, PlacementRecord, TokenRecord, Tombstone,
        attempt_key, deployment_key, event_key, job_key, placement_key, vip_key,
    },
    world::{Stored, World},
};

/// Events that are kept; older ones are pruned.
pub(crate) const MAX_EVENTS: usize = 1_000;

const FULL_OPS: usize = MAX_TXN_OPS / 4;
const FULL_BYTES: usize = MAX_TXN_BYTES / 4;

type Change = Box<dyn FnOnce(&mut World, Revision) + Send>;

/// Changes that happen together.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) txn: Txn,
    changes: Vec<Change>,
    pub(crate) events: Vec<Event>,
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.txn.ops.is_empty() && self.events.is_empty()
    }

    /// Whether it should be written before more is added: far from the limits of a transaction.
    pub(crate) fn is_full(&self) -> bool {
        self.txn.ops.len() >= FULL_OPS || self.txn.size_bytes() >= FULL_BYTES
    }

    fn put<T: Serialize>(&mut self, key: String, value: &T) -> anyhow::Result<()> {
        self.txn = std::mem::take(&mut self.txn).put_json(key, value)?;
        Ok(())
    }

    fn delete(&mut self, key: String) {
        self.txn = std::mem::take(&mut self.txn).delete(key);
    }

    fn delete_prefix(&mut self, prefix: String) {
        self.txn = std::mem::take(&mut self.txn).delete_prefix(prefix);
    }

    fn when(&mut self, key: String, revision: Revision) {
        self.txn = std::mem::take(&mut self.txn).when_revision(key, revision);
    }

    fn then(&mut self, change: impl FnOnce(&mut World, Revision) + Send + 'static) {
        self.changes.push(Box::new(change));
    }

    pub(crate) fn event(&mut self, severity: EventSeverity, subject: String, message: impl Into<String>) {
        self.events.push(Event { at: Timestamp::now(), subject, severity, message: message.into() });
    }

    /// On condition that the deployment hasn't changed since the world was read.
    pub(crate) fn when_deployment(&mut self, world: &World, name: &DeploymentName) {
        let revision = world.deployments.get(name).map_or(0, |stored| stored.revision);
        self.when(deployment_key(name), revision);
    }

    pub(crate) fn put_deployment(&mut self, world: &World, record: DeploymentRecord) -> anyhow::Result<()> {
        let name = record.spec.name.clone();
        self.when_deployment(world, &name);
        self.put(deployment_key(&name), &record)?;
        for vip in record.vips().filter(|vip| !world.vips.contains_key(vip)) {
            self.when(vip_key(vip), 0);
            self.put(vip_key(vip), &name)?;
        }
        self.then(move |world, revision| {
            world.vips.extend(record.vips().map(|vip| (vip, name.clone())));
            world.deployments.insert(name, Stored { value: record, revision });
        });
        Ok(())
    }

    pub(crate) fn delete_deployment(&mut self, world: &World, record: &DeploymentRecord) {
        let name = &record.spec.name;
        self.when_deployment(world, name);
        self.delete(deployment_key(name));
        self.delete_prefix(format!("placements/{name}/"));
        record.vips().for_each(|vip| self.delete(vip_key(vip)));
        let (name, vips) = (name.clone(), record.vips());
        self.then(move |world, _| {
            world.deployments.remove(&name);
            world.placements.remove(&name);
            vips.for_each(|vip| drop(world.vips.remove(&vip)));
            world.missing.remove(&name);
            world.locations.values_mut().for_each(|location| {
                location.refused.remove(&name);
            });
        });
    }

    pub(crate) fn put_placement(
        &mut self,
        name: &DeploymentName,
        location: &LocationId,
        record: Option<PlacementRecord>,
    ) -> anyhow::Result<()> {
        let key = placement_key(name, location);
        match record {
            Some(record) => self.put(key, &record)?,
            None => self.delete(key),
        }
        let (name, location) = (name.clone(), location.clone());
        self.then(move |world, _| {
            let placements = world.placements.entry(name).or_default();
            match record {
                Some(record) => placements.insert(location, record),
                None => placements.remove(&location),
            };
        });
        Ok(())
    }

    pub(crate) fn put_job(&mut self, world: &World, record: JobRecord) -> anyhow::Result<()> {
        let name = record.spec.name.clone();
        let revision = world.jobs.get(&name).map_or(0, |stored| stored.revision);
        self.when(job_key(&name), revision);
        self.put(job_key(&name), &record)?;
        self.then(move |world, revision| {
            world.jobs.insert(Stored { value: record, revision });
        });
        Ok(())
    }

    pub(crate) fn delete_job(&mut self, world: &World, name: &JobName) {
        self.when(job_key(name), world.jobs.get(name).map_or(0, |stored| stored.revision));
        self.delete(job_key(name));
        self.delete_prefix(format!("attempts/{name}/"));
        let name = name.clone();
        self.then(move |world, _| {
            world.jobs.remove(&name);
            world.waiting.remove(&name);
            let attempt = |attempt| AttemptId { job: name.clone(), attempt };
            let of_job = world.attempts.range(attempt(0)..=attempt(u32::MAX));
            let of_job: Vec<AttemptId> = of_job.map(|(attempt, _)| attempt.clone()).collect();
            of_job.iter().for_each(|attempt| drop(world.attempts.remove(attempt)));
            world.locations.values_mut().for_each(|location| {
                location.refused_jobs.remove(&name);
            });
        });
    }

    pub(crate) fn put_attempt(
        &mut self,
        world: &World,
        attempt: AttemptId,
        record: AttemptRecord,
    ) -> anyhow::Result<()> {
        self.when(attempt_key(&attempt), world.attempts.get(&attempt).map_or(0, |stored| stored.revision));
        self.put(attempt_key(&attempt), &record)?;
        self.then(move |world, revision| {
            world.attempts.insert(attempt, Stored { value: record, revision });
        });
        Ok(())
    }

    pub(crate) fn delete_attempt(&mut self, world: &World, attempt: AttemptId) {
        self.when(attempt_key(&attempt), world.attempts.get(&attempt).map_or(0, |stored| stored.revision));
        self.delete(attempt_key(&attempt));
        self.then(move |world, _| {
            world.attempts.remove(&attempt);
        });
    }

    pub(crate) fn put_prewarm(&mut self, image: String, wish: Option<Prewarm>) -> anyhow::Result<()> {
        let key = format!("prewarms/{image}");
        match &wish {
            Some(wish) => self.put(key, wish)?,
            None => self.delete(key),
        }
        self.then(move |world, _| {
            match wish {
                Some(wish) => world.prewarms.insert(image, wish),
                None => world.prewarms.remove(&image),
            };
        });
        Ok(())
    }

    pub(crate) fn put_team(&mut self, team: Team, settings: TeamSettings) -> anyhow::Result<()> {
        let (key, unset) = (format!("teams/{team}"), settings == TeamSettings::default());
        if unset {
            self.delete(key);
        } else {
            self.put(key, &settings)?;
        }
        self.then(move |world, _| {
            if unset {
                world.teams.remove(&team);
            } else {
                world.teams.insert(team, settings);
            }
        });
        Ok(())
    }

    pub(crate) fn put_settings(&mut self, id: LocationId, settings: LocationSettings) -> anyhow::Result<()> {
        self.put(format!("settings/{id}"), &settings)?;
        self.then(move |world, _| world.locations.entry(id).or_default().settings = settings);
        Ok(())
    }

    pub(crate) fn put_location(&mut self, id: LocationId, known: LocationKnown) -> anyhow::Result<()> {
        self.put(format!("locations/{id}"), &known)?;
        self.then(move |world, _| world.locations.entry(id).or_default().known = Some(known));
        Ok(())
    }

    pub(crate) fn put_token(&mut self, hash: String, record: TokenRecord) -> anyhow::Result<()> {
        self.put(format!("tokens/{hash}"), &record)?;
        self.then(move |world, _| {
            world.tokens.insert(hash, record);
        });
        Ok(())
    }

    pub(crate) fn delete_token(&mut self, hash: String) {
        self.delete(format!("tokens/{hash}"));
        self.then(move |world, _| {
            world.tokens.remove(&hash);
        });
    }

    /// `key` is below `tombstones/`.
    pub(crate) fn put_tombstone(&mut self, key: String, tombstone: Option<Tombstone>) -> anyhow::Result<()> {
        match tombstone {
            Some(tombstone) => self.put(format!("tombstones/{key}"), &tombstone)?,
            None => self.delete(format!("tombstones/{key}")),
        }
        self.then(move |world, _| {
            match tombstone {
                Some(tombstone) => world.tombstones.insert(key, tombstone),
                None => world.tombstones.remove(&key),
            };
        });
        Ok(())
    }

    /// Numbers the events and prunes as many old ones.
    pub(crate) fn seal(mut self, world: &World) -> anyhow::Result<(Txn, Vec<Change>)> {
        let mut kept = world.events.len();
        let mut oldest = world.events.iter().map(|(number, _)| *number);
        for (number, event) in (world.next_event()..).zip(std::mem::take(&mut self.events)) {
            self.put(event_key(number), &event)?;
            let pruned = if kept < MAX_EVENTS { None } else { oldest.next() };
            if let Some(number) = pruned {
                self.delete(event_key(number));
            } else {
                kept += 1;
            }
            self.then(move |world, _| {
                if pruned.is_some() {
                    world.events.pop_front();
                }
                world.events.push_back((number, event));
            });
        }
        Ok((self.txn, self.changes))
    }
}
