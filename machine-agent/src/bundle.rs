//! The OCI bundle of an instance: `config.json` and the few files that are mounted into it.
//!
//! An instance gets as little as ordinary images work with: ten capabilities, no new privileges, the system
//! calls of `bundle/seccomp.json`, and its own pid, ipc, uts, mount and network namespace.

mod seccomp;
mod user;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use anyplace_images::manifest::ContainerConfig;
use anyplace_model::{Assignment, GATEWAY, MachineId, Workload};
use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use crate::paths::InstancePaths;
pub(crate) use seccomp::Compiled;
use user::User;

/// What a program that starts as root and then drops its rights needs, and no more: no raw sockets, no device
/// nodes, no administration.
const CAPABILITIES: [&str; 10] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// Processes and threads in an instance: many more than apps have, many fewer than hurt the machine.
const MAX_PROCESSES: i64 = 1_024;
/// The period of the CPU limit, the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// The kernel refuses less.
const MIN_CPU_QUOTA_US: u64 = 1_000;
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// /dev/shm counts into the memory limit; this is the size that other platforms give.
const SHM_OPTION: &str = "size=65536k";
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Everything that `config.json` is made from.
pub(crate) struct Bundle<'a> {
    pub(crate) assignment: &'a Assignment,
    pub(crate) machine: &'a MachineId,
    pub(crate) image: &'a ContainerConfig,
    pub(crate) paths: &'a InstancePaths,
    /// The seccomp profile as this runtime compiled it, where it takes it.
    pub(crate) filter: Option<&'a str>,
}

impl Bundle<'_> {
    /// Writes the bundle; the root file system must be mounted. Blocks.
    pub(crate) fn write(&self) -> anyhow::Result<()> {
        let folder = &self.paths.bundle;
        fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
        let instance = &self.assignment.instance;
        let hosts = format!(
            "127.0.0.1 localhost\n{} {instance}\n{GATEWAY} gateway.anyplace.internal\n",
            self.assignment.address
        );
        // An empty one is right where the machine has none.
        let resolv = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let files = [("hosts", hosts), ("hostname", format!("{instance}\n")), ("resolv.conf", resolv)];
        for (name, text) in files {
            fs::write(folder.join(name), text).with_context(|| format!("can't write {name}"))?;
        }
        let wanted = self.image.user.as_deref().unwrap_or_default();
        let user = user::resolve(&self.paths.merged, wanted)?;
        let spec = self.spec(&user, gpu_devices(&self.assignment.gpus))?;
        crate::files::write_json(&folder.join("config.json"), &spec)
    }

    fn spec(&self, user: &User, devices: Vec<Device>) -> anyhow::Result<Spec> {
        let Self { assignment, image, paths, .. } = self;
        let resources = &assignment.resources;
        let quota = (resources.cpu.0 * CPU_PERIOD_US / 1_000).max(MIN_CPU_QUOTA_US);
        let mut allowed = vec![json!({"allow": false, "access": "rwm"})];
        allowed.extend(devices.iter().map(Device::allow));
        let spec = json!({
            "ociVersion": "1.0.2",
            "hostname": assignment.instance,
            "annotations": self.filter.map(|filter| json!({seccomp::ANNOTATION: filter})),
            "root": {"path": paths.merged, "readonly": false},
            "process": {
                "terminal": false,
                "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.more_gids},
                "args": self.arguments()?,
                "env": self.environment(user),
                "cwd": image.working_dir.as_deref().filter(|folder| folder.starts_with('/')).unwrap_or("/"),
                "capabilities": {
                    "bounding": CAPABILITIES,
                    "effective": CAPABILITIES,
                    "permitted": CAPABILITIES,
                },
                "noNewPrivileges": true,
            },
            "mounts": self.mounts(),
            "linux": {
                "cgroupsPath": paths.cgroup,
                "resources": {
                    "devices": allowed,
                    "memory": {"limit": resources.memory.0},
                    "cpu": {
                        "shares": (resources.cpu.0 * 1_024 / 1_000).max(2),
                        "quota": quota,
                        "period": CPU_PERIOD_US,
                    },
                    "pids": {"limit": MAX_PROCESSES},
                },
                "devices": devices.iter().map(Device::node).collect::<Vec<_>>(),
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                    {"type": "network", "path": paths.netns},
                ],
                "seccomp": seccomp::profile()?,
                "maskedPaths": MASKED,
                "readonlyPaths": READ_ONLY,
            },
        });
        serde_json::from_value(spec).context("the bundle isn't as the OCI runtime specification wants it")
    }

    fn arguments(&self) -> anyhow::Result<Vec<String>> {
        let arguments = self.assignment.command.clone().unwrap_or_else(|| {
            let part = |part: &Option<Vec<String>>| part.clone().unwrap_or_default();
            [part(&self.image.entrypoint), part(&self.image.cmd)].concat()
        });
        anyhow::ensure!(
            !arguments.is_empty(),
            "the image `{}` names no program; give `command` in the spec, or push it with an entrypoint",
            self.assignment.image
        );
        Ok(arguments)
    }

    /// The image's, then the spec's, then the platform's: the last one of a name counts.
    fn environment(&self, user: &User) -> Vec<String> {
        let mut variables = BTreeMap::new();
        let home = format!("HOME={}", user.home);
        let image = self.image.env.iter().flatten().map(String::as_str);
        for pair in [DEFAULT_PATH, &home].into_iter().chain(image) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            variables.insert(name.to_owned(), value.to_owned());
        }
        let assignment = self.assignment;
        variables.extend(assignment.env.clone());
        let mut add = |name: &str, value: String| variables.insert(name.to_owned(), value);
        add("ANYPLACE_LOCATION", assignment.location.to_string());
        add("ANYPLACE_MACHINE", self.machine.to_string());
        add("ANYPLACE_INSTANCE", assignment.instance.to_string());
        match &assignment.workload {
            Workload::Deployment(name) => add("ANYPLACE_DEPLOYMENT", name.to_string()),
            Workload::Job(attempt) => {
                add("ANYPLACE_JOB", attempt.job.to_string());
                add("ANYPLACE_ATTEMPT", attempt.attempt.to_string())
            }
        };
        let gpus: Vec<String> = assignment.gpus.iter().map(u32::to_string).collect();
        // `void` keeps NVIDIA's hooks from giving an instance GPUs that it didn't ask for.
        add("NVIDIA_VISIBLE_DEVICES", if gpus.is_empty() { "void".into() } else { gpus.join(",") });
        variables.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    fn mounts(&self) -> Vec<Value> {
        let special = [
            ("/proc", "proc", vec!["nosuid", "noexec", "nodev"]),
            ("/dev", "tmpfs", vec!["nosuid", "strictatime", "mode=755", "size=65536k"]),
            (
                "/dev/pts",
                "devpts",
                vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            ("/dev/shm", "tmpfs", vec!["nosuid", "noexec", "nodev", "mode=1777", SHM_OPTION]),
            ("/dev/mqueue", "mqueue", vec!["nosuid", "noexec", "nodev"]),
            ("/sys", "sysfs", vec!["nosuid", "noexec", "nodev", "ro"]),
        ];
        let special = special.into_iter().map(|(destination, kind, options)| {
            json!({"destination": destination, "type": kind, "source": kind, "options": options})
        });
        let files = ["hosts", "hostname", "resolv.conf"].into_iter().map(|name| {
            json!({
                "destination": format!("/etc/{name}"),
                "type": "bind",
                "source": self.paths.bundle.join(name),
                "options": ["rbind", "rprivate"],
            })
        });
        special.chain(files).collect()
    }
}

/// A device node of the machine that an instance gets.
struct Device {
    path: PathBuf,
    major: u64,
    minor: u64,
}

impl Device {
    fn find(path: impl AsRef<Path>) -> Option<Self> {
        let path = path.as_ref();
        let rdev = fs::metadata(path).ok()?.rdev();
        Some(Self {
            path: path.into(),
            major: nix::sys::stat::major(rdev),
            minor: nix::sys::stat::minor(rdev),
        })
    }

    fn node(&self) -> Value {
        json!({"path": self.path, "type": "c", "major": self.major, "minor": self.minor, "fileMode": 0o666})
    }

    fn allow(&self) -> Value {
        json!({"allow": true, "type": "c", "major": self.major, "minor": self.minor, "access": "rw"})
    }
}

fn gpu_devices(gpus: &[u32]) -> Vec<Device> {
    if gpus.is_empty() {
        return Vec::new();
    }
    let shared = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"].map(str::to_owned);
    let own = gpus.iter().map(|index| format!("/dev/nvidia{index}"));
    shared.into_iter().chain(own).filter_map(Device::find).collect()
}

#[cfg(test)]
mod tests;
