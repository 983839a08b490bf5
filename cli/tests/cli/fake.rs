//! A fake of the global scheduler's API for the command line's tests: real types and watch streams, no platform. A
//! deployment is ready after a moment, unless it asks for a GPU, and has two virtual IPs if it is named `dual`; a job ends
//! after a moment, and fails if it is named so.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyplace_api::{
    ApplyOutcome, ArrayCounts, CapacityView, DeploymentPhase, DeploymentView, ErrorCode, Event,
    EventSeverity, JobView, LatencyQuery, LatencyView, LocationRoutes, LocationShare, LogQuery, NewToken,
    Problem, RoutesView, TeamView, TokenRequest, WatchQuery,
};
use anyplace_model::{
    Advert, AttemptId, Away, Bytes, DeploymentSpec, Endpoint, Explanation, FULL_WEIGHT, GpuBlock, Held,
    InstancePhase, InstanceStatus, Isolation, JobPhase, JobSpec, LocationExplanation, LocationRecord,
    LocationSettings, MilliCpu, ReasonCode, Refusal, RemoteLocation, Route, Span, TeamSettings, Traffic,
    Workload,
};
use anyplace_service::{Failure, Feed, Json, Query};
use axum::{
    Router,
    extract::{Path, Request, State},
    http::StatusCode,
    middleware::Next,
    response::Response,
    routing::{get, patch, post, put},
};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

/// How long things take.
const MOMENT: Duration = Duration::from_millis(150);

/// A running fake; it ends with this value.
pub(crate) struct Fake {
    pub(crate) url: String,
    pub(crate) state: Shared,
    _runtime: tokio::runtime::Runtime,
}

pub(crate) type Shared = Arc<World>;

#[derive(Default)]
pub(crate) struct World {
    deployments: Arc<Feed<DeploymentView>>,
    jobs: Arc<Feed<JobView>>,
    pub(crate) settings: Mutex<LocationSettings>,
    pub(crate) team: Mutex<TeamSettings>,
    pub(crate) tokens: Mutex<Vec<TokenRequest>>,
}

impl Fake {
    pub(crate) fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = Shared::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = router(state.clone());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self { url, state, _runtime: runtime }
    }
}

fn router(state: Shared) -> Router {
    Router::new()
        .route("/v1/deployments", get(async |State(state): State<Shared>| list(&state.deployments)))
        .route("/v1/deployments/{name}", put(apply).get(deployment).delete(delete_deployment))
        .route("/v1/deployments/{name}/why", get(why))
        .route("/v1/deployments/{name}/logs", get(logs))
        .route("/v1/deployments/{name}/routes", get(routes))
        .route("/v1/instances", get(instances))
        .route("/v1/jobs", post(submit).get(async |State(state): State<Shared>| list(&state.jobs)))
        .route("/v1/jobs/{name}", get(job))
        .route("/v1/jobs/{name}/why", get(why_job))
        .route("/v1/watch/deployments", get(watch_deployments))
        .route("/v1/watch/jobs", get(watch_jobs))
        .route("/v1/locations/{name}", patch(set_location).get(location))
        .route("/v1/teams", get(async |State(state): State<Shared>| Json(vec![team_view(&state)])))
        .route(
            "/v1/teams/ants",
            put(set_team).get(async |State(state): State<Shared>| Json(team_view(&state))),
        )
        .route("/v1/capacity", get(capacity))
        .route("/v1/latency", get(latency))
        .route("/v1/events", get(events))
        .route("/v1/tokens", post(create_token))
        .layer(axum::middleware::from_fn(authenticate))
        .with_state(state)
}

async fn authenticate(request: Request, next: Next) -> Result<Response, Failure> {
    match anyplace_service::bearer(request.headers()) {
        Some("good") => Ok(next.run(request).await),
        Some("old") => Err(Problem::new(ErrorCode::TokenExpired, "the token expired an hour ago").into()),
        _ => Err(Problem::new(ErrorCode::Unauthenticated, "the token is not known").into()),
    }
}

fn list<T: Clone + PartialEq>(feed: &Feed<T>) -> Json<Vec<T>> {
    Json(feed.entries().into_values().collect())
}

fn find<T: Clone + PartialEq>(feed: &Feed<T>, kind: &str, name: &str) -> Result<Json<T>, Failure> {
    let missing = || Problem::new(ErrorCode::NotFound, format!("there is no {kind} `{name}`"));
    feed.entries().remove(name).map(Json).ok_or_else(|| missing().into())
}

fn refusal(reason: ReasonCode, message: &str) -> Refusal {
    Refusal { reason, count: 3, message: message.into() }
}

fn instance(name: &str, workload: Workload, phase: InstancePhase) -> InstanceStatus {
    InstanceStatus {
        instance: name.parse().unwrap(),
        workload,
        generation: 1,
        machine: "ams-1".parse().unwrap(),
        address: Ipv4Addr::new(10, 1, 1, 65),
        phase,
        ready: phase == InstancePhase::Running,
        restarts: 0,
        exit_code: None,
        started_at: Some(Timestamp::now()),
        ended_at: None,
        reason: None,
    }
}

async fn apply(
    State(state): State<Shared>,
    Json(spec): Json<DeploymentSpec>,
) -> Result<Json<ApplyOutcome>, Failure> {
    let before = state.deployments.entries().remove(spec.name.as_str());
    let changed = before.as_ref().is_none_or(|before| before.spec != spec);
    let fits = spec.resources.gpu.is_none();
    let mut view = DeploymentView {
        name: spec.name.clone(),
        generation: before.as_ref().map_or(1, |before| before.generation + u64::from(changed)),
        vip: Ipv4Addr::new(203, 0, 113, 1),
        vip6: (spec.name.as_str() == "dual").then(|| "2001:db8:a::1".parse().unwrap()),
        created_at: Timestamp::now(),
        phase: if fits { DeploymentPhase::Progressing } else { DeploymentPhase::Pending },
        wanted: spec.instances.min,
        ready: 0,
        reasons: if fits { vec![] } else { vec![refusal(ReasonCode::NoGpu, "no location has a GPU")] },
        locations: vec![],
        spec,
    };
    let outcome = ApplyOutcome { created: before.is_none(), changed, deployment: view.clone() };
    state.deployments.set(view.name.as_str(), view.clone());
    if fits {
        tokio::spawn(async move {
            tokio::time::sleep(MOMENT).await;
            let workload = Workload::Deployment(view.name.clone());
            view.locations = vec![LocationShare {
                location: "ams".parse().unwrap(),
                wanted: view.wanted,
                ready: view.wanted,
                instances: vec![instance("hello-1", workload, InstancePhase::Running)],
                refusals: vec![],
            }];
            (view.phase, view.ready) = (DeploymentPhase::Ready, view.wanted);
            // Deleted in the meantime, it stays so.
            if state.deployments.entries().contains_key(view.name.as_str()) {
                state.deployments.set(view.name.as_str(), view.clone());
            }
        });
    }
    Ok(Json(outcome))
}

async fn deployment(
    State(state): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<DeploymentView>, Failure> {
    find(&state.deployments, "deployment", &name)
}

async fn delete_deployment(
    State(state): State<Shared>,
    Path(name): Path<String>,
) -> Result<StatusCode, Failure> {
    find(&state.deployments, "deployment", &name)?;
    state.deployments.remove(&name);
    Ok(StatusCode::NO_CONTENT)
}

async fn why(State(state): State<Shared>, Path(name): Path<String>) -> Result<Json<Explanation>, Failure> {
    let view = find(&state.deployments, "deployment", &name)?.0;
    Ok(Json(explanation(&format!("deployment/{name}"), view.wanted, &view.reasons)))
}

async fn why_job(
    State(state): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<Explanation>, Failure> {
    let view = find(&state.jobs, "job", &name)?.0;
    Ok(Json(explanation(&format!("job/{name}"), 1, &view.reasons)))
}

fn explanation(subject: &str, wanted: u32, reasons: &[Refusal]) -> Explanation {
    Explanation {
        subject: subject.into(),
        summary: "no location can run it".into(),
        wanted,
        placed: 0,
        ready: 0,
        refusals: reasons.to_vec(),
        locations: vec![LocationExplanation {
            location: "ams".parse().unwrap(),
            placed: 0,
            room_for: 0,
            entering: None,
            nearer_ms: None,
            refusals: reasons.to_vec(),
            moves: Vec::new(),
        }],
        nearest_fit: Some("none has a GPU".into()),
    }
}

async fn logs(
    State(state): State<Shared>,
    Path(name): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<String, Failure> {
    find(&state.deployments, "deployment", &name)?;
    Ok(format!("{name}: serving, tail {:?}, follow {}\n", query.tail, query.follow))
}

/// Amsterdam has an instance that is ready, one that drains and one that isn't ready; Tokyo, withdrawn, has none; São
/// Paulo doesn't answer.
async fn routes(State(state): State<Shared>, Path(name): Path<String>) -> Result<Json<RoutesView>, Failure> {
    let view = find(&state.deployments, "deployment", &name)?.0;
    let endpoint = |index: u8, ready, draining| Endpoint {
        instance: format!("{name}-{index}").parse().unwrap(),
        machine: "ams-1".parse().unwrap(),
        address: Ipv4Addr::new(10, 1, 1, 64 + index),
        ready,
        draining,
        began_ms: u64::from(index),
        stopped_ms: if draining { 90 } else { 0 },
        slot: u16::from(index) - 1,
        weight: FULL_WEIGHT,
    };
    let local = vec![endpoint(1, true, false), endpoint(2, true, true), endpoint(3, false, false)];
    let remote = |name: &str, number: u8| RemoteLocation {
        location: name.parse().unwrap(),
        distance_km: 9_340.4,
        ready: 1,
        ingress: vec![Ipv4Addr::new(10, number, 1, 1)],
    };
    // What exceeds Amsterdam goes to Tokyo.
    let busy = view.spec.connections_per_second().is_some();
    let away = Away { since_ms: 100, spans: vec![Span { parts: 192, to: Some("nrt".parse().unwrap()) }] };
    let vips: Vec<_> = anyplace_model::vips(view.vip, view.vip6).collect();
    let routes = |local: Vec<Endpoint>, remote: Vec<RemoteLocation>| {
        let ports = &view.spec.ports;
        let route = |vip: &IpAddr| Route {
            vip: *vip,
            ports: ports.clone(),
            local: local.clone(),
            remote: remote.clone(),
            away: if busy && !local.is_empty() { vec![away.clone()] } else { Vec::new() },
            nearest: Vec::new(),
        };
        vips.iter().map(route).collect::<Vec<_>>()
    };
    let location = |name: &str, routes, problem: Option<&str>| LocationRoutes {
        location: name.parse().unwrap(),
        withdrawn: name == "nrt",
        routes,
        traffic: (name == "ams" && busy).then(traffic),
        latency_ms: [("nrt".parse().unwrap(), 120.5)].into_iter().filter(|_| name == "ams").collect(),
        problem: problem.map(Into::into),
    };
    Ok(Json(RoutesView {
        deployment: view.name.clone(),
        locations: vec![
            location("ams", routes(local, if busy { vec![remote("nrt", 2)] } else { vec![] }), None),
            location("gru", vec![], Some("its location scheduler has stopped reporting")),
            location("nrt", routes(vec![], vec![remote("ams", 1)]), None),
        ],
        vips,
    }))
}

/// Of a location that sends some of what enters to another.
fn traffic() -> Traffic {
    serde_json::from_value(serde_json::json!({
        "entering": 80.0, "asked": 100.8, "capacity": 20.0, "away": {"nrt": 192},
        "grant": {"revision": 3, "asked": 100.8, "quotas": {"ams": 20.0, "nrt": 81.5}},
    }))
    .unwrap()
}

async fn submit(State(state): State<Shared>, Json(spec): Json<JobSpec>) -> Result<Json<JobView>, Failure> {
    if state.jobs.entries().contains_key(spec.name.as_str()) {
        let taken = Problem::new(ErrorCode::AlreadyExists, format!("there is a job `{}` already", spec.name));
        return Err(taken.field("name").fix("choose another name, or delete that one").into());
    }
    let mut view = JobView {
        name: spec.name.clone(),
        phase: JobPhase::Queued,
        created_at: Timestamp::now(),
        attempt: 0,
        queue_position: Some(1),
        predicted_start: Some(Timestamp::now()),
        location: None,
        instance: None,
        exit_code: None,
        reasons: vec![refusal(ReasonCode::OutsideOffPeakWindow, "it is day everywhere")],
        preemptions: 0,
        array: spec.array.map(|size| ArrayCounts { size, queued: size, ..ArrayCounts::default() }),
        index_of: None,
        spec,
    };
    let (answer, name) = (view.clone(), view.name.to_string());
    state.jobs.set(&*name, view.clone());
    if name != "waits" {
        tokio::spawn(async move {
            tokio::time::sleep(MOMENT).await;
            let fails = name == "fails";
            view.phase = if fails { JobPhase::Failed } else { JobPhase::Succeeded };
            view.reasons =
                if fails { vec![refusal(ReasonCode::ExitedNonZero, "exit code 7")] } else { vec![] };
            (view.attempt, view.exit_code) = (1, Some(if fails { 7 } else { 0 }));
            (view.queue_position, view.predicted_start) = (None, None);
            view.location = Some("nrt".parse().unwrap());
            let attempt = AttemptId { job: view.name.clone(), attempt: 1 };
            view.instance = Some(instance("night-1", Workload::Job(attempt), InstancePhase::Exited));
            state.jobs.set(name, view);
        });
    }
    Ok(Json(answer))
}

async fn instances(State(state): State<Shared>) -> Json<Vec<serde_json::Value>> {
    let located = |location: &str, instance: &InstanceStatus| {
        let mut value = serde_json::to_value(instance).unwrap();
        value["location"] = location.into();
        value
    };
    let (deployments, jobs) = (state.deployments.entries(), state.jobs.entries());
    let of_deployments = deployments
        .values()
        .flat_map(|view| &view.locations)
        .flat_map(|share| share.instances.iter().map(|instance| located(share.location.as_str(), instance)));
    let of_jobs = jobs.values().filter_map(|view| view.instance.as_ref()).map(|it| located("nrt", it));
    Json(of_deployments.chain(of_jobs).collect())
}

async fn job(State(state): State<Shared>, Path(name): Path<String>) -> Result<Json<JobView>, Failure> {
    find(&state.jobs, "job", &name)
}

async fn watch_deployments(State(state): State<Shared>, Query(query): Query<WatchQuery>) -> Response {
    state.deployments.response(query, CancellationToken::new())
}

async fn watch_jobs(State(state): State<Shared>, Query(query): Query<WatchQuery>) -> Response {
    state.jobs.response(query, CancellationToken::new())
}

fn record(state: &World) -> LocationRecord {
    LocationRecord {
        location: "ams".parse().unwrap(),
        alive: true,
        last_report_ms: Some(40),
        settings: state.settings.lock().unwrap().clone(),
        advert: Some(advert()),
        advertise: None,
    }
}

async fn location(State(state): State<Shared>, Path(_): Path<String>) -> Json<LocationRecord> {
    Json(record(&state))
}

async fn set_location(
    State(state): State<Shared>,
    Path(_): Path<String>,
    Json(settings): Json<LocationSettings>,
) -> Json<LocationRecord> {
    *state.settings.lock().unwrap() = settings;
    Json(record(&state))
}

fn team_view(state: &World) -> TeamView {
    TeamView {
        team: "ants".parse().unwrap(),
        settings: state.team.lock().unwrap().clone(),
        held: Held { cpu: MilliCpu(1_500), memory: Bytes(2 << 30), gpus: 1 },
        share_permille: 125,
        placed: 3,
        queued: 7,
    }
}

async fn set_team(State(state): State<Shared>, Json(settings): Json<TeamSettings>) -> Json<TeamView> {
    *state.team.lock().unwrap() = settings;
    Json(team_view(&state))
}

fn advert() -> Advert {
    let block = |memory: u64, whole| GpuBlock {
        model: "H100".into(),
        memory: Bytes(memory << 30),
        whole,
        count: 1,
        most_in_one_machine: 1,
    };
    Advert {
        region: "eu".into(),
        country: "NL".into(),
        labels: [("tier".to_owned(), "edge".to_owned())].into(),
        latitude: 52.31,
        longitude: 4.76,
        timezone: "Europe/Amsterdam".into(),
        off_peak: Some("22:00-06:00".parse().unwrap()),
        machines: 2,
        cpu: MilliCpu(8_000),
        memory: Bytes(16 << 30),
        free_cpu: MilliCpu(7_850),
        free_memory: Bytes(15 << 30),
        free_disk: Bytes(50 << 30),
        largest_free_cpu: MilliCpu(4_000),
        largest_free_memory: Bytes(8 << 30),
        largest_free_disk: Bytes(25 << 30),
        gpus: [("H100".to_owned(), 2)].into(),
        gpu_blocks: vec![block(16, false), block(80, true)],
        isolations: vec![Isolation::Container],
        warm_images: vec!["hello:v1".into()],
        conditions: vec![],
        preemptible: None,
    }
}

async fn capacity() -> Json<Vec<CapacityView>> {
    Json(vec![CapacityView {
        location: "ams".parse().unwrap(),
        alive: true,
        withdrawn: false,
        draining: true,
        off_peak_now: false,
        instances: 3,
        advert: advert(),
    }])
}

async fn latency(Query(query): Query<LatencyQuery>) -> Json<Vec<LatencyView>> {
    let view = |from: &str, to: &str, latency_ms, measured| LatencyView {
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
        latency_ms,
        measured,
        distance_km: 9_340.4,
    };
    let mut views = vec![view("ams", "nrt", 120.5, true), view("nrt", "ams", 140.6, false)];
    views.retain(|view| query.from.as_ref().is_none_or(|from| *from == view.from));
    Json(views)
}

async fn events() -> Json<Vec<Event>> {
    let event = |subject: &str, message: &str| Event {
        at: Timestamp::now(),
        subject: subject.into(),
        severity: EventSeverity::Normal,
        message: message.into(),
    };
    Json(vec![event("deployment/hello", "created"), event("location/ams", "joined")])
}

async fn create_token(State(state): State<Shared>, Json(request): Json<TokenRequest>) -> Json<NewToken> {
    state.tokens.lock().unwrap().push(request);
    Json(NewToken { token: "ap_new".into(), expires_at: None })
}
