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
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{machine::Machine, until};

const LOCATIONS: usize = 330;
/// The first so many have instances.
pub(crate) const SERVING: usize = 16;

pub(crate) struct Fleet {
    pub(crate) global: Client,
    pub(crate) locations: Vec<Location>,
    schedulers: JoinSet<anyhow::Result<()>>,
    shutdown: CancellationToken,
    process: Process,
}

/// The process ends with the bench, also where that panics.
struct Process(Child);

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
    pub(crate) machine: Machine,
}

impl Fleet {
    pub(crate) async fn start(anyplace: &Path, folder: &Path) -> Self {
        // All at once, so that no two are the same; taken again in a moment.
        let ports: Vec<TcpListener> =
            (0..=LOCATIONS).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let mut addresses: Vec<SocketAddr> = ports.iter().map(|port| port.local_addr().unwrap()).collect();
        drop(ports);
        let listen = addresses.pop().unwrap();
        let data_dir = folder.join("global");
        let config = folder.join("global.toml");
        // Leases are no part of what is measured, and 330 schedulers start on few CPUs.
        let text = format!(
            "data_dir = {data_dir:?}\nlisten = \"{listen}\"\nvip_pools = [\"203.0.113.0/24\"]\nlocation_lease_ms = 60000\n"
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(folder.join("global.log")).unwrap();
        let process = Command::new(anyplace)
            .args(["global-scheduler", "--config"])
            .arg(&config)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let process = Process(process);
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
            let config: Config = serde_json::from_value(json!({
                "data_dir": folder.join("data"), "listen": address, "advertise": format!("http://{address}"),
                "location": name, "region": if number < SERVING { "eu" } else { "us" }, "country": "NL",
                "latitude": (number % 120) as f64 - 60.0, "longitude": number as f64 - 165.0, "timezone": "UTC",
                "global": url, "token_file": folder.join("location.token"), "machine_lease_ms": 60_000,
            }))
            .unwrap();
            schedulers.spawn(run(config, shutdown.clone()));
            let token = folder.join("data/machine.token");
            until("a location scheduler", || {
                std::fs::read_to_string(&token).is_ok_and(|it| it.ends_with('\n'))
            })
            .await;
            let token = std::fs::read_to_string(token).unwrap().trim().to_owned();
            let client = Client::new(&format!("http://{address}"), Some(token.clone())).unwrap();
            let machine = Machine::start(number, client).await;
            locations.push(Location { name, address, token, machine });
        }
        for location in &locations {
            while !global
                .location(&location.name)
                .await
                .is_ok_and(|it| it.alive && it.advert.is_some_and(|it| it.machines == 1))
            {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
        Self { global, locations, schedulers, shutdown, process }
    }

    /// Virtual IPs by deployment.
    pub(crate) async fn vips(&self) -> BTreeMap<DeploymentName, Ipv4Addr> {
        let deployments = self.global.deployments().await.unwrap();
        deployments.into_iter().map(|view| (view.name, view.vip)).collect()
    }

    pub(crate) fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.locations.iter().map(|location| &location.machine)
    }

    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        while let Some(ended) = self.schedulers.join_next().await {
            ended.unwrap().unwrap();
        }
        drop(self.process);
    }
}
