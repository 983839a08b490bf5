//! A job on a prewarmed machine: from the moment when its submission is accepted to the first thing that its program
//! writes, on a whole platform (global scheduler, location scheduler, registry, agent, router), with crun.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use anyplace_tests::platform::{Options, Role};
use anyplace_tests::{Platform, Testbed, Topology, write_hello_image};

use super::super::sample::median;
use crate::shell;

const JOBS: u32 = 20;
/// What is left to do after a job's end, such as the schedulers' records and the kernel's removal of its network.
const SETTLE: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(30);
const MACHINE: &str = "ams-1";

/// Milliseconds to the first output of jobs and those of crun by itself, and what came from the registry meanwhile.
pub(crate) struct Starts {
    pub(crate) median_ms: f64,
    pub(crate) raw_crun_ms: f64,
    pub(crate) fetched_bytes: u64,
}

/// Counts in the machine's kernel what comes from the registry's port: refusals too, so that no attempt stays unseen.
const COUNTER: &str = "table inet bench { counter fetched { }; chain input { type filter hook input priority 0; \
    tcp sport 5000 counter name fetched; }; }";

pub(crate) fn measure(binary: &Path, work: &Path) -> Result<Starts> {
    // The testbed's own programs.
    let build = shell::cargo(&["build", "--quiet", "-p", "anyplace-tests", "--bins"])?;
    shell::show(build)?;
    let mut topology = Topology::of_locations(1);
    topology.machines_per_location = 1;
    let bed = Testbed::create("bench", &topology)?;
    let options = Options { binary: Some(binary.to_owned()), plain_cgroups: true, ..Options::default() };
    let platform = Platform::start(bed, options)?;
    let result = on(&platform, work);
    platform.destroy()?;
    result
}

fn on(platform: &Platform, work: &Path) -> Result<Starts> {
    let rootfs = work.join("hello");
    write_hello_image(&rootfs)?;
    let pushed = platform.cli_output(["push", &*rootfs.to_string_lossy(), "hello:v1"])?;
    platform.cli_output(["prewarm", "set", "hello:v1", "--wait"])?;
    // Without a registry nothing can be fetched: what starts now starts from what is there.
    platform.process(&Role::Registry("ams".to_owned()))?.stop(PATIENCE)?;
    let machine = platform.bed().node(MACHINE)?;
    shell::output(machine.command("nft").arg(COUNTER))?;
    let mut millis = Vec::new();
    for number in 0..JOBS {
        let name = format!("start-{number}");
        let took = one(platform, pushed.trim(), &name)?;
        eprintln!("{name}: {took:.1} ms");
        millis.push(took);
        gone(platform)?;
    }
    let mut list = machine.command("nft");
    let counted = shell::output(list.args(["--json", "list", "counter", "inet", "bench", "fetched"]))?;
    let counted: serde_json::Value = serde_json::from_str(&counted)?;
    let counters = counted["nftables"].as_array().context("nftables")?;
    let bytes = counters.iter().find_map(|entry| entry["counter"]["bytes"].as_u64());
    Ok(Starts {
        // The first job finds caches of all kinds cold.
        median_ms: median(&millis[1..]),
        raw_crun_ms: raw_crun(&rootfs, work)?,
        fetched_bytes: bytes.context("a counter")?,
    })
}

/// Submits a job; milliseconds from its acceptance to its first line.
fn one(platform: &Platform, image: &str, name: &str) -> Result<f64> {
    let spec = serde_json::json!({
        "kind": "Job", "name": name, "image": image, "command": ["/bin/busybox", "echo", "running"],
        "scheduling_policy": "anytime", "resources": { "cpu": "100m", "memory": "64Mi" },
    });
    let token = std::fs::read_to_string(platform.data_dir(&Role::Global).join("admin.token"))?;
    let mut curl = platform.bed().node("global")?.command("curl");
    curl.args(["--silent", "--show-error", "--fail-with-body", "--json", &spec.to_string()]);
    curl.args([
        "--header",
        &format!("Authorization: Bearer {}", token.trim()),
        "http://10.0.0.10:7600/v1/jobs",
    ]);
    let job: serde_json::Value = serde_json::from_str(&shell::output(&mut curl)?)?;
    let accepted = seconds(job["created_at"].as_str().context("created_at")?)?;
    let logs = platform.data_dir(&Role::Agent(MACHINE.to_owned())).join("logs");
    let begun = Instant::now();
    loop {
        if let Some(line) = first_line(&logs, name) {
            let stamp = line.split(' ').next().context("a time")?;
            return Ok((seconds(stamp)? - accepted) * 1e3);
        }
        if begun.elapsed() > PATIENCE {
            let why = platform.cli_output(["why", "job", name]).unwrap_or_default();
            bail!("{name} has written nothing: {why}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until nothing of the job is left on the machine: the next start is not beside its removal.
fn gone(platform: &Platform) -> Result<()> {
    let instances = platform.data_dir(&Role::Agent(MACHINE.to_owned())).join("instances");
    let begun = Instant::now();
    while std::fs::read_dir(&instances)?.next().is_some() {
        if begun.elapsed() > PATIENCE {
            bail!("{} does not become empty", instances.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(SETTLE);
    Ok(())
}

/// `crun run` of the same program by itself: the median's milliseconds.
fn raw_crun(rootfs: &Path, work: &Path) -> Result<f64> {
    let bundle = work.join("bundle");
    std::fs::create_dir_all(&bundle)?;
    // crun wants it there.
    std::fs::create_dir_all(rootfs.join("dev"))?;
    let spec = serde_json::json!({
        "ociVersion": "1.0.2", "root": { "path": rootfs },
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["/bin/busybox", "true"], "cwd": "/" },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network" }] },
    });
    std::fs::write(bundle.join("config.json"), spec.to_string())?;
    let script =
        "umount /sys/fs/cgroup/unified 2>/dev/null; exec crun --root \"$1/state\" run --bundle \"$1\" raw";
    let mut millis = Vec::new();
    for _ in 0..JOBS {
        let mut run = Command::new("unshare");
        run.args(["--mount", "sh", "-c", script, "sh"]).arg(&bundle);
        let begun = Instant::now();
        shell::output(&mut run)?;
        millis.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(&millis))
}

/// The log's first line of the job's only attempt.
fn first_line(logs: &Path, job: &str) -> Option<String> {
    let folder = std::fs::read_dir(logs)
        .ok()?
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&format!("{job}-")))?;
    let text = std::fs::read_to_string(folder.path().join("log")).ok()?;
    text.lines().find(|line| line.ends_with("running")).map(str::to_owned)
}

/// RFC 3339 as seconds since 1970.
fn seconds(stamp: &str) -> Result<f64> {
    let text = shell::output(Command::new("date").args(["-d", stamp, "+%s.%N"]))?;
    text.trim().parse().context("a time")
}
