//! The roles' config files, as documented for operators.

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::netns;
use crate::topology::{GLOBAL_ADDRESS, Location, Machine, VIP_PREFIX, VIP_PREFIX6};

/// What a machine's agent and router have in common.
pub(super) struct OnMachine {
    pub(super) data_dir: PathBuf,
    pub(super) machine: Machine,
    pub(super) control: Ipv4Addr,
    pub(super) token_file: PathBuf,
    pub(super) cgroup_parent: String,
}

pub(super) fn global(data: &Path) -> String {
    format!(
        "data_dir = {data:?}\nlisten = \"{GLOBAL_ADDRESS}:7600\"\nvip_pools = [\"{VIP_PREFIX}\", \"{VIP_PREFIX6}\"]\n"
    )
}

pub(super) fn location(
    location: &Location,
    data: &Path,
    token_file: &Path,
    off_peak: &str,
    drain_ms: Option<u64>,
) -> String {
    let drain = drain_ms.map(|ms| format!("drain_ms = {ms}\n")).unwrap_or_default();
    let address = location.control_address();
    let Location { name, region, country, latitude, longitude, timezone, .. } = location;
    format!(
        "data_dir = {data:?}
listen = \"{address}:7610\"
advertise = \"http://{address}:7610\"
location = {name:?}
region = {region:?}
country = {country:?}
labels = {{ tier = \"edge\" }}
latitude = {latitude:?}
longitude = {longitude:?}
timezone = {timezone:?}
off_peak = {off_peak:?}
global = \"http://{GLOBAL_ADDRESS}:7600\"
token_file = {token_file:?}
machine_lease_ms = 600
{drain}"
    )
}

pub(super) fn registry(
    location: &Location,
    data: &Path,
    credentials: &Path,
    upstream: Option<&str>,
) -> String {
    let address = location.control_address();
    let mut text =
        format!("data_dir = {data:?}\nlisten = \"{address}:5000\"\ncredentials_file = {credentials:?}\n");
    if let Some(url) = upstream {
        let _ = write!(text, "[[upstreams]]\nurl = {url:?}\ncredentials_file = {credentials:?}\n");
    }
    text
}

pub(super) fn agent(on: &OnMachine, credentials: &Path, gpus: &[(String, String)]) -> String {
    let address = on.machine.address();
    let mut text = common(on);
    let _ = write!(
        text,
        "listen = \"{address}:7620\"
advertise = \"http://{address}:7620\"
registry = \"http://{control}:5000\"
registry_credentials_file = {credentials:?}
instance_cidr = \"{instances}\"
protected_cidrs = [\"10.0.0.0/8\"]
cgroup_parent = {parent:?}
resources = {{ cpu = \"4\", memory = \"8Gi\", disk = \"50Gi\" }}
",
        control = on.control,
        instances = on.machine.instance_cidr(),
        parent = on.cgroup_parent,
    );
    for (model, memory) in gpus {
        let _ = write!(text, "[[gpus]]\nmodel = {model:?}\nmemory = {memory:?}\n");
    }
    text
}

pub(super) fn router(on: &OnMachine, pins: &Path, include: &Path, control_socket: &Path) -> String {
    let common = common(on);
    format!(
        "{common}pin_dir = {pins:?}\nfleet = [\"10.0.0.0/8\"]\n[bgp]\ninclude = {include:?}\ncontrol_socket = \
         {control_socket:?}\n"
    )
}

fn common(on: &OnMachine) -> String {
    let OnMachine { data_dir, machine, control, token_file, .. } = on;
    format!(
        "data_dir = {data_dir:?}
machine = {:?}
location_scheduler = \"http://{control}:7610\"
token_file = {token_file:?}
address = \"{}\"
address6 = \"{}\"
uplink = \"eth0\"
",
        machine.name,
        machine.address(),
        machine.address6(),
    )
}

/// A window of ten minutes that begins twelve hours from now in the location's time.
pub(super) fn window_far_away(location: &Location) -> Result<String> {
    window(location, 12 * 3600, 600)
}

/// A window in the location's local time that begins `after` seconds from now.
pub fn window(location: &Location, after: u32, length: u32) -> Result<String> {
    let at = |seconds: u32| -> Result<String> {
        let when = format!("now + {seconds} seconds");
        let mut command = Command::new("date");
        command.env("TZ", &location.timezone).args(["-d", &when, "+%H:%M:%S"]);
        Ok(netns::run(&mut command).context("tell a location's local time")?.trim().to_owned())
    };
    Ok(format!("{}-{}", at(after)?, at(after + length)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Topology;

    #[test]
    fn a_window_has_the_documented_form() {
        let topology = Topology::three_locations();
        let window = window(&topology.locations[1], 60, 600).unwrap();
        let (from, to) = window.split_once('-').unwrap();
        assert_eq!((from.len(), to.len(), from == to), (8, 8, false), "{window}");
    }
}
