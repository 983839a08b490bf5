//! The API: machines and routers come with the machine token; the global scheduler, to read logs and routes, also with
//! the log token of this run.

use std::{net::IpAddr, str::FromStr, sync::Arc, time::Instant};

use anyplace_api::{Client, ErrorCode, LogQuery, Problem, WatchQuery};
use anyplace_location_core::{FreeRoom, Life, instance_statuses};
use anyplace_model::{
    InstanceId, InstanceStatus, InvalidId, MachineId, MachineRecord, MachineReport, Probes, Route,
    RouteRecord, TrafficReport,
};
use anyplace_service::{Failure, Json, Query, TokenHash, bearer, healthz, not_found, text_stream};
use axum::{
    Router,
    extract::{DefaultBodyLimit, Path, Request, State as Shared},
    http::{HeaderMap, StatusCode},
    middleware::{Next, from_fn_with_state},
    response::Response,
    routing::{get, put},
};

use crate::{
    live::{Heard, Live},
    scheduler::{MAX_MACHINES, Scheduler},
};

/// Of the traffic of 100,000 virtual IPs about half of it.
const MAX_REPORT_BYTES: usize = 8 << 20;

type App = Shared<Arc<Scheduler>>;

/// All paths.
pub(crate) fn router(scheduler: Arc<Scheduler>) -> Router {
    let machines = Router::new()
        .route("/v1/machines", get(machines))
        .route("/v1/machines/{machine}/report", put(report))
        .route("/v1/machines/{machine}/traffic", put(traffic))
        .layer(DefaultBodyLimit::max(MAX_REPORT_BYTES))
        .route("/v1/instances", get(instances))
        .route("/v1/watch/machines/{machine}/desired", get(watch_machine))
        .route("/v1/watch/routes", get(watch_routes))
        .route_layer(from_fn_with_state(scheduler.clone(), for_machines));
    let readers = Router::new()
        .route("/v1/instances/{instance}/logs", get(logs))
        .route("/v1/routes/{vip}", get(route))
        .route_layer(from_fn_with_state(scheduler.clone(), for_readers));
    machines.merge(readers).route("/healthz", get(healthz)).fallback(not_found).with_state(scheduler)
}

async fn for_machines(scheduler: App, request: Request, next: Next) -> Result<Response, Failure> {
    let token = presented(request.headers())?;
    if token == scheduler.log_token_hash {
        let detail = "this token reads logs and routes and does nothing else";
        return Err(Problem::new(ErrorCode::Forbidden, detail).fix(MACHINE_TOKEN).into());
    }
    if token != scheduler.machine_token_hash {
        return Err(unknown());
    }
    Ok(next.run(request).await)
}

async fn for_readers(scheduler: App, request: Request, next: Next) -> Result<Response, Failure> {
    let token = presented(request.headers())?;
    if token != scheduler.log_token_hash && token != scheduler.machine_token_hash {
        return Err(unknown());
    }
    Ok(next.run(request).await)
}

const MACHINE_TOKEN: &str =
    "copy machine.token from the location scheduler's data_dir, and name the copy in token_file";

fn presented(headers: &HeaderMap) -> Result<TokenHash, Failure> {
    let missing = || Problem::new(ErrorCode::Unauthenticated, "no bearer token").fix(MACHINE_TOKEN);
    bearer(headers).map(TokenHash::of).ok_or_else(|| missing().into())
}

fn unknown() -> Failure {
    Problem::new(ErrorCode::Unauthenticated, "the token isn't this location's").fix(MACHINE_TOKEN).into()
}

fn parse<T: FromStr<Err = InvalidId>>(text: &str, field: &str) -> Result<T, Failure> {
    text.parse().map_err(|error: InvalidId| {
        Problem::new(ErrorCode::InvalidRequest, error.to_string()).field(field).into()
    })
}

async fn report(
    scheduler: App,
    Path(machine): Path<String>,
    Json(report): Json<MachineReport>,
) -> Result<StatusCode, Failure> {
    let machine: MachineId = parse(&machine, "machine")?;
    if report.machine != machine {
        let detail = format!("the report of {} was sent as {machine}'s", report.machine);
        return Err(Problem::new(ErrorCode::InvalidRequest, detail).field("machine").into());
    }
    let mut live = scheduler.live();
    let machines = &live.state.machines;
    if !machines.contains_key(&machine) && machines.len() >= MAX_MACHINES {
        return Err(full());
    }
    let overlaps = |other: &MachineReport| {
        let (a, b) = (other.instance_cidr, report.instance_cidr);
        a.contains(&b.network()) || b.contains(&a.network()) || other.address == report.address
    };
    let neighbour = machines
        .iter()
        .find(|(name, other)| **name != machine && other.life != Life::Lost && overlaps(&other.report));
    if let Some((name, other)) = neighbour {
        let detail = format!(
            "address {} or instance_cidr {} is also machine {name}'s ({}, {})",
            report.address, report.instance_cidr, other.report.address, other.report.instance_cidr
        );
        let fix = "give each machine an address and an instance_cidr of its own in machine-agent.toml";
        return Err(Problem::new(ErrorCode::Conflict, detail).field("instance_cidr").fix(fix).into());
    }
    if live.hear(report, Instant::now()) == Heard::Changed {
        drop(live);
        // At once, before any disk: a container that stopped answering gets no further connection.
        scheduler.rerouted.notify_one();
        scheduler.reconcile.notify_one();
        scheduler.report.notify_one();
    }
    Ok(StatusCode::NO_CONTENT)
}

/// What a machine's router measured, and what it should measure. It takes effect with the next decision.
async fn traffic(
    scheduler: App,
    Path(machine): Path<String>,
    Json(report): Json<TrafficReport>,
) -> Result<Json<Probes>, Failure> {
    let machine: MachineId = parse(&machine, "machine")?;
    let mut live = scheduler.live();
    // Others count for nothing, and there is no bound to how many those are.
    if !live.state.machines.contains_key(&machine) {
        return Ok(Json(Probes::default()));
    }
    let Live { state, choice, latency, .. } = &mut *live;
    let probes = latency.measured(&state.machines, &machine, report.latency_ms, Instant::now());
    choice.measured(machine, report.connections);
    Ok(Json(probes))
}

/// Refuses another machine.
fn full() -> Failure {
    let detail = format!("the location has {MAX_MACHINES} machines already");
    let fix = "stop agents that aren't needed: a machine without instances is forgotten an hour after its last report";
    Problem::new(ErrorCode::LimitExceeded, detail).field("machine").fix(fix).into()
}

async fn watch_machine(
    scheduler: App,
    Path(machine): Path<String>,
    Query(query): Query<WatchQuery>,
) -> Result<Response, Failure> {
    let machine: MachineId = parse(&machine, "machine")?;
    let feed = scheduler.machine_feed(&machine).ok_or_else(full)?;
    Ok(feed.response(query, scheduler.shutdown.clone()))
}

/// Until machines have reported, there are no routes: empty ones would take the traffic from instances that serve it
/// well.
fn warm(scheduler: &Scheduler) -> Result<(), Failure> {
    if scheduler.live().is_warm() {
        return Ok(());
    }
    let detail = "just started; machines are still reporting";
    Err(Problem::new(ErrorCode::Unavailable, detail).fix("ask again in a second").into())
}

async fn watch_routes(scheduler: App, Query(query): Query<WatchQuery>) -> Result<Response, Failure> {
    warm(&scheduler)?;
    Ok(scheduler.routes.response(query, scheduler.shutdown.clone()))
}

/// One virtual IP's route, as it is published to the routers.
async fn route(scheduler: App, Path(vip): Path<String>) -> Result<Json<Route>, Failure> {
    let vip: IpAddr = vip.parse().map_err(|_| {
        Problem::new(ErrorCode::InvalidRequest, format!("`{vip}` is no IP address")).field("vip")
    })?;
    warm(&scheduler)?;
    match scheduler.routes.get(&format!("vips/{vip}")) {
        Some(RouteRecord::Vip(route)) => Ok(Json(route)),
        _ => Err(Problem::new(ErrorCode::NotFound, format!("no route to {vip} is known here"))
            .field("vip")
            .fix("`anyplace get deployments` lists virtual IPs")
            .into()),
    }
}

async fn machines(scheduler: App) -> Json<Vec<MachineRecord>> {
    let live = scheduler.live();
    let free = FreeRoom::all(&live.state).into_values();
    let records = live.state.machines.values().zip(free).map(|(machine, free)| MachineRecord {
        location: scheduler.config.location.clone(),
        report: machine.report.clone(),
        alive: machine.life == Life::Alive,
        free_cpu: free.cpu,
        free_memory: free.memory,
        free_gpu_memory: free.gpu_memory,
    });
    Json(records.collect())
}

async fn instances(scheduler: App) -> Json<Vec<InstanceStatus>> {
    Json(instance_statuses(&scheduler.live().state))
}

async fn logs(
    scheduler: App,
    Path(instance): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Failure> {
    let instance: InstanceId = parse(&instance, "instance")?;
    let agent = agent_of(&scheduler, &instance)?;
    let response = agent.instance_logs(&instance, &query).await?;
    Ok(text_stream(response.bytes_stream()))
}

/// The agent that runs or ran the instance.
fn agent_of(scheduler: &Scheduler, instance: &InstanceId) -> Result<Client, Failure> {
    let live = scheduler.live();
    let held = live.state.reservations.get(instance).map(|held| held.machine.clone());
    let machine = held.or_else(|| scheduler.history().machine(instance).cloned());
    let machine = machine.ok_or_else(|| {
        Problem::new(ErrorCode::NotFound, format!("no instance {instance} runs or ran here"))
            .field("instance")
            .fix("`anyplace describe` lists a deployment's instances")
    })?;
    let advertise = live.state.machines.get(&machine).map(|known| known.report.advertise.clone());
    let advertise = advertise.ok_or_else(|| {
        Problem::new(ErrorCode::Unavailable, format!("{instance} ran on machine {machine}, which is gone"))
    })?;
    Ok(scheduler.global.with_base(&advertise, Some(scheduler.machine_token.clone()))?)
}
