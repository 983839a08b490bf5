//! `GET /metrics`: what the eBPF programs counted, as Prometheus text.
//!
//! The counters are read through the pinned maps, so a scrape never waits for the router, nor the router for it.

use std::{fmt::Write as _, net::SocketAddr, path::PathBuf};

use anyhow::Context as _;
use anyplace_ebpf::Meters;
use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Answers until the shutdown. A listener that can't be had is logged and done without: packets matter more.
pub(crate) fn serve(listen: SocketAddr, pin_dir: PathBuf, shutdown: CancellationToken) -> JoinHandle<()> {
    let router = Router::new().route("/metrics", get(move || answer(pin_dir.clone())));
    tokio::spawn(async move {
        if let Err(error) = anyplace_service::serve(listen, router, shutdown).await {
            tracing::warn!("no metrics: {error:#}");
        }
    })
}

async fn answer(pin_dir: PathBuf) -> Response {
    // A system call for each VIP.
    let text = tokio::task::spawn_blocking(move || render(&Meters::open(&pin_dir)?));
    match text.await.context("reading the counters").and_then(|text| text) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response(),
    }
}

/// The counters of the machine, and of each VIP port that a packet came for.
///
/// # Errors
/// The maps can't be read.
pub fn render(meters: &Meters) -> anyhow::Result<String> {
    let mut text = String::new();
    for (counter, value) in meters.totals()?.iter() {
        let name = counter.name();
        writeln!(text, "# TYPE anyplace_router_{name}_total counter\nanyplace_router_{name}_total {value}")?;
    }
    let vips = meters.vips()?;
    for name in ["packets", "bytes", "connections"] {
        writeln!(text, "# TYPE anyplace_router_vip_{name}_total counter")?;
        for (key, counters) in vips.iter().filter(|(_, counters)| counters.packets > 0) {
            let value = match name {
                "packets" => counters.packets,
                "bytes" => counters.bytes,
                _ => counters.connections,
            };
            let (vip, port, protocol) = (key.address, key.port, key.protocol);
            writeln!(
                text,
                "anyplace_router_vip_{name}_total{{vip=\"{vip}\",port=\"{port}\",protocol=\"{protocol}\"}} {value}"
            )?;
        }
    }
    Ok(text)
}
