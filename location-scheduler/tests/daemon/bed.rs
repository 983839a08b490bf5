//! One location: the daemon, its machines and its global scheduler.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    time::{Duration, Instant},
};

use anyplace_api::Client;
use anyplace_location_scheduler::{Config, run};
use anyplace_model::{
    AttemptId, Format, JobSpec, LocationDesired, LocationSettings, Placement, Prewarm, Spec, parse_spec,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{global::Global, machine::Machine, routes::Routes};

/// The machines' lease here: long enough for a busy machine, short enough for a test.
pub(crate) const LEASE: Duration = Duration::from_millis(500);

pub(crate) struct Bed {
    pub(crate) global: Global,
    pub(crate) machines: BTreeMap<String, Machine>,
    /// Of the configuration, from the next start on.
    pub(crate) tidy_pause_ms: u64,
    folder: tempfile::TempDir,
    listen: SocketAddr,
    url: String,
    token: String,
    daemon: JoinHandle<anyhow::Result<()>>,
    shutdown: CancellationToken,
}

impl Bed {
    pub(crate) async fn start(machines: &[&str]) -> Self {
        Self::start_with(machines, &[]).await
    }

    /// With GPUs of 40 GiB: models by machine.
    pub(crate) async fn start_with(machines: &[&str], gpus: &[&[&str]]) -> Self {
        anyplace_service::install_crypto_provider();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("location.token"), "ap_location").unwrap();
        let global = Global::start().await;
        // Free now; taken again at once.
        let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let daemon = tokio::spawn(run(config(folder.path(), listen, &global), shutdown.clone()));
        let url = format!("http://{listen}");
        let token = machine_token(folder.path()).await;
        let mut bed = Self {
            global,
            machines: BTreeMap::new(),
            tidy_pause_ms: 0,
            folder,
            listen,
            url,
            token,
            daemon,
            shutdown,
        };
        for (index, name) in machines.iter().enumerate() {
            let gpus = gpus.get(index).copied().unwrap_or_default();
            let machine = Machine::start(name, index as u8 + 1, gpus, bed.client()).await;
            bed.machines.insert((*name).to_string(), machine);
        }
        bed.settings(LocationSettings::default());
        let client = bed.client();
        let all = async || client.machines().await.is_ok_and(|known| known.len() == machines.len());
        bed.until_async(Duration::from_secs(10), "all machines report", all).await;
        bed
    }

    pub(crate) async fn restart(&mut self) {
        self.shutdown.cancel();
        (&mut self.daemon).await.unwrap().unwrap();
        self.shutdown = CancellationToken::new();
        let mut config = config(self.folder.path(), self.listen, &self.global);
        config.tidy_pause_ms = self.tidy_pause_ms;
        self.daemon = tokio::spawn(run(config, self.shutdown.clone()));
    }

    pub(crate) async fn stop(self) {
        self.machines.values().for_each(Machine::stop);
        self.shutdown.cancel();
        self.daemon.await.unwrap().unwrap();
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.url, Some(self.token.clone())).unwrap()
    }

    pub(crate) fn routes(&self) -> Routes {
        Routes::watch(self.client())
    }

    pub(crate) fn machine(&self, name: &str) -> &Machine {
        &self.machines[name]
    }

    pub(crate) fn want(&self, name: &str, placement: Placement) {
        self.global
            .desired
            .set(format!("placements/{name}"), LocationDesired::Placement(Box::new(placement)));
    }

    pub(crate) fn forget(&self, name: &str) {
        self.global.desired.remove(&format!("placements/{name}"));
    }

    pub(crate) fn wish(&self, image: &str, machines: Option<u32>) {
        let wish = Prewarm { image: image.into(), locations: Vec::new(), machines, priority: 50 };
        self.global.desired.set(format!("prewarms/{image}"), LocationDesired::Prewarm(wish));
    }

    pub(crate) fn want_attempt(&self, (attempt, spec): (AttemptId, JobSpec)) {
        let key = format!("attempts/{attempt}");
        self.global.desired.set(key, LocationDesired::Attempt { attempt, spec: Box::new(spec) });
    }

    pub(crate) fn forget_attempt(&self, job: &str, attempt: u32) {
        self.global.desired.remove(&format!("attempts/{job}/{attempt}"));
    }

    pub(crate) fn settings(&self, settings: LocationSettings) {
        let vip_prefixes = vec!["203.0.113.0/24".parse().unwrap()];
        self.global.desired.set("settings", LocationDesired::Settings { settings, vip_prefixes });
    }

    /// Instances that machines really run, by name.
    pub(crate) fn running(&self) -> Vec<String> {
        let mut running: Vec<String> = self.machines.values().flat_map(Machine::running).collect();
        running.sort();
        running
    }

    /// Containers that were ever started.
    pub(crate) fn started(&self) -> usize {
        self.machines.values().map(Machine::started).sum()
    }

    pub(crate) fn wanted_images(&self) -> usize {
        self.machines.values().map(Machine::wanted_images).sum()
    }

    pub(crate) async fn until(&self, limit: Duration, what: &str, holds: impl Fn(&Self) -> bool) {
        self.until_async(limit, what, async || holds(self)).await;
    }

    pub(crate) async fn until_async(&self, limit: Duration, what: &str, holds: impl AsyncFn() -> bool) {
        let start = Instant::now();
        while !holds().await {
            assert!(start.elapsed() < limit, "not within {limit:?}: {what}; running {:?}", self.running());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn config(folder: &Path, listen: SocketAddr, global: &Global) -> Config {
    Config {
        etcd: None,
        data_dir: folder.join("data"),
        listen,
        advertise: format!("http://{listen}"),
        location: "ams".parse().unwrap(),
        region: "eu".into(),
        country: "NL".into(),
        labels: BTreeMap::new(),
        latitude: 52.31,
        longitude: 4.76,
        timezone: "Europe/Amsterdam".into(),
        off_peak: None,
        global: global.url.clone(),
        token_file: folder.join("location.token"),
        machine_lease_ms: LEASE.as_millis() as u64,
        drain_ms: 300,
        move_ready_ms: 3_000,
        tidy_pause_ms: 0,
    }
}

async fn machine_token(folder: &Path) -> String {
    let path = folder.join("data/machine.token");
    for _ in 0..1_000 {
        if let Ok(token) = anyplace_service::read_token(&path) {
            return token;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} was not made", path.display());
}

/// A placement whose virtual IP is 203.0.113.1.
pub(crate) fn placement(name: &str, generation: u64, count: u32, more: &str) -> Placement {
    let text = format!("kind: Deployment\nname: {name}\nimage: {name}:1\nports: [{{port: 80}}]\n{more}\n");
    let Spec::Deployment(spec) = parse_spec(&text, Format::Yaml, "test.yaml").unwrap() else {
        panic!("the text says Deployment")
    };
    Placement { generation, spec: *spec, vip: Ipv4Addr::new(203, 0, 113, 1), vip6: None, count }
}

pub(crate) fn attempt(name: &str, attempt: u32) -> (AttemptId, JobSpec) {
    attempt_of(name, attempt, "")
}

pub(crate) fn attempt_of(name: &str, attempt: u32, more: &str) -> (AttemptId, JobSpec) {
    let text = format!("kind: Job\nname: {name}\nimage: {name}:1\n{more}\n");
    let Spec::Job(spec) = parse_spec(&text, Format::Yaml, "test.yaml").unwrap() else {
        panic!("the text says Job")
    };
    (AttemptId { job: spec.name.clone(), attempt }, *spec)
}
