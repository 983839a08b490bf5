//! Deployments: apply, delete, and carrying out the plan.

use std::collections::BTreeMap;

use anyplace_api::{ApplyOutcome, ErrorCode, EventSeverity, Problem};
use anyplace_model::{DeploymentName, DeploymentSpec, InvalidSpec};
use anyplace_service::Failure;
use jiff::Timestamp;

use crate::{
    app::{App, Writer},
    batch::Batch,
    records::{DeploymentRecord, PlacementRecord, Tombstone},
    views, vips,
};

pub(crate) fn invalid(problem: InvalidSpec) -> Problem {
    Problem::new(ErrorCode::InvalidRequest, problem.message).field(problem.field).fix(problem.fix)
}

pub(crate) fn unknown_deployment(name: &DeploymentName) -> Failure {
    Problem::new(ErrorCode::NotFound, format!("there is no deployment {name}"))
        .fix("see `anyplace get deployments`")
        .into()
}

impl App {
    /// Creates or changes a deployment, and plans it.
    pub(crate) async fn apply(&self, spec: DeploymentSpec) -> Result<ApplyOutcome, Failure> {
        spec.validate().map_err(invalid)?;
        let name = spec.name.clone();
        let writer = self.writer().await;
        let (batch, created) = {
            let world = self.world();
            let stored = world.deployments.get(&name).map(|stored| &stored.value);
            let mut batch = Batch::default();
            let created = stored.is_none();
            if stored.is_none_or(|stored| stored.spec != spec) {
                let record = match stored {
                    Some(stored) => stored.changed(spec, world.oldest(&name, stored.generation)),
                    None => DeploymentRecord {
                        generation: 1 + world.tombstones.get(&tombstone(&name)).map_or(0, |stone| stone.last),
                        vip: vips::allocate(&self.config.vip_pools, &world.vips)?,
                        vip6: vips::allocate6(&self.config.vip_pools, &world.vips)?,
                        created_at: Timestamp::now(),
                        earlier: BTreeMap::new(),
                        spec,
                    },
                };
                let message = if created {
                    format!("created with virtual IP {}", vips::text(record.vips()))
                } else {
                    format!("changed to generation {}", record.generation)
                };
                batch.event(EventSeverity::Normal, format!("deployment/{name}"), message);
                batch.put_deployment(&world, record)?;
            }
            (batch, created)
        };
        let changed = !batch.is_empty();
        writer.commit(batch).await?;
        if changed && let Err(Failure(problem)) = self.reconcile(&writer).await {
            // It is written; the loop plans it as soon as it can.
            tracing::error!(%problem, "the plan after an apply failed; it is tried again");
        }
        let deployment = views::deployment(&self.world(), &name).ok_or_else(|| unknown_deployment(&name))?;
        Ok(ApplyOutcome { created, changed, deployment })
    }

    /// Ends a deployment.
    pub(crate) async fn delete_deployment(&self, name: &DeploymentName) -> Result<(), Failure> {
        let writer = self.writer().await;
        let batch = {
            let world = self.world();
            let record = &world.deployments.get(name).ok_or_else(|| unknown_deployment(name))?.value;
            let mut batch = Batch::default();
            let stone = Tombstone { last: record.generation, deleted_at: Timestamp::now() };
            batch.delete_deployment(&world, record);
            batch.put_tombstone(tombstone(name), Some(stone))?;
            let message = format!("deleted; virtual IP {} is free again", vips::text(record.vips()));
            batch.event(EventSeverity::Normal, format!("deployment/{name}"), message);
            batch
        };
        writer.commit(batch).await?;
        self.publish();
        self.wake.notify_one();
        Ok(())
    }

    /// Plans all deployments and writes what changes: one transaction for each deployment.
    pub(crate) async fn place_deployments(&self, writer: &Writer<'_>) -> Result<(), Failure> {
        let state = self.world().state();
        let plan = anyplace_global_core::plan(&state, Timestamp::now());
        for (name, counts) in &plan.counts {
            let batch = {
                let world = self.world();
                let Some(generation) = world.deployments.get(name).map(|stored| stored.value.generation)
                else {
                    continue;
                };
                let mut batch = Batch::default();
                let placed = world.placements.get(name);
                let mut moves = Vec::new();
                let before = |id| placed.and_then(|placed| placed.get(id)).map_or(0, |record| record.count);
                for (id, count) in counts {
                    let record = PlacementRecord { count: *count, generation };
                    if placed.and_then(|placed| placed.get(id)) != Some(&record) {
                        batch.put_placement(name, id, Some(record))?;
                    }
                    if before(id) != *count {
                        moves.push(format!("{count} in {id} (was {})", before(id)));
                    }
                }
                for id in
                    placed.iter().flat_map(|placed| placed.keys()).filter(|id| !counts.contains_key(*id))
                {
                    batch.put_placement(name, id, None)?;
                    moves.push(format!("0 in {id} (was {})", before(id)));
                }
                if !moves.is_empty() {
                    let message = format!("placed: {}", moves.join(", "));
                    batch.event(EventSeverity::Normal, format!("deployment/{name}"), message);
                }
                let known = world.missing.get(name).is_some_and(|missing| !missing.refusals.is_empty());
                if let Some(missing) = plan.missing.get(name).filter(|_| !known) {
                    let nearest = missing.nearest_fit.as_ref().map_or(String::new(), |it| format!(": {it}"));
                    let message = format!("{} instances fit nowhere{nearest}", missing.count);
                    batch.event(EventSeverity::Warning, format!("deployment/{name}"), message);
                }
                if !batch.is_empty() {
                    batch.when_deployment(&world, name);
                }
                batch
            };
            writer.commit(batch).await?;
        }
        self.world().missing = plan.missing;
        Ok(())
    }
}

fn tombstone(name: &DeploymentName) -> String {
    format!("deployments/{name}")
}
