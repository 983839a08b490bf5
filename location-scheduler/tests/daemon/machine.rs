//! A scripted machine: does what its feed says, as the test lets it, and reports at once and every third of a lease.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard},
};

use anyplace_api::{Client, WatchEvent, Watcher};
use anyplace_model::{
    Assignment, Bytes, Gpu, ImageState, InstanceId, InstancePhase, InstanceStatus, Isolation, MachineDesired,
    MachineId, MachineReport, Mark, MilliCpu,
};
use axum::{
    Router,
    extract::{Path, State},
    http::{HeaderMap, header::AUTHORIZATION},
    routing::get,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::bed::LEASE;

pub(crate) struct Machine {
    shared: Arc<Shared>,
    stop: CancellationToken,
}

struct Shared {
    inner: Mutex<Inner>,
    poke: Notify,
}

struct Inner {
    name: MachineId,
    number: u8,
    gpus: Vec<Gpu>,
    epoch: u64,
    sequence: u64,
    advertise: String,
    wanted: BTreeMap<String, MachineDesired>,
    containers: BTreeMap<InstanceId, (Assignment, Option<i32>)>,
    warm: BTreeSet<String>,
    started: usize,
    ready: bool,
    silent: bool,
    deaf: bool,
    fetching: bool,
    mark: Option<Mark>,
}

impl Machine {
    pub(crate) async fn start(name: &str, number: u8, gpus: &[&str], client: Client) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let advertise = format!("http://{}", listener.local_addr().unwrap());
        let inner = Inner {
            name: name.parse().unwrap(),
            number,
            gpus: gpus.iter().map(|model| Gpu { model: (*model).into(), memory: Bytes(40 << 30) }).collect(),
            epoch: anyplace_service::unix_epoch(),
            sequence: 0,
            advertise,
            wanted: BTreeMap::new(),
            containers: BTreeMap::new(),
            warm: BTreeSet::new(),
            started: 0,
            ready: true,
            silent: false,
            deaf: false,
            fetching: true,
            mark: None,
        };
        let shared = Arc::new(Shared { inner: Mutex::new(inner), poke: Notify::new() });
        let stop = CancellationToken::new();
        let logs = Router::new().route("/v1/instances/{instance}/logs", get(log)).with_state(shared.clone());
        let until = stop.clone().cancelled_owned();
        tokio::spawn(async move { axum::serve(listener, logs).with_graceful_shutdown(until).await });
        tokio::spawn(stop.clone().run_until_cancelled_owned(follow(shared.clone(), client.clone())));
        tokio::spawn(stop.clone().run_until_cancelled_owned(report(shared.clone(), client)));
        Self { shared, stop }
    }

    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.shared.lock();
        change(&mut inner);
        inner.act();
        drop(inner);
        self.shared.poke.notify_one();
    }

    /// Whether its instances pass their readiness check.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.change(|inner| inner.ready = ready);
    }

    /// Cut off: neither reports nor hears.
    pub(crate) fn set_silent(&self, silent: bool) {
        self.change(|inner| inner.silent = silent);
    }

    /// Reports, but doesn't act on what it hears.
    pub(crate) fn set_deaf(&self, deaf: bool) {
        self.change(|inner| inner.deaf = deaf);
    }

    /// Whether images arrive.
    pub(crate) fn set_fetching(&self, fetching: bool) {
        self.change(|inner| inner.fetching = fetching);
    }

    /// Ends every container with this status.
    pub(crate) fn end_all(&self, code: i32) {
        self.change(|inner| inner.containers.values_mut().for_each(|(_, exit)| *exit = Some(code)));
    }

    pub(crate) fn running(&self) -> Vec<String> {
        self.shared.lock().containers.keys().map(ToString::to_string).collect()
    }

    pub(crate) fn started(&self) -> usize {
        self.shared.lock().started
    }

    pub(crate) fn wanted_images(&self) -> usize {
        let inner = self.shared.lock();
        inner.wanted.values().filter(|item| matches!(item, MachineDesired::Image { .. })).count()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }
}

impl Inner {
    fn act(&mut self) {
        if self.silent || self.deaf {
            return;
        }
        let wanted = &self.wanted;
        self.containers.retain(|instance, _| wanted.contains_key(&format!("instances/{instance}")));
        for item in self.wanted.values() {
            match item {
                MachineDesired::Image { image, .. } if self.fetching => drop(self.warm.insert(image.clone())),
                MachineDesired::Image { .. } => {}
                MachineDesired::Mark(mark) => self.mark = Some(*mark),
                MachineDesired::Instance(assignment) => {
                    let started = &mut self.started;
                    self.containers
                        .entry(assignment.instance.clone())
                        .or_insert_with(|| {
                            *started += 1;
                            ((**assignment).clone(), None)
                        })
                        .0
                        .draining = assignment.draining;
                }
            }
        }
    }

    fn report(&mut self) -> MachineReport {
        self.sequence += 1;
        let images = self.wanted.values().filter_map(|item| match item {
            MachineDesired::Image { image, .. } => Some(image.clone()),
            MachineDesired::Instance(_) | MachineDesired::Mark(_) => None,
        });
        let state = |image: &String| match self.warm.contains(image) {
            true => ImageState::Warm,
            false => ImageState::Pulling { done: 0, total: 0 },
        };
        MachineReport {
            machine: self.name.clone(),
            epoch: self.epoch,
            sequence: self.sequence,
            address: Ipv4Addr::new(10, 1, self.number, 1),
            instance_cidr: format!("10.1.{}.64/26", self.number).parse().unwrap(),
            advertise: self.advertise.clone(),
            cpu: MilliCpu(4_000),
            memory: Bytes(8 << 30),
            disk: Bytes(50 << 30),
            gpus: self.gpus.clone(),
            isolations: vec![Isolation::Container],
            conditions: Vec::new(),
            images: images.map(|image| (image.clone(), state(&image))).collect(),
            instances: self.containers.values().map(|held| self.status(held)).collect(),
            mark: self.mark,
        }
    }

    fn status(&self, (assignment, exit): &(Assignment, Option<i32>)) -> InstanceStatus {
        InstanceStatus {
            instance: assignment.instance.clone(),
            workload: assignment.workload.clone(),
            generation: assignment.generation,
            machine: self.name.clone(),
            address: assignment.address,
            phase: if exit.is_some() { InstancePhase::Exited } else { InstancePhase::Running },
            ready: exit.is_none() && self.ready,
            restarts: 0,
            exit_code: *exit,
            started_at: None,
            ended_at: None,
            reason: None,
        }
    }
}

async fn follow(shared: Arc<Shared>, client: Client) {
    let path = Client::machine_desired_path(&shared.lock().name);
    let mut watcher = Watcher::<MachineDesired>::new(client, path);
    let mut wanted = BTreeMap::new();
    loop {
        match watcher.next(|_| {}).await {
            WatchEvent::Reset { .. } => wanted.clear(),
            WatchEvent::Put { key, value, .. } => drop(wanted.insert(key, value)),
            WatchEvent::Delete { key, .. } => drop(wanted.remove(&key)),
            WatchEvent::Synced { .. } => {
                let mut inner = shared.lock();
                if !inner.silent && !inner.deaf {
                    inner.wanted.clone_from(&wanted);
                }
                inner.act();
                drop(inner);
                shared.poke.notify_one();
            }
        }
    }
}

async fn report(shared: Arc<Shared>, client: Client) {
    loop {
        let report = {
            let mut inner = shared.lock();
            (!inner.silent).then(|| inner.report())
        };
        if let Some(report) = report {
            // The daemon may be down: the next heartbeat tries again.
            let _ = client.report_machine(&report).await;
        }
        let _ = tokio::time::timeout(LEASE / 3, shared.poke.notified()).await;
    }
}

async fn log(State(shared): State<Arc<Shared>>, Path(instance): Path<String>, headers: HeaderMap) -> String {
    assert!(headers.contains_key(AUTHORIZATION), "machine {} wants a token", shared.lock().name);
    format!("log of {instance}\n")
}
