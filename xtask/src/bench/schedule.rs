//! The schedulers: how long a decision takes, and how many placements a second reach the machines.
//!
//! Decisions are timed by examples of the two core crates: the planners' own choices, over generated fleets. Placements are
//! counted by an example of the crate `anyplace-location-scheduler`, from the API to the machines, with real schedulers.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::daemon::Daemon;
use super::report::Op;
use super::{Report, WorkDir, example, measure_fleet, measure_lines, wanted};
use crate::shell;

const PARTS: &[&str] = &["decisions", "embedded", "etcd"];
const LOCATION: (&str, &str) = ("anyplace-location-core", "location-decision-bench");
const GLOBAL: (&str, &str) = ("anyplace-global-core", "global-decision-bench");
const PLACEMENTS: &str = "placements";
/// The best of its runs on this kind of machine: 5,000 nodes and 10,000 pods in scheduler_perf.
const KUBE: (&str, f64) = ("kube-scheduler 1.36", 160.0);

pub(crate) fn run(report: &mut Report, only: Option<&str>) -> Result<()> {
    let folder = WorkDir::new("schedule")?;
    if wanted(only, PARTS, "decisions")? {
        decisions(report)?;
    }
    if wanted(only, PARTS, "embedded")? {
        let values = measure_fleet(PLACEMENTS, &folder.join("embedded"), None)?;
        placements(report, "embedded store", &values, 5_000.0, Some(KUBE));
    }
    if wanted(only, PARTS, "etcd")? {
        let (_etcd, endpoint) = etcd(&folder.join("etcd-data"))?;
        let values = measure_fleet(PLACEMENTS, &folder.join("etcd"), Some(&endpoint))?;
        placements(report, "etcd", &values, 1_000.0, None);
    }
    Ok(())
}

fn decisions(report: &mut Report) -> Result<()> {
    let global = measure_lines(&example(GLOBAL.0, GLOBAL.1)?, &[])?;
    let location = measure_lines(&example(LOCATION.0, LOCATION.1)?, &[])?;
    let name = "global plan for one more instance, 330 locations, 1,000 deployments, p99";
    report.add(name, value(&global, "one_p99_ms"), "ms", Op::AtMost, 1.0, None);
    let name = "each new deployment of 20 in a plan of 100, mean";
    report.add(name, value(&global, "new_mean_ms"), "ms", Op::AtMost, 1.0, None);
    let name = "location plan for one more instance, 1,000 machines of 8 GPUs, 20,000 instances, p99";
    report.add(name, value(&location, "one_p99_ms"), "ms", Op::AtMost, 1.0, None);
    let name = "each instance of a plan that starts 1,000, mean";
    report.add(name, value(&location, "many_mean_ms"), "ms", Op::AtMost, 1.0, None);
    let name = "location scheduler's first plan, 20,000 reservations read from JSON";
    report.add(name, value(&location, "first_ms"), "ms", Op::AtMost, 1_000.0, None);
    Ok(())
}

fn placements(
    report: &mut Report,
    store: &str,
    values: &BTreeMap<String, f64>,
    target: f64,
    peer: Option<(&str, f64)>,
) {
    let name = format!("placements, API to machine, {store}, 5 x 1,000 machines, 10,000 instances");
    let assigned = value(values, "placements_per_s");
    report.add(&name, assigned, "/s", Op::AtLeast, target, peer);
    if let Some((peer, rate)) = peer {
        report.add(&format!("the same beside {peer}"), assigned / rate, "x", Op::AtLeast, 10.0, None);
    }
}

fn value(values: &BTreeMap<String, f64>, name: &str) -> f64 {
    values.get(name).copied().unwrap_or(f64::NAN)
}

/// One member of etcd 3.5, as its package starts it but for the folder and the ports; its endpoint.
fn etcd(data: &Path) -> Result<(Daemon, String)> {
    let program = shell::root()?.join("target/tools/etcd-3.5/usr/bin/etcd");
    ensure!(program.exists(), "{} is missing; run `cargo xtask setup`", program.display());
    // Both at once, so that they differ; taken again in a moment.
    let [client, peer] = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let (client, peer) = (client?, peer?);
    let [address, peer_address] = [client.local_addr()?, peer.local_addr()?];
    drop((client, peer));
    let url = |address: SocketAddr| format!("http://{address}");
    let (endpoint, peer) = (url(address), url(peer_address));
    let mut command = Command::new(program);
    command.arg("--data-dir").arg(data).args(["--log-level", "error", "--name", "bench"]).args([
        "--listen-client-urls",
        &endpoint,
        "--advertise-client-urls",
        &endpoint,
        "--listen-peer-urls",
        &peer,
        "--initial-advertise-peer-urls",
        &peer,
        "--initial-cluster",
        &format!("bench={peer}"),
    ]);
    let daemon = Daemon::start(command, address, None, &data.with_extension("log")).context("start etcd")?;
    Ok((daemon, endpoint))
}
