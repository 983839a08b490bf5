//! The global scheduler's process, and all locations.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command},
};

use anyplace_api::{Client, Role, TokenRequest, TokenScope};
use anyplace_location_scheduler::{Config, run};
use anyplace_model::{DeploymentName, LocationId};
use futures_util::StreamExt as _;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{machine::Machine, until};

/// How large a fleet is.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'a> {
    pub(crate) locations: usize,
    /// In each location.
    pub(crate) machines: usize,
    /// So many locations are in the region `eu`, the others in `us`.
    pub(crate) serving: usize,
    /// Whether each location scheduler is a process of its own.
    pub(crate) processes: bool,
    /// Endpoint of the etcd that all schedulers keep their state in, each below its own prefix; none for stores of their own.
    pub(crate) etcd: Option<&'a str>,
}

pub(crate) struct Fleet {
    pub(crate) global: Client,
    pub(crate) locations: Vec<Location>,
    schedulers: JoinSet<anyhow::Result<()>>,
    shutdown: CancellationToken,
    processes: Vec<Process>,
}

/// The process ends with the bench, also where that panics.
struct Process(Child);

impl Process {
    /// Starts a part of the binary with its configuration; both are named after the part, in `folder`.
    fn start(anyplace: &Path, part: &str, folder: &Path, config: &str) -> Self {
        let file = folder.join(part).with_extension("toml");
        std::fs::write(&file, config).unwrap();
        let log = std::fs::File::create(file.with_extension("log")).unwrap();
        let mut command = Command::new(anyplace);
        command.args([part, "--config"]).arg(&file).stdout(log.try_clone().unwrap()).stderr(log);
        Self(command.spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) struct Location {
    pub(crate) name: LocationId,
    pub(crate) address: SocketAddr,
    pub(crate) token: String,
    pub(crate) machines: Vec<Machine>,
}

impl Fleet {
    pub(crate) async fn start(anyplace: &Path, folder: &Path, shape: Shape<'_>) -> Self {
        // All at once, so that no two are the same; taken again in a moment.
        let ports: Vec<TcpListener> =
            (0..=shape.locations).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let mut addresses: Vec<SocketAddr> = ports.iter().map(|port| port.local_addr().unwrap()).collect();
        drop(ports);
        let listen = addresses.pop().unwrap();
        let data_dir = folder.join("global");
        // Leases are no part of what is measured, and 330 schedulers start on few CPUs.
        let mut text = format!(
            "data_dir = {data_dir:?}\nlisten = \"{listen}\"\nvip_pools = [\"203.0.113.0/24\"]\nlocation_lease_ms = 60000\n"
        );
        if let Some(etcd) = shape.etcd {
            text += &format!("[etcd]\nendpoints = [\"{etcd}\"]\nprefix = \"global\"\n");
        }
        let mut processes = vec![Process::start(anyplace, "global-scheduler", folder, &text)];
        let token = data_dir.join("admin.token");
        until("the global scheduler", || token.exists()).await;
        let url = format!("http://{listen}");
        let global = Client::new(&url, Some(std::fs::read_to_string(token).unwrap().trim().into())).unwrap();
        while global.healthz().await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let (mut schedulers, shutdown) = (JoinSet::new(), CancellationToken::new());
        let mut locations = Vec::new();
        for (number, address) in addresses.into_iter().enumerate() {
            let name: LocationId = format!("l{number}").parse().unwrap();
            let folder = folder.join(name.as_str());
            std::fs::create_dir_all(&folder).unwrap();
            let scope = TokenScope { location: Some(name.clone()) };
            let request = TokenRequest { role: Role::Location, scope, ttl: None };
            let token = global.create_token(&request).await.unwrap().token;
            std::fs::write(folder.join("location.token"), token).unwrap();
            let (data_dir, token_file) = (folder.join("data"), folder.join("location.token"));
            let region = if number < shape.serving { "eu" } else { "us" };
            let (latitude, longitude) = ((number % 120) as f64 - 60.0, number as f64 - 165.0);
            let mut config = json!({
                "data_dir": data_dir, "listen": address, "advertise": format!("http://{address}"), "location": name,
                "region": region, "country": "NL", "latitude": latitude, "longitude": longitude, "timezone": "UTC",
                "global": url, "token_file": token_file, "machine_lease_ms": 60_000,
            });
            if let Some(etcd) = shape.etcd.filter(|_| !shape.processes) {
                config["etcd"] = json!({"endpoints": [etcd], "prefix": name});
            }
            if shape.processes {
                // TOML writes these values as JSON does.
                let fields = config.as_object().unwrap().iter();
                let mut text: String = fields.map(|(key, value)| format!("{key} = {value}\n")).collect();
                if let Some(etcd) = shape.etcd {
                    text += &format!("[etcd]\nendpoints = [\"{etcd}\"]\nprefix = \"{name}\"\n");
                }
                processes.push(Process::start(anyplace, "location-scheduler", &folder, &text));
            } else {
                let config: Config = serde_json::from_value(config).unwrap();
                schedulers.spawn(run(config, shutdown.clone()));
            }
            let token = folder.join("data/machine.token");
            until("a location scheduler", || {
                std::fs::read_to_string(&token).is_ok_and(|it| it.ends_with('\n'))
            })
            .await;
            let token = std::fs::read_to_string(token).unwrap().trim().to_owned();
            let client = Client::new(&format!("http://{address}"), Some(token.clone())).unwrap();
            let numbers = number * shape.machines..(number + 1) * shape.machines;
            let machines = futures_util::stream::iter(numbers)
                .map(|number| Machine::start(number, client.clone()))
                .buffered(32)
                .collect()
                .await;
            locations.push(Location { name, address, token, machines });
        }
        for location in &locations {
            while !global.location(&location.name).await.is_ok_and(|it| {
                it.alive && it.advert.is_some_and(|it| it.machines as usize == shape.machines)
            }) {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
        Self { global, locations, schedulers, shutdown, processes }
    }

    /// Virtual IPs by deployment.
    pub(crate) async fn vips(&self) -> BTreeMap<DeploymentName, Ipv4Addr> {
        let deployments = self.global.deployments().await.unwrap();
        deployments.into_iter().map(|view| (view.name, view.vip)).collect()
    }

    pub(crate) fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.locations.iter().flat_map(|location| &location.machines)
    }

    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        while let Some(ended) = self.schedulers.join_next().await {
            ended.unwrap().unwrap();
        }
        drop(self.processes);
    }
}
