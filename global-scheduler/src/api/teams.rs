//! `/v1/teams`: weights and quotas of teams, and what their jobs hold.

use std::sync::Arc;

use anyplace_api::{ErrorCode, EventSeverity, Problem, TeamView};
use anyplace_model::{Team, TeamSettings};
use anyplace_service::{Failure, Json};
use axum::extract::State;

use super::extract::Name;
use crate::{app::App, batch::Batch, deployments::invalid, views};

/// Teams for which something is set: each is looked at in each plan of the queue.
const MAX_TEAMS: usize = 1_000;

/// All teams for which something is set, or whose jobs wait or run.
#[utoipa::path(get, path = "/v1/teams", tag = "teams",
    responses((status = 200, body = Vec<TeamView>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Vec<TeamView>> {
    Json(views::teams(&app.world()))
}

/// One team. One of which nothing is known has what every team has.
#[utoipa::path(get, path = "/v1/teams/{name}", tag = "teams",
    params(("name" = String, Path, description = "The team")),
    responses((status = 200, body = TeamView), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn get(State(app): State<Arc<App>>, Name(name): Name<Team>) -> Json<TeamView> {
    Json(views::team(&app.world(), &name))
}

/// Replace what is set for a team. Attempts that hold more than a new quota go on.
#[utoipa::path(put, path = "/v1/teams/{name}", tag = "teams",
    params(("name" = String, Path, description = "The team")), request_body = TeamSettings,
    responses((status = 200, body = TeamView), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn set(
    State(app): State<Arc<App>>,
    Name(name): Name<Team>,
    Json(settings): Json<TeamSettings>,
) -> Result<Json<TeamView>, Failure> {
    settings.validate().map_err(invalid)?;
    let writer = app.writer().await;
    let batch = {
        let world = app.world();
        if world.teams.len() >= MAX_TEAMS && !world.teams.contains_key(&name) {
            let text = format!("something is set for {MAX_TEAMS} teams already");
            return Err(Problem::new(ErrorCode::LimitExceeded, text)
                .fix("reset one with `anyplace team reset NAME`; `anyplace team ls` lists them")
                .into());
        }
        let mut batch = Batch::default();
        let before = world.teams.get(&name).cloned().unwrap_or_default();
        if before != settings {
            batch.event(EventSeverity::Normal, format!("team/{name}"), format!("set: {}", words(&settings)));
            batch.put_team(name.clone(), settings)?;
        }
        batch
    };
    writer.commit(batch).await?;
    app.wake.notify_one();
    Ok(Json(views::team(&app.world(), &name)))
}

fn words(settings: &TeamSettings) -> String {
    let TeamSettings { weight, max_cpu, max_memory, max_gpus, max_queued } = settings;
    let bound = |name: &str, value: Option<String>| value.map(|value| format!(", {name} {value}"));
    [
        Some(format!("weight {weight}")),
        bound("max_cpu", max_cpu.map(|it| it.to_string())),
        bound("max_memory", max_memory.map(|it| it.to_string())),
        bound("max_gpus", max_gpus.map(|it| it.to_string())),
        bound("max_queued", max_queued.map(|it| it.to_string())),
    ]
    .into_iter()
    .flatten()
    .collect()
}
