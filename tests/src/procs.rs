//! Finding and killing the processes of a testbed.
//!
//! A process belongs to a testbed when it carries its mark in the environment, when its network namespace is one of the
//! testbed's, or when it is in a cgroup below the testbed's parent.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::{cgroups, netns};

/// Environment variable that names the testbed.
pub(crate) const BED_VARIABLE: &str = "ANYPLACE_TESTBED";
/// Environment variable that names the machine, on agents and routers and what they start.
pub(crate) const MACHINE_VARIABLE: &str = "ANYPLACE_MACHINE";

/// How long killed processes may take to disappear.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Which processes are meant.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// `NAME=value` pairs that must all be in the environment.
    pub(crate) marks: Vec<String>,
    /// Inodes of network namespaces.
    pub(crate) netns: BTreeSet<u64>,
    /// Cgroup folders, in every hierarchy.
    pub(crate) cgroups: Vec<PathBuf>,
}

impl Selection {
    /// Everything of one testbed.
    pub(crate) fn of_bed(bed: &str) -> Self {
        let prefix = netns::prefix(bed);
        let namespaces = std::fs::read_dir(netns::NETNS_DIR).into_iter().flatten().flatten();
        let names = namespaces.filter_map(|entry| entry.file_name().into_string().ok());
        Self {
            marks: vec![format!("{BED_VARIABLE}={bed}")],
            netns: names
                .filter(|name| name.starts_with(&prefix))
                .filter_map(|name| netns::inode(&name))
                .collect(),
            cgroups: cgroups::of_bed(bed),
        }
    }

    /// Everything on one machine of a testbed.
    pub(crate) fn of_machine(bed: &str, machine: &str) -> Self {
        let namespace = format!("{}{machine}", netns::prefix(bed));
        Self {
            marks: vec![format!("{BED_VARIABLE}={bed}"), format!("{MACHINE_VARIABLE}={machine}")],
            netns: netns::inode(&namespace).into_iter().collect(),
            cgroups: cgroups::of_bed(bed).into_iter().map(|folder| folder.join(machine)).collect(),
        }
    }

    /// The pids now, without this process and its parents.
    pub(crate) fn pids(&self) -> Vec<i32> {
        let spared = own_line();
        // A namespace that is the caller's own can't select anything, whatever the bind mount says.
        let own = std::fs::metadata("/proc/self/ns/net").map(|meta| meta.ino()).unwrap_or(0);
        let in_cgroups: BTreeSet<i32> =
            self.cgroups.iter().flat_map(|folder| cgroups::pids(folder)).collect();
        let selected = |pid: &i32| {
            in_cgroups.contains(pid)
                || netns_inode(*pid).is_some_and(|inode| inode != own && self.netns.contains(&inode))
                || has_marks(*pid, &self.marks)
        };
        let processes: Vec<i32> =
            all().into_iter().filter(|pid| !spared.contains(pid) && !is_dead(*pid)).collect();
        let mut found: BTreeSet<i32> = processes.iter().copied().filter(selected).collect();
        // What they started, too: a container has neither mark nor namespace, and its cgroup may have failed.
        loop {
            let more = |pid: &i32| {
                !found.contains(pid) && parent(*pid).is_some_and(|parent| found.contains(&parent))
            };
            let children: Vec<i32> = processes.iter().copied().filter(more).collect();
            if children.is_empty() {
                return found.into_iter().collect();
            }
            found.extend(children);
        }
    }

    /// Kills until none is left; an error names what would not go.
    pub(crate) fn kill(&self) -> Result<()> {
        let deadline = Instant::now() + KILL_TIMEOUT;
        loop {
            for folder in &self.cgroups {
                cgroups::thaw(folder);
            }
            let pids = self.pids();
            if pids.is_empty() {
                return Ok(());
            }
            for pid in &pids {
                // It may have gone meanwhile.
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            // Reap those that are our children; the others are somebody else's to reap.
            let until = Instant::now() + Duration::from_millis(20);
            while pids.iter().any(|pid| !is_dead(*pid)) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            for pid in &pids {
                let _ = waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG));
            }
            if Instant::now() > deadline {
                let names: Vec<_> = self.pids().into_iter().map(describe).collect();
                bail!("these processes do not end on SIGKILL: {}", names.join(", "));
            }
        }
    }
}

/// A process for people: pid and command line.
pub(crate) fn describe(pid: i32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    format!("{pid} ({})", line.trim())
}

/// All pids.
pub(crate) fn all() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Gone, or a zombie that waits for its parent.
pub(crate) fn is_dead(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    // The state follows the name, which is in parentheses and may hold anything.
    stat.rsplit(')')
        .next()
        .is_none_or(|rest| matches!(rest.trim_start().chars().next(), Some('Z' | 'X') | None))
}

fn netns_inode(pid: i32) -> Option<u64> {
    std::fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|meta| meta.ino())
}

fn has_marks(pid: i32, marks: &[String]) -> bool {
    let Ok(environ) = std::fs::read(format!("/proc/{pid}/environ")) else { return false };
    let entries: Vec<_> = environ.split(|byte| *byte == 0).collect();
    !marks.is_empty() && marks.iter().all(|mark| entries.contains(&mark.as_bytes()))
}

pub(crate) fn parent(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// This process and its parents, which no clean-up may end.
fn own_line() -> BTreeSet<i32> {
    let mut line = BTreeSet::new();
    let mut pid = std::process::id() as i32;
    while pid > 0 && line.insert(pid) {
        pid = parent(pid).unwrap_or(0);
    }
    line
}
