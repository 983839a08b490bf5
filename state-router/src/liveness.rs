//! Which instances seem dead: those of this machine are tried by a connection, other machines' routers are asked for
//! theirs. Only while no scheduler answers, here or at a router that asks.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyplace_model::MachineId;
use anyplace_router_core::{Peers, ROLL_CALL_BYTES, roll_call};
use tokio::{net::TcpStream, sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::plane::Names;

/// Instances are tried, and machines asked, so often.
pub(crate) const PERIOD: Duration = Duration::from_millis(500);
/// An instance that takes no connection in this time, so many times in a row, seems dead.
const PATIENCE: Duration = Duration::from_millis(400);
const FAILURES: u32 = 2;
/// Who asked once asks again.
const ASKED: Duration = Duration::from_secs(5);
/// Connections that are tried at once.
const CONCURRENCY: usize = 64;

/// What is suspected; shared by the tasks and the metrics.
#[derive(Debug, Clone)]
pub(crate) struct Liveness {
    started: Instant,
    names: Names,
    state: Arc<Mutex<State>>,
    suspects: watch::Sender<BTreeSet<Ipv4Addr>>,
}

#[derive(Debug, Default)]
struct State {
    /// Failures in a row of this machine's instances.
    failures: BTreeMap<Ipv4Addr, u32>,
    /// When another router asked last.
    asked: Option<Instant>,
    /// While no scheduler answers.
    alone: Option<Alone>,
    /// As the data plane has it: instances that are suspected, and virtual IPs that keep all theirs.
    applied: (usize, usize),
}

#[derive(Debug)]
struct Alone {
    peers: Peers,
    /// All of the location that take connections.
    instances: BTreeMap<Ipv4Addr, MachineId>,
}

impl Liveness {
    pub(crate) fn new(names: Names) -> Self {
        let (state, suspects) = (Arc::default(), watch::Sender::default());
        Self { started: Instant::now(), names, state, suspects }
    }

    /// No scheduler answers: suspects are looked for from now on, on these machines among these instances.
    pub(crate) fn begin(
        &self,
        machines: &BTreeMap<MachineId, Ipv4Addr>,
        instances: BTreeMap<Ipv4Addr, MachineId>,
    ) {
        let peers = Peers::new(machines, self.started.elapsed());
        self.state().alone = Some(Alone { peers, instances });
    }

    /// A scheduler answers.
    pub(crate) fn end(&self) {
        self.state().alone = None;
        self.suspects.send_replace(BTreeSet::new());
    }

    /// What seems dead; none while a scheduler answers.
    pub(crate) fn suspects(&self) -> watch::Receiver<BTreeSet<Ipv4Addr>> {
        self.suspects.subscribe()
    }

    /// The data plane has it now: so many instances are suspected, and so many virtual IPs keep all theirs, since too few
    /// would be left.
    pub(crate) fn applied(&self, suspects: usize, floored: usize) {
        self.state().applied = (suspects, floored);
    }

    /// As metrics.
    pub(crate) fn render(&self) -> String {
        let (suspects, floored) = self.state().applied;
        let rows = [("suspected_instances", suspects), ("floored_vips", floored)];
        let row =
            |(name, value)| format!("# TYPE anyplace_router_{name} gauge\nanyplace_router_{name} {value}\n");
        rows.map(row).concat()
    }

    /// Questions to other machines, each period; and what has come of the last ones is concluded.
    pub(crate) fn ask(&self) -> Vec<(Ipv4Addr, [u8; ROLL_CALL_BYTES])> {
        let mut state = self.state();
        let dead = state.dead();
        let Some(Alone { peers, instances }) = &mut state.alone else { return Vec::new() };
        let now = self.started.elapsed();
        let seems = |(address, machine): &(&Ipv4Addr, &MachineId)| {
            dead.contains(*address) || peers.suspects(now, machine, **address)
        };
        let suspects: BTreeSet<Ipv4Addr> =
            instances.iter().filter(seems).map(|(address, _)| *address).collect();
        self.suspects.send_if_modified(|last| {
            let changes = *last != suspects;
            *last = suspects;
            changes
        });
        peers.ask(rand::random)
    }

    /// Takes in an answer; returns whether it is one.
    pub(crate) fn answered(&self, from: Ipv4Addr, bytes: &[u8]) -> bool {
        let now = self.started.elapsed();
        self.state().alone.as_mut().is_some_and(|alone| alone.peers.answered(now, from, bytes))
    }

    /// What to say to a question.
    pub(crate) fn reply(&self, question: &[u8]) -> Option<Vec<u8>> {
        let mut state = self.state();
        let reply = roll_call(question, &state.dead())?;
        state.asked = Some(Instant::now());
        Some(reply)
    }

    /// Tries this machine's instances while that is of use, until the shutdown.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(PERIOD) => {}
                () = shutdown.cancelled() => return,
            }
            let wanted = {
                let state = self.state();
                state.alone.is_some() || state.asked.is_some_and(|at| at.elapsed() < ASKED)
            };
            if !wanted {
                self.state().failures.clear();
                continue;
            }
            let ports = self.names.tcp_ports();
            let tried = tokio::select! {
                tried = try_all(&ports) => tried,
                () = shutdown.cancelled() => return,
            };
            let failures = &mut self.state().failures;
            failures.retain(|address, _| tried.contains_key(address));
            for (address, takes) in tried {
                let count = failures.entry(address).or_default();
                *count = if takes { 0 } else { count.saturating_add(1) };
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock with the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// This machine's instances that seem dead.
    fn dead(&self) -> BTreeSet<Ipv4Addr> {
        self.failures.iter().filter(|(_, count)| **count >= FAILURES).map(|(address, _)| *address).collect()
    }
}

/// Whether each instance takes a connection.
async fn try_all(ports: &BTreeMap<Ipv4Addr, u16>) -> BTreeMap<Ipv4Addr, bool> {
    let (mut tried, mut tasks) = (BTreeMap::new(), JoinSet::new());
    for (address, port) in ports {
        if tasks.len() >= CONCURRENCY
            && let Some(Ok((address, takes))) = tasks.join_next().await
        {
            tried.insert(address, takes);
        }
        let (address, to) = (*address, SocketAddr::from((*address, *port)));
        tasks.spawn(async move {
            (address, matches!(tokio::time::timeout(PATIENCE, TcpStream::connect(to)).await, Ok(Ok(_))))
        });
    }
    while let Some(done) = tasks.join_next().await {
        tried.extend(done);
    }
    tried
}
