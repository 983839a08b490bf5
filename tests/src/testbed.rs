//! The testbed as a whole: creating it, breaking parts of it, removing it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::MsFlags;

use crate::bird::{self, Files};
use crate::cleanup::{self, OwnerLock};
use crate::node::{Node, Process};
use crate::procs::Selection;
use crate::topology::{Machine, Topology};
use crate::{cgroups, network};

/// How long BGP may take until every edge knows every machine.
const CONVERGENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// A running testbed; dropping it removes it.
#[derive(Debug)]
pub struct Testbed {
    name: String,
    topology: Topology,
    state: PathBuf,
    nodes: BTreeMap<String, Node>,
    lock: Option<OwnerLock>,
    /// XDP programs on the edges; detached when closed.
    pass: Vec<OwnedFd>,
}

impl Testbed {
    /// Removes what an earlier testbed of this name left, and builds a new one: network up, BGP converged, nothing
    /// announced yet but the instances' prefixes.
    pub fn create(name: &str, topology: &Topology) -> Result<Self> {
        cleanup::check_name(name)?;
        if !nix::unistd::geteuid().is_root() {
            bail!("the testbed makes network namespaces and needs root; run it as root");
        }
        // The lock's file goes with the clean-up, so take it again on the new folder.
        if cleanup::state_dir(name).exists() {
            let old = cleanup::lock(name)?;
            cleanup::remove(name)?;
            drop(old);
        }
        cleanup::remove(name)?;
        let lock = cleanup::lock(name)?;
        let state = cleanup::state_dir(name);
        let nodes =
            topology.nodes().into_iter().map(|node| (node.clone(), Node::new(name, &node, &state))).collect();
        let mut bed = Self {
            name: name.into(),
            topology: topology.clone(),
            state,
            nodes,
            lock: Some(lock),
            pass: Vec::new(),
        };
        bed.build().with_context(|| format!("build testbed `{name}`"))?;
        Ok(bed)
    }

    fn build(&mut self) -> Result<()> {
        let bpf = self.bpf_dir();
        std::fs::create_dir_all(&bpf)?;
        nix::mount::mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount a bpffs at {}", bpf.display()))?;
        network::namespaces(&self.name, &self.topology)?;
        self.pass = network::wires(&self.name, &self.topology)?;
        network::delayed_links(&self.name, &self.topology, &self.state.join("logs"))?;
        for location in &self.topology.locations {
            self.start_bird(&location.edge(), &bird::edge_config(&self.topology, location))?;
            self.start_bird(&location.client(), &bird::client_config(location))?;
        }
        for machine in self.topology.machines() {
            self.announce_prefixes(&machine.name, &[])?;
            self.start_bird(&machine.name, &self.machine_config(&machine, false)?)?;
        }
        self.wait_for_routes()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is made of.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The folder of all its files.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// Its bpffs; each machine's router pins below it.
    pub fn bpf_dir(&self) -> PathBuf {
        self.state.join("bpf")
    }

    /// The parent cgroup of one machine's containers.
    pub fn cgroup_parent(&self, machine: &str) -> String {
        format!("/{}/{machine}", cgroups::parent(&self.name))
    }

    /// The include file of a machine's bird, and its control socket: what the state router's config names.
    pub fn bird_files(&self, machine: &str) -> (PathBuf, PathBuf) {
        let files = Files::new(&self.state, machine);
        (files.include, files.control)
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        let known = || self.nodes.keys().cloned().collect::<Vec<_>>().join(", ");
        self.nodes.get(name).with_context(|| format!("no node `{name}`; there are {}", known()))
    }

    /// A machine by name.
    pub fn machine(&self, name: &str) -> Result<Machine> {
        self.topology.machine(name).with_context(|| format!("no machine `{name}`"))
    }

    /// Runs a command of a node's bird.
    pub fn bird(&self, node: &str, words: &[&str]) -> Result<String> {
        bird::control(&Files::new(&self.state, node), words)
    }

    /// Writes a machine's include file, as its state router would; bird reads it at the next `configure`.
    pub fn announce_prefixes(&self, machine: &str, prefixes: &[&str]) -> Result<()> {
        let files = Files::new(&self.state, machine);
        if let Some(folder) = files.include.parent() {
            std::fs::create_dir_all(folder)?;
        }
        Ok(std::fs::write(files.include, bird::vip_include(prefixes))?)
    }

    /// Withdraws the VIPs of a whole location from BGP, by the operator's hand: its machines go on, its routers don't
    /// notice.
    pub fn withdraw_location(&self, location: &str) -> Result<()> {
        self.set_withdrawn(location, true)
    }

    /// Undoes [`Self::withdraw_location`].
    pub fn announce_location(&self, location: &str) -> Result<()> {
        self.set_withdrawn(location, false)
    }

    fn set_withdrawn(&self, location: &str, withdrawn: bool) -> Result<()> {
        let location =
            self.topology.location(location).with_context(|| format!("no location `{location}`"))?;
        let machines = self.topology.machines_of(location);
        for machine in &machines {
            let config = self.machine_config(machine, withdrawn)?;
            std::fs::write(Files::new(&self.state, &machine.name).config, config)?;
        }
        for machine in &machines {
            // A dead machine has nothing to withdraw.
            if let Err(error) = self.bird(&machine.name, &["configure"])
                && self.is_alive(&machine.name)
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Loses a machine at once, as by a power cut: its link first, then every process on it and every container.
    pub fn kill_machine(&self, machine: &str) -> Result<()> {
        let node = self.node(machine)?;
        self.machine(machine)?;
        node.run("ip", &["link", "set", "eth0", "down"])?;
        Selection::of_machine(&self.name, machine).kill()
    }

    /// Brings a killed machine's link and BGP back; its agent and router are the platform's to start.
    pub fn revive_machine(&self, machine: &str) -> Result<()> {
        let found = self.machine(machine)?;
        let node = self.node(machine)?;
        let (gateway, instances) = (found.gateway().to_string(), found.instance_cidr());
        node.run("ip", &["link", "set", "eth0", "up"])?;
        node.run("ip", &["route", "replace", "default", "via", &gateway])?;
        let gateway6 = found.gateway6().to_string();
        node.run("ip", &["-6", "route", "replace", "default", "via", &gateway6])?;
        node.run("ip", &["route", "replace", "unreachable", &instances, "metric", "9999"])?;
        self.announce_prefixes(machine, &[])?;
        self.start_bird(machine, &self.machine_config(&found, false)?)?;
        Ok(())
    }

    /// Processes that run on a machine.
    pub fn processes_on(&self, machine: &str) -> Vec<i32> {
        Selection::of_machine(&self.name, machine).pids()
    }

    /// Removes everything; an error names what would not go.
    pub fn destroy(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        if self.lock.is_none() {
            return Ok(());
        }
        let result = cleanup::remove(&self.name);
        self.lock = None;
        result
    }

    fn is_alive(&self, machine: &str) -> bool {
        !self.processes_on(machine).is_empty()
    }

    fn machine_config(&self, machine: &Machine, withdrawn: bool) -> Result<String> {
        let location = self.topology.location(&machine.location).context("a machine's location")?;
        let files = Files::new(&self.state, &machine.name);
        Ok(bird::machine_config(location, machine, &files.include, withdrawn))
    }

    fn start_bird(&self, node: &str, config: &str) -> Result<Process> {
        bird::start(self.node(node)?, &Files::new(&self.state, node), config)
    }

    /// Waits until every edge has a route to every machine's instances, every control address and every client's IPv6.
    fn wait_for_routes(&self) -> Result<()> {
        let deadline = Instant::now() + CONVERGENCE_TIMEOUT;
        for location in &self.topology.locations {
            let edge = self.node(&location.edge())?;
            loop {
                let table =
                    edge.run("ip", &["route", "show"])? + &edge.run("ip", &["-6", "route", "show"])?;
                let known: Vec<_> = table.lines().filter_map(|line| line.split(' ').next()).collect();
                let mut missing: Vec<_> =
                    self.topology.machines().iter().map(Machine::instance_cidr).collect();
                missing.extend(
                    self.topology.locations.iter().map(|far| format!("{}/31", far.control_address())),
                );
                missing.extend(
                    self.topology.locations.iter().map(|far| format!("{}/127", bird::client_gateway6(far))),
                );
                missing.retain(|prefix| !known.contains(&prefix.as_str()));
                if missing.is_empty() {
                    break;
                }
                if Instant::now() > deadline {
                    let sessions = self.bird(&location.edge(), &["show", "protocols"]).unwrap_or_default();
                    bail!(
                        "edge {} has no route to {}; its sessions:\n{sessions}",
                        location.name,
                        missing.join(", ")
                    );
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("testbed `{}` was not removed: {error:#}", self.name);
        }
    }
}

/// Where cargo puts this build's programs.
pub fn target_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find this program")?;
    let folder = program.parent().context("this program's folder")?;
    // Tests are in `deps`, one below the programs.
    let is_deps = folder.file_name().is_some_and(|name| name == "deps");
    Ok(if is_deps { folder.parent().context("the target folder")?.to_owned() } else { folder.to_owned() })
}

/// For tests: whether they can run. As root they must; elsewhere they say that they are skipped, except in CI, where a
/// skipped test would pass for a passed one.
pub fn require_root(test: &str) -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    let in_ci = std::env::var_os("CI").is_some();
    assert!(is_root || !in_ci, "{test} needs root (network namespaces) and CI is set; run the tests as root");
    if !is_root {
        eprintln!("skipped: {test} needs root (network namespaces)");
        return false;
    }
    for program in ["ip", "bird", "birdc", "ethtool"] {
        let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
        let found = found.is_ok_and(|output| output.status.success());
        assert!(found, "{test} needs `{program}`; run `cargo xtask setup`");
    }
    true
}
