//! The OCI runtimes that are installed, and how they are called.
//!
//! `isolation: container` is crun, or runc where crun isn't installed or the machine has cgroup hierarchies of both
//! versions (crun refuses that); `isolation: sandbox` is gVisor's runsc. Their state is kept below `data_dir`, never in /run.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyplace_model::Isolation;

use crate::cgroup::Cgroups;

/// Searched after PATH: services often have a short one.
const MORE_FOLDERS: [&str; 3] = ["/usr/local/bin", "/usr/sbin", "/usr/bin"];

/// A kind of runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Crun,
    Runc,
    Runsc,
}

/// An installed runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Runtime {
    pub(crate) kind: Kind,
    program: PathBuf,
    root: PathBuf,
}

/// What is installed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Runtimes {
    container: Option<Runtime>,
    sandbox: Option<Runtime>,
}

impl Runtimes {
    /// Looks for the runtimes, and says in the log what is missing and which package has it.
    pub(crate) fn detect(cgroups: Option<&Cgroups>, root: &Path) -> Self {
        let find = |kind, name: &str| {
            find_program(name).map(|program| Runtime { kind, program, root: root.join(name) })
        };
        let (crun, runc) = (find(Kind::Crun, "crun"), find(Kind::Runc, "runc"));
        let container = match (cgroups.is_some_and(Cgroups::is_mixed), crun, runc) {
            (false, Some(crun), _) => Some(crun),
            (_, _, runc) => runc,
        };
        if container.is_none() {
            tracing::warn!(
                "isolation `container` is not offered: no OCI runtime; run `apt-get install runc`"
            );
        }
        let sandbox = find(Kind::Runsc, "runsc");
        if sandbox.is_none() {
            tracing::info!("isolation `sandbox` is not offered: no gVisor; run `apt-get install runsc`");
        }
        Self { container, sandbox }
    }

    pub(crate) fn get(&self, isolation: Isolation) -> Option<&Runtime> {
        match isolation {
            Isolation::Container => self.container.as_ref(),
            Isolation::Sandbox => self.sandbox.as_ref(),
            Isolation::Microvm => None,
        }
    }

    pub(crate) fn isolations(&self) -> Vec<Isolation> {
        [Isolation::Container, Isolation::Sandbox]
            .into_iter()
            .filter(|isolation| self.get(*isolation).is_some())
            .collect()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Runtime> {
        self.container.iter().chain(&self.sandbox)
    }
}

impl Runtime {
    /// Program and global options; `log` gets the runtime's own messages as JSON lines.
    pub(crate) fn prefix(&self, log: Option<&Path>) -> Vec<OsString> {
        let mut prefix: Vec<OsString> =
            vec![self.program.clone().into(), "--root".into(), self.root.clone().into()];
        if let Some(log) = log {
            prefix.extend(["--log".into(), log.into(), "--log-format".into(), "json".into()]);
        }
        if self.kind == Kind::Runsc {
            // Its own network stack would need the veth for itself; the namespace's is the instance's anyway.
            prefix.extend(["--network=host".into(), "--platform=ptrace".into()]);
        }
        prefix
    }

    /// A command of the runtime, silent.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let prefix = self.prefix(None);
        let mut command = Command::new(&self.program);
        command.args(prefix.iter().skip(1)).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Containers that the runtime knows.
    pub(crate) fn containers(&self) -> Vec<String> {
        crate::paths::names(&self.root)
    }

    pub(crate) fn knows(&self, container: &str) -> bool {
        self.root.join(container).exists()
    }

    /// Where a container's seccomp filter is, as it was compiled; none of a runtime that takes no compiled one.
    pub(crate) fn filter(&self, container: &str) -> Option<PathBuf> {
        (self.kind == Kind::Crun).then(|| self.root.join(container).join("seccomp.bpf"))
    }

    /// Removes a container whatever its state. Blocks.
    pub(crate) fn delete(&self, container: &str) {
        if self.knows(container) {
            // What it can't remove, the caller does: it goes on with cgroups and mounts.
            let _ = self.command(&["delete", "--force", container]).status();
            // A runtime doesn't recognise what it was killed in the middle of making.
            let _ = std::fs::remove_dir_all(self.root.join(container));
        }
    }
}

/// Finds a program.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(MORE_FOLDERS.iter().map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}
