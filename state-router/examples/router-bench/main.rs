//! Measures the data plane and the router for `cargo xtask bench router`, which compares with the targets.
//!
//! Run as root: `router-bench PART...`; see [`PARTS`]. Everything happens in namespaces of the process's own. Each result is
//! a line of JSON: `{"figure": ..., "value": ...}`. `ANYPLACE_BPF_OBJECT=FILE` measures another object than the built-in one,
//! so that two are compared in alternating runs of one program.

mod bpf;
mod forward;
mod instructions;
mod scale;
mod wrapper;

use std::{net::Ipv4Addr, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use anyplace_ebpf::{Capacity, DataPlane, Options};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, CpuSet, sched_setaffinity, unshare},
    unistd::Pid,
};

/// What measures a part.
type Measure = fn(&Bed) -> Result<()>;

/// What can be measured.
const PARTS: [(&str, Measure); 3] =
    [("forward", forward::measure), ("load", scale::measure), ("instructions", instructions::measure)];

fn main() -> Result<()> {
    let parts: Vec<String> = std::env::args().skip(1).collect();
    if parts == ["record-instructions"] {
        return instructions::record(&Bed::new()?);
    }
    ensure!(!parts.is_empty(), "found no part, expected some of {:?}", PARTS.map(|(name, _)| name));
    let bed = Bed::new()?;
    for part in &parts {
        let Some((_, measure)) = PARTS.iter().find(|(name, _)| name == part) else {
            bail!("found part `{part}`, expected some of {:?}", PARTS.map(|(name, _)| name));
        };
        measure(&bed).with_context(|| format!("measuring {part}"))?;
    }
    Ok(())
}

/// Prints a result.
fn report(figure: &str, value: f64) {
    println!("{}", serde_json::json!({ "figure": figure, "value": value }));
}

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A machine with one interface in a network namespace, and a bpffs; gone with the process.
struct Bed {
    folder: PathBuf,
}

impl Bed {
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 1);

    /// Must be called while the process has one thread: namespaces belong to threads.
    fn new() -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "this bench loads eBPF programs: run it as root");
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("unshare")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)
            .context("make mounts private")?;
        // A tmpfs over a folder that is there on every machine: nothing is left behind.
        let folder = PathBuf::from("/mnt");
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .context("mount tmpfs")?;
        std::fs::create_dir(folder.join("bpf"))?;
        mount(Some("bpf"), &folder.join("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mount bpffs")?;
        for line in ["link set lo up", "link add eth0 mtu 1500 type veth peer name router"] {
            ip(line)?;
        }
        let bed = Self { folder };
        bed.pin(true)?;
        Ok(bed)
    }

    /// A fresh data plane under a name of its own.
    fn plane(&self, name: &str, capacity: Capacity) -> Result<DataPlane> {
        let options = Options {
            uplink: "eth0".into(),
            address: Self::ADDRESS,
            address6: None,
            pin_dir: self.folder.join("bpf").join(name),
            object: std::env::var_os("ANYPLACE_BPF_OBJECT").map(PathBuf::from),
        };
        DataPlane::load_for(options, capacity).context("the data plane can't be loaded")
    }

    /// Keeps the process on the last CPU, or lets it go again.
    fn pin(&self, pinned: bool) -> Result<()> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let count = libc_cpus().max(cpus);
        let mut set = CpuSet::new();
        for cpu in if pinned { count - 1..count } else { 0..count } {
            set.set(cpu)?;
        }
        sched_setaffinity(Pid::from_raw(0), &set).context("sched_setaffinity")
    }
}

/// CPUs that are online, whatever this process is bound to.
fn libc_cpus() -> usize {
    // SAFETY: no pointers.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1)
}

/// Runs `ip` with the words of a line.
fn ip(line: &str) -> Result<()> {
    let status =
        Command::new("ip").args(line.split(' ')).status().context("start ip (Debian package iproute2)")?;
    ensure!(status.success(), "`ip {line}` ended with {status}");
    Ok(())
}
