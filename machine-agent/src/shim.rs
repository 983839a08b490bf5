//! The shim: one small process for each container, which outlives the agent. It makes the container through the OCI
//! runtime, copies its output into the log, waits for its end, writes down how it ended, and cleans up after it.
//!
//! It has no thread pool and no network. The agent and the shim speak through files in the shim's folder:
//! - `shim.json`: what to do; written by the agent before the start
//! - `lock`: held while the shim lives, so that nobody needs to trust a process number
//! - `shim.pid`: the shim's process number
//! - `started.json` or `failed.json`: the container runs, or why not; then the shim closes its standard output, for
//!   which the agent that started it waits
//! - `seccomp.bpf`: the container's seccomp filter, where the agent asked for it
//! - `exit.json`: how the container ended

mod log;
mod state;

use std::{
    fs::{self, File},
    io::{PipeReader, PipeWriter},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use anyhow::Context as _;
use jiff::Timestamp;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};

pub(crate) use log::{LogFile, previous as previous_log};
pub(crate) use state::{Failed, ShimSpec, Started, alive, files, hold_lock};

use crate::{files::read_json, instance::Exit, pidfd};

/// After the end of the container its pipes are empty at once; this bound is for the case that something outside
/// of it holds one open.
const LAST_OUTPUT: Duration = Duration::from_millis(500);

/// Runs the shim in its folder until its container has ended. Call it before any thread is started.
///
/// # Errors
/// The folder isn't a shim's, another shim has it, or the container can't be run; then `failed.json` says why.
pub fn run(state_dir: &Path) -> anyhow::Result<()> {
    let _lock = take_lock(state_dir)?;
    let spec: ShimSpec = read_json(&state_dir.join(files::SPEC)).with_context(|| {
        format!("{} is no shim's folder; the machine agent makes it", state_dir.display())
    })?;
    // Fails only where this is a session's leader already.
    let _ = nix::unistd::setsid();
    // So that the container's first process becomes a child of this one when the runtime's own process ends.
    nix::sys::prctl::set_child_subreaper(true).context("can't become a subreaper")?;
    crate::files::write(&state_dir.join(files::PID), std::process::id().to_string().as_bytes())
        .context("can't write the process number")?;
    let log = Arc::new(Mutex::new(LogFile::open(&spec.log, spec.log_bytes)?));
    let result = supervise(state_dir, &spec, &log);
    if let Err(error) = &result {
        let message = format!("{error:#}");
        write_line(&log, "anyplace", message.as_bytes());
        // Not after `exit.json`: then the container did run.
        if !state_dir.join(files::EXIT).exists() {
            crate::files::write_json(&state_dir.join(files::FAILED), &Failed { message })?;
            tell_agent();
        }
    }
    // Also after a failure: half of a container may be there. The agent looks after what this can't remove.
    let _ =
        runtime(&spec, &["delete", "--force", &spec.id]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    result
}

fn take_lock(state_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = state_dir.join(files::LOCK);
    let file = File::open(&path)
        .with_context(|| format!("can't open {}; the machine agent makes it", path.display()))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .context("another shim has this folder")?;
    // The agent may have given the folder up just before the lock was ours.
    anyhow::ensure!(path.exists(), "the agent has removed this folder");
    Ok(lock)
}

fn supervise(state_dir: &Path, spec: &ShimSpec, log: &Arc<Mutex<LogFile>>) -> anyhow::Result<()> {
    let (out_reader, out_writer) = std::io::pipe().context("can't make a pipe")?;
    let (err_reader, err_writer) = std::io::pipe().context("can't make a pipe")?;
    let (done, copied) = mpsc::channel();
    copy(out_reader, "stdout", log.clone(), done.clone());
    copy(err_reader, "stderr", log.clone(), done);

    let init_pid = launch(state_dir, spec, out_writer, err_writer)?;
    // Its number can't be another process's yet: it is not reaped before `wait_for`.
    let init_start_ticks = pidfd::start_ticks_of(init_pid).context("the container ended before its start")?;
    let started = Started { init_pid, init_start_ticks, started_at: Timestamp::now() };
    if let Some(filter) = &spec.filter {
        // Without it the next container starts as slowly as this one.
        let _ = fs::copy(filter, state_dir.join(files::FILTER));
    }
    crate::files::write_json(&state_dir.join(files::STARTED), &started)?;
    tell_agent();

    // A sandbox's first process is the sandbox: only its runtime knows how the program inside ended.
    let inside = spec.exit_from_runtime.then(|| exit_from_runtime(spec)).flatten();
    let (mut exit_code, signal) = wait_for(init_pid)?;
    if let Some(inside) = inside {
        exit_code = inside;
    }
    for _ in 0..2 {
        let _ = copied.recv_timeout(LAST_OUTPUT);
    }
    let exit = Exit { exit_code, signal, oom_killed: oom_killed(spec), ended_at: Timestamp::now() };
    crate::files::write_json(&state_dir.join(files::EXIT), &exit)
}

/// Makes the container and starts it; the number of its first process.
fn launch(state_dir: &Path, spec: &ShimSpec, out: PipeWriter, err: PipeWriter) -> anyhow::Result<i32> {
    let pid_file = state_dir.join(files::INIT_PID);
    let (bundle, pid_path) = (spec.bundle.to_string_lossy(), pid_file.to_string_lossy());
    let options = ["--bundle", &*bundle, "--pid-file", &*pid_path, &*spec.id];
    // One run of the runtime takes half as long as two. gVisor's exit status has to be asked for between them.
    let first: &[&str] = if spec.exit_from_runtime { &["create"] } else { &["run", "--detach"] };
    let arguments = [first, &options[..]].concat();
    // The command holds the pipes' other ends, and must be gone before their end can be seen.
    let made = runtime(spec, &arguments).stdin(Stdio::null()).stdout(out).stderr(err).status();
    let made = made.with_context(|| format!("can't run {}", spec.program()))?;
    if !made.success() {
        anyhow::bail!("{} could not start the container: {}", spec.program(), complaint(spec, made));
    }
    if spec.exit_from_runtime {
        let started = runtime(spec, &["start", &spec.id])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| format!("can't run {}", spec.program()))?;
        if !started.success() {
            anyhow::bail!("{} could not start the container: {}", spec.program(), complaint(spec, started));
        }
    }
    let number = fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
    number.with_context(|| format!("{} wrote no process number", spec.program()))
}

/// The agent waits for the end of this process's standard output, then looks at its files.
fn tell_agent() {
    // Without it the agent waits until the end of the shim, or in vain: either way the container is looked after.
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(null);
    }
}

fn runtime(spec: &ShimSpec, arguments: &[&str]) -> Command {
    let mut command = Command::new(spec.program());
    command.args(spec.runtime.iter().skip(1)).args(arguments);
    command
}

/// What the runtime wrote about its failure: the last error in its own log.
fn complaint(spec: &ShimSpec, status: std::process::ExitStatus) -> String {
    let text = fs::read_to_string(&spec.runtime_log).unwrap_or_default();
    let message = text.lines().rev().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        let serious = matches!(line.get("level")?.as_str()?, "error" | "fatal" | "warning");
        serious.then(|| line.get("msg").and_then(|message| message.as_str()).map(str::to_owned))?
    });
    message.unwrap_or_else(|| format!("it ended with {status} and said nothing"))
}

fn copy(reader: PipeReader, stream: &'static str, log: Arc<Mutex<LogFile>>, done: mpsc::Sender<()>) {
    std::thread::spawn(move || {
        log::copy_lines(reader, |line| write_line(&log, stream, line));
        // Nobody listens when the shim gives up first.
        let _ = done.send(());
    });
}

fn write_line(log: &Mutex<LogFile>, stream: &str, line: &[u8]) {
    let mut log = log.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // A full disk costs lines of the log, never the container.
    let _ = log.write_line(Timestamp::now(), stream, line);
}

/// Reaps children until the container's first process is among them: as subreaper, this process gets others too.
fn wait_for(init: i32) -> anyhow::Result<(i32, Option<i32>)> {
    loop {
        match waitpid(None::<Pid>, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == init => return Ok((code, None)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == init => {
                return Ok((128 + signal as i32, Some(signal as i32)));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("the container's first process is not a child"),
        }
    }
}

fn exit_from_runtime(spec: &ShimSpec) -> Option<i32> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Waited {
        exit_status: i32,
    }
    let output = runtime(spec, &["wait", &spec.id]).stdin(Stdio::null()).output().ok()?;
    serde_json::from_slice::<Waited>(&output.stdout).ok().map(|waited| waited.exit_status)
}

fn oom_killed(spec: &ShimSpec) -> bool {
    let text = spec.oom_file.as_deref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
    text.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0")
}
