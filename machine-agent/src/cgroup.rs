//! The cgroup hierarchies of the machine, version 1, version 2 or both: where instances are limited.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Where the hierarchies are mounted.
pub(crate) const MOUNT: &str = "/sys/fs/cgroup";
/// What instances are limited by.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// The machine's hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cgroups {
    /// One of version 2.
    Unified(PathBuf),
    /// One of version 1 for each controller; beside them there may be a version 2 one without controllers.
    Split(Vec<PathBuf>),
}

impl Cgroups {
    /// Looks below `mount`.
    ///
    /// # Errors
    /// Instances can't be limited; the text says what was found and what to do.
    pub(crate) fn detect(mount: &Path) -> Result<Self, String> {
        if let Ok(controllers) = fs::read_to_string(mount.join("cgroup.controllers")) {
            let there: Vec<&str> = controllers.split_whitespace().collect();
            let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !there.contains(name)).collect();
            if missing.is_empty() {
                return Ok(Self::Unified(mount.into()));
            }
            return Err(complaint(mount, &missing));
        }
        let missing: Vec<&str> =
            CONTROLLERS.into_iter().filter(|name| !mount.join(name).join("cgroup.procs").exists()).collect();
        if !missing.is_empty() {
            return Err(complaint(mount, &missing));
        }
        let roots = crate::paths::names(mount).into_iter().map(|name| mount.join(name));
        Ok(Self::Split(roots.filter(|root| root.join("cgroup.procs").exists()).collect()))
    }

    /// Whether hierarchies of both versions are mounted, which some runtimes refuse.
    pub(crate) fn is_mixed(&self) -> bool {
        match self {
            Self::Unified(_) => false,
            Self::Split(roots) => roots.iter().any(|root| root.join("cgroup.controllers").exists()),
        }
    }

    /// The folders of a cgroup in all hierarchies.
    pub(crate) fn folders(&self, cgroup: &str) -> Vec<PathBuf> {
        let cgroup = cgroup.trim_start_matches('/');
        match self {
            Self::Unified(root) => vec![root.join(cgroup)],
            Self::Split(roots) => roots.iter().map(|root| root.join(cgroup)).collect(),
        }
    }

    /// The file that counts kills for want of memory.
    pub(crate) fn oom_file(&self, cgroup: &str) -> PathBuf {
        let cgroup = cgroup.trim_start_matches('/');
        match self {
            Self::Unified(root) => root.join(cgroup).join("memory.events"),
            Self::Split(roots) => {
                let root = roots.iter().find(|root| root.ends_with("memory"));
                root.map_or_else(PathBuf::new, |root| root.join(cgroup).join("memory.oom_control"))
            }
        }
    }

    /// Names of the cgroups below one.
    pub(crate) fn children(&self, cgroup: &str) -> Vec<String> {
        let mut names: Vec<String> = self
            .folders(cgroup)
            .iter()
            .flat_map(|folder| {
                crate::paths::names(folder).into_iter().filter(|name| folder.join(name).is_dir())
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Kills whatever runs in a cgroup and removes it. Blocks for as long as the kernel takes to end processes.
    ///
    /// # Errors
    /// It is still there after two seconds.
    pub(crate) fn remove(&self, cgroup: &str) -> Result<(), String> {
        for folder in self.folders(cgroup) {
            let mut tries = 0;
            while folder.exists() && fs::remove_dir(&folder).is_err() {
                for pid in fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
                    if let Ok(pid) = pid.parse() {
                        // It may have ended by itself.
                        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    }
                }
                tries += 1;
                if tries > 400 {
                    return Err(format!("the cgroup {} can't be removed", folder.display()));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Removes a cgroup where it is empty.
    pub(crate) fn remove_if_empty(&self, cgroup: &str) {
        for folder in self.folders(cgroup) {
            // Refused where it isn't empty, which is the point.
            let _ = fs::remove_dir(folder);
        }
    }
}

fn complaint(mount: &Path, missing: &[&str]) -> String {
    format!(
        "{} has no cgroup controller {}, so instances can't be limited; mount them (`mount -t cgroup2 none {}`) or \
         boot with cgroup_enable=memory",
        mount.display(),
        missing.join(", "),
        mount.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_found_and_a_machine_without_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let mount = dir.path();
        let error = Cgroups::detect(mount).unwrap_err();
        assert!(
            error.contains("no cgroup controller cpu, memory, pids") && error.contains("mount -t cgroup2")
        );

        fs::write(mount.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        assert_eq!(Cgroups::detect(mount), Ok(Cgroups::Unified(mount.into())));
        fs::write(mount.join("cgroup.controllers"), "cpu\n").unwrap();
        assert!(Cgroups::detect(mount).unwrap_err().contains("controller memory, pids"));
        fs::remove_file(mount.join("cgroup.controllers")).unwrap();

        for name in ["cpu", "memory", "pids", "unified"] {
            fs::create_dir(mount.join(name)).unwrap();
            fs::write(mount.join(name).join("cgroup.procs"), "").unwrap();
        }
        let found = Cgroups::detect(mount).unwrap();
        assert!(!found.is_mixed());
        fs::write(mount.join("unified/cgroup.controllers"), "").unwrap();
        assert!(found.is_mixed());
        assert_eq!(found.folders("/anyplace/m/i").len(), 4);
        assert_eq!(found.oom_file("/a"), mount.join("memory/a/memory.oom_control"));
        fs::create_dir_all(mount.join("pids/a/b")).unwrap();
        assert_eq!(found.children("/a"), ["b"]);
        found.remove("/a/b").unwrap();
        assert!(found.children("/a").is_empty());
    }
}
