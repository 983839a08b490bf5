//! The agent's configuration, `machine-agent.toml`.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyplace_model::{Bytes, Gpu, MachineId, MilliCpu};
use anyplace_service::ScrubConfig;
use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;

/// Configuration of a machine agent.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Folder for images, instances and logs.
    pub data_dir: PathBuf,
    /// Address of the agent's own API.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// URL at which the location scheduler reaches that API.
    pub advertise: String,
    /// This machine's name.
    pub machine: MachineId,
    /// URL of the location scheduler.
    pub location_scheduler: String,
    /// File with the machine token, which the agent sends and asks for.
    pub token_file: PathBuf,
    /// URL of the registry for images whose reference names no host.
    #[serde(default)]
    pub registry: Option<String>,
    /// File with the line `user:password` for that registry, and for others that say no file of their own.
    #[serde(default)]
    pub registry_credentials_file: Option<PathBuf>,
    /// Registries that have the same images, asked in this order where those before, and `registry`, are away.
    #[serde(default)]
    pub registries: Vec<Registry>,
    /// The machine's address in the fabric.
    pub address: Ipv4Addr,
    /// Its IPv6 address on the uplink: containers reach IPv6 destinations from behind it, virtual IPs among them; none
    /// without it. The state router's configuration must have it too.
    #[serde(default)]
    pub address6: Option<Ipv6Addr>,
    /// The interface towards the fabric.
    pub uplink: String,
    /// Where instances get their addresses from.
    pub instance_cidr: Ipv4Net,
    /// What containers must not reach: the control plane and the fabric.
    #[serde(default)]
    pub protected_cidrs: Vec<IpNet>,
    /// Cgroup below which instances get theirs.
    #[serde(default = "default_cgroup_parent")]
    pub cgroup_parent: String,
    /// Kept from instances.
    #[serde(default)]
    pub reserved: Reserved,
    /// What the machine has; read from the machine where it isn't said.
    #[serde(default)]
    pub resources: Option<MachineResources>,
    /// What images may take on disk; those that were used longest ago go when there are more. Images in use, or to be
    /// kept warm, stay. Half of the file system of `data_dir` unless said.
    #[serde(default)]
    pub image_budget: Option<Bytes>,
    /// Bytes a second that images to be kept warm are fetched with, all together. Without it, a twelfth of the uplink's
    /// speed where the interface tells that, so that traffic loses less than a tenth; else 20 MiB.
    #[serde(default)]
    pub prewarm_rate: Option<Bytes>,
    /// Reading images again in the background.
    #[serde(default)]
    pub scrub: ScrubConfig,
    /// GPUs; asked from NVML where none is said.
    #[serde(default)]
    pub gpus: Vec<Gpu>,
    /// Program that is run as the shim, with `shim --state DIR`; the agent's own unless said. For tests, whose own
    /// program has no such subcommand.
    #[serde(default)]
    pub shim: Option<PathBuf>,
}

/// A registry of several.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a URL, or { url = ..., credentials_file = ... }")]
pub enum Registry {
    /// Its URL.
    Url(String),
    /// Its URL, and how to log in there.
    WithLogin(RegistryLogin),
}

/// A registry with a login of its own.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryLogin {
    /// Its URL.
    pub url: String,
    /// File with the line `user:password`.
    pub credentials_file: PathBuf,
}

impl Config {
    /// All registries' URLs with their files of credentials, in the order of asking.
    pub(crate) fn registries(&self) -> impl Iterator<Item = (&str, Option<&Path>)> {
        let shared = self.registry_credentials_file.as_deref();
        let first = self.registry.as_deref().map(|url| (url, shared));
        let others = self.registries.iter().map(move |registry| match registry {
            Registry::Url(url) => (url.as_str(), shared),
            Registry::WithLogin(RegistryLogin { url, credentials_file }) => {
                (url.as_str(), Some(credentials_file.as_path()))
            }
        });
        first.into_iter().chain(others)
    }
}

/// What is kept from instances.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reserved {
    /// CPU.
    pub cpu: MilliCpu,
    /// Memory.
    pub memory: Bytes,
}

/// What a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineResources {
    /// CPU.
    pub cpu: MilliCpu,
    /// Memory.
    pub memory: Bytes,
    /// Disk.
    pub disk: Bytes,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7620))
}

fn default_cgroup_parent() -> String {
    "/anyplace".into()
}

#[cfg(test)]
mod tests {
    use anyplace_model::DurationMs;

    use super::*;

    #[test]
    fn the_documented_file_is_read_and_an_unknown_field_is_refused() {
        let text = r#"
            data_dir = "/var/lib/anyplace/machine"
            advertise = "http://10.1.1.1:7620"
            machine = "ams-1"
            location_scheduler = "http://10.1.0.10:7610"
            token_file = "/etc/anyplace/machine.token"
            registry = "http://10.1.0.10:5000"
            registry_credentials_file = "/etc/anyplace/registry.credentials"
            address = "10.1.1.1"
            uplink = "eth0"
            instance_cidr = "10.1.1.64/26"
            protected_cidrs = ["10.1.0.0/24", "2001:db8:f::/48"]
            address6 = "2001:db8:f::1"
            reserved = { cpu = "0", memory = "256Mi" }
            resources = { cpu = "4", memory = "8Gi", disk = "50Gi" }
            image_budget = "30Gi"
            prewarm_rate = "20Mi"
            scrub = { every = "7d", rate = "8MiB" }
            [[gpus]]
            model = "H100"
            memory = "80Gi"
        "#;
        let config: Config = toml::from_str(text).unwrap();
        assert_eq!(config.listen, default_listen());
        assert_eq!(config.cgroup_parent, "/anyplace");
        assert_eq!(
            (config.image_budget, config.prewarm_rate),
            (Some(Bytes(30 << 30)), Some(Bytes(20 << 20)))
        );
        assert_eq!(config.reserved.memory, Bytes(256 << 20));
        assert_eq!(config.gpus[0].model, "H100");
        assert_eq!(config.scrub, ScrubConfig { every: DurationMs(7 * 86_400_000), rate: Bytes(8 << 20) });
        assert_eq!(config.registries().count(), 1);
        let others = r#"
            registries = ["http://10.1.0.11:5000", { url = "http://10.1.0.12:5000", credentials_file = "/x" }]
        "#;
        let several: Config = toml::from_str(&format!("{others}{text}")).unwrap();
        let shared = Some(Path::new("/etc/anyplace/registry.credentials"));
        assert_eq!(
            several.registries().collect::<Vec<_>>(),
            [
                ("http://10.1.0.10:5000", shared),
                ("http://10.1.0.11:5000", shared),
                ("http://10.1.0.12:5000", Some(Path::new("/x")))
            ]
        );
        let error = toml::from_str::<Config>(&format!("registries = [5]\n{text}")).unwrap_err().to_string();
        assert!(error.contains("expected a URL, or { url = "), "{error}");
        let error = toml::from_str::<Config>(&format!("uplinks = 1\n{text}")).unwrap_err().to_string();
        assert!(error.contains("unknown field `uplinks`"), "{error}");
    }
}
