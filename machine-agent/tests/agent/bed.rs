//! A machine for tests: a fresh network namespace with an uplink into a second one (the fabric), a location
//! scheduler that serves what the test wants and keeps what the agent reports, and a registry with one image.
//!
//! Everything is removed when the bed is dropped, also by a panic.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_machine_agent::{Config, run};
use anyplace_model::{
    Assignment, Health, ImageState, InstanceId, InstancePhase, InstanceStatus, MachineDesired, MachineReport,
    Resources, Workload,
};
use anyplace_service::Feed;
use nix::sched::{CloneFlags, unshare};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    control::{Images, Scheduler, image, router},
    fabric::{Fabric, answer},
};

pub(crate) const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 1);
/// In the fabric; where clouds tell machines their secrets.
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// In the fabric, and protected.
pub(crate) const PROTECTED: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 0);
/// In the fabric, and open to all.
pub(crate) const OPEN: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The same by IPv6; the machine has one of these addresses whether its agent knows it or not.
pub(crate) const MACHINE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 1);
pub(crate) const PROTECTED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 0);
pub(crate) const OPEN6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1);
/// In the fabric, and where clouds tell machines their secrets.
pub(crate) const PRIVATE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
pub(crate) const TOKEN: &str = "ap_test";
const CONTROL: &str = "127.0.0.1:7610";
const AGENT: &str = "127.0.0.1:7620";
const WAIT: Duration = Duration::from_secs(20);

pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    cgroup_parent: String,
    pub(crate) feed: Arc<Feed<MachineDesired>>,
    reports: watch::Receiver<Vec<MachineReport>>,
    agent: Option<JoinHandle<anyhow::Result<()>>>,
    pub(crate) shutdown: CancellationToken,
    control: CancellationToken,
    fabric: Fabric,
    /// Where the agent looks for the location scheduler.
    pub(crate) scheduler: String,
    /// Where it looks for images, and more of its configuration.
    pub(crate) settings: String,
    images: Images,
}

/// Runs a test in a bed; says why where it can't.
pub(crate) fn with<F: Future<Output = ()>>(test: impl FnOnce(Bed) -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "this test needs root; run it as root");
        eprintln!("skipped: needs root");
        return;
    }
    for (program, package) in [
        ("runc", "runc"),
        ("runsc", "runsc"),
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("busybox", "busybox-static"),
    ] {
        assert!(find(program).is_some(), "`{program}` is missing; run `apt-get install {package}`");
    }
    // A thread of its own, since it moves into another network namespace; the runtime's threads follow it there.
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let bed = Bed::new().await;
            test(bed).await;
        });
        runtime.shutdown_timeout(Duration::from_secs(1));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(crate) fn find(program: &str) -> Option<PathBuf> {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.exists())
}

impl Bed {
    async fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        anyplace_service::init_logging();
        anyplace_service::install_crypto_provider();
        let fabric = Fabric::new();
        let dir = tempfile::Builder::new().prefix("anyplace-agent-").tempdir().unwrap();
        fs::write(dir.path().join("token"), TOKEN).unwrap();
        let busybox = image(&dir.path().join("busybox"), b"").await;
        let images = Images::default();
        images.lock().unwrap().insert("busybox".into(), Arc::new(busybox));
        let feed = Arc::new(Feed::new());
        let (sender, reports) = watch::channel(Vec::new());
        let control = CancellationToken::new();
        let (of_feed, of_images) = (feed.clone(), images.clone());
        let router =
            router(Scheduler { feed: of_feed, reports: sender, images: of_images, control: control.clone() });
        let listener = tokio::net::TcpListener::bind(CONTROL).await.unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self {
            dir,
            cgroup_parent: format!("/anyplace-test-{}-{number}", std::process::id()),
            feed,
            reports,
            agent: None,
            shutdown: CancellationToken::new(),
            control,
            fabric,
            scheduler: format!("http://{CONTROL}"),
            settings: format!("registry = 'http://{CONTROL}'\n"),
            images,
        }
    }

    /// Puts another image into the registry, with so many bytes of noise, which it returns.
    pub(crate) async fn add_image(&self, name: &str, noise_bytes: usize) -> Vec<u8> {
        let mut word = name.bytes().fold(0x9e37_79b9_u64, |word, byte| word * 31 + u64::from(byte)) | 1;
        let mut noise = Vec::with_capacity(noise_bytes);
        while noise.len() < noise_bytes {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            noise.extend_from_slice(&word.to_le_bytes());
        }
        let image = image(&self.dir.path().join(name), &noise).await;
        self.images.lock().unwrap().insert(name.into(), Arc::new(image));
        noise
    }

    /// Waits for a report about an image.
    pub(crate) async fn until_image(&self, name: &str, what: &str, holds: impl Fn(&ImageState) -> bool) {
        let begun = Instant::now();
        let mut reports = self.reports.clone();
        let mut seen = 0;
        while begun.elapsed() < WAIT {
            let last = reports.borrow_and_update().clone();
            if last[seen..].iter().any(|report| report.images.get(name).is_some_and(&holds)) {
                return;
            }
            seen = last.len();
            let _ = tokio::time::timeout(Duration::from_millis(500), reports.changed()).await;
        }
        panic!("{name} did not become {what}: {:?}", self.reports().last().map(|report| &report.images));
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn config(&self) -> Config {
        let text = format!(
            r#"
            data_dir = "{data}"
            listen = "{AGENT}"
            advertise = "http://{AGENT}"
            machine = "test-1"
            location_scheduler = "{scheduler}"
            token_file = "{dir}/token"
            address = "{MACHINE}"
            uplink = "eth0"
            instance_cidr = "10.9.1.64/26"
            protected_cidrs = ["{PROTECTED}/32", "{PROTECTED6}/128"]
            cgroup_parent = "{parent}"
            resources = {{ cpu = "2", memory = "1Gi", disk = "1Gi" }}
            shim = "{shim}"
            {settings}
            "#,
            settings = self.settings,
            scheduler = self.scheduler,
            data = self.data().display(),
            dir = self.dir.path().display(),
            parent = self.cgroup_parent,
            shim = env!("CARGO_BIN_EXE_anyplace-shim"),
        );
        toml::from_str(&text).unwrap()
    }

    pub(crate) fn start_agent(&mut self) {
        self.shutdown = CancellationToken::new();
        self.agent = Some(tokio::spawn(run(self.config(), self.shutdown.clone())));
    }

    /// As by kill -9: wherever it is.
    pub(crate) async fn abort_agent(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.abort();
            match agent.await {
                Ok(ended) => ended.unwrap(),
                Err(error) => assert!(error.is_cancelled(), "the agent panicked: {error}"),
            }
        }
    }

    pub(crate) async fn stop_agent(&mut self) {
        self.shutdown.cancel();
        if let Some(agent) = self.agent.take() {
            agent.await.unwrap().unwrap();
        }
        // Without instances, a clean end leaves nothing at all.
        let tables = std::process::Command::new("nft").args(["list", "tables"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&tables.stdout), "");
        for cgroup in self.cgroups() {
            assert!(!cgroup.join("test-1").exists(), "{} stays", cgroup.display());
        }
    }

    pub(crate) fn want(&self, assignment: Assignment) {
        let key = format!("instances/{}", assignment.instance);
        self.feed.set(key, MachineDesired::Instance(Box::new(assignment)));
    }

    pub(crate) fn unwant(&self, instance: &str) {
        assert!(self.feed.remove(&format!("instances/{instance}")));
    }

    /// Reports so far.
    pub(crate) fn reports(&self) -> Vec<MachineReport> {
        self.reports.borrow().clone()
    }

    /// Waits for a report about an instance; none is for one that isn't there.
    pub(crate) async fn until(
        &mut self,
        instance: &str,
        what: &str,
        mut holds: impl FnMut(Option<&InstanceStatus>) -> bool,
    ) -> Option<InstanceStatus> {
        let mut last = None;
        let begun = Instant::now();
        let mut reports = self.reports.clone();
        while begun.elapsed() < WAIT {
            if let Some(report) = reports.borrow_and_update().last() {
                let status = report.instances.iter().find(|status| status.instance.as_str() == instance);
                if holds(status) {
                    return status.cloned();
                }
                last = status.cloned();
            }
            if let Some(agent) = &self.agent {
                assert!(!agent.is_finished(), "the agent has ended");
            }
            let _ = tokio::time::timeout(Duration::from_millis(500), reports.changed()).await;
        }
        let log = fs::read_to_string(self.data().join("logs").join(instance).join("log")).unwrap_or_default();
        panic!("{instance} did not become {what}: {last:#?}\nlog: {log}");
    }

    pub(crate) async fn until_phase(&mut self, instance: &str, phase: InstancePhase) -> InstanceStatus {
        let what = format!("{phase:?}");
        let status = self.until(instance, &what, |status| status.is_some_and(|status| status.phase == phase));
        status.await.unwrap()
    }

    pub(crate) async fn until_ready(&mut self, instance: &str, restarts: u32) -> InstanceStatus {
        let ready = |status: &InstanceStatus| status.ready && status.restarts == restarts;
        self.until(instance, "ready", |status| status.is_some_and(ready)).await.unwrap()
    }

    pub(crate) async fn until_gone(&mut self, instance: &str) {
        self.until(instance, "gone", |status| status.is_none()).await;
    }

    /// Process number of an instance's first process.
    pub(crate) fn init_pid(&self, instance: &str) -> i32 {
        let path = self.data().join("instances").join(instance).join("run/started.json");
        let started: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        started["init_pid"].as_i64().unwrap().try_into().unwrap()
    }

    pub(crate) fn shim_pid(&self, instance: &str) -> i32 {
        let path = self.data().join("instances").join(instance).join("run/shim.pid");
        fs::read_to_string(path).unwrap().parse().unwrap()
    }

    pub(crate) async fn agent_get(&self, path: &str, token: &str) -> (u16, String, String) {
        let response = reqwest::Client::new()
            .get(format!("http://{AGENT}{path}"))
            .bearer_auth(token)
            .send()
            .await
            .unwrap();
        let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
        (response.status().as_u16(), kind, response.text().await.unwrap())
    }

    /// One HTTP request from the fabric.
    pub(crate) fn get_from_fabric(&self, address: IpAddr, port: u16) -> std::io::Result<String> {
        let address = SocketAddr::new(address, port);
        self.fabric.run(move || {
            let limit = Duration::from_secs(2);
            let mut stream = TcpStream::connect_timeout(&address, limit)?;
            stream.set_read_timeout(Some(limit))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }

    /// Listens on port 9999 of the machine itself.
    pub(crate) fn answer_on_the_machine(&self) {
        answer();
    }

    /// What is left of instances, as seen from outside.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        let root = self.dir.path().to_string_lossy().into_owned();
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap().lines() {
            if line.contains(&root) {
                left.push(format!("mount {line}"));
            }
        }
        for folder in ["netns", "instances", "runtime/runc", "runtime/crun"] {
            for entry in fs::read_dir(self.data().join(folder)).into_iter().flatten() {
                left.push(format!("file {}", entry.unwrap().path().display()));
            }
        }
        for name in nix::net::if_::if_nameindex().unwrap().iter() {
            if name.name().to_bytes().starts_with(b"apv") {
                left.push(format!("interface {:?}", name.name()));
            }
        }
        for cgroup in self.cgroups() {
            for entry in fs::read_dir(cgroup.join("test-1")).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    left.push(format!("cgroup {}", entry.path().display()));
                }
            }
        }
        left.extend(self.processes().iter().map(|(pid, command)| format!("process {pid} {command}")));
        left
    }

    /// Shims and runtimes: what names the bed's folder.
    fn processes(&self) -> Vec<(i32, String)> {
        let root = self.dir.path().to_string_lossy().into_owned();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let command = fs::read_to_string(entry.path().join("cmdline")).ok()?.replace('\0', " ");
                command.contains(&root).then_some((pid, command))
            })
            .collect()
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let root = Path::new("/sys/fs/cgroup");
        let name = self.cgroup_parent.trim_start_matches('/');
        let split = fs::read_dir(root).unwrap().flatten().map(|entry| entry.path().join(name));
        split.chain([root.join(name)]).filter(|path| path.is_dir()).collect()
    }

    fn clean(&self) {
        self.control.cancel();
        self.shutdown.cancel();
        if let Some(agent) = &self.agent {
            agent.abort();
        }
        std::thread::sleep(Duration::from_millis(50));
        let kill = |pid| {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        };
        for _ in 0..50 {
            self.processes().iter().for_each(|(pid, _)| kill(*pid));
            for cgroup in self.cgroups() {
                remove_cgroup(&cgroup, &kill);
            }
            let root = self.dir.path().to_string_lossy().into_owned();
            for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
                if let Some(at) = line.split(' ').nth(4).filter(|at| at.starts_with(&root)) {
                    let _ = nix::mount::umount2(at, nix::mount::MntFlags::MNT_DETACH);
                }
            }
            if self.cgroups().is_empty() && self.processes().is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.clean();
    }
}

fn remove_cgroup(folder: &Path, kill: &impl Fn(i32)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path(), kill);
        }
    }
    for pid in fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
        kill(pid.parse().unwrap());
    }
    let _ = fs::remove_dir(folder);
}

/// An instance of busybox.
pub(crate) fn assignment(name: &str, host: u8, restart: bool, command: &[&str]) -> Assignment {
    let workload = if restart {
        Workload::Deployment("web".parse().unwrap())
    } else {
        Workload::Job(anyplace_model::AttemptId { job: "batch".parse().unwrap(), attempt: 1 })
    };
    Assignment {
        instance: InstanceId::new(name).unwrap(),
        workload,
        location: "test".parse().unwrap(),
        generation: 1,
        image: "busybox:v1".into(),
        command: Some(command.iter().map(|part| (*part).to_owned()).collect()),
        env: BTreeMap::new(),
        isolation: anyplace_model::Isolation::Container,
        resources: Resources::default(),
        gpus: vec![],
        address: Ipv4Addr::new(10, 9, 1, host),
        ports: vec![],
        health: Health::default(),
        restart,
        timeout_ms: None,
        draining: false,
    }
}
