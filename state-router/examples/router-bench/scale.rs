//! Many VIPs: from the events of a watch into the maps, the memory that they take, and the time that one change takes.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use anyplace_api::WatchEvent;
use anyplace_ebpf::Capacity;
use anyplace_model::{Route, RouteRecord};
use anyplace_state_router::{Plane, Routes};
use serde_json::json;

use crate::{Bed, report};

const VIPS: u32 = 100_000;
const BACKENDS: u32 = 16;
const FIRST_VIP: u32 = 0x0b00_0000;
/// Events that are brought into the data plane together, as the router does with a snapshot.
const BATCH: u32 = 1_024;
const CHANGES: u32 = 20_000;

pub(crate) fn measure(bed: &Bed) -> Result<()> {
    // The router isn't bound to a CPU.
    bed.pin(false)?;
    let before = resident()?;
    let mut routes = Routes::load(bed.folder.join("routes.log"));
    let data_plane = bed.plane("load", Capacity::for_vips(VIPS))?;
    let mut plane = Plane::new(data_plane, "m-1".parse()?);

    // The events are made batch by batch, so that their memory isn't counted as the router's; only the time between
    // event and map is taken.
    let (mut took, mut record) = (Duration::ZERO, Duration::ZERO);
    routes.apply(WatchEvent::Reset { epoch: 1 });
    for first in (0..VIPS).step_by(BATCH as usize) {
        let events: Vec<_> =
            (first..VIPS.min(first + BATCH)).map(|vip| put(vip, 0)).collect::<Result<_>>()?;
        let start = Instant::now();
        let changes = events.into_iter().flat_map(|event| routes.apply(event)).collect();
        record += start.elapsed();
        plane.apply(changes);
        took += start.elapsed();
    }
    let start = Instant::now();
    plane.apply(routes.apply(WatchEvent::Synced { revision: 1 }));
    plane.finish(|vip| routes.contains(vip));
    took += start.elapsed();
    ensure!(plane.is_settled(), "not all VIPs are in the data plane");
    ensure!(plane.data_plane().vips().len() == VIPS as usize, "VIPs are missing");
    report("load_seconds", took.as_secs_f64());
    report("load_log_seconds", record.as_secs_f64());

    // Maps that don't grow with VIPs are not counted.
    let memory = plane.data_plane().memory()?;
    let maps: u64 = memory
        .iter()
        .filter(|it| matches!(it.map, "VIPS" | "BUCKETS" | "VIP_COUNTERS"))
        .map(|it| it.bytes)
        .sum();
    let after = resident()?;
    report("map_bytes_per_vip", maps as f64 / f64::from(VIPS));
    report("router_bytes_per_vip", after as f64 / f64::from(VIPS));
    report("router_growth_bytes_per_vip", after.saturating_sub(before) as f64 / f64::from(VIPS));
    report("bytes_per_vip", (maps + after) as f64 / f64::from(VIPS));
    let flows = memory.iter().find(|it| it.map == "FLOWS").context("the flow table is missing")?;
    report("target_flow_bytes", flows.bytes as f64 / f64::from(flows.entries));

    let mut times = Vec::new();
    for change in 0..CHANGES {
        let event = put(change.wrapping_mul(7_919) % VIPS, 1 + change)?;
        let start = Instant::now();
        plane.apply(routes.apply(event));
        times.push(start.elapsed());
        // At the pace of a busy location; a range of the arena rests a tenth of a second.
        while start.elapsed() < Duration::from_micros(200) {
            std::hint::spin_loop();
        }
    }
    times.sort_unstable();
    let at = |per_cent: usize| times[(times.len() - 1) * per_cent / 100].as_secs_f64() * 1e6;
    report("change_p50_us", at(50));
    report("change_p99_us", at(99));
    ensure!(plane.is_settled(), "a change is not in the data plane");
    drop(plane);
    bed.plane("load", Capacity::for_vips(VIPS))?.unload()?;
    bed.pin(true)
}

/// A VIP of one port with its backends on machines of this location; `change` makes one of them unready.
fn put(vip: u32, change: u32) -> Result<WatchEvent<RouteRecord>> {
    let address = Ipv4Addr::from(FIRST_VIP + vip);
    let local: Vec<_> = (0..BACKENDS)
        .map(|backend| {
            let machine = 2 + (vip.wrapping_mul(31) + backend * 7) % 200;
            let ready = change == 0 || backend != change % BACKENDS;
            json!({
                "instance": format!("web-{vip}-{backend}"),
                "machine": format!("m-{machine}"),
                "address": Ipv4Addr::from(0x0a00_0000 + (machine << 12) + vip.wrapping_mul(16) % 4_000 + backend),
                "ready": ready,
                "draining": false,
                "began_ms": 1_700_000_000_000u64 + u64::from(backend) * 1_000,
                "slot": backend,
                "stopped_ms": if ready { 0 } else { 1_800_000_000_000u64 + u64::from(change) },
            })
        })
        .collect();
    let ports = [json!({ "port": 80, "protocol": "tcp" })];
    let route: Route =
        serde_json::from_value(json!({ "vip": address, "ports": ports, "local": local, "remote": [] }))?;
    Ok(WatchEvent::Put { revision: 1, key: format!("vips/{address}"), value: RouteRecord::Vip(route) })
}

/// Memory of this process that is not a file's or a map's.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
    Ok(kib.context("no RssAnon in /proc/self/status")?.trim().parse::<u64>()? * 1_024)
}
