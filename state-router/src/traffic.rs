//! Tells the location scheduler how many new connections enter at this machine, by virtual IP, and the round trips to
//! other locations that it asked for.
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
use anyplace_ebpf::{Meters, VipKey};
use anyplace_model::{MachineId, TrafficReport};
use tokio_util::sync::CancellationToken;

use crate::latency::Latency;

/// The location scheduler decides so often.
const PERIOD: Duration = Duration::from_secs(1);
/// Reading takes a system call for each VIP port: at most one part of so many of the time.
const READING: u32 = 20;
/// A report that takes longer is given up for a newer one.
const PATIENCE: Duration = Duration::from_secs(2);

/// Connections ever, by port of a virtual IP: each is a counter of its own, which goes with the port.
type Counts = BTreeMap<VipKey, u64>;

/// Reports until the shutdown. Packets matter more: failures are logged, and tried again.
pub(crate) async fn run(
    client: Client,
    machine: MachineId,
    pin_dir: PathBuf,
    latency: Latency,
    shutdown: CancellationToken,
) {
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
        let connections = last.as_ref().map(|(before_at, before)| rates(before, &now, at - *before_at));
        last = Some((at, now));
        let Some(connections) = connections else { continue };
        let report = TrafficReport { connections, latency_ms: latency.latency_ms() };
        let sent = tokio::select! {
            sent = tokio::time::timeout(PATIENCE, client.report_traffic(&machine, &report)) => sent,
            () = shutdown.cancelled() => return,
        };
        match sent {
            Ok(Ok(probes)) => {
                failing = false;
                latency.aim(&probes);
            }
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
    Ok(meters.vips()?.into_iter().map(|(key, counters)| (key, counters.connections)).collect())
}

/// What came in between, a second; a counter that is smaller than before began anew.
fn rates(before: &Counts, now: &Counts, time: Duration) -> BTreeMap<IpAddr, f64> {
    let seconds = time.as_secs_f64().max(1e-3);
    let mut rates = BTreeMap::new();
    for (key, count) in now {
        let before = before.get(key).copied().unwrap_or(0);
        let came = count.checked_sub(before).unwrap_or(*count);
        if came > 0 {
            *rates.entry(key.address).or_default() += came as f64 / seconds;
        }
    }
    rates
}

#[cfg(test)]
mod tests {
    use anyplace_ebpf::Protocol;

    use super::*;

    #[test]
    fn rates_are_of_the_time_between_and_survive_a_counter_that_begins_anew() {
        let vip = |last: u8| IpAddr::from([203, 0, 113, last]);
        let key = |last: u8, port: u16| VipKey { address: vip(last), port, protocol: Protocol::Tcp };
        let before = Counts::from([
            (key(1, 80), 100),
            (key(1, 443), 40),
            (key(2, 80), 50),
            (key(3, 80), 7),
            (key(5, 80), 9_000),
            (key(5, 443), 500),
        ]);
        let now = Counts::from([
            (key(1, 80), 130),
            (key(1, 443), 50),
            (key(2, 80), 20),
            (key(3, 80), 7),
            (key(4, 80), 10),
            // The other port is gone: what it counted isn't missing here.
            (key(5, 443), 504),
        ]);
        let rates = rates(&before, &now, Duration::from_millis(2_000));
        assert_eq!(rates, BTreeMap::from([(vip(1), 20.0), (vip(2), 10.0), (vip(4), 5.0), (vip(5), 2.0)]));
    }
}
