//! The files in the shim's folder.

use std::{fs::File, path::Path, path::PathBuf};

use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// Names of the files.
pub(crate) mod files {
    pub(crate) const SPEC: &str = "shim.json";
    pub(crate) const LOCK: &str = "lock";
    pub(crate) const PID: &str = "shim.pid";
    pub(crate) const INIT_PID: &str = "init.pid";
    pub(crate) const STARTED: &str = "started.json";
    pub(crate) const FAILED: &str = "failed.json";
    pub(crate) const EXIT: &str = "exit.json";
    pub(crate) const FILTER: &str = "seccomp.bpf";
    pub(crate) const RUNTIME_LOG: &str = "runtime.log";
    pub(crate) const SHIM_LOG: &str = "shim.log";
}

/// What the shim has to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ShimSpec {
    /// The container's name at the runtime.
    pub(crate) id: String,
    /// The runtime's program and global options.
    pub(crate) runtime: Vec<String>,
    /// Where those options make the runtime write its own log, as JSON lines.
    pub(crate) runtime_log: PathBuf,
    /// Whether only the runtime knows the exit status.
    pub(crate) exit_from_runtime: bool,
    /// The runtime's file with the compiled seccomp filter, where the agent wants to know it.
    pub(crate) filter: Option<PathBuf>,
    pub(crate) bundle: PathBuf,
    pub(crate) log: PathBuf,
    /// Size at which the log is rotated; the last one is kept.
    pub(crate) log_bytes: u64,
    /// File of the cgroup that counts kills for want of memory.
    pub(crate) oom_file: Option<PathBuf>,
}

impl ShimSpec {
    pub(crate) fn program(&self) -> &str {
        self.runtime.first().map_or("", String::as_str)
    }
}

/// The container runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Started {
    pub(crate) init_pid: i32,
    /// With the process number, the identity of the process.
    pub(crate) init_start_ticks: u64,
    pub(crate) started_at: Timestamp,
}

/// The container could not be started.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Failed {
    pub(crate) message: String,
}

/// Whether the folder's shim lives.
pub(crate) fn alive(run: &Path) -> bool {
    match File::open(run.join(files::LOCK)) {
        Ok(file) => Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err(),
        Err(_) => false,
    }
}

/// Takes the place of the shim, so that none can begin in this folder; none where one lives.
pub(crate) fn hold_lock(run: &Path) -> Option<Flock<File>> {
    Flock::lock(File::open(run.join(files::LOCK)).ok()?, FlockArg::LockExclusiveNonblock).ok()
}
