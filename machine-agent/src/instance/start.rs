//! From an image to a running container, and from a container that an earlier agent started to a known one.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::Path,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use anyplace_images::PulledImage;
use anyplace_model::{Assignment, Isolation};
use jiff::Timestamp;
use tokio::{
    io::AsyncReadExt as _,
    process::Command,
    time::{Instant, sleep, timeout},
};

use super::{Context, Exit};
use crate::{
    bundle::Bundle,
    cleanup, files, network,
    paths::InstancePaths,
    pidfd, rootfs,
    runtime::Kind,
    shim::{self, Failed, ShimSpec, Started},
};

/// A container that hasn't started by then won't: the slowest runtime needs a fifth of a second.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the files of a shim that an earlier agent started are looked at.
const POLL: Duration = Duration::from_millis(2);
/// Two parts of this size for each instance.
const LOG_BYTES: u64 = 8 << 20;
/// The status of a process that was killed.
const KILLED: i32 = 128 + 9;

/// What an earlier agent left of an instance.
pub(super) enum Found {
    Running(Started),
    Ended(Exit),
    Failed(String),
    Nothing,
}

/// Starts a fresh container.
pub(super) async fn start(
    ctx: &Arc<Context>,
    assignment: &Arc<Assignment>,
    paths: &InstancePaths,
    image: PulledImage,
) -> anyhow::Result<Started> {
    let begun = Instant::now();
    let (context, wanted, at) = (ctx.clone(), assignment.clone(), paths.clone());
    tokio::task::spawn_blocking(move || prepare(&context, &wanted, &at, &image))
        .await
        .context("preparing the container panicked")??;
    let prepared = begun.elapsed();
    let program = ctx.config.shim.clone().unwrap_or_else(|| "/proc/self/exe".into());
    let log = File::create(paths.run.join(shim::files::SHIM_LOG)).context("can't make the shim's log")?;
    // Nothing of the agent's is handed on: the shim lives on when the agent's terminal or pipe is gone.
    let mut child = Command::new(&program)
        .args(["shim", "--state"])
        .arg(&paths.run)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .with_context(|| format!("can't start the shim {}", program.display()))?;
    let mut told = child.stdout.take().context("the shim's output is a pipe")?;
    // It writes nothing: the pipe ends when there is something to read in its folder, and with it.
    let closed = timeout(START_TIMEOUT, told.read_u8()).await;
    anyhow::ensure!(closed.is_ok(), "the container did not start in 30 s");
    if let Some(started) = files::read_json(&paths.run.join(shim::files::STARTED)) {
        let (all, prepared) = (begun.elapsed(), prepared.as_micros());
        ctx.filter.learn(&paths.run.join(shim::files::FILTER));
        tracing::info!(instance = %assignment.instance, us = all.as_micros(), prepared_us = prepared, "started");
        return Ok(started);
    }
    if let Some(Failed { message }) = files::read_json(&paths.run.join(shim::files::FAILED)) {
        anyhow::bail!("{message}");
    }
    let status = timeout(START_TIMEOUT, child.wait()).await.context("the shim neither starts nor ends")?;
    let status = status.context("can't wait for the shim")?;
    let words = fs::read_to_string(paths.run.join(shim::files::SHIM_LOG)).unwrap_or_default();
    anyhow::bail!("the shim ended with {status} before the container started: {}", words.trim());
}

/// Everything up to the shim: blocks.
fn prepare(
    ctx: &Context,
    assignment: &Assignment,
    paths: &InstancePaths,
    image: &PulledImage,
) -> anyhow::Result<()> {
    let cgroups = ctx
        .cgroups
        .as_ref()
        .context("the machine has no usable cgroups; mount them and restart the agent")?;
    let runtime = ctx.runtimes.get(assignment.isolation).with_context(|| match assignment.isolation {
        Isolation::Container => {
            "no OCI runtime is installed; run `apt-get install runc` and restart the agent"
        }
        Isolation::Sandbox => "gVisor is not installed; run `apt-get install runsc` and restart the agent",
        Isolation::Microvm => "microVMs are not supported yet; ask for `sandbox`",
    })?;
    ctx.ensure_firewall()?;
    // What the last container, or a killed agent, has left.
    cleanup::end_container(ctx, assignment, paths)?;
    rootfs::remove(&paths.run)?;
    network::ensure(paths, assignment.address, ctx.mtu, ctx.config.address6.is_some())?;
    rootfs::mount_fresh(image, paths)?;
    let container = image.config.container();
    let compiled = runtime.filter(assignment.instance.as_str());
    let filter = compiled.as_ref().and_then(|_| ctx.filter.get());
    Bundle { assignment, machine: &ctx.config.machine, image: &container, paths, filter }.write()?;
    fs::create_dir_all(&paths.run).context("can't make the shim's folder")?;
    let runtime_log = paths.run.join(shim::files::RUNTIME_LOG);
    let prefix = runtime.prefix(Some(&runtime_log));
    let spec = ShimSpec {
        id: assignment.instance.to_string(),
        runtime: prefix.into_iter().map(|part| part.to_string_lossy().into_owned()).collect(),
        runtime_log,
        exit_from_runtime: runtime.kind == Kind::Runsc,
        filter: compiled.filter(|_| filter.is_none()),
        bundle: paths.bundle.clone(),
        log: paths.logs.join("log"),
        log_bytes: LOG_BYTES,
        oom_file: Some(cgroups.oom_file(&paths.cgroup)),
    };
    files::write_json(&paths.run.join(shim::files::SPEC), &spec)?;
    File::create(paths.run.join(shim::files::LOCK)).context("can't make the shim's lock")?;
    Ok(())
}

/// Finds out what became of an instance. Its shim may be in the middle of starting it.
pub(super) async fn adopt(ctx: &Arc<Context>, assignment: &Arc<Assignment>, paths: &InstancePaths) -> Found {
    let run = &paths.run;
    let begun = Instant::now();
    loop {
        // Before its files, as above.
        let alive = shim::alive(run);
        if let Some(exit) = files::read_json(&run.join(shim::files::EXIT)) {
            shim_gone(run).await;
            return Found::Ended(exit);
        }
        if let Some(Failed { message }) = files::read_json(&run.join(shim::files::FAILED)) {
            return Found::Failed(message);
        }
        match (files::read_json(&run.join(shim::files::STARTED)), alive) {
            (Some(started), true) => {
                complete_network(ctx, paths, assignment.address).await;
                return Found::Running(started);
            }
            (Some(_), false) => return Found::Ended(exit(ctx, assignment, paths).await),
            (None, true) if begun.elapsed() < START_TIMEOUT => sleep(POLL).await,
            (None, _) => return Found::Nothing,
        }
    }
}

/// What an earlier agent made is brought up to date; the container runs on either way.
async fn complete_network(ctx: &Arc<Context>, paths: &InstancePaths, address: Ipv4Addr) {
    let (owned, shared, is_client6) = (paths.clone(), ctx.clone(), ctx.config.address6.is_some());
    let done = tokio::task::spawn_blocking(move || {
        // An earlier agent's rules know nothing of what containers send by IPv6.
        shared.ensure_firewall()?;
        network::complete(&owned, address, is_client6)
    })
    .await;
    if let Err(error) = done.map_err(anyhow::Error::from).flatten() {
        tracing::warn!(%address, "no IPv6 for clients of this instance: {error:#}");
    }
}

/// Returns when the container's first process has ended, or its shim has.
pub(super) async fn init_gone(paths: &InstancePaths, started: &Started) {
    if let Some(init) = pidfd::open_same(started.init_pid, started.init_start_ticks) {
        tokio::select! {
            () = pidfd::ended(init) => {}
            () = shim_gone(&paths.run) => {}
        }
    }
}

/// Waits for the shim's end, and says how the container ended. Where the shim was killed, the container is too: its
/// output leads nowhere, and nobody would learn its status.
pub(super) async fn exit(ctx: &Arc<Context>, assignment: &Arc<Assignment>, paths: &InstancePaths) -> Exit {
    shim_gone(&paths.run).await;
    let path = paths.run.join(shim::files::EXIT);
    if let Some(exit) = files::read_json(&path) {
        return exit;
    }
    tracing::warn!(instance = %assignment.instance, "its shim was killed; ending the container");
    let exit = Exit {
        exit_code: KILLED,
        signal: Some(libc::SIGKILL),
        oom_killed: false,
        ended_at: Timestamp::now(),
    };
    let (context, wanted, at, found) = (ctx.clone(), assignment.clone(), paths.clone(), exit.clone());
    let ended = tokio::task::spawn_blocking(move || {
        cleanup::end_container(&context, &wanted, &at)?;
        // For the next agent: a job that was killed isn't run again.
        files::write_json(&path, &found)
    });
    match ended.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(error = format!("{error:#}"), "can't end a container"),
        Err(error) => tracing::error!(%error, "ending a container panicked"),
    }
    exit
}

async fn shim_gone(run: &Path) {
    while shim::alive(run) {
        let pid = fs::read_to_string(run.join(shim::files::PID)).ok().and_then(|text| text.parse().ok());
        match pid.and_then(pidfd::open) {
            // Still the shim: it had the lock after its process was opened.
            Some(process) if shim::alive(run) => pidfd::ended(process).await,
            _ => sleep(POLL).await,
        }
    }
}
