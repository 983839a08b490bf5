//! A started platform for one scenario, and ways to look at it from outside.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use anyplace_tests::platform::Options;
use anyplace_tests::{
    HELLO_ENTRY, Load, LoadReport, Platform, Request, Testbed, Topology, VIP_PREFIX, http_get, leftovers,
    require_root, target_dir, write_hello_image,
};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

/// Between two requests of one client's steady stream.
const INTERVAL: Duration = Duration::from_millis(25);
/// From connect to the last byte of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// A platform with the image `hello:v1` in its registry. Removed when dropped; its logs are kept if the test failed.
pub(super) struct World {
    pub(super) platform: Platform,
}

impl World {
    /// Nothing where such tests can't run.
    pub(super) fn start(bed: &str, locations: usize) -> Option<Self> {
        Self::start_with(bed, locations, Options::default())
    }

    /// The same, with a platform that isn't like all others.
    pub(super) fn start_with(bed: &str, locations: usize, options: Options) -> Option<Self> {
        if !require_root(bed) {
            return None;
        }
        let bed = Testbed::create(bed, &Topology::of_locations(locations)).unwrap();
        let rootfs = bed.state_dir().join("image");
        write_hello_image(&rootfs).unwrap();
        let world = Self { platform: Platform::start(bed, options).unwrap() };
        // Routers load their programs while the rest starts already; on a busy machine they take longer.
        for machine in world.machines() {
            let (include, _) = world.platform.bed().bird_files(&machine);
            wait_for("the announcement", 60, || match std::fs::read_to_string(&include).unwrap() {
                text if text.contains(VIP_PREFIX) => Ok(()),
                text => Err(format!("{machine}: {text}")),
            });
        }
        world
            .platform
            .cli_output(["push", rootfs.to_str().unwrap(), "hello:v1", "--entrypoint", HELLO_ENTRY])
            .unwrap();
        Some(world)
    }

    /// Removes everything; nothing may be left.
    pub(super) fn end(self) {
        let name = self.platform.bed().name().to_owned();
        drop(self);
        assert_eq!(leftovers(&name), Vec::<String>::new());
    }

    /// Runs the command line; the result whatever it is.
    pub(super) fn cli(&self, args: &[&str]) -> Output {
        self.platform.cli(args.iter().copied()).output().unwrap()
    }

    /// Runs the command line, which has to succeed; its standard output.
    pub(super) fn cli_ok(&self, args: &[&str]) -> String {
        self.platform.cli_output(args.iter().copied()).unwrap()
    }

    /// Writes a spec; the path for `-f`.
    pub(super) fn spec(&self, name: &str, text: &str) -> String {
        let path = self.platform.bed().state_dir().join(format!("{name}.yaml"));
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Applies a deployment and waits until it is ready; its virtual IP.
    pub(super) fn apply(&self, name: &str, text: &str) -> String {
        let path = self.spec(name, text);
        self.cli_ok(&["apply", "-f", &path, "--wait", "--timeout", "40s"]);
        self.vip(name)
    }

    pub(super) fn vip(&self, name: &str) -> String {
        self.json(&["get", "deployments", name])["vip"].as_str().unwrap().to_owned()
    }

    /// The same with `-o json`; the one object of a list of one.
    pub(super) fn json(&self, args: &[&str]) -> Value {
        match serde_json::from_str(&self.cli_ok(&[args, &["-o", "json"]].concat())).unwrap() {
            Value::Array(mut list) if list.len() == 1 => list.remove(0),
            other => other,
        }
    }

    /// What a client reads at a virtual IP.
    pub(super) fn call(&self, client: &str, vip: &str) -> anyhow::Result<String> {
        let node = self.platform.bed().node(client)?;
        let answer = http_get(node, &format!("http://{vip}/"), CALL_TIMEOUT)?;
        anyhow::ensure!(answer.status == 200, "{client} got status {}", answer.status);
        Ok(answer.body)
    }

    pub(super) fn clients(&self) -> Vec<String> {
        self.platform.bed().topology().locations.iter().map(|location| location.client()).collect()
    }

    pub(super) fn machines(&self) -> Vec<String> {
        self.platform.bed().topology().machines().into_iter().map(|machine| machine.name).collect()
    }

    /// The containers' processes whose command line contains `part`, on all machines.
    pub(super) fn pids(&self, part: &str) -> BTreeSet<i32> {
        self.machines().iter().flat_map(|machine| self.platform.container_processes(machine, part)).collect()
    }

    /// Steady requests from every client.
    pub(super) fn load(&self, vip: &str) -> Vec<(String, Load)> {
        let target: SocketAddr = format!("{vip}:80").parse().unwrap();
        let start = |client: String| {
            let load = self.load_from(&client, target);
            (client, load)
        };
        self.clients().into_iter().map(start).collect()
    }

    /// Steady requests from one client.
    pub(super) fn load_from(&self, client: &str, target: SocketAddr) -> Load {
        Load::start(self.platform.bed().node(client).unwrap(), target, INTERVAL).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let folder: PathBuf = target_dir().unwrap_or_default().join("scenario-logs");
            let folder = folder.join(self.platform.bed().name());
            match self.platform.save_logs(&folder) {
                Ok(()) => eprintln!("the logs of all processes are in {}", folder.display()),
                Err(error) => eprintln!("the logs can't be kept: {error:#}"),
            }
        }
    }
}

/// Ends the streams; every request must have been answered.
pub(super) fn all_answered(loads: Vec<(String, Load)>) {
    let stopped: Vec<(String, Vec<Request>)> =
        loads.into_iter().map(|(client, load)| (client, load.stop().unwrap())).collect();
    for (client, requests) in &stopped {
        let failed: Vec<&Result<String, String>> =
            requests.iter().map(|request| &request.result).filter(|result| result.is_err()).collect();
        assert!(requests.len() > 20, "{client} sent only {} requests", requests.len());
        assert!(
            failed.is_empty(),
            "{client}: {} of {} requests failed: {failed:?}",
            failed.len(),
            requests.len()
        );
    }
}

/// Ends the streams; what all clients noticed.
pub(super) fn report(loads: Vec<(String, Load)>) -> LoadReport {
    anyplace_tests::combine(loads.into_iter().map(|(_, load)| load.report().unwrap()))
}

/// Waits until `done` gives something; panics with what it said last.
pub(super) fn wait_for<T>(what: &str, seconds: u64, mut done: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        match done() {
            Ok(value) => return value,
            Err(seen) => assert!(Instant::now() < deadline, "waited {seconds} s for {what}: {seen}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs `work` in the network namespace of a process.
pub(super) fn in_network_of<T: Send>(pid: i32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// A deployment of the hello image with four instances, more of its spec following.
pub(super) fn hello(name: &str, instances: u32, more: &str) -> String {
    format!(
        "kind: Deployment
name: {name}
image: hello:v1
resources: {{cpu: 50m, memory: 32Mi}}
ports: [{{port: 80, container_port: 8080}}]
instances: {{min: {instances}}}
health:
  readiness:
    http: {{path: /, port: 8080}}
    interval: 200ms
{more}"
    )
}
