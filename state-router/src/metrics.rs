//! `GET /metrics`: what the eBPF programs counted, and round trips to other locations, as Prometheus text.
//!
//! The counters are read through the pinned maps, so a scrape never waits for the router, nor the router for it.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, path::PathBuf};

use anyhow::Context as _;
use anyplace_ebpf::{InstanceCounters, Meters, VipCounters, VipKey};
use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{latency::Latency, plane::Names};

/// A counter's name and its value.
type Row<T> = (&'static str, fn(&T) -> u64);

/// Answers until the shutdown. A listener that can't be had is logged and done without: packets matter more.
pub(crate) fn serve(
    listen: SocketAddr,
    pin_dir: PathBuf,
    names: Names,
    latency: Latency,
    shutdown: CancellationToken,
) -> JoinHandle<()> {
    let router =
        Router::new().route("/metrics", get(move || answer(pin_dir.clone(), names.clone(), latency.clone())));
    tokio::spawn(async move {
        if let Err(error) = anyplace_service::serve(listen, router, shutdown).await {
            tracing::warn!("no metrics: {error:#}");
        }
    })
}

async fn answer(pin_dir: PathBuf, names: Names, latency: Latency) -> Response {
    // A system call for each VIP, and for each port of an instance.
    let text =
        tokio::task::spawn_blocking(
            move || Ok(render(&Meters::open(&pin_dir)?, &names)? + &latency.render()),
        );
    match text.await.context("reading the counters").and_then(|text| text) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response(),
    }
}

/// The counters of the machine, of each VIP port that a packet came for, and of each instance that got one. An instance
/// without a name yet is called by its address.
///
/// # Errors
/// The maps can't be read.
pub fn render(meters: &Meters, names: &Names) -> anyhow::Result<String> {
    let mut text = String::new();
    for (counter, value) in meters.totals()?.iter() {
        let name = counter.name();
        writeln!(text, "# TYPE anyplace_router_{name}_total counter\nanyplace_router_{name}_total {value}")?;
    }
    let lost = meters.lost_flow_events()?;
    let name = "anyplace_router_flow_events_lost_total";
    writeln!(text, "# TYPE {name} counter\n{name} {lost}")?;
    let vips: BTreeMap<String, VipCounters> =
        meters.vips()?.into_iter().map(|(key, counters)| (labels(&key), counters)).collect();
    let rows: [Row<VipCounters>; 3] = [
        ("vip_packets", |it| it.packets),
        ("vip_bytes", |it| it.bytes),
        ("vip_connections", |it| it.connections),
    ];
    table(&mut text, &rows, vips.iter().filter(|(_, counters)| counters.packets > 0))?;
    let names = names.get();
    let label = |(key, address)| {
        let name = names.get(&address).map_or_else(|| address.to_string(), ToString::to_string);
        format!("{},instance=\"{name}\"", labels(&key))
    };
    let instances: BTreeMap<String, InstanceCounters> =
        meters.instances()?.into_iter().map(|(key, counters)| (label(key), counters)).collect();
    let rows: [Row<InstanceCounters>; 3] = [
        ("instance_packets", |it| it.packets),
        ("instance_bytes", |it| it.bytes),
        ("instance_new_flows", |it| it.new_flows),
    ];
    table(&mut text, &rows, instances.iter().filter(|(_, counters)| counters.packets > 0))?;
    Ok(text)
}

fn labels(key: &VipKey) -> String {
    format!("vip=\"{}\",port=\"{}\",protocol=\"{}\"", key.address, key.port, key.protocol)
}

/// Several counters of everything that has labels.
fn table<'a, T: 'a>(
    text: &mut String,
    rows: &[Row<T>],
    counted: impl Iterator<Item = (&'a String, &'a T)> + Clone,
) -> std::fmt::Result {
    for (name, value) in rows {
        writeln!(text, "# TYPE anyplace_router_{name}_total counter")?;
        for (labels, counters) in counted.clone() {
            writeln!(text, "anyplace_router_{name}_total{{{labels}}} {}", value(counters))?;
        }
    }
    Ok(())
}
