//! One node: a network namespace, and the processes started in it.

use std::fs::OpenOptions;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns;
use crate::procs::BED_VARIABLE;

/// A node of a testbed.
#[derive(Clone, Debug)]
pub struct Node {
    bed: String,
    name: String,
    netns: String,
    state_dir: PathBuf,
}

impl Node {
    pub(crate) fn new(bed: &str, name: &str, state_dir: &Path) -> Self {
        Self {
            bed: bed.into(),
            name: name.into(),
            netns: format!("{}{name}", netns::prefix(bed)),
            state_dir: state_dir.into(),
        }
    }

    /// Its name (`ams-1`, `nrt-edge`, `global`).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of its network namespace.
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// A command that will run in this node's network, marked as the testbed's.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env(BED_VARIABLE, &self.bed).stdin(Stdio::null());
        netns::enter_on_exec(&mut command, &self.netns);
        command
    }

    /// Runs a program to its end; its output, or an error with what it printed.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        netns::run(self.command(program).args(args)).with_context(|| format!("on {}", self.name))
    }

    /// Runs `work` on a thread inside this node's network.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        netns::inside(&self.netns, work)
    }

    /// Moves the calling thread into this node's network, with all threads that it starts.
    pub fn enter(&self) -> Result<()> {
        netns::enter(&self.netns)
    }

    /// Starts a long-running program in a process group of its own, its output appended to the log `label`.
    pub fn spawn(&self, label: &str, command: Command) -> Result<Process> {
        let logs = self.state_dir.join("logs");
        spawn(&logs, label, command)
    }

    /// Where [`Self::spawn`] writes the output of `label`.
    pub fn log(&self, label: &str) -> PathBuf {
        self.state_dir.join("logs").join(format!("{label}.log"))
    }
}

/// Starts a program with its output in `<logs>/<label>.log`.
fn spawn(logs: &Path, label: &str, command: Command) -> Result<Process> {
    let output = open_log(logs, label)?;
    spawn_with_output(logs, label, command, output.into())
}

fn open_log(logs: &Path, label: &str) -> Result<std::fs::File> {
    std::fs::create_dir_all(logs)?;
    let log = logs.join(format!("{label}.log"));
    Ok(OpenOptions::new().create(true).append(true).open(log)?)
}

/// Starts a program whose standard output goes elsewhere, its messages in the log.
pub(crate) fn spawn_with_output(
    logs: &Path,
    label: &str,
    mut command: Command,
    output: Stdio,
) -> Result<Process> {
    let messages = open_log(logs, label)?;
    let log = logs.join(format!("{label}.log"));
    command.stdin(Stdio::null()).stdout(output).stderr(messages).process_group(0);
    let child = command.spawn().with_context(|| format!("start {command:?}"))?;
    Ok(Process { label: label.into(), log, pid: child.id() as i32, child: Arc::new(Mutex::new(child)) })
}

/// A process that a node runs.
#[derive(Clone, Debug)]
pub struct Process {
    label: String,
    log: PathBuf,
    pid: i32,
    child: Arc<Mutex<Child>>,
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The label it was started under.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// How it ended, or nothing while it runs.
    pub fn exited(&self) -> Option<ExitStatus> {
        match self.child().try_wait() {
            Ok(status) => status,
            // Somebody else reaped it (a kill of the whole machine does).
            Err(_) => Some(ExitStatus::from_raw(libc::SIGKILL)),
        }
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.exited().is_none() {
            kill(Pid::from_raw(self.pid), signal)
                .with_context(|| format!("signal {} ({})", self.label, self.pid))?;
        }
        Ok(())
    }

    /// Asks it to end and waits; kills it at the deadline.
    pub fn stop(&self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.exited() {
                return Ok(status);
            }
            if Instant::now() > deadline {
                self.signal(Signal::SIGKILL)?;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// An error with the end of its log if it has ended.
    pub fn check(&self) -> Result<()> {
        if let Some(status) = self.exited() {
            bail!("{} ended ({status}); its log ends with:\n{}", self.label, self.log_tail());
        }
        Ok(())
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
