//! Where everything is, below `data_dir`.

use std::path::{Path, PathBuf};

use anyplace_model::{InstanceId, MachineId};

use crate::Config;

/// Folders of the agent.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    root: PathBuf,
    cgroup: String,
}

/// Files and names of one instance.
#[derive(Debug, Clone)]
pub(crate) struct InstancePaths {
    /// Folder of the instance.
    pub(crate) dir: PathBuf,
    /// What it is; the first file that is made, and the last that goes.
    pub(crate) record: PathBuf,
    /// The OCI bundle.
    pub(crate) bundle: PathBuf,
    /// The mounted root file system.
    pub(crate) merged: PathBuf,
    /// What the instance has written.
    pub(crate) upper: PathBuf,
    /// Overlayfs' own.
    pub(crate) work: PathBuf,
    /// The shim's folder.
    pub(crate) run: PathBuf,
    /// Is there once the network is complete.
    pub(crate) network_mark: PathBuf,
    /// The network namespace.
    pub(crate) netns: PathBuf,
    /// Folder of the log.
    pub(crate) logs: PathBuf,
    /// Path inside each cgroup hierarchy.
    pub(crate) cgroup: String,
}

impl Paths {
    pub(crate) fn new(config: &Config) -> Self {
        Self { root: config.data_dir.clone(), cgroup: machine_cgroup(&config.cgroup_parent, &config.machine) }
    }

    /// When the last agent began.
    pub(crate) fn epoch(&self) -> PathBuf {
        self.root.join("epoch.json")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub(crate) fn instances(&self) -> PathBuf {
        self.root.join("instances")
    }

    pub(crate) fn netns(&self) -> PathBuf {
        self.root.join("netns")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub(crate) fn runtime(&self) -> PathBuf {
        self.root.join("runtime")
    }

    /// The cgroup above all instances of this machine.
    pub(crate) fn machine_cgroup(&self) -> &str {
        &self.cgroup
    }

    pub(crate) fn log(&self, instance: &str) -> PathBuf {
        self.logs().join(instance).join("log")
    }

    pub(crate) fn instance(&self, instance: &InstanceId) -> InstancePaths {
        let name = instance.as_str();
        let dir = self.instances().join(name);
        InstancePaths {
            record: dir.join("record.json"),
            bundle: dir.join("bundle"),
            merged: dir.join("merged"),
            upper: dir.join("upper"),
            work: dir.join("work"),
            run: dir.join("run"),
            network_mark: dir.join("network"),
            netns: self.netns().join(name),
            logs: self.logs().join(name),
            cgroup: format!("{}/{name}", self.cgroup),
            dir,
        }
    }
}

fn machine_cgroup(parent: &str, machine: &MachineId) -> String {
    format!("/{}/{machine}", parent.trim_matches('/'))
}

/// Names in a folder; none where it isn't there.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
