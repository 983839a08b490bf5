//! BGP by bird2: one daemon for each machine, edge and client.
//!
//! Machines announce their instances' prefix and what the router's include file lists. Edges learn both, merge the
//! paths over their machines (ECMP), prefer their own location by the shorter AS path and nearer locations by the MED,
//! and tell clients nothing but VIPs.
//!
//! The include file is two static protocols, `anyplace_vips` and `anyplace_vips6`, with one route for each announced
//! prefix of their family; see [`vip_include`]. Its routes never reach the machine's kernel: bird has no kernel protocol there.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::node::{Node, Process};
use crate::topology::{Location, Machine, Topology, VIP_PREFIX, VIP_PREFIX6};

/// Always in the include file and never exported, so that the file stays valid with nothing to announce.
const PLACEHOLDER: &str = "192.0.2.255/32";
const PLACEHOLDER6: &str = "100::/128";

/// Options of every session. Hold time and BFD decide how fast a frozen peer is noticed: 3 s by BGP alone, half a
/// second by BFD (five times 100 ms: shorter ones flap when a 2-core machine compiles beside).
const SESSION: &str = "    hold time 3;\n    keepalive time 1;\n    connect delay time 1;\n    connect retry time 1;\n    \
                       error wait time 1, 2;\n    error forget time 1;\n";
const BFD: &str = "interval 100 ms; multiplier 5;";

/// How long a daemon may take to open its control socket.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The include file that announces these prefixes.
pub fn vip_include(prefixes: &[&str]) -> String {
    let mut text = String::new();
    for (protocol, channel, placeholder) in
        [("anyplace_vips", "ipv4", PLACEHOLDER), ("anyplace_vips6", "ipv6", PLACEHOLDER6)]
    {
        let _ =
            writeln!(text, "protocol static {protocol} {{\n  {channel};\n  route {placeholder} unreachable;");
        for prefix in prefixes.iter().filter(|prefix| prefix.contains(':') == (channel == "ipv6")) {
            let _ = writeln!(text, "  route {prefix} unreachable;");
        }
        text += "}\n";
    }
    text
}

/// Where a node's bird keeps its files.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) config: PathBuf,
    pub(crate) include: PathBuf,
    pub(crate) control: PathBuf,
}

impl Files {
    pub(crate) fn new(state: &Path, node: &str) -> Self {
        let folder = state.join("bird").join(node);
        Self {
            config: folder.join("bird.conf"),
            include: folder.join("anyplace.conf"),
            control: folder.join("bird.ctl"),
        }
    }
}

fn head(id: impl std::fmt::Display) -> String {
    format!("log stderr all;\nrouter id {id};\nprotocol device {{ scan time 5; }}\n")
}

/// A machine's configuration; `withdrawn` keeps the VIPs back, whatever the include file says.
pub(crate) fn machine_config(
    location: &Location,
    machine: &Machine,
    include: &Path,
    withdrawn: bool,
) -> String {
    let vips = if withdrawn { "reject" } else { "accept" };
    let (address, gateway) = (machine.address(), machine.gateway());
    format!(
        "{head}include \"{include}\";
protocol static instances {{
  ipv4;
  route {instances} unreachable;
}}
protocol bfd {{
  interface \"eth0\" {{ {BFD} }};
}}
filter announced {{
  if proto = \"instances\" then accept;
  if proto = \"anyplace_vips\" && net != {PLACEHOLDER} then {vips};
  if proto = \"anyplace_vips6\" && net != {PLACEHOLDER6} then {vips};
  reject;
}}
protocol bgp to_edge {{
    local {address} as {machine_as};
    neighbor {gateway} as {edge_as};
    bfd on;
{SESSION}    ipv4 {{ import none; export filter announced; }};
    ipv6 {{ import none; export filter announced; }};
}}
",
        head = head(address),
        include = include.display(),
        instances = machine.instance_cidr(),
        machine_as = location.machine_as(),
        edge_as = location.edge_as(),
    )
}

/// An edge's configuration.
pub(crate) fn edge_config(topology: &Topology, location: &Location) -> String {
    let mut text = head(location.control_address());
    let own_as = location.edge_as();
    let _ = write!(
        text,
        "protocol direct {{ ipv4; ipv6; interface \"m*\", \"ctl\", \"global\", \"client\"; }}
protocol kernel {{
  merge paths on;
  ipv4 {{ import none; export filter {{ if source = RTS_DEVICE then reject; accept; }}; }};
}}
protocol kernel {{
  merge paths on;
  ipv6 {{ import none; export filter {{ if source = RTS_DEVICE then reject; accept; }}; }};
}}
protocol bfd {{
  interface \"m*\" {{ {BFD} }};
}}
"
    );
    for machine in topology.machines_of(location) {
        let _ = write!(
            text,
            "protocol bgp machine{} {{
    local {} as {own_as};
    neighbor {} as {};
    bfd on;
{SESSION}    ipv4 {{ import filter {{ bgp_med = 0; accept; }}; export none; }};
    ipv6 {{ import filter {{ bgp_med = 0; accept; }}; export none; }};
}}
",
            machine.index,
            machine.gateway(),
            machine.address(),
            location.machine_as()
        );
    }
    for (peer, own_address, peer_address) in edge_links(topology, location) {
        let med = topology.delay(&location.name, &peer.name).as_millis();
        let _ = write!(
            text,
            "protocol bgp edge_{} {{
    local {own_address} as {own_as};
    neighbor {peer_address} as {};
    med metric on;
{SESSION}    ipv4 {{ import filter {{ bgp_med = {med}; accept; }}; export all; }};
    ipv6 {{ import filter {{ bgp_med = {med}; accept; }}; export all; }};
}}
",
            peer.name,
            peer.edge_as()
        );
    }
    let client = location.client_address();
    let _ = write!(
        text,
        "protocol bgp to_client {{
    local {} as {own_as};
    neighbor {client} as {};
{SESSION}    ipv4 {{ import none; export filter {{ if net ~ [ {VIP_PREFIX}+ ] then accept; reject; }}; }};
    ipv6 {{ import none; export filter {{ if net ~ [ {VIP_PREFIX6}+ ] then accept; reject; }}; }};
}}
",
        client_gateway(location),
        location.client_as()
    );
    text
}

/// A client's configuration: it learns VIPs from the edge near it, as a host learns its default route.
pub(crate) fn client_config(location: &Location) -> String {
    let client = location.client_address();
    format!(
        "{head}protocol kernel {{
  ipv4 {{ import none; export all; }};
}}
protocol kernel {{
  ipv6 {{ import none; export all; }};
}}
protocol bgp to_edge {{
    local {client} as {client_as};
    neighbor {gateway} as {edge_as};
{SESSION}    ipv4 {{ import all; export none; }};
    ipv6 {{ import all; export none; }};
}}
",
        head = head(client),
        gateway = client_gateway(location),
        client_as = location.client_as(),
        edge_as = location.edge_as(),
    )
}

/// The edge's end of the client's link.
pub(crate) fn client_gateway(location: &Location) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::from(u32::from(location.client_address()) + 1)
}

/// The same for IPv6.
pub(crate) fn client_gateway6(location: &Location) -> std::net::Ipv6Addr {
    std::net::Ipv6Addr::from(u128::from(location.client_address6()) - 1)
}

/// The IPv6 address of the end of an edge link that has this IPv4 address.
pub(crate) fn edge_link6(end: std::net::Ipv4Addr) -> std::net::Ipv6Addr {
    let [_, _, link, side] = end.octets();
    std::net::Ipv6Addr::new(0xfd61, 0xff, link.into(), 0, 0, 0, 0, side.into())
}

/// The other edges, with this edge's and their address on the link between.
pub(crate) fn edge_links<'a>(
    topology: &'a Topology,
    location: &Location,
) -> Vec<(&'a Location, std::net::Ipv4Addr, std::net::Ipv4Addr)> {
    let others = topology.locations.iter().filter(|other| other.index != location.index);
    others
        .map(|other| {
            let (low, high) = (location.index.min(other.index), location.index.max(other.index));
            let end = |second: bool| std::net::Ipv4Addr::new(10, 255, low * 16 + high, u8::from(second));
            (other, end(location.index > other.index), end(location.index < other.index))
        })
        .collect()
}

/// Starts a node's daemon on a configuration.
pub(crate) fn start(node: &Node, files: &Files, config: &str) -> Result<Process> {
    if let Some(folder) = files.config.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&files.config, config)?;
    let mut command = node.command("bird");
    command.arg("-f").arg("-c").arg(&files.config).arg("-s").arg(&files.control);
    let daemon =
        node.spawn(&format!("bird-{}", node.name()), command).context("start bird (package bird2)")?;
    let deadline = Instant::now() + START_TIMEOUT;
    while control(files, &["show", "status"]).is_err() {
        daemon.check()?;
        if Instant::now() > deadline {
            bail!("bird on {} did not open its control socket: {}", node.name(), daemon.log_tail());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(daemon)
}

/// Runs a command of a daemon (`show route`, `configure`).
pub(crate) fn control(files: &Files, words: &[&str]) -> Result<String> {
    crate::netns::run(Command::new("birdc").arg("-s").arg(&files.control).args(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_of_an_edge_link_agree() {
        let topology = Topology::three_locations();
        for location in &topology.locations {
            for (peer, own, other) in edge_links(&topology, location) {
                let back = edge_links(&topology, peer);
                assert!(back.iter().any(|(far, a, b)| far.name == location.name && *a == other && *b == own));
            }
        }
    }
}
