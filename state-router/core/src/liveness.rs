//! What routers do about instances that seem dead while no scheduler says so. Pure: times and nonces come in.
//!
//! Each router knows which instances of its own machine seem dead, and asks the other machines' routers for theirs:
//!
//! ```text
//! question:   "apl"  1 byte 3   8 bytes nonce   240 bytes zero
//! answer:     "apl"  1 byte 4   8 bytes nonce   4 bytes for each instance that seems dead, up to 60
//! ```
//!
//! So an answer is never longer than its question. A machine that doesn't answer for [`SILENCE`] is dead with all that it
//! has. A suspicion only takes instances out, never one in; and not so many of a virtual IP's that less than a floor would
//! be left ([`without`]): rather than the few being overloaded, or the router believed that is cut off itself, all stay.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use anyplace_model::{Endpoint, MachineId, Route};

/// Length of a question, and the most of an answer.
pub const ROLL_CALL_BYTES: usize = HEAD + 4 * MOST;
/// An answer has no more instances than this; a machine of which more are dead answers with the first.
const MOST: usize = 60;
const HEAD: usize = 12;
const QUESTION: [u8; 4] = *b"apl\x03";
const ANSWER: [u8; 4] = *b"apl\x04";
/// Four questions in a row, each of which may be lost.
const SILENCE: Duration = Duration::from_secs(2);

/// What the other machines of the location say.
#[derive(Debug)]
pub struct Peers {
    machines: BTreeMap<MachineId, Peer>,
}

#[derive(Debug)]
struct Peer {
    address: Ipv4Addr,
    nonce: Option<[u8; 8]>,
    /// When it answered last, or was first asked.
    heard: Duration,
    dead: BTreeSet<Ipv4Addr>,
}

impl Peers {
    /// Nothing has been asked yet; silence counts from now on.
    pub fn new(machines: &BTreeMap<MachineId, Ipv4Addr>, now: Duration) -> Self {
        let peer = |address| Peer { address, nonce: None, heard: now, dead: BTreeSet::new() };
        Self {
            machines: machines.iter().map(|(machine, address)| (machine.clone(), peer(*address))).collect(),
        }
    }

    /// A question to each.
    pub fn ask(&mut self, mut nonce: impl FnMut() -> [u8; 8]) -> Vec<(Ipv4Addr, [u8; ROLL_CALL_BYTES])> {
        let question = |peer: &mut Peer| {
            let nonce = nonce();
            peer.nonce = Some(nonce);
            let mut question = [0; ROLL_CALL_BYTES];
            question[..4].copy_from_slice(&QUESTION);
            question[4..HEAD].copy_from_slice(&nonce);
            (peer.address, question)
        };
        self.machines.values_mut().map(question).collect()
    }

    /// Takes an answer in; returns whether it is one to the last question.
    pub fn answered(&mut self, now: Duration, from: Ipv4Addr, bytes: &[u8]) -> bool {
        let Some((head, dead)) = bytes.split_at_checked(HEAD) else { return false };
        if head[..4] != ANSWER || dead.len() % 4 != 0 || dead.len() > 4 * MOST {
            return false;
        }
        let meant =
            |peer: &&mut Peer| peer.address == from && peer.nonce.is_some_and(|nonce| nonce == head[4..]);
        let Some(peer) = self.machines.values_mut().find(meant) else { return false };
        peer.nonce = None;
        peer.heard = now;
        let address = |bytes: &[u8]| Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]);
        peer.dead = dead.chunks_exact(4).map(address).collect();
        true
    }

    /// Whether an instance seems dead. Of a machine that isn't among those that are asked nothing is known.
    pub fn suspects(&self, now: Duration, machine: &MachineId, instance: Ipv4Addr) -> bool {
        self.machines
            .get(machine)
            .is_some_and(|peer| now.saturating_sub(peer.heard) > SILENCE || peer.dead.contains(&instance))
    }
}

/// The answer to a question, by the instances here that seem dead; none to anything else.
pub fn roll_call(question: &[u8], dead: &BTreeSet<Ipv4Addr>) -> Option<Vec<u8>> {
    if question.len() != ROLL_CALL_BYTES || question[..4] != QUESTION {
        return None;
    }
    let mut answer = [&ANSWER[..], &question[4..HEAD]].concat();
    answer.extend(dead.iter().take(MOST).flat_map(|address| address.octets()));
    Some(answer)
}

/// A route without the instances that are suspected: they take no new connections. None where less than `floor_percent`
/// of those that are ready would be left.
pub fn without(route: &Route, floor_percent: u8, suspected: impl Fn(&Endpoint) -> bool) -> Option<Route> {
    let takes = |endpoint: &&Endpoint| endpoint.ready && !endpoint.draining;
    let ready = route.local.iter().filter(takes).count();
    let left = route.local.iter().filter(takes).filter(|endpoint| !suspected(endpoint)).count();
    if left * 100 < ready * usize::from(floor_percent) {
        return None;
    }
    let mut route = route.clone();
    for endpoint in route.local.iter_mut().filter(|it| it.ready && !it.draining && suspected(it)) {
        endpoint.ready = false;
    }
    Some(route)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 1, 1, last)
    }

    fn route(ready: &[bool]) -> Route {
        let endpoint = |(index, ready): (usize, &bool)| {
            json!({"instance": format!("web-{index}"), "machine": "m", "address": at(index as u8), "ready": ready,
                "draining": false, "slot": index})
        };
        let local: Vec<_> = ready.iter().enumerate().map(endpoint).collect();
        serde_json::from_value(
            json!({"vip": "203.0.113.1", "ports": [{"port": 80}], "local": local, "remote": []}),
        )
        .unwrap()
    }

    fn ready(route: &Route) -> Vec<u8> {
        route.local.iter().filter(|it| it.ready).map(|it| it.address.octets()[3]).collect()
    }

    #[test]
    fn suspects_go_until_the_floor_and_nobody_comes() {
        let route = route(&[true, true, true, false, true]);
        let without = |floor_percent, suspects: &[u8]| {
            let suspects = suspects.to_vec();
            super::without(&route, floor_percent, |it| suspects.contains(&it.address.octets()[3]))
                .map(|it| ready(&it))
        };
        assert_eq!(without(50, &[]), Some(vec![0, 1, 2, 4]));
        assert_eq!(without(50, &[1]), Some(vec![0, 2, 4]));
        assert_eq!(
            without(50, &[1, 3, 4]),
            Some(vec![0, 2]),
            "exactly half; who isn't ready counts on neither side"
        );
        assert_eq!(without(50, &[0, 1, 4]), None, "a quarter");
        assert_eq!(without(50, &[0, 1, 2, 4]), None);
        assert_eq!(without(100, &[1]), None);
        assert_eq!(without(0, &[0, 1, 2, 4]), Some(vec![]), "without a floor other locations take over");
    }

    #[test]
    fn machines_say_who_is_dead_and_those_that_are_silent_are() {
        let names = ["m1", "m2"].map(|name| -> MachineId { name.parse().unwrap() });
        let machines = BTreeMap::from([(names[0].clone(), at(1)), (names[1].clone(), at(2))]);
        let (mut peers, mut last) = (Peers::new(&machines, Duration::ZERO), 0_u8);
        let (dead, none) = (BTreeSet::from([at(70), at(71)]), BTreeSet::new());
        for half_second in 1..=10_u32 {
            let now = Duration::from_millis(500) * half_second;
            let asked = peers.ask(|| {
                last += 1;
                [last; 8]
            });
            for (address, question) in
                asked.into_iter().filter(|(address, _)| *address == at(1) || half_second < 3)
            {
                let answer = roll_call(&question, if address == at(1) { &dead } else { &none }).unwrap();
                assert!(answer.len() <= question.len() && roll_call(&answer, &dead).is_none());
                assert!(!peers.answered(now, at(9), &answer), "from another address");
                assert!(!peers.answered(now, address, &answer[..answer.len() - 1]));
                assert!(peers.answered(now, address, &answer));
                assert!(!peers.answered(now, address, &answer), "twice");
            }
            assert!(peers.suspects(now, &names[0], at(70)) && !peers.suspects(now, &names[0], at(80)));
            // It answered last after a second.
            assert_eq!(peers.suspects(now, &names[1], at(90)), half_second > 6, "{half_second}");
            assert!(!peers.suspects(now, &"m3".parse().unwrap(), at(95)), "of it nothing is known");
        }
        let many: BTreeSet<Ipv4Addr> = (0..200).map(at).collect();
        let (_, question) = peers.ask(|| [9; 8]).remove(0);
        assert_eq!(roll_call(&question, &many).unwrap().len(), ROLL_CALL_BYTES);
    }
}
