//! Round trips to other locations: whom to ask next, what an answer means, and what is said of a location. Pure: times
//! and nonces come in.
//!
//! ```text
//! question, answer:   "apl"  1 byte 1 | 2   8 bytes nonce
//! ```
//!
//! An answer counts if it comes from the address that was asked last and carries the nonce of that question, so that
//! nobody else can make a location look near; it is as long as the question, so that nobody gains by asking in
//! another's name. What is said is the median of the last answers: what single packets waited for doesn't move it.

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use anyplace_model::LocationId;

/// Length of a question and of an answer.
pub const PACKET_BYTES: usize = 12;

const QUESTION: [u8; 4] = *b"apl\x01";
const ANSWER: [u8; 4] = *b"apl\x02";
/// Answers that count. At one a second a longer way is noticed within 8 s.
const WINDOW: usize = 15;
/// With fewer nothing is said: the first packets wait for neighbours and routes to be found.
const LEAST: usize = 3;
/// An older answer says nothing of now.
const KEPT: Duration = Duration::from_secs(30);
/// What is said stays until the median has moved by more than this part of it, and this much: everybody who hears it may
/// move traffic.
const MOVED: f64 = 0.1;
const MOVED_MS: f64 = 1.0;

/// The round trips from one location to others.
#[derive(Debug, Default)]
pub struct Prober {
    targets: BTreeMap<LocationId, Target>,
    /// Who was asked last.
    last: Option<LocationId>,
}

#[derive(Debug, Default)]
struct Target {
    addresses: Vec<Ipv4Addr>,
    /// Which of them is asked: another where one hasn't answered.
    turn: usize,
    asked: Option<Asked>,
    /// When each came, and the round trip in milliseconds.
    answers: VecDeque<(Duration, f64)>,
    said: Option<f64>,
}

#[derive(Debug)]
struct Asked {
    at: Duration,
    address: Ipv4Addr,
    nonce: [u8; 8],
}

impl Prober {
    /// Asks these locations from now on, each at one of its addresses. What is known of those that stay is kept.
    pub fn aim(&mut self, targets: &BTreeMap<LocationId, Vec<Ipv4Addr>>) {
        self.targets.retain(|location, _| targets.contains_key(location));
        for (location, addresses) in targets.iter().filter(|(_, addresses)| !addresses.is_empty()) {
            let target = self.targets.entry(location.clone()).or_default();
            target.addresses.clone_from(addresses);
        }
    }

    /// How many locations are asked in turn.
    pub fn targets(&self) -> usize {
        self.targets.len()
    }

    /// The next question, and to whom. One that wasn't answered by the location's next turn is given up.
    pub fn ask(&mut self, now: Duration, nonce: [u8; 8]) -> Option<(Ipv4Addr, [u8; PACKET_BYTES])> {
        let after = self.last.take().and_then(|last| {
            let rest = (std::ops::Bound::Excluded(last), std::ops::Bound::Unbounded);
            self.targets.range(rest).next().map(|(location, _)| location.clone())
        });
        let location = after.or_else(|| self.targets.keys().next().cloned())?;
        let target = self.targets.get_mut(&location)?;
        target.turn += usize::from(target.asked.is_some());
        let address = *target.addresses.get(target.turn % target.addresses.len().max(1))?;
        target.asked = Some(Asked { at: now, address, nonce });
        self.last = Some(location);
        Some((address, packet(QUESTION, nonce)))
    }

    /// Takes an answer in; returns whether it is one.
    pub fn answered(&mut self, now: Duration, from: Ipv4Addr, bytes: &[u8]) -> bool {
        let Some(nonce) = nonce(ANSWER, bytes) else { return false };
        let meant = |target: &&mut Target| {
            target.asked.as_ref().is_some_and(|asked| asked.address == from && asked.nonce == nonce)
        };
        let Some(target) = self.targets.values_mut().find(meant) else { return false };
        let Some(asked) = target.asked.take() else { return false };
        target.answers.push_back((now, now.saturating_sub(asked.at).as_secs_f64() * 1e3));
        if target.answers.len() > WINDOW {
            target.answers.pop_front();
        }
        true
    }

    /// What is said of each location now, in milliseconds.
    pub fn latency_ms(&mut self, now: Duration) -> BTreeMap<LocationId, f64> {
        let said = self.targets.iter_mut().filter_map(|(location, target)| {
            let fresh = |(at, _): &(Duration, f64)| now.saturating_sub(*at) <= KEPT;
            target.answers.retain(fresh);
            let median = target.median();
            target.said = match (median, target.said) {
                (Some(median), Some(said)) if (median - said).abs() <= (said * MOVED).max(MOVED_MS) => {
                    Some(said)
                }
                (median, _) => median,
            };
            Some((location.clone(), target.said?))
        });
        said.collect()
    }
}

impl Target {
    fn median(&self) -> Option<f64> {
        let mut answers: Vec<f64> = self.answers.iter().map(|(_, latency_ms)| *latency_ms).collect();
        answers.sort_by(f64::total_cmp);
        answers.get(answers.len() / 2).filter(|_| answers.len() >= LEAST).copied()
    }
}

/// The answer to a question; none to anything else.
pub fn answer(question: &[u8]) -> Option<[u8; PACKET_BYTES]> {
    nonce(QUESTION, question).map(|nonce| packet(ANSWER, nonce))
}

fn packet(head: [u8; 4], nonce: [u8; 8]) -> [u8; PACKET_BYTES] {
    let mut packet = [0; PACKET_BYTES];
    packet[..4].copy_from_slice(&head);
    packet[4..].copy_from_slice(&nonce);
    packet
}

fn nonce(head: [u8; 4], packet: &[u8]) -> Option<[u8; 8]> {
    packet.strip_prefix(&head)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NRT: Ipv4Addr = Ipv4Addr::new(10, 2, 1, 1);
    const NRT_2: Ipv4Addr = Ipv4Addr::new(10, 2, 2, 1);
    const GRU: Ipv4Addr = Ipv4Addr::new(10, 3, 1, 1);

    fn id(name: &str) -> LocationId {
        name.parse().unwrap()
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn aimed(targets: &[(&str, &[Ipv4Addr])]) -> Prober {
        let mut prober = Prober::default();
        prober.aim(&targets.iter().map(|(name, addresses)| (id(name), addresses.to_vec())).collect());
        prober
    }

    /// A prober of one location that was asked every second from `from_s` on; the round trips.
    fn hear(prober: &mut Prober, from_s: u64, took_ms: &[u64]) {
        for (second, took) in (from_s..).zip(took_ms) {
            let at = ms(second * 1_000);
            let (address, question) = prober.ask(at, second.to_be_bytes()).unwrap();
            assert!(prober.answered(at + ms(*took), address, &answer(&question).unwrap()));
        }
    }

    fn said(prober: &mut Prober, at_s: u64) -> Option<f64> {
        prober.latency_ms(ms(at_s * 1_000)).get(&id("nrt")).copied()
    }

    #[test]
    fn locations_are_asked_in_turn_and_only_the_right_answer_counts() {
        let mut prober = aimed(&[("nrt", &[NRT]), ("gru", &[GRU])]);
        assert_eq!(prober.targets(), 2);
        let mut asked = Vec::new();
        for turn in 0..6_u64 {
            let at = ms(turn * 500);
            let (address, question) = prober.ask(at, turn.to_be_bytes()).unwrap();
            asked.push(address);
            let right = answer(&question).unwrap();
            assert_eq!(right.len(), question.len(), "nobody gains by asking in another's name");
            assert!(!prober.answered(at, address, &question), "a question is no answer");
            assert!(!prober.answered(at, NRT_2, &right), "from another address");
            let mut wrong = right;
            wrong[11] ^= 1;
            assert!(!prober.answered(at, address, &wrong), "with another nonce");
            assert!(!prober.answered(at, address, &right[..11]) && answer(&right).is_none());
            let took = if address == NRT { 120 } else { 100 };
            assert!(prober.answered(at + ms(took), address, &right));
            assert!(!prober.answered(at, address, &right), "twice");
        }
        assert_eq!(asked, [GRU, NRT, GRU, NRT, GRU, NRT]);
        let said = prober.latency_ms(ms(3_000));
        assert_eq!(said, BTreeMap::from([(id("gru"), 100.0), (id("nrt"), 120.0)]));
        prober.aim(&BTreeMap::new());
        assert_eq!((prober.latency_ms(ms(3_000)).len(), prober.ask(ms(3_000), [0; 8])), (0, None));
    }

    #[test]
    fn a_machine_that_does_not_answer_is_passed_over() {
        let mut prober = aimed(&[("nrt", &[NRT, NRT_2])]);
        let mut asked = Vec::new();
        for second in 0..6_u64 {
            let at = ms(second * 1_000);
            let (address, question) = prober.ask(at, second.to_be_bytes()).unwrap();
            asked.push(address);
            if address == NRT_2 {
                assert!(prober.answered(at + ms(7), address, &answer(&question).unwrap()));
            }
        }
        assert_eq!(asked, [NRT, NRT_2, NRT_2, NRT_2, NRT_2, NRT_2]);
        assert_eq!(said(&mut prober, 6), Some(7.0));
    }

    #[test]
    fn packets_that_waited_move_nothing_and_a_longer_way_is_noticed() {
        let mut prober = aimed(&[("nrt", &[NRT])]);
        hear(&mut prober, 0, &[900, 120]);
        assert_eq!(said(&mut prober, 2), None, "too little to say anything");
        hear(&mut prober, 2, &[120, 121, 900, 122, 120, 450, 119]);
        assert_eq!(said(&mut prober, 9), Some(121.0));
        hear(&mut prober, 9, &[125, 126, 127, 125, 128, 126, 127, 126, 125]);
        assert_eq!(said(&mut prober, 18), Some(121.0), "too little to tell anybody");
        hear(&mut prober, 18, &[180; 8]);
        assert_eq!(said(&mut prober, 26), Some(180.0));
        hear(&mut prober, 26, &[60; 8]);
        assert_eq!(said(&mut prober, 34), Some(60.0));
    }

    #[test]
    fn what_was_heard_long_ago_says_nothing() {
        let mut prober = aimed(&[("nrt", &[NRT])]);
        hear(&mut prober, 0, &[120; 5]);
        assert_eq!(said(&mut prober, 30), Some(120.0));
        assert_eq!(said(&mut prober, 33), None, "fewer than three are left");
        // What comes after a silence is told, however near it is to what was.
        hear(&mut prober, 40, &[121; 3]);
        assert_eq!(said(&mut prober, 43), Some(121.0));
    }
}
