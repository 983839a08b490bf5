//! The state router: the cost of a packet in its eBPF programs, and its tables at scale.
//!
//! The measuring program is an example of the crate `anyplace-state-router`, since it loads eBPF; here it is run, and its
//! results get their targets. Packets are timed by BPF_PROG_TEST_RUN on one pinned CPU, median of five runs of a
//! million, less the cost of a wrapper that undoes the change (shown as a figure of its own).
//!
//! How a change of health gets to routers is measured by an example of the crate `anyplace-location-scheduler`, beside the
//! binary's global scheduler.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::report::Op;
use super::{Report, WorkDir, example, measure_fleet, measure_lines, wanted};

const PARTS: &[&str] = &["forward", "load", "instructions", DISSEMINATION];
const EXAMPLE: &str = "router-bench";
const DISSEMINATION: &str = "dissemination";

/// Figures of the measuring program: its name for it, ours, unit, target, peer.
type Row = (&'static str, &'static str, &'static str, f64, Option<(&'static str, f64)>);

/// Measured on this kind of machine, with its wrapper in.
const KATRAN: &str = "Katran, GUE";

/// Rows that are compared as they are; all are upper bounds.
const ROWS: &[Row] = &[
    ("wrapper_ns", "the wrapper's own cost, taken off below", "ns", 20.0, None),
    ("forward_tcp_1", "forward, IPv4 TCP, 1 flow", "ns", 40.0, Some((KATRAN, 149.0))),
    ("forward_tcp_4096", "forward, IPv4 TCP, 4k flows", "ns", 40.0, None),
    ("forward_tcp_65536", "forward, IPv4 TCP, 64k flows", "ns", 40.0, Some((KATRAN, 290.0))),
    ("forward_tcp_262144", "forward, IPv4 TCP, 256k flows", "ns", 40.0, Some((KATRAN, 340.0))),
    ("forward_vips", "forward, 65,000 random VIPs", "ns", 350.0, None),
    ("load_seconds", "100,000 VIPs x 16 backends from empty", "s", 3.0, None),
    ("bytes_per_vip", "memory for each of 100,000 VIPs", "B", 1_024.0, None),
    ("change_p99_us", "one VIP changed, until in the data plane, p99", "us", 100.0, None),
    ("ingress_flow_bytes", "memory for each flow at ingress", "B", 0.0, None),
    ("dissemination_bytes", "a change, on the wire to a router, mean", "B", 60.0, None),
    ("dissemination_p99_s", "health change to 330 locations' routers, p99", "s", 1.0, None),
    ("target_flow_bytes", "memory for each flow at the target", "B", 96.0, None),
];

/// IPv6 rows and their IPv4 counterparts, shown as a ratio too.
const IPV6: &[(&str, &str, &str)] = &[
    ("forward_v6_4096", "forward_tcp_4096", "forward, IPv6 TCP, 4k flows"),
    ("forward_v6_65536", "forward_tcp_65536", "forward, IPv6 TCP, 64k flows"),
    ("target_v6_tcp", "target_tcp", "target: decapsulate and deliver, IPv6 TCP"),
    ("target_v6_udp", "target_udp", "target: decapsulate and deliver, IPv6 UDP"),
];
/// How much more than IPv4 TCP another kind of packet may cost.
const MORE: f64 = 1.5;

/// Rows that are compared with IPv4 TCP over 64k flows.
const RELATIVE: &[(&str, &str)] = &[
    ("forward_udp", "forward, IPv4 UDP"),
    ("target_tcp", "target: decapsulate and deliver, TCP"),
    ("target_udp", "target: decapsulate and deliver, UDP"),
];

pub(crate) fn run(report: &mut Report, only: Option<&str>) -> Result<()> {
    let mut parts = Vec::new();
    for part in PARTS {
        if wanted(only, PARTS, part)? {
            parts.push(*part);
        }
    }
    let mut values = BTreeMap::new();
    for part in parts {
        if part == DISSEMINATION {
            values.extend(dissemination()?);
            continue;
        }
        // A process each: the memory of one part must not count in another.
        let program = example("anyplace-state-router", EXAMPLE)?;
        values.extend(measure_lines(&program, &[part]).context("it must run as root")?);
    }
    for (key, name, unit, target, peer) in ROWS {
        if let Some(value) = values.get(*key) {
            report.add(name, *value, unit, Op::AtMost, *target, *peer);
        }
    }
    if let Some(base) = values.get("forward_tcp_65536") {
        for (key, name) in RELATIVE {
            match values.get(*key) {
                Some(value) => report.add(name, *value, "ns", Op::AtMost, MORE * base, None),
                None => report.missing(name, "ns", Op::AtMost, MORE * base),
            }
        }
        for (key, counterpart, name) in IPV6 {
            let (Some(value), Some(counterpart)) = (values.get(*key), values.get(*counterpart)) else {
                report.missing(name, "ns", Op::AtMost, MORE * base);
                continue;
            };
            report.add(name, *value, "ns", Op::AtMost, MORE * counterpart, None);
            report.add(&format!("{name}: IPv6 / IPv4"), value / counterpart, "x", Op::AtMost, MORE, None);
        }
        let flows = ROWS.iter().filter(|row| row.0.starts_with("forward_tcp_"));
        let costs: Vec<f64> = flows.filter_map(|row| values.get(row.0)).copied().collect();
        let most = costs.iter().copied().fold(f64::MIN, f64::max);
        let least = costs.iter().copied().fold(f64::MAX, f64::min);
        report.add("forward, IPv4 TCP: most / least flows", most / least, "x", Op::AtMost, 1.1, None);
    }
    for (key, growth) in values.iter().filter_map(|(key, value)| Some((key.strip_prefix("growth_")?, value)))
    {
        let count = |kind: &str| values.get(&format!("{kind}_{key}")).copied().unwrap_or(f64::NAN);
        let name =
            format!("{key}: {} instructions, {} verified; growth", count("instructions"), count("verified"));
        report.add(&name, *growth, "x", Op::AtMost, 1.1, None);
    }
    Ok(())
}

/// What a change of health comes to on its way.
fn dissemination() -> Result<BTreeMap<String, f64>> {
    let folder = WorkDir::new(DISSEMINATION)?;
    measure_fleet(DISSEMINATION, &folder.join("fleet"), None)
}
