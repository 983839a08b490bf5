//! The platform on a testbed: every role as a process of the one binary, configured and started as an operator would.
//!
//! Order: global scheduler; a token for each location; registries and location schedulers; then an agent and a router
//! on each machine. All waiting is for the documented `/healthz`.

mod config;

pub use config::window as off_peak_window;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::http::http_get;
use crate::node::{Node, Process};
use crate::procs::MACHINE_VARIABLE;
use crate::testbed::{Testbed, target_dir};
use crate::topology::{GLOBAL_ADDRESS, Location, Machine};
use crate::{cgroups, netns, procs};

/// How long a role may take from its start to its first answer.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Where systemd mounts a version 2 hierarchy beside those of version 1.
const UNIFIED: &str = "/sys/fs/cgroup/unified";
/// How long a role may take to end when asked.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// One role on one node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The global scheduler.
    Global,
    /// A location's scheduler, by location.
    Location(String),
    /// A location's registry, by location.
    Registry(String),
    /// A machine's agent, by machine.
    Agent(String),
    /// A machine's router, by machine.
    Router(String),
}

impl Role {
    /// The binary's subcommand.
    fn subcommand(&self) -> &'static str {
        match self {
            Self::Global => "global-scheduler",
            Self::Location(_) => "location-scheduler",
            Self::Registry(_) => "registry",
            Self::Agent(_) => "machine-agent",
            Self::Router(_) => "state-router",
        }
    }

    /// Name of its log, config and data.
    pub fn label(&self) -> String {
        match self {
            Self::Global => "global-scheduler".to_owned(),
            Self::Location(at) | Self::Registry(at) | Self::Agent(at) | Self::Router(at) => {
                format!("{}-{at}", self.subcommand())
            }
        }
    }
}

/// What may differ between scenarios.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Off-peak window by location, in its local time (`22:00-06:00`); a location without one gets a window half a day
    /// away, so that no job starts by chance of the hour.
    pub off_peak: BTreeMap<String, String>,
    /// GPUs (model, memory) of each machine.
    pub gpus: BTreeMap<String, Vec<(String, String)>>,
    /// How long an instance that ends keeps its connections, in milliseconds; by default as without configuration.
    pub drain_ms: Option<u64>,
    /// The binary; by default the one that was built with this program.
    pub binary: Option<PathBuf>,
    /// Hides a version 2 cgroup hierarchy that is mounted beside those of version 1, as a machine that has only these
    /// looks: crun refuses the mixture.
    pub plain_cgroups: bool,
}

/// A platform that runs on a testbed, which it owns.
#[derive(Debug)]
pub struct Platform {
    bed: Testbed,
    binary: PathBuf,
    options: Options,
    processes: Mutex<BTreeMap<Role, Process>>,
}

impl Platform {
    /// Starts everything and returns when all schedulers and registries answer. Agents and routers have been started
    /// then; what they do shows in the API.
    pub fn start(bed: Testbed, options: Options) -> Result<Self> {
        let binary = match &options.binary {
            Some(binary) => binary.clone(),
            None => target_dir()?.join("anyplace"),
        };
        if !binary.exists() {
            bail!("{} is not there; run `cargo build -p anyplace`", binary.display());
        }
        let platform = Self { bed, binary, options, processes: Mutex::default() };
        platform.start_all()?;
        Ok(platform)
    }

    fn start_all(&self) -> Result<()> {
        fs::create_dir_all(self.config_dir())?;
        write_secret(&self.registry_credentials(), &format!("anyplace:{}\n", random_hex()?))?;
        self.start_role(&Role::Global)?;
        self.wait_healthy(&Role::Global)?;
        let locations = self.bed.topology().locations.clone();
        in_parallel(&locations, |location| {
            self.start_role(&Role::Registry(location.name.clone()))?;
            let token = self.location_token(&location.name);
            let file = token.to_string_lossy().into_owned();
            let args =
                ["token", "create", "--role", "location", "--location", &location.name, "--out", &file];
            netns::run(&mut self.cli(args))?;
            self.start_role(&Role::Location(location.name.clone()))
        })?;
        in_parallel(&locations, |location| {
            self.wait_healthy(&Role::Location(location.name.clone()))?;
            // The agents and routers of the location share the token that its scheduler made.
            let made = self.data_dir(&Role::Location(location.name.clone())).join("machine.token");
            let token = fs::read_to_string(&made).with_context(|| format!("read {}", made.display()))?;
            write_secret(&self.machine_token(&location.name), &token)?;
            for machine in self.bed.topology().machines_of(location) {
                self.start_role(&Role::Agent(machine.name.clone()))?;
                self.start_role(&Role::Router(machine.name))?;
            }
            self.wait_healthy(&Role::Registry(location.name.clone()))
        })
    }

    /// The testbed below.
    pub fn bed(&self) -> &Testbed {
        &self.bed
    }

    /// A run of the command line, on the global scheduler's node with an operator's environment.
    pub fn cli<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = self.global_node().command(&self.binary);
        command
            .args(args)
            .env("ANYPLACE_URL", format!("http://{GLOBAL_ADDRESS}:7600"))
            .env("ANYPLACE_TOKEN_FILE", self.data_dir(&Role::Global).join("admin.token"))
            .env("ANYPLACE_REGISTRY", self.registry_url())
            .env("ANYPLACE_REGISTRY_CREDENTIALS_FILE", self.registry_credentials());
        command
    }

    /// The same, run to its end: its standard output, or an error with all it printed.
    pub fn cli_output<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
        netns::run(&mut self.cli(args))
    }

    /// URL of the home registry.
    pub fn registry_url(&self) -> String {
        let home = self.bed.topology().locations.first().map(Location::control_address);
        format!("http://{}:5000", home.unwrap_or(GLOBAL_ADDRESS))
    }

    /// The file with the registries' user and password.
    pub fn registry_credentials(&self) -> PathBuf {
        self.config_dir().join("registry.credentials")
    }

    /// A role's data folder.
    pub fn data_dir(&self, role: &Role) -> PathBuf {
        self.bed.state_dir().join("data").join(role.label())
    }

    /// The process of a role.
    pub fn process(&self, role: &Role) -> Result<Process> {
        self.processes().get(role).cloned().with_context(|| format!("{} was never started", role.label()))
    }

    /// Writes a role's config and starts it, again if it has ended.
    pub fn start_role(&self, role: &Role) -> Result<()> {
        let data = self.data_dir(role);
        fs::create_dir_all(&data)?;
        let config = self.config_dir().join(format!("{}.toml", role.label()));
        fs::write(&config, self.config(role)?)?;
        let (node, machine) = match role {
            Role::Global => ("global".to_owned(), None),
            Role::Location(at) | Role::Registry(at) => (self.location(at)?.control(), None),
            Role::Agent(machine) | Role::Router(machine) => (machine.clone(), Some(machine)),
        };
        let node = self.bed.node(&node)?;
        let hide = self.options.plain_cgroups && matches!(role, Role::Agent(_));
        let mut command = if hide && Path::new(UNIFIED).join("cgroup.procs").exists() {
            let mut shell = node.command("unshare");
            let script = format!("umount {UNIFIED} && exec \"$0\" \"$@\"");
            shell.args(["--mount", "sh", "-c", &script]).arg(&self.binary);
            shell
        } else {
            node.command(&self.binary)
        };
        command.arg(role.subcommand()).arg("--config").arg(&config);
        if let Some(machine) = machine {
            command.env(MACHINE_VARIABLE, machine);
        }
        let process = node.spawn(&role.label(), command)?;
        self.processes().insert(role.clone(), process);
        Ok(())
    }

    /// Ends a role with SIGTERM and starts it again.
    pub fn restart_role(&self, role: &Role) -> Result<()> {
        self.process(role)?.stop(STOP_TIMEOUT)?;
        self.start_role(role)
    }

    /// Waits until a role answers `/healthz`; an error with the end of its log if it doesn't.
    pub fn wait_healthy(&self, role: &Role) -> Result<()> {
        let process = self.process(role)?;
        let url = format!("{}/healthz", self.url(role)?);
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let answer = http_get(self.global_node(), &url, Duration::from_secs(1));
            if answer.as_ref().is_ok_and(|response| response.status == 200) {
                return Ok(());
            }
            process.check()?;
            if Instant::now() > deadline {
                let seen =
                    answer.map_or_else(|error| format!("{error:#}"), |response| response.status.to_string());
                bail!("{url}: {seen}; its log ends with:\n{}", process.log_tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// An error that names the roles which ended by themselves, with the ends of their logs.
    pub fn check(&self) -> Result<()> {
        self.processes().values().try_for_each(Process::check)
    }

    /// Processes of the containers on a machine, by cgroup, whose command line contains `part`.
    pub fn container_processes(&self, machine: &str, part: &str) -> Vec<i32> {
        let folders = cgroups::of_bed(self.bed.name()).into_iter().map(|folder| folder.join(machine));
        let mut pids: Vec<i32> = folders.flat_map(|folder| cgroups::pids(&folder)).collect();
        pids.sort_unstable();
        pids.dedup();
        let line = |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        pids.retain(|pid| String::from_utf8_lossy(&line(pid)).replace('\0', " ").contains(part));
        // A server's children, which come and go with requests, carry its command line too.
        let servers = pids.clone();
        pids.retain(|pid| procs::parent(*pid).is_some_and(|parent| !servers.contains(&parent)));
        pids
    }

    /// Copies all logs to a folder, for a look after the testbed has gone.
    pub fn save_logs(&self, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(self.bed.state_dir().join("logs"))? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(())
    }

    /// Removes the testbed with everything on it.
    pub fn destroy(self) -> Result<()> {
        self.bed.destroy()
    }

    fn global_node(&self) -> &Node {
        // Every testbed has this node; the lookup is by a name that the topology fixes.
        #[allow(clippy::expect_used)]
        self.bed.node("global").expect("every topology has the global node")
    }

    fn location(&self, name: &str) -> Result<&Location> {
        self.bed.topology().location(name).with_context(|| format!("no location `{name}`"))
    }

    fn url(&self, role: &Role) -> Result<String> {
        Ok(match role {
            Role::Global => format!("http://{GLOBAL_ADDRESS}:7600"),
            Role::Location(at) => format!("http://{}:7610", self.location(at)?.control_address()),
            Role::Registry(at) => format!("http://{}:5000", self.location(at)?.control_address()),
            Role::Agent(machine) => format!("http://{}:7620", self.bed.machine(machine)?.address()),
            Role::Router(_) => bail!("a router has no HTTP address"),
        })
    }

    fn config(&self, role: &Role) -> Result<String> {
        let data = self.data_dir(role);
        let options = &self.options;
        Ok(match role {
            Role::Global => config::global(&data),
            Role::Location(at) => {
                let location = self.location(at)?;
                let window = match options.off_peak.get(at) {
                    Some(window) => window.clone(),
                    None => config::window_far_away(location)?,
                };
                config::location(location, &data, &self.location_token(at), &window, options.drain_ms)
            }
            Role::Registry(at) => {
                let home = self.registry_url();
                let location = self.location(at)?;
                let own = format!("http://{}:5000", location.control_address());
                let upstream = (own != home).then_some(home.as_str());
                config::registry(location, &data, &self.registry_credentials(), upstream)
            }
            Role::Agent(name) => {
                let machine = self.bed.machine(name)?;
                let gpus = options.gpus.get(name).map(Vec::as_slice).unwrap_or_default();
                config::agent(&self.machine_config(&machine, &data)?, &self.registry_credentials(), gpus)
            }
            Role::Router(name) => {
                let machine = self.bed.machine(name)?;
                let (include, control) = self.bed.bird_files(name);
                let pins = self.bed.bpf_dir().join(name);
                config::router(&self.machine_config(&machine, &data)?, &pins, &include, &control)
            }
        })
    }

    fn machine_config(&self, machine: &Machine, data: &Path) -> Result<config::OnMachine> {
        Ok(config::OnMachine {
            data_dir: data.to_owned(),
            machine: machine.clone(),
            control: self.location(&machine.location)?.control_address(),
            token_file: self.machine_token(&machine.location),
            cgroup_parent: self.bed.cgroup_parent(&machine.name),
        })
    }

    fn config_dir(&self) -> PathBuf {
        self.bed.state_dir().join("etc")
    }

    fn location_token(&self, location: &str) -> PathBuf {
        self.config_dir().join(format!("{location}.location.token"))
    }

    fn machine_token(&self, location: &str) -> PathBuf {
        self.config_dir().join(format!("{location}.machine.token"))
    }

    fn processes(&self) -> MutexGuard<'_, BTreeMap<Role, Process>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does the same for all items at once; the first error wins.
fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(|| work(item))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => bail!("a start thread panicked"),
        })
    })
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

fn random_hex() -> Result<String> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
