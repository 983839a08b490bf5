//! Breaking things while clients ask: a container, a machine, a whole location.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use anyplace_tests::{Load, LoadReport, combine};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Demo;
use super::interrupt::{pause, wait_for};
use super::steps::served_by;

/// Between two requests of one client.
const INTERVAL: Duration = Duration::from_millis(20);
/// Requests before the failure, to have something to compare with.
const BEFORE: Duration = Duration::from_secs(1);
/// Requests after it: longer than any time-out that takes part.
const AFTER: Duration = Duration::from_secs(5);
/// How long lost instances may take to be replaced.
const HEAL_TIMEOUT: Duration = Duration::from_secs(30);

impl Demo {
    pub(super) fn outages(&mut self) -> Result<()> {
        let (_, machine) = served_by(&self.call("ams-client")?.0)?;
        let report = self.under_load(&format!("kill -9 of a container on {machine}"), || {
            let servers = self.platform.container_processes(&machine, "httpd");
            let pid = servers.first().with_context(|| format!("no web server runs on {machine}"))?;
            kill(Pid::from_raw(*pid), Signal::SIGKILL).context("kill a container")
        })?;
        self.report.container_kill = Some(report);
        self.wait_healed()?;

        let (_, machine) = served_by(&self.call("nrt-client")?.0)?;
        let report = self.under_load(&format!("power cut of machine {machine}"), || {
            self.platform.bed().kill_machine(&machine)
        })?;
        self.report.machine_kill = Some(report);
        self.wait_healed()?;

        let report = self.under_load("withdrawal of location gru", || {
            self.read_cli(&["location", "withdraw", "gru"]).map(drop)
        })?;
        self.report.location_withdraw = Some(report);
        let from = served_by(&self.call("gru-client")?.0)?.0;
        if from == "gru" {
            bail!("gru is withdrawn and still answers its client");
        }
        println!("  gru-client is answered by {from} now");
        self.show_cli(&["location", "announce", "gru"])?;
        wait_for("gru to answer its client again", HEAL_TIMEOUT, || {
            let from = served_by(&self.call("gru-client")?.0)?.0;
            if from == "gru" { Ok(()) } else { bail!("gru-client is answered by {from}") }
        })
    }

    /// Does something while all clients send requests; what they noticed.
    fn under_load(&self, what: &str, act: impl FnOnce() -> Result<()>) -> Result<LoadReport> {
        let target: SocketAddr = format!("{}:80", self.vip).parse().context("the virtual IP")?;
        let bed = self.platform.bed();
        let mut loads = Vec::new();
        for location in &bed.topology().locations {
            loads.push((location.client(), Load::start(bed.node(&location.client())?, target, INTERVAL)?));
        }
        let acted = pause(BEFORE).and_then(|()| act()).and_then(|()| pause(AFTER));
        // The streams end first, whatever happened.
        let mut reports = Vec::new();
        println!("{what}:");
        for (client, load) in loads {
            let report = load.report()?;
            println!(
                "  {client}: {} of {} requests failed, longest gap {} ms",
                report.failed_requests, report.requests, report.longest_gap_ms
            );
            reports.push(report);
        }
        acted?;
        Ok(combine(reports))
    }

    /// Waits until the deployment has all its instances again.
    fn wait_healed(&self) -> Result<()> {
        wait_for("the lost instances' replacement", HEAL_TIMEOUT, || {
            let hello = self.json(&["get", "deployments", "hello"])?;
            let (wanted, ready) = (hello["wanted"].as_u64(), hello["ready"].as_u64());
            if wanted == ready && wanted.is_some() {
                Ok(())
            } else {
                bail!("{ready:?} of {wanted:?} are ready")
            }
        })?;
        println!("  all instances are ready again");
        Ok(())
    }
}
