//! The batch job that runs once it is night.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use anyplace_tests::platform::off_peak_window;

use super::Demo;
use super::interrupt::wait_for;

const NIGHT: &str = "docs/examples/nightly.yaml";
/// The location whose night the demo calls.
const AT: &str = "nrt";
/// Seconds until then: enough to see the job wait.
const NIGHT_IN_S: u32 = 4;
/// From there to the job's end, on a busy machine.
const JOB_TIMEOUT: Duration = Duration::from_secs(60);

impl Demo {
    pub(super) fn night_job(&mut self) -> Result<()> {
        self.show_cli(&["jobs", "run", "-f", NIGHT])?;
        wait_for("the job to wait for its window", Duration::from_secs(10), || {
            let job = self.json(&["jobs", "get", "nightly"])?;
            let reasons = job["reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
            let waits = reasons.iter().any(|one| one["reason"] == "outside_off_peak_window");
            if waits && job["phase"] == "queued" { Ok(()) } else { bail!("the job is {job}") }
        })?;
        self.show_cli(&["why", "job", "nightly"])?;

        let location = self.platform.bed().topology().location(AT).context("the night's location")?;
        let window = off_peak_window(location, NIGHT_IN_S, 600)?;
        println!("the demo's clock: in {AT} the night begins in {NIGHT_IN_S} s (local {window})");
        self.show_cli(&["location", "set", AT, "--off-peak", &window])?;
        let job = wait_for("the job's end", JOB_TIMEOUT, || {
            let job = self.json(&["jobs", "get", "nightly"])?;
            let has_ended = ["succeeded", "failed", "cancelled"].iter().any(|phase| job["phase"] == *phase);
            if has_ended { Ok(job) } else { bail!("the job is {}", job["phase"]) }
        })?;
        self.report.job_exit_code = job["exit_code"].as_i64();
        if job["location"] != AT {
            bail!("the job ran in {}, where it isn't night; expected {AT}", job["location"]);
        }
        self.show_cli(&["jobs", "logs", "nightly"])?;
        let log = self.read_cli(&["jobs", "logs", "nightly"])?;
        if log.matches("nightly report: done").count() != 1 {
            bail!("the job's log should hold one run's line: {log}");
        }
        println!("exit code {}, attempt {}", job["exit_code"], job["attempt"]);
        Ok(())
    }
}
