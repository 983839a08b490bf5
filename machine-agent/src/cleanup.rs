//! Removing what belongs to instances: in whole, after an end, and after a crash at any point. Everything here
//! blocks, may be done again, and copes with whatever is there or isn't.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant, SystemTime},
};

use anyplace_model::{Assignment, InstanceId, host_interface};

use crate::{
    files::read_json,
    instance::Context,
    network,
    paths::{InstancePaths, names},
    pidfd, rootfs,
    shim::{self, Started, files},
};

/// A shim that is about to end by itself gets so long.
const SHIM_END: Duration = Duration::from_millis(500);
/// A shim that doesn't end although its container is dead is killed after this.
const SHIM_PATIENCE: Duration = Duration::from_secs(3);
/// Logs of instances that are gone.
const KEPT_LOGS: usize = 100;

/// Ends the container and its shim, if there are any, and makes the runtime and the cgroups forget it. The shim's
/// folder stays.
pub(crate) fn end_container(
    ctx: &Context,
    assignment: &Assignment,
    paths: &InstancePaths,
) -> anyhow::Result<()> {
    let id = assignment.instance.as_str();
    let ending = || paths.run.join(files::EXIT).exists() || paths.run.join(files::FAILED).exists();
    let begun = Instant::now();
    // Held to the end of this function: no shim that comes late can begin.
    let _lock = loop {
        if !paths.run.join(files::LOCK).exists() {
            break None;
        }
        if let Some(lock) = shim::hold_lock(&paths.run) {
            break Some(lock);
        }
        if !ending() || begun.elapsed() > SHIM_END {
            kill_container(ctx, assignment, paths);
        }
        if begun.elapsed() > SHIM_PATIENCE {
            let pid = fs::read_to_string(paths.run.join(files::PID)).ok().and_then(|text| text.parse().ok());
            if let Some(fd) = pid.and_then(pidfd::open).filter(|_| shim::alive(&paths.run)) {
                pidfd::kill(&fd);
            }
        }
        anyhow::ensure!(begun.elapsed() < 2 * SHIM_PATIENCE, "the shim of {id} does not end");
        std::thread::sleep(Duration::from_millis(5));
    };
    kill_init(paths);
    for runtime in ctx.runtimes.all() {
        runtime.delete(id);
    }
    match &ctx.cgroups {
        Some(cgroups) => cgroups.remove(&paths.cgroup).map_err(anyhow::Error::msg),
        None => Ok(()),
    }
}

/// Kills the container's first process, and with it all others.
pub(crate) fn kill_container(ctx: &Context, assignment: &Assignment, paths: &InstancePaths) {
    kill_init(paths);
    if let Some(runtime) = ctx.runtimes.get(assignment.isolation) {
        // It may be dead, or not made yet; the caller looks again.
        let _ = runtime.command(&["kill", assignment.instance.as_str(), "KILL"]).status();
    }
}

fn kill_init(paths: &InstancePaths) {
    if let Some(started) = read_json::<Started>(&paths.run.join(files::STARTED))
        && let Some(fd) = pidfd::open_same(started.init_pid, started.init_start_ticks)
    {
        pidfd::kill(&fd);
    }
}

/// Removes the instance entirely, its log excepted. The record goes last: as long as it is there, a new agent
/// knows that there is something to remove.
pub(crate) fn remove_instance(
    ctx: &Context,
    assignment: &Assignment,
    paths: &InstancePaths,
) -> anyhow::Result<()> {
    end_container(ctx, assignment, paths)?;
    rootfs::unmount(&paths.merged)?;
    network::remove(paths, Some(assignment.address))?;
    for folder in [&paths.run, &paths.bundle, &paths.merged, &paths.upper, &paths.work] {
        rootfs::remove(folder)?;
    }
    rootfs::remove(&paths.dir)
}

/// Removes what belongs to no known instance: what a killed agent left between two steps.
pub(crate) fn sweep(ctx: &Context, known: &BTreeMap<InstanceId, Ipv4Addr>) {
    let unknown = |name: &String| !known.contains_key(name.as_str());
    let told = |what: &str, name: &str, result: anyhow::Result<()>| match result {
        Ok(()) => tracing::info!(what, name, "removed a leftover"),
        Err(error) => {
            tracing::error!(what, name, error = format!("{error:#}"), "can't remove a leftover");
        }
    };
    for runtime in ctx.runtimes.all() {
        for name in runtime.containers().into_iter().filter(unknown) {
            runtime.delete(&name);
            told("container", &name, Ok(()));
        }
    }
    if let Some(cgroups) = &ctx.cgroups {
        let parent = ctx.paths.machine_cgroup();
        for name in cgroups.children(parent).into_iter().filter(unknown) {
            let removed = cgroups.remove(&format!("{parent}/{name}")).map_err(anyhow::Error::msg);
            told("cgroup", &name, removed);
        }
    }
    let instances = ctx.paths.instances();
    for name in names(&instances).into_iter().filter(unknown) {
        let folder = instances.join(&name);
        let removed = rootfs::unmount(&folder.join("merged")).and_then(|()| rootfs::remove(&folder));
        told("folder", &name, removed);
    }
    for name in names(&ctx.paths.netns()).into_iter().filter(unknown) {
        told("network namespace", &name, network::remove_namespace(&ctx.paths.netns().join(&name)));
    }
    let wanted: BTreeSet<String> = known.values().map(|address| host_interface(*address)).collect();
    for name in network::interfaces().into_iter().filter(|name| !wanted.contains(name)) {
        told("interface", &name, network::remove_interface(&name));
    }
}

/// Removes the oldest logs of instances that are gone.
pub(crate) fn prune_logs(ctx: &Context) {
    let folder = ctx.paths.logs();
    let here = ctx.board.facts().instances;
    let mut gone: Vec<(SystemTime, String)> = names(&folder)
        .into_iter()
        .filter(|name| !here.contains_key(name.as_str()))
        .map(|name| {
            let written = fs::metadata(folder.join(&name).join("log")).and_then(|file| file.modified());
            (written.unwrap_or(SystemTime::UNIX_EPOCH), name)
        })
        .collect();
    gone.sort_unstable();
    for (_, name) in gone.iter().rev().skip(KEPT_LOGS) {
        if let Err(error) = rootfs::remove(&folder.join(name)) {
            tracing::warn!(error = format!("{error:#}"), "can't remove an old log");
        }
    }
}
