//! Building a testbed's network: namespaces, links, addresses, static routes.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use crate::bird::{client_gateway, client_gateway6, edge_link6, edge_links};
use crate::node::{self, Process};
use crate::procs::BED_VARIABLE;
use crate::relay::Link;
use crate::topology::{GLOBAL_ADDRESS, Topology};
use crate::xdp_pass::attach_pass;
use crate::{netns, testbed};

/// Inside the fabric: room for the encapsulation around a packet of 1500 bytes.
const FABRIC_MTU: u16 = 1600;

/// Parameters of every node.
const NODE_SYSCTLS: &[(&str, &str)] = &[
    // Decapsulated packets arrive from "wrong" interfaces, and replies leave by other ways.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    // Addresses count at once, and stay when a machine's link goes; nobody is asked for routes.
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/keep_addr_on_down", "1"),
];

/// Makes all namespaces.
pub(crate) fn namespaces(bed: &str, topology: &Topology) -> Result<()> {
    for node in topology.nodes() {
        let namespace = format!("{}{node}", netns::prefix(bed));
        netns::add(bed, &namespace)?;
        netns::sysctls(&namespace, NODE_SYSCTLS)?;
        let forwards = node.ends_with("-edge") || topology.machine(&node).is_some();
        if forwards {
            netns::sysctls(&namespace, &[("net/ipv4/ip_forward", "1")])?;
        }
        if node.ends_with("-edge") {
            // ECMP by the flow, not by the pair of hosts.
            let by_flow =
                ["net/ipv4", "net/ipv6"].map(|family| format!("{family}/fib_multipath_hash_policy"));
            netns::sysctls(&namespace, &by_flow.each_ref().map(|name| (name.as_str(), "1")))?;
            netns::sysctls(&namespace, &[("net/ipv6/conf/all/forwarding", "1")])?;
        }
    }
    Ok(())
}

/// Makes the links inside locations, and gives addresses and static routes.
///
/// Returns the XDP programs on the edges' ends of the machines' links, attached while they are kept.
pub(crate) fn wires(bed: &str, topology: &Topology) -> Result<Vec<OwnedFd>> {
    let mut pass = Vec::new();
    let namespace = |node: &str| format!("{}{node}", netns::prefix(bed));
    for (position, location) in topology.locations.iter().enumerate() {
        let edge = namespace(&location.edge());
        let mut lines = vec!["link set lo up".to_owned()];
        let mut machine_ends = Vec::new();
        let wire = |lines: &mut Vec<String>, device: &str, node: &str, gateway: String, address: String| {
            let far = namespace(node);
            lines.push(format!(
                "link add {device} mtu {FABRIC_MTU} type veth peer name eth0 mtu {FABRIC_MTU} netns {far}"
            ));
            lines.push(format!("addr add {gateway}/31 dev {device}"));
            lines.push(format!("link set {device} up"));
            (far, gateway, address)
        };
        for machine in topology.machines_of(location) {
            let device = machine.edge_interface();
            let (gateway, address) = (machine.gateway().to_string(), machine.address().to_string());
            machine_ends.push((device.clone(), machine.clone()));
            let far = wire(&mut lines, &device, &machine.name, gateway, address);
            lines.push(format!("addr add {}/127 dev {device}", machine.gateway6()));
            netns::ip_batch(&edge, &std::mem::take(&mut lines))?;
            let mut far_lines = host_lines(&far.1, &far.2);
            far_lines.push(format!("addr add {}/127 dev eth0", machine.address6()));
            far_lines.push(format!("route add default via {}", machine.gateway6()));
            // What no instance has must not go back to the edge, which would send it here again.
            far_lines.push(format!("route add unreachable {} metric 9999", machine.instance_cidr()));
            netns::ip_batch(&far.0, &far_lines)?;
        }
        let mut hosts = vec![("ctl", location.control(), location.control_address())];
        if position == 0 {
            hosts.push(("global", "global".to_owned(), GLOBAL_ADDRESS));
        }
        for (device, node, address) in hosts {
            let gateway = std::net::Ipv4Addr::from(u32::from(address) + 1).to_string();
            let far = wire(&mut lines, device, &node, gateway, address.to_string());
            netns::ip_batch(&edge, &std::mem::take(&mut lines))?;
            netns::ip_batch(&far.0, &host_lines(&far.1, &far.2))?;
        }
        netns::inside(&edge, || {
            for (device, _) in &machine_ends {
                // The machine's XDP program wants whole packets with finished checksums, and sends them back where
                // they came from.
                let off = ["-K", device, "tso", "off", "gso", "off", "tx", "off"];
                netns::run(Command::new("ethtool").args(off)).context("package ethtool")?;
                pass.push(attach_pass(device)?);
            }
            Ok(())
        })?;
    }
    Ok(pass)
}

fn host_lines(gateway: &str, address: &str) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        format!("addr add {address}/31 dev eth0"),
        "link set eth0 up".to_owned(),
        format!("route add default via {gateway}"),
    ]
}

/// Starts the relay of all delayed links, and gives their ends addresses.
pub(crate) fn delayed_links(bed: &str, topology: &Topology, logs: &Path) -> Result<Process> {
    let namespace = |node: &str| format!("{}{node}", netns::prefix(bed));
    let mut links = Vec::new();
    for location in &topology.locations {
        let end = (namespace(&location.edge()), "client".to_owned());
        let client = (namespace(&location.client()), "eth0".to_owned());
        links.push(Link { ends: [end, client], delay: topology.client_delay, rate_mbit: None });
        for (peer, _, _) in
            edge_links(topology, location).iter().filter(|(peer, _, _)| peer.index > location.index)
        {
            let ends = [
                (namespace(&location.edge()), format!("to-{}", peer.name)),
                (namespace(&peer.edge()), format!("to-{}", location.name)),
            ];
            links.push(Link { ends, delay: topology.delay(&location.name, &peer.name), rate_mbit: None });
        }
    }
    let relay = start_relay(bed, &links, logs)?;
    for location in &topology.locations {
        let gateway = client_gateway(location);
        let mut lines = vec![
            format!("addr add {gateway}/31 dev client"),
            format!("addr add {}/127 dev client", client_gateway6(location)),
            "link set client mtu 1500 up".to_owned(),
        ];
        for (peer, own, _) in edge_links(topology, location) {
            lines.push(format!("addr add {own}/31 dev to-{}", peer.name));
            lines.push(format!("addr add {}/127 dev to-{}", edge_link6(own), peer.name));
            lines.push(format!("link set to-{} mtu {FABRIC_MTU} up", peer.name));
        }
        netns::ip_batch(&namespace(&location.edge()), &lines)?;
        let lines = [
            "link set lo up".to_owned(),
            format!("addr add {}/31 dev eth0", location.client_address()),
            format!("addr add {}/127 dev eth0", location.client_address6()),
            "link set eth0 mtu 1500 up".to_owned(),
        ];
        netns::ip_batch(&namespace(&location.client()), &lines)?;
    }
    Ok(relay)
}

/// Starts the relay process and waits until it has made the devices.
fn start_relay(bed: &str, links: &[Link], logs: &Path) -> Result<Process> {
    let program = testbed::target_dir()?.join("anyplace-delay-link");
    if !program.exists() {
        bail!("{} is not there; run `cargo build -p anyplace-tests`", program.display());
    }
    let (read, write) = std::io::pipe()?;
    let mut command = Command::new(program);
    command.args(links.iter().map(Link::to_string)).env(BED_VARIABLE, bed);
    let relay = node::spawn_with_output(logs, "delay-link", command, write.into())?;
    let mut line = String::new();
    BufReader::new(read).read_line(&mut line)?;
    if line.trim() != "ready" {
        bail!("the delay relay did not start: {}", relay.log_tail());
    }
    Ok(relay)
}
