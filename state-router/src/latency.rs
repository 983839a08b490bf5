//! Measures round trips to other locations, where the location scheduler names some, and answers other routers' questions:
//! datagrams between the machines' addresses in the fabric, about one a second for each location.
//!
//! Losing some is harmless, and so is a router that can't listen: locations are then as far as their distance says.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyplace_model::{LocationId, Probes};
use anyplace_router_core::{PACKET_BYTES, Prober, answer};
use ipnet::Ipv4Net;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

/// Routers of all locations ask each other here, so it is the same everywhere.
const PORT: u16 = 7631;
/// Each location is asked so often, give or take a quarter: routers that started together don't go on together.
const PERIOD: Duration = Duration::from_secs(1);
const JITTER: std::ops::Range<f64> = 0.75..1.25;

/// What is known, shared by the task that measures, the one that reports, and the metrics.
#[derive(Debug, Clone)]
pub(crate) struct Latency {
    started: Instant,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    prober: Prober,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    asked: u64,
    heard: u64,
    answered: u64,
    refused: u64,
}

impl Latency {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), state: Arc::default() }
    }

    /// Measures these from now on.
    pub(crate) fn aim(&self, probes: &Probes) {
        self.state().prober.aim(&probes.targets);
    }

    /// What is known now, in milliseconds.
    pub(crate) fn latency_ms(&self) -> BTreeMap<LocationId, f64> {
        let now = self.started.elapsed();
        self.state().prober.latency_ms(now)
    }

    /// As metrics.
    pub(crate) fn render(&self) -> String {
        let latency = self.latency_ms();
        let state = self.state();
        let Counters { asked, heard, answered, refused } = state.counters;
        let mut text = String::new();
        let counters = [("asked", asked), ("heard", heard), ("answered", answered), ("refused", refused)];
        for (name, value) in counters {
            let name = format!("anyplace_router_probes_{name}_total");
            // Writing to a string can't fail.
            let _ = writeln!(text, "# TYPE {name} counter\n{name} {value}");
        }
        let name = "anyplace_router_location_latency_seconds";
        let _ = writeln!(text, "# TYPE {name} gauge");
        for (location, latency_ms) in latency {
            let _ = writeln!(text, "{name}{{location=\"{location}\"}} {}", latency_ms / 1e3);
        }
        text
    }

    /// Asks and answers until the shutdown.
    pub(crate) async fn run(self, address: Ipv4Addr, fleet: Vec<Ipv4Net>, shutdown: CancellationToken) {
        let socket = match UdpSocket::bind((address, PORT)).await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%address, PORT, %error, "latency to other locations isn't measured");
                return;
            }
        };
        let mut buffer = [0; PACKET_BYTES + 1];
        let mut due = tokio::time::Instant::now() + PERIOD;
        loop {
            let received = tokio::select! {
                received = socket.recv_from(&mut buffer) => received,
                () = tokio::time::sleep_until(due) => {
                    if let Some((address, question)) = self.ask() {
                        // A way that isn't there is as good as no answer.
                        let _ = socket.send_to(&question, (address, PORT)).await;
                    }
                    due = tokio::time::Instant::now() + self.pause();
                    continue;
                }
                () = shutdown.cancelled() => return,
            };
            match received {
                Ok((length, from)) => {
                    let reply = self.receive(&buffer[..length], from, &fleet);
                    if let Some(reply) = reply {
                        let _ = socket.send_to(&reply, from).await;
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "a datagram couldn't be received");
                    tokio::time::sleep(PERIOD / 10).await;
                }
            }
        }
    }

    fn ask(&self) -> Option<(Ipv4Addr, [u8; PACKET_BYTES])> {
        let mut state = self.state();
        let asked = state.prober.ask(self.started.elapsed(), rand::random());
        state.counters.asked += u64::from(asked.is_some());
        asked
    }

    /// Until the next question: locations have their turns one after the other.
    fn pause(&self) -> Duration {
        let targets = u32::try_from(self.state().prober.targets()).unwrap_or(u32::MAX);
        (PERIOD / targets.max(1)).mul_f64(rand::random_range(JITTER))
    }

    /// Takes a datagram in; what is to be said to it.
    fn receive(&self, bytes: &[u8], from: SocketAddr, fleet: &[Ipv4Net]) -> Option<[u8; PACKET_BYTES]> {
        let now = self.started.elapsed();
        let IpAddr::V4(sender) = from.ip() else { return None };
        let mut state = self.state();
        if !fleet.is_empty() && !fleet.iter().any(|net| net.contains(&sender)) {
            state.counters.refused += 1;
            return None;
        }
        if from.port() == PORT && state.prober.answered(now, sender, bytes) {
            state.counters.heard += 1;
            return None;
        }
        let reply = answer(bytes);
        state.counters.answered += u64::from(reply.is_some());
        state.counters.refused += u64::from(reply.is_none());
        reply
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock with the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> Ipv4Addr {
        address.parse().unwrap()
    }

    #[tokio::test]
    async fn two_routers_measure_each_other_and_strangers_get_no_answer() {
        let (one, two) = (Latency::new(), Latency::new());
        let (first, second) = (at("127.61.1.1"), at("127.61.2.1"));
        let fleet: Vec<Ipv4Net> = vec!["127.61.0.0/16".parse().unwrap()];
        let shutdown = CancellationToken::new();
        let run = |latency: &Latency, address| {
            tokio::spawn(latency.clone().run(address, fleet.clone(), shutdown.clone()))
        };
        let tasks = [run(&one, first), run(&two, second)];
        one.aim(&Probes { targets: BTreeMap::from([("nrt".parse().unwrap(), vec![second])]) });
        let stranger = UdpSocket::bind("127.62.1.1:0").await.unwrap();
        let neighbour = UdpSocket::bind("127.61.3.1:0").await.unwrap();
        while one.latency_ms().is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(tasks.iter().all(|task| !task.is_finished()), "the port is taken");
            stranger.send_to(b"apl\x01abcdefgh", (second, PORT)).await.unwrap();
        }
        assert!(one.render().contains("location_latency_seconds{location=\"nrt\"} 0."), "{}", one.render());
        neighbour.send_to(b"apl\x01abcdefgh", (second, PORT)).await.unwrap();
        let mut buffer = [0; 100];
        let (length, _) = neighbour.recv_from(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"apl\x02abcdefgh");
        assert!(stranger.try_recv_from(&mut buffer).is_err(), "nothing is said to strangers");
        let refused = two.state().counters.refused;
        assert!(refused > 0, "and they are counted");
        shutdown.cancel();
        for task in tasks {
            task.await.unwrap();
        }
    }
}
