//! Namespaces for pulls over a slow link, and for many machines at once. All are removed at the end.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::shell;

/// The servers' namespace and its address towards the clients.
pub(crate) const SERVER_ADDRESS: &str = "10.99.0.1";
/// Jumbo frames: headers are then under 1 % of what an interface counts.
const MTU: &str = "9000";

/// One namespace with the servers and some with clients.
pub(crate) struct Network {
    prefix: String,
    clients: usize,
    relay: Option<Child>,
}

impl Network {
    /// A client behind a link with a delay (one way, in microseconds) and a rate.
    pub(crate) fn slow_link(relay: &Path, delay_us: u64, mbit: u32) -> Result<Network> {
        let mut network = Network::new(1)?;
        let (server, client) = (network.server(), network.client(0));
        let link = format!("{server}:eth0:{client}:eth0:{delay_us}:{mbit}");
        let mut command = Command::new(relay);
        command.arg(link).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {}", relay.display()))?;
        let mut ready = String::new();
        let output = child.stdout.take().context("the relay's output")?;
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut ready)?;
        network.relay = Some(child);
        for (namespace, address) in [(&server, SERVER_ADDRESS), (&client, "10.99.0.2")] {
            ip(&["-n", namespace, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
            ip(&["-n", namespace, "link", "set", "eth0", "mtu", MTU, "up"])?;
        }
        Ok(network)
    }

    /// Many clients on one switch, which is in the servers' namespace.
    pub(crate) fn switch(clients: usize) -> Result<Network> {
        let network = Network::new(clients)?;
        let server = network.server();
        ip(&["-n", &server, "link", "add", "br0", "type", "bridge"])?;
        for number in 0..clients {
            let (client, port) = (network.client(number), format!("port{number}"));
            ip(&[
                "-n", &server, "link", "add", &port, "mtu", MTU, "type", "veth", "peer", "name", "eth0",
                "mtu", MTU, "netns", &client,
            ])?;
            ip(&["-n", &server, "link", "set", &port, "master", "br0", "up"])?;
            let address = format!("{}/16", network.address(number));
            ip(&["-n", &client, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &client, "link", "set", "eth0", "up"])?;
        }
        ip(&["-n", &server, "addr", "add", &format!("{SERVER_ADDRESS}/16"), "dev", "br0"])?;
        ip(&["-n", &server, "link", "set", "br0", "mtu", MTU, "up"])?;
        Ok(network)
    }

    fn new(clients: usize) -> Result<Network> {
        let network = Network { prefix: format!("apb-{}", std::process::id()), clients, relay: None };
        for namespace in network.namespaces() {
            ip(&["netns", "add", &namespace])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }

    pub(crate) fn server(&self) -> String {
        format!("{}-s", self.prefix)
    }

    pub(crate) fn client(&self, number: usize) -> String {
        format!("{}-c{number}", self.prefix)
    }

    fn namespaces(&self) -> Vec<String> {
        std::iter::once(self.server()).chain((0..self.clients).map(|number| self.client(number))).collect()
    }

    /// A client's address on the switch.
    pub(crate) fn address(&self, client: usize) -> String {
        format!("10.99.1.{}", client + 1)
    }

    /// Bytes that a client sent so far, as its interface counts them.
    pub(crate) fn sent(&self, client: usize) -> Result<u64> {
        let words = ["-n", &self.client(client), "-j", "-s", "link", "show", "eth0"];
        let links: serde_json::Value =
            serde_json::from_str(&shell::output(&mut shell::command("ip", &words)?)?)?;
        links[0]["stats64"]["tx"]["bytes"].as_u64().context("the interface's counter")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(relay) = &mut self.relay {
            let _ = relay.kill();
            let _ = relay.wait();
        }
        for namespace in self.namespaces() {
            let _ = ip(&["netns", "delete", &namespace]);
        }
    }
}

/// A command inside a network namespace. Not by `ip netns exec`, which makes a mount namespace too: what pulls mount
/// would be gone with them.
pub(crate) fn inside(namespace: &str, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg(program).args(args).stdin(Stdio::null());
    command
}

fn ip(args: &[&str]) -> Result<()> {
    shell::output(&mut shell::command("ip", args)?).map(drop)
}
