//! Datagrams between routers, at the machines' addresses in the fabric: round trips to other locations, where the location
//! scheduler names some, about one a second for each; and, while no scheduler answers, which instances of other machines
//! seem dead ([`crate::liveness`]).
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
use anyplace_router_core::{PACKET_BYTES, Prober, ROLL_CALL_BYTES, answer};
use ipnet::Ipv4Net;
use tokio::{net::UdpSocket, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::liveness::{self, Liveness};

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
    liveness: Liveness,
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
    pub(crate) fn new(liveness: Liveness) -> Self {
        Self { started: Instant::now(), state: Arc::default(), liveness }
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
        text + &self.liveness.render()
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
        let mut buffer = [0; ROLL_CALL_BYTES + 1];
        let mut due = tokio::time::Instant::now() + PERIOD;
        let mut roll_calls = tokio::time::interval(liveness::PERIOD);
        roll_calls.set_missed_tick_behavior(MissedTickBehavior::Delay);
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
                _ = roll_calls.tick() => {
                    for (address, question) in self.liveness.ask() {
                        let _ = socket.send_to(&question, (address, PORT)).await;
                    }
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
    fn receive(&self, bytes: &[u8], from: SocketAddr, fleet: &[Ipv4Net]) -> Option<Vec<u8>> {
        let now = self.started.elapsed();
        let IpAddr::V4(sender) = from.ip() else { return None };
        let mut state = self.state();
        if !fleet.is_empty() && !fleet.iter().any(|net| net.contains(&sender)) {
            state.counters.refused += 1;
            return None;
        }
        let ours = from.port() == PORT;
        if ours && (state.prober.answered(now, sender, bytes) || self.liveness.answered(sender, bytes)) {
            state.counters.heard += 1;
            return None;
        }
        let reply = answer(bytes).map(Vec::from).or_else(|| self.liveness.reply(bytes));
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
    use std::collections::BTreeSet;

    use super::*;
    use crate::plane::Names;

    fn at(address: &str) -> Ipv4Addr {
        address.parse().unwrap()
    }

    #[tokio::test]
    async fn two_routers_measure_each_other_and_strangers_get_no_answer() {
        let router = || Latency::new(Liveness::new(Names::default()));
        let (one, two) = (router(), router());
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

    #[tokio::test]
    async fn instances_that_take_no_connection_and_machines_that_say_nothing_are_suspected() {
        let (here, there, gone) = (at("127.61.4.1"), at("127.61.5.1"), at("127.61.6.1"));
        let (names, shutdown) = (Names::default(), CancellationToken::new());
        let (alive, dead, lost) = (at("127.61.5.65"), at("127.61.5.66"), at("127.61.6.65"));
        let listener = tokio::net::TcpListener::bind((alive, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for address in [alive, dead] {
            names.set(address, None, Some(port));
        }
        let (one, two) = (Liveness::new(Names::default()), Liveness::new(names));
        let mut tasks = Vec::new();
        for (liveness, address) in [(&one, here), (&two, there)] {
            tasks.push(tokio::spawn(Latency::new(liveness.clone()).run(
                address,
                Vec::new(),
                shutdown.clone(),
            )));
            tasks.push(tokio::spawn(liveness.clone().run(shutdown.clone())));
        }
        let machine = |name: &str| name.parse::<anyplace_model::MachineId>().unwrap();
        let machines = BTreeMap::from([(machine("m2"), there), (machine("m3"), gone)]);
        let on = [(alive, "m2"), (dead, "m2"), (lost, "m3")];
        one.begin(&machines, on.map(|(address, name)| (address, machine(name))).into());
        let mut suspects = one.suspects();
        suspects.wait_for(|now| *now == BTreeSet::from([dead, lost])).await.unwrap();
        drop(listener);
        suspects.wait_for(|now| *now == BTreeSet::from([alive, dead, lost])).await.unwrap();
        let _back = tokio::net::TcpListener::bind((alive, port)).await.unwrap();
        suspects.wait_for(|now| *now == BTreeSet::from([dead, lost])).await.unwrap();
        one.end();
        suspects.wait_for(BTreeSet::is_empty).await.unwrap();
        shutdown.cancel();
        for task in tasks {
            task.await.unwrap();
        }
    }
}
