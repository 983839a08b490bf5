//! `cargo xtask demo`: the main job, end to end, on three locations made of network namespaces.
//!
//! Every step looks from outside (HTTP from the clients' namespaces, processes, signals) and ends the demo with an
//! error if what it shows isn't so; `--check` adds the promised numbers and ends by itself. Whatever happens, all is
//! removed at the end, and what a killed demo left is removed at the next start.

mod interrupt;
mod job;
mod outage;
mod report;
mod steps;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use anyplace_tests::{Platform, Testbed, Topology, cleanup, leftovers, platform, write_hello_image};
use serde_json::Value;

use crate::{setup, shell};
use report::Report;

/// The testbed's name: in namespaces, cgroups, folders.
const BED: &str = "demo";

/// A demo under way.
struct Demo {
    platform: Platform,
    report: Report,
    /// Just before the platform's first process was started.
    started: Instant,
    /// The deployment's virtual IP, once there is one.
    vip: String,
    /// The same for IPv6.
    vip6: String,
}

/// Runs the demo to its end. Returns whether everything was as it should be.
pub(crate) fn run(check: bool) -> Result<bool> {
    setup::ensure()?;
    if !nix::unistd::geteuid().is_root() {
        bail!("the demo makes network namespaces, cgroups and containers; run it as root");
    }
    shell::show(shell::cargo(&["build", "-p", "anyplace", "-p", "anyplace-tests", "--bins"])?)?;
    interrupt::catch()?;
    let left = leftovers(BED);
    if !left.is_empty() {
        println!("removing what an earlier demo left ({} things)", left.len());
    }
    cleanup(BED)?;

    let mut report = Report::default();
    let result = show(check, &mut report);
    if !check || result.is_err() {
        println!("\nremoving everything");
    }
    // The testbed went with `show`; this is for a testbed that failed half-way, and an error if one can't be removed.
    let removed = cleanup(BED);
    let left = leftovers(BED);
    for thing in &left {
        println!("left behind: {thing}");
    }
    report.leftovers = Some(left.len());
    if let Err(error) = &result
        && !interrupt::was_asked()
    {
        eprintln!("error: {error:#}");
    }
    if let Err(error) = &removed {
        eprintln!("error: {error:#}");
    }
    let broken = if check { report.broken_promises() } else { Vec::new() };
    for promise in &broken {
        eprintln!("error: {promise}");
    }
    if check {
        println!("{}", report.json());
    }
    let interrupted_on_purpose = !check && interrupt::was_asked();
    let ended_well = result.is_ok() || interrupted_on_purpose;
    Ok(ended_well && removed.is_ok() && broken.is_empty() && left.is_empty())
}

/// All steps; the platform is gone when this returns.
fn show(check: bool, report: &mut Report) -> Result<()> {
    heading(1, "a network of three locations, and the platform on it");
    let bed = Testbed::create(BED, &Topology::three_locations())?;
    steps::describe_network(&bed);
    let rootfs = bed.state_dir().join("image");
    write_hello_image(&rootfs)?;
    interrupt::check()?;
    let started = Instant::now();
    let platform = Platform::start(bed, platform::Options::default())?;
    println!("all schedulers and registries answer after {} ms", started.elapsed().as_millis());
    let mut demo =
        Demo { platform, report: Report::default(), started, vip: String::new(), vip6: String::new() };

    let result = demo.steps(&rootfs).and_then(|()| if check { Ok(()) } else { demo.stay_up() });
    *report = std::mem::take(&mut demo.report);
    if result.is_err() && !interrupt::was_asked() {
        let logs = shell::root()?.join("target/demo-logs");
        demo.platform.save_logs(&logs)?;
        println!("the logs of all processes are in {}", logs.display());
    }
    let destroyed = demo.platform.destroy();
    result.and(destroyed)
}

impl Demo {
    fn steps(&mut self, rootfs: &std::path::Path) -> Result<()> {
        heading(2, "a real image, packed and pushed");
        self.push(rootfs)?;
        heading(3, "a spec, applied; one address");
        self.apply()?;
        heading(4, "that address, called from everywhere");
        self.call_from_everywhere()?;
        heading(5, "failures under a steady stream of requests from all clients");
        self.outages()?;
        heading(6, "what users and operators see");
        self.look_around()?;
        heading(7, "a batch job that waits for the night");
        self.night_job()?;
        self.platform.check().or_else(|error| {
            // The processes on the machine that was killed are meant to have ended.
            if self.report.machine_kill.is_some() { Ok(()) } else { Err(error) }
        })
    }

    fn stay_up(&self) -> Result<()> {
        heading(8, "yours to try");
        println!("The platform stays up until Ctrl-C. From another terminal:\n");
        for line in self.next_commands()? {
            println!("  {line}");
        }
        loop {
            if interrupt::pause(Duration::from_secs(1)).is_err() {
                return Ok(());
            }
        }
    }

    /// Runs the command line with its output shown; an error if it fails.
    fn show_cli(&self, args: &[&str]) -> Result<()> {
        interrupt::check()?;
        println!("$ anyplace {}", args.join(" "));
        let status = self.cli(args).status().context("start the command line")?;
        if !status.success() {
            bail!("`anyplace {}` ended with {status}", args.join(" "));
        }
        Ok(())
    }

    /// Runs the command line; its standard output.
    fn read_cli(&self, args: &[&str]) -> Result<String> {
        interrupt::check()?;
        self.platform.cli_output(args.iter().copied())
    }

    /// The same with `-o json`; the one object of a list of one.
    fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.read_cli(&[args, &["-o", "json"]].concat())?;
        let value: Value = serde_json::from_str(&text).with_context(|| format!("read JSON: {text}"))?;
        Ok(match value {
            Value::Array(mut list) if list.len() == 1 => list.remove(0),
            other => other,
        })
    }

    fn cli(&self, args: &[&str]) -> Command {
        let mut command = self.platform.cli(args.iter().copied());
        if let Ok(root) = shell::root() {
            command.current_dir(root);
        }
        command
    }
}

fn heading(number: u32, text: &str) {
    println!("\n\u{2500}\u{2500} {number}. {text}");
}
