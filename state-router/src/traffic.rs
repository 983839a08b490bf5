//! Tells the location scheduler how many new connections enter at this machine, by virtual IP.
//!
//! The counters are read through the pinned maps, like the metrics. Without the location scheduler nothing is kept: the next
//! report is of the time since the last reading.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyplace_api::Client;
use anyplace_ebpf::Meters;
use anyplace_model::{MachineId, TrafficReport};
use tokio_util::sync::CancellationToken;

/// The location scheduler decides so often.
const PERIOD: Duration = Duration::from_secs(1);
/// Reading takes a system call for each VIP port: at most one part of so many of the time.
const READING: u32 = 20;
/// A report that takes longer is given up for a newer one.
const PATIENCE: Duration = Duration::from_secs(2);

/// Connections ever, by virtual IP.
type Counts = BTreeMap<IpAddr, u64>;

/// Reports until the shutdown. Packets matter more: failures are logged, and tried again.
pub(crate) async fn run(client: Client, machine: MachineId, pin_dir: PathBuf, shutdown: CancellationToken) {
    let mut last: Option<(Instant, Counts)> = None;
    let mut failing = false;
    let mut pause = PERIOD;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
        let pin_dir = pin_dir.clone();
        let started = Instant::now();
        let read = tokio::task::spawn_blocking(move || counts(&Meters::open(&pin_dir)?)).await;
        pause = PERIOD.max(started.elapsed() * READING);
        let now = match read.map_err(anyhow::Error::from).flatten() {
            Ok(now) => now,
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!("new connections can't be counted: {error:#}");
                }
                continue;
            }
        };
        let at = Instant::now();
        let Some((before_at, before)) = last.replace((at, now.clone())) else { continue };
        let report = TrafficReport { connections: rates(&before, &now, at - before_at) };
        let sent = tokio::select! {
            sent = tokio::time::timeout(PATIENCE, client.report_traffic(&machine, &report)) => sent,
            () = shutdown.cancelled() => return,
        };
        match sent {
            Ok(Ok(())) => failing = false,
            Ok(Err(error)) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "the location scheduler isn't told of new connections");
                }
            }
            Err(_) => tracing::debug!("the location scheduler takes long"),
        }
    }
}

fn counts(meters: &Meters) -> anyhow::Result<Counts> {
    let mut counts = Counts::new();
    for (key, counters) in meters.vips()? {
        *counts.entry(key.address).or_default() += counters.connections;
    }
    Ok(counts)
}

/// What came in between, a second; a counter that is smaller than before began anew.
fn rates(before: &Counts, now: &Counts, time: Duration) -> BTreeMap<IpAddr, f64> {
    let seconds = time.as_secs_f64().max(1e-3);
    let came = now.iter().map(|(vip, count)| {
        let before = before.get(vip).copied().unwrap_or(0);
        (*vip, count.checked_sub(before).unwrap_or(*count))
    });
    came.filter(|(_, count)| *count > 0).map(|(vip, count)| (vip, count as f64 / seconds)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_time_between_and_survive_a_counter_that_begins_anew() {
        let vip = |last: u8| IpAddr::from([203, 0, 113, last]);
        let before = Counts::from([(vip(1), 100), (vip(2), 50), (vip(3), 7)]);
        let now = Counts::from([(vip(1), 130), (vip(2), 20), (vip(3), 7), (vip(4), 10)]);
        let rates = rates(&before, &now, Duration::from_millis(2_000));
        assert_eq!(rates, BTreeMap::from([(vip(1), 15.0), (vip(2), 10.0), (vip(4), 5.0)]));
    }
}
