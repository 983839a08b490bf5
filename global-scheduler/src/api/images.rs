//! `/v1/images/in-use`: for registries, so that their rules let nothing go that is still needed.

use std::{collections::BTreeSet, sync::Arc};

use anyplace_api::Problem;
use anyplace_service::Json;
use axum::extract::State;

use crate::app::App;

/// The images of all deployments and of their instances that an update hasn't reached yet, of jobs that have not ended, and of wishes for warm images.
#[utoipa::path(get, path = "/v1/images/in-use", tag = "images",
    responses((status = 200, body = Vec<String>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn in_use(State(app): State<Arc<App>>) -> Json<Vec<String>> {
    let world = app.world();
    let deployments = world.deployments.iter().flat_map(|(name, stored)| {
        let record = &stored.value;
        let running = record.earlier.range(world.oldest(name, record.generation)..);
        running.map(|(_, image)| image).chain([&record.spec.image])
    });
    let jobs = world.jobs.unfinished();
    let images: BTreeSet<&String> =
        deployments.chain(jobs.map(|job| &job.spec.image)).chain(world.prewarms.keys()).collect();
    Json(images.into_iter().cloned().collect())
}
