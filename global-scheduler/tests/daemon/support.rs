//! A global scheduler in this process, and locations that follow a script instead of having machines.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyplace_api::{Client, Role, TokenRequest, TokenScope, WatchEvent, Watcher};
use anyplace_global_scheduler::Config;
use anyplace_model::{
    Advert, AttemptStatus, Bytes, DeploymentName, DeploymentSpec, ImageState, InstancePhase, InstanceStatus,
    Isolation, JobSpec, LocationDesired, LocationId, LocationReport, MachineId, MilliCpu, PlacementStatus,
    ReasonCode, Refusal, RemoteRoute, Traffic, Workload,
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const LEASE_MS: u64 = 1_000;

/// The daemon, in a folder that it can be started in again.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) admin: Client,
    pub(crate) listen: SocketAddr,
    /// `[jobs]` of its configuration.
    jobs: Value,
    shutdown: CancellationToken,
    task: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Bed {
    pub(crate) async fn start() -> Self {
        Self::with_jobs(json!({"headroom_percent": 0})).await
    }

    /// With this in `[jobs]` of its configuration.
    pub(crate) async fn with_jobs(jobs: Value) -> Self {
        anyplace_service::install_crypto_provider();
        let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let admin = Client::new(&format!("http://{listen}"), None).unwrap();
        let mut bed = Self { dir, admin, listen, jobs, shutdown: CancellationToken::new(), task: None };
        bed.run().await;
        bed
    }

    async fn run(&mut self) {
        let config: Config = serde_json::from_value(json!({
            "data_dir": self.dir.path(), "listen": self.listen, "vip_pools": ["203.0.113.0/24"],
            "location_lease_ms": LEASE_MS, "jobs": self.jobs,
        }))
        .unwrap();
        self.shutdown = CancellationToken::new();
        let shutdown = self.shutdown.clone();
        self.task = Some(tokio::spawn(async move {
            // The end of a process ends its connections; in this one they may hold the store for a moment more.
            for _ in 0..200 {
                match anyplace_global_scheduler::run(config.clone(), shutdown.clone()).await {
                    Err(error) if format!("{error:#}").contains("in use") => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    outcome => return outcome,
                }
            }
            anyhow::bail!("the store stays in use")
        }));
        eventually("the API answers", || async {
            assert!(!self.task.as_ref().unwrap().is_finished(), "it ended by itself");
            self.admin.healthz().await.is_ok()
        })
        .await;
        let token = std::fs::read_to_string(self.dir.path().join("admin.token")).unwrap();
        self.admin = self.client(Some(token.trim().into()));
    }

    pub(crate) async fn stop(&mut self) {
        self.shutdown.cancel();
        self.task.take().unwrap().await.unwrap().unwrap();
    }

    pub(crate) async fn restart(&mut self) {
        self.stop().await;
        self.run().await;
    }

    /// Starts it again after [`Self::stop`].
    pub(crate) async fn restart_stopped(&mut self) {
        self.run().await;
    }

    pub(crate) fn client(&self, token: Option<String>) -> Client {
        Client::new(&format!("http://{}", self.listen), token).unwrap()
    }

    pub(crate) async fn token(&self, role: Role, location: Option<&str>) -> String {
        let scope = TokenScope { location: location.map(|it| it.parse().unwrap()) };
        self.admin.create_token(&TokenRequest { role, scope, ttl: None }).await.unwrap().token
    }

    pub(crate) async fn location(&self, name: &str) -> FakeLocation {
        self.location_with(name, advert()).await
    }

    pub(crate) async fn location_with(&self, name: &str, advert: Advert) -> FakeLocation {
        let token = self.token(Role::Location, Some(name)).await;
        let location = FakeLocation::start(self.client(Some(token)), name, advert);
        let id = location.name.parse().unwrap();
        eventually("the location joins", || async {
            self.admin.location(&id).await.is_ok_and(|record| record.alive)
        })
        .await;
        location
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

pub(crate) fn advert() -> Advert {
    Advert {
        region: "eu".into(),
        country: "NL".into(),
        labels: BTreeMap::new(),
        latitude: 52.3,
        longitude: 4.8,
        timezone: "UTC".into(),
        off_peak: None,
        machines: 1,
        cpu: MilliCpu(4_000),
        memory: Bytes(8 << 30),
        free_cpu: MilliCpu(4_000),
        free_memory: Bytes(8 << 30),
        free_disk: Bytes(50 << 30),
        largest_free_cpu: MilliCpu(4_000),
        largest_free_memory: Bytes(8 << 30),
        largest_free_disk: Bytes(50 << 30),
        gpus: BTreeMap::new(),
        gpu_blocks: Vec::new(),
        isolations: vec![Isolation::Container],
        warm_images: Vec::new(),
        conditions: Vec::new(),
        preemptible: None,
    }
}

/// What the fake location does.
#[derive(Default)]
pub(crate) struct Script {
    /// Whether instances become ready.
    pub(crate) ready: bool,
    /// Generation of all its instances; by itself, the one that it was told.
    pub(crate) lags_at: Option<u64>,
    /// How many of each deployment's instances it refuses.
    pub(crate) refuses: u32,
    /// Whether attempts only start, and don't run yet.
    pub(crate) starting: bool,
    /// How attempts end; they run until it is set.
    pub(crate) exit_code: Option<i32>,
    /// How attempts of single jobs end.
    pub(crate) exits: BTreeMap<String, i32>,
    /// Attempts that make way for deployments.
    pub(crate) preempted: BTreeSet<String>,
    /// Reported although nobody asked for it.
    pub(crate) foreign: Vec<AttemptStatus>,
    /// Where it serves logs.
    pub(crate) advertise: Option<String>,
    /// How far wished images are on its machines.
    pub(crate) prewarms: BTreeMap<String, BTreeMap<MachineId, ImageState>>,
    /// What it says of new connections.
    pub(crate) traffic: BTreeMap<DeploymentName, Traffic>,
    /// How far it says that others are.
    pub(crate) latency_ms: BTreeMap<LocationId, f64>,
    /// What it was told to have.
    pub(crate) desired: BTreeMap<String, LocationDesired>,
}

pub(crate) struct FakeLocation {
    pub(crate) name: String,
    pub(crate) script: Arc<Mutex<Script>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for FakeLocation {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl FakeLocation {
    fn start(client: Client, name: &str, advert: Advert) -> Self {
        let script = Arc::new(Mutex::new(Script { ready: true, ..Script::default() }));
        let watching = tokio::spawn(watch(client.clone(), name.to_string(), script.clone()));
        let reporting = tokio::spawn(report(client, name.to_string(), advert, script.clone()));
        Self { name: name.into(), script, tasks: vec![watching, reporting] }
    }

    pub(crate) fn count(&self, deployment: &str) -> u32 {
        match self.script.lock().unwrap().desired.get(&format!("placements/{deployment}")) {
            Some(LocationDesired::Placement(placement)) => placement.count,
            _ => 0,
        }
    }

    pub(crate) fn route(&self, deployment: &str) -> Option<RemoteRoute> {
        match self.script.lock().unwrap().desired.get(&format!("routes/{deployment}")) {
            Some(LocationDesired::Route(route)) => Some(route.clone()),
            _ => None,
        }
    }

    pub(crate) fn serving(&self, deployment: &str) -> Vec<String> {
        let route = self.route(deployment);
        route.iter().flat_map(|it| &it.backends).map(|backend| backend.location.to_string()).collect()
    }

    pub(crate) fn prewarms(&self) -> Vec<String> {
        let script = self.script.lock().unwrap();
        script.desired.keys().filter_map(|key| key.strip_prefix("prewarms/").map(Into::into)).collect()
    }

    pub(crate) fn attempts(&self) -> Vec<String> {
        let script = self.script.lock().unwrap();
        script.desired.keys().filter_map(|key| key.strip_prefix("attempts/").map(Into::into)).collect()
    }
}

async fn watch(client: Client, name: String, script: Arc<Mutex<Script>>) {
    let path = Client::location_desired_path(&name.parse().unwrap());
    let mut watcher: Watcher<LocationDesired> = Watcher::new(client, path);
    let mut building = BTreeMap::new();
    loop {
        match watcher.next(|_| ()).await {
            WatchEvent::Reset { .. } => building.clear(),
            WatchEvent::Put { key, value, .. } => {
                building.insert(key, value);
            }
            WatchEvent::Delete { key, .. } => {
                building.remove(&key);
            }
            WatchEvent::Synced { .. } => script.lock().unwrap().desired = building.clone(),
        }
    }
}

async fn report(client: Client, name: String, advert: Advert, script: Arc<Mutex<Script>>) {
    let epoch = anyplace_service::unix_epoch();
    for sequence in 0.. {
        let report = make_report(&name, epoch, sequence, &advert, &script.lock().unwrap());
        let _ = client.report_location(&report).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn instance(
    name: &str,
    workload: Workload,
    generation: u64,
    phase: InstancePhase,
) -> InstanceStatus {
    InstanceStatus {
        instance: name.parse().unwrap(),
        workload,
        generation,
        machine: "m-1".parse().unwrap(),
        address: Ipv4Addr::new(10, 1, 1, 65),
        phase,
        ready: phase == InstancePhase::Running,
        restarts: 0,
        exit_code: None,
        started_at: None,
        ended_at: None,
        reason: None,
    }
}

fn make_report(name: &str, epoch: u64, sequence: u64, advert: &Advert, script: &Script) -> LocationReport {
    let mut report = LocationReport {
        location: name.parse().unwrap(),
        epoch,
        sequence,
        advertise: script.advertise.clone().unwrap_or("http://127.0.0.1:9".into()),
        log_token: "secret-of-the-location".into(),
        advert: advert.clone(),
        ingress: vec![Ipv4Addr::new(10, 1, 1, 1)],
        placements: Vec::new(),
        attempts: script.foreign.clone(),
        moves: Vec::new(),
        prewarms: script.prewarms.clone(),
        traffic: script.traffic.clone(),
        latency_ms: script.latency_ms.clone(),
    };
    for desired in script.desired.values() {
        match desired {
            LocationDesired::Placement(placement) => {
                let refused = script.refuses.min(placement.count);
                let phase = if script.ready { InstancePhase::Running } else { InstancePhase::Starting };
                let deployment = placement.spec.name.clone();
                let generation = script.lags_at.unwrap_or(placement.generation);
                let instances = (0..placement.count - refused).map(|index| {
                    let workload = Workload::Deployment(deployment.clone());
                    instance(&format!("{deployment}-{name}-{index}"), workload, generation, phase)
                });
                let refusal =
                    Refusal { reason: ReasonCode::NoAddress, count: 1, message: "no free address".into() };
                report.placements.push(PlacementStatus {
                    deployment: deployment.clone(),
                    generation: placement.generation,
                    count: placement.count,
                    instances: instances.collect(),
                    refused,
                    refusals: if refused > 0 { vec![refusal] } else { Vec::new() },
                });
            }
            LocationDesired::Attempt { attempt, spec } => {
                let exit_code = script.exits.get(attempt.job.as_str()).copied().or(script.exit_code);
                let phase = match exit_code {
                    _ if script.starting => InstancePhase::Pulling,
                    Some(_) => InstancePhase::Exited,
                    None => InstancePhase::Running,
                };
                if phase != InstancePhase::Exited {
                    let advert = &mut report.advert;
                    advert.free_cpu.0 = advert.free_cpu.0.saturating_sub(spec.resources.cpu.0);
                    advert.largest_free_cpu = advert.largest_free_cpu.min(advert.free_cpu);
                }
                let workload = Workload::Job(attempt.clone());
                let mut instance =
                    instance(&format!("{}-{}", attempt.job, attempt.attempt), workload, 1, phase);
                instance.exit_code = exit_code;
                if script.preempted.contains(&attempt.to_string()) {
                    let message = "it made way for a deployment".into();
                    instance.phase = InstancePhase::Stopping;
                    instance.reason = Some(Refusal { reason: ReasonCode::Preempted, count: 1, message });
                }
                report.attempts.push(AttemptStatus {
                    attempt: attempt.clone(),
                    location: report.location.clone(),
                    instance: Some(instance),
                    refusals: Vec::new(),
                });
            }
            _ => {}
        }
    }
    report
}

pub(crate) fn deployment(more: Value) -> DeploymentSpec {
    let mut spec =
        json!({"kind": "Deployment", "name": "hello", "image": "hello:1", "ports": [{"port": 80}]});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(spec).unwrap()
}

pub(crate) fn job(more: Value) -> JobSpec {
    let mut spec = json!({"kind": "Job", "name": "work", "image": "work:1"});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(spec).unwrap()
}

/// Waits until something is so.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !check().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
