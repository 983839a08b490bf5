//! Routes of a deployment's virtual IPs, fetched from the location schedulers: what their routers follow.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use anyplace_api::{ErrorCode, LocationRoutes, Problem, RoutesView};
use anyplace_model::{DeploymentName, LocationId, Route, Traffic};
use anyplace_service::{Failure, Json};
use axum::extract::State;
use futures_util::{StreamExt as _, stream};

use super::extract::Name;
use crate::{app::App, deployments::unknown_deployment, world::LocationState};

/// Locations that are asked at once; each is a connection.
const CONCURRENCY: usize = 256;
/// A location that takes longer is left out. Several rounds of it fit into a client's patience of 10 s.
const PATIENCE: Duration = Duration::from_secs(2);

/// A location, and where to ask it.
struct Source {
    location: LocationId,
    withdrawn: bool,
    traffic: Option<Traffic>,
    latency_ms: Arc<BTreeMap<LocationId, f64>>,
    address: Result<(String, String), String>,
}

/// The routes of a deployment's virtual IPs in all locations: who serves them, as each location's routers see it.
#[utoipa::path(get, path = "/v1/deployments/{name}/routes", tag = "deployments",
    params(("name" = String, Path, description = "The deployment")),
    responses((status = 200, body = RoutesView), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn of_deployment(
    State(app): State<Arc<App>>,
    Name(name): Name<DeploymentName>,
) -> Result<Json<RoutesView>, Failure> {
    let (vips, sources) = {
        let world = app.world();
        let record = &world.deployments.get(&name).ok_or_else(|| unknown_deployment(&name))?.value;
        let vips: Vec<IpAddr> = record.vips().collect();
        let joined = world.locations.iter().filter(|(_, location)| location.known.is_some());
        (vips, joined.map(|(id, location)| source(id, location, &name)).collect::<Vec<_>>())
    };
    let asked = stream::iter(sources).map(|source| ask(&app, source, &vips)).buffered(CONCURRENCY);
    let locations = asked.collect().await;
    Ok(Json(RoutesView { deployment: name, vips, locations }))
}

fn source(id: &LocationId, location: &LocationState, name: &DeploymentName) -> Source {
    let address = match &location.observed {
        None => Err("it has not reported since the global scheduler started".into()),
        Some(_) if !location.is_alive() => Err("its location scheduler has stopped reporting".into()),
        Some(observed) => Ok((observed.advertise.clone(), observed.log_token.clone())),
    };
    let traffic = location.observed.as_ref().and_then(|observed| observed.traffic.get(name)).cloned();
    let latency_ms =
        location.observed.as_ref().map(|observed| observed.latency_ms.clone()).unwrap_or_default();
    Source { location: id.clone(), withdrawn: location.settings.withdrawn, traffic, latency_ms, address }
}

async fn ask(app: &App, source: Source, vips: &[IpAddr]) -> LocationRoutes {
    let Source { location, withdrawn, traffic, latency_ms, address } = source;
    let answer = match address {
        Ok((address, token)) => match tokio::time::timeout(PATIENCE, fetch(app, &address, token, vips)).await
        {
            Ok(answer) => answer,
            Err(_) => Err(format!("{address} does not answer in time")),
        },
        Err(problem) => Err(problem),
    };
    let (routes, problem) = match answer {
        Ok(routes) => (routes, None),
        Err(problem) => (Vec::new(), Some(problem)),
    };
    let others = routes.iter().flat_map(|route: &Route| &route.remote).map(|it| &it.location);
    let latency_ms = others.filter_map(|it| Some((it.clone(), *latency_ms.get(it)?))).collect();
    LocationRoutes { location, withdrawn, routes, traffic, latency_ms, problem }
}

async fn fetch(app: &App, address: &str, token: String, vips: &[IpAddr]) -> Result<Vec<Route>, String> {
    let client = app.http.with_base(address, Some(token)).map_err(|error| error.to_string())?;
    let mut routes = Vec::with_capacity(vips.len());
    for vip in vips {
        match client.route(*vip).await {
            Ok(route) => routes.push(route),
            // It was told of the deployment a moment ago, or not yet.
            Err(error) if error.code() == Some(ErrorCode::NotFound) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(routes)
}
