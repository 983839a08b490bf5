//! The steps that push, apply, call and look around.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use anyplace_tests::{HELLO_ENTRY, Testbed, http_get};

use super::Demo;
use super::interrupt::wait_for;

/// The example specs, as a user would write them.
const HELLO: &str = "docs/examples/hello.yaml";
const GPU: &str = "docs/examples/gpu.yaml";

/// From connect to the last byte, around half the world.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// Prints what the testbed is made of.
pub(super) fn describe_network(bed: &Testbed) {
    let topology = bed.topology();
    for location in &topology.locations {
        let machines: Vec<_> = topology
            .machines_of(location)
            .iter()
            .map(|machine| format!("{} ({})", machine.name, machine.address()))
            .collect();
        println!("{}: machines {}, client {}", location.name, machines.join(", "), location.client_address());
    }
    let far = |(a, b, delay): &(String, String, Duration)| format!("{a}-{b} {} ms", delay.as_millis());
    println!("one way: {}", topology.delays.iter().map(far).collect::<Vec<_>>().join(", "));
}

impl Demo {
    pub(super) fn push(&self, rootfs: &Path) -> Result<()> {
        let folder = rootfs.to_string_lossy();
        self.show_cli(&["push", &folder, "hello:v1", "--entrypoint", HELLO_ENTRY])
    }

    pub(super) fn apply(&mut self) -> Result<()> {
        self.show_cli(&["apply", "-f", HELLO, "--wait"])?;
        let hello = self.json(&["get", "deployments", "hello"])?;
        self.vip = hello["vip"].as_str().context("the deployment's virtual IP")?.to_owned();
        self.vip6 = hello["vip6"].as_str().context("the deployment's virtual IPv6")?.to_owned();
        let node = self.platform.bed().node("ams-client")?;
        let url = format!("http://{}/", self.vip);
        wait_for("the first answer", Duration::from_secs(20), || {
            let answer = http_get(node, &url, CALL_TIMEOUT)?;
            if answer.status == 200 { Ok(()) } else { bail!("{url} answers {}", answer.status) }
        })?;
        let elapsed = self.started.elapsed().as_millis() as u64;
        self.report.first_response_ms = Some(elapsed);
        println!(
            "hello has the addresses {} and {}; its first answer came {elapsed} ms after the platform's start",
            self.vip, self.vip6
        );
        Ok(())
    }

    pub(super) fn call_from_everywhere(&self) -> Result<()> {
        for location in &self.platform.bed().topology().locations {
            let client = location.client();
            // A location that became ready last may be served from elsewhere for a moment.
            for (family, host) in [("IPv4", self.vip.clone()), ("IPv6", format!("[{}]", self.vip6))] {
                let (body, elapsed) = wait_for("an answer from nearby", Duration::from_secs(10), || {
                    let (body, elapsed) = self.call_at(&client, &host)?;
                    let from = served_by(&body)?.0;
                    if from == location.name {
                        Ok((body, elapsed))
                    } else {
                        bail!("{client} was answered by {from} at {host}")
                    }
                })?;
                println!("{client} by {family}: {} ({:.1} ms)", body.trim(), elapsed.as_secs_f64() * 1e3);
            }
        }
        Ok(())
    }

    /// One call from a client: the page and the time.
    pub(super) fn call(&self, client: &str) -> Result<(String, Duration)> {
        self.call_at(client, &self.vip)
    }

    fn call_at(&self, client: &str, host: &str) -> Result<(String, Duration)> {
        let node = self.platform.bed().node(client)?;
        let answer = http_get(node, &format!("http://{host}/"), CALL_TIMEOUT)?;
        if answer.status != 200 {
            bail!("{client} got status {}", answer.status);
        }
        Ok((answer.body, answer.elapsed))
    }

    pub(super) fn look_around(&self) -> Result<()> {
        self.show_cli(&["capacity"])?;
        self.show_cli(&["get", "deployments"])?;
        self.show_cli(&["describe", "deployment", "hello"])?;
        self.show_cli(&["logs", "hello", "--tail", "5"])?;
        let log = self.read_cli(&["logs", "hello"])?;
        if !log.contains("serving on port 8080") {
            bail!("the instances' logs don't hold what their entry script wrote: {log}");
        }
        println!("\nand a spec that asks for a GPU, which no machine here has:");
        self.show_cli(&["apply", "-f", GPU])?;
        let why = wait_for("a reason", Duration::from_secs(10), || {
            let why = self.json(&["why", "gpu"])?;
            let reasons = why["refusals"].as_array().map(Vec::as_slice).unwrap_or_default();
            let says_gpu = reasons.iter().any(|refusal| {
                let reason = refusal["reason"].as_str().unwrap_or_default();
                reason.contains("gpu") && refusal["count"].as_u64().unwrap_or(0) > 0
            });
            if says_gpu { Ok(why) } else { bail!("`why gpu` names no GPU reason with a count: {why}") }
        })?;
        if why["ready"].as_u64() != Some(0) {
            bail!("an instance that needs a GPU runs on machines without one: {why}");
        }
        self.show_cli(&["why", "gpu"])?;
        self.show_cli(&["delete", "deployment", "gpu"])
    }

    /// Three commands to go on with.
    pub(super) fn next_commands(&self) -> Result<Vec<String>> {
        let (bed, client) = (self.platform.bed(), "nrt-client");
        let anyplace = self.write_wrapper()?;
        Ok(vec![
            format!("nsenter --net=/run/netns/ap-{}-{client} curl -s http://{}/", bed.name(), self.vip),
            format!("{} get instances", anyplace.display()),
            format!("tail -f {}/logs/state-router-ams-1.log", bed.state_dir().display()),
        ])
    }

    /// A script that runs the command line inside the testbed, with its address and credentials.
    fn write_wrapper(&self) -> Result<std::path::PathBuf> {
        let bed = self.platform.bed();
        let cli = self.platform.cli([]);
        let variables: String = cli
            .get_envs()
            .filter(|(name, _)| {
                name.to_string_lossy().starts_with("ANYPLACE_") && *name != "ANYPLACE_TESTBED"
            })
            .filter_map(|(name, value)| Some(format!("export {}='{}'\n", name.display(), value?.display())))
            .collect();
        let script = format!(
            "#!/bin/sh\n{variables}exec nsenter --net=/run/netns/ap-{}-global '{}' \"$@\"\n",
            bed.name(),
            cli.get_program().display()
        );
        let path = bed.state_dir().join("anyplace");
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        Ok(path)
    }
}

/// Location and machine that a page says it comes from.
pub(super) fn served_by(body: &str) -> Result<(String, String)> {
    let words: Vec<_> = body.split([' ', ',', '\n']).filter(|word| !word.is_empty()).collect();
    match words[..] {
        ["hello", "from", location, "machine", machine, ..] => Ok((location.to_owned(), machine.to_owned())),
        _ => bail!("found the page `{}`, expected `hello from LOCATION, machine MACHINE ...`", body.trim()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_says_who_serves_it() {
        let body = "hello from ams, machine ams-1, instance hello-abc\n";
        assert_eq!(served_by(body).unwrap(), ("ams".to_owned(), "ams-1".to_owned()));
        assert!(served_by("404").is_err());
    }
}
