//! Locations, their clients, and messages between them that are late or lost.

use std::collections::VecDeque;

use anyplace_choice::{Demand, Grant, Ledger, PARTS, Shares, View, Want, warmth};
use anyplace_seed::Seed;

/// Time goes in steps of this.
pub(crate) const TICK_MS: u64 = 100;
/// From a client to its ingress and back.
pub(crate) const ACCESS_MS: f64 = 5.0;
/// An ingress measures, decides and reports so often.
const PERIOD_MS: u64 = 1_000;
/// Grants are made so often.
const ROUND_MS: u64 = 500;
/// Whoever measures looks back so long.
const WINDOW_MS: u64 = 1_000;

/// One location, for one virtual IP.
pub(crate) struct Site {
    pub(crate) capacity: f64,
    /// Since when it has the last of it.
    pub(crate) since_ms: u64,
    /// Its capacity by tick.
    pub(crate) capacities: Vec<f64>,
    /// New connections a second that enter here, by tick, the newest last.
    pub(crate) rates: VecDeque<f64>,
    pub(crate) shares: Shares,
    demand: Demand,
    grant: Grant,
    /// Others, nearest first.
    near: Vec<usize>,
    phase_ms: u64,
    /// Grants arrive in order.
    delivered_ms: u64,
}

enum Message {
    Report { site: usize, sent_ms: u64, capacity: f64, asked: f64, away: Vec<(usize, usize)>, known: u64 },
    Grant { site: usize, grant: Grant },
}

/// All of it.
pub(crate) struct World {
    pub(crate) now_ms: u64,
    pub(crate) sites: Vec<Site>,
    pub(crate) latency: Vec<Vec<f64>>,
    pub(crate) moves: u64,
    seed: Seed,
    flight: Vec<(u64, Message)>,
    ledger: Ledger,
    // What the maker of grants heard last.
    heard_ms: Vec<u64>,
    capacity: Vec<f64>,
    asked: Vec<f64>,
    away: Vec<Vec<(usize, usize)>>,
    known: Vec<u64>,
}

impl World {
    /// Locations on a globe of 40,000 km, in clusters as cities are; `serving` per cent of them have instances.
    pub(crate) fn new(
        mut seed: Seed,
        sites: usize,
        serving: u64,
        capacity: impl Fn(&mut Seed) -> f64,
    ) -> Self {
        let mut places: Vec<(f64, f64)> = Vec::new();
        for index in 0..sites {
            let near = index > 3 && seed.chance(60);
            let (x, y) = if near {
                places[seed.index(index)]
            } else {
                (seed.below(20_000) as f64, seed.below(8_000) as f64)
            };
            let spread = if near { 1_500 } else { 1 };
            places.push((x + seed.below(spread) as f64, y + seed.below(spread) as f64));
        }
        // Both ways, through fibre that is half as long again as the straight line.
        let rtt = |(ax, ay): (f64, f64), (bx, by): (f64, f64)| 0.5 + (ax - bx).hypot(ay - by) * 1.5 / 100.0;
        let latency: Vec<Vec<f64>> = (0..sites)
            .map(|a| (0..sites).map(|b| if a == b { 0.0 } else { rtt(places[a], places[b]) }).collect())
            .collect();
        let must_serve = seed.index(sites);
        let all = (0..sites)
            .map(|index| {
                let mut near: Vec<usize> = (0..sites).filter(|other| *other != index).collect();
                near.sort_by(|a, b| latency[index][*a].total_cmp(&latency[index][*b]));
                let serves = index == must_serve || seed.chance(serving);
                Site {
                    capacity: if serves { capacity(&mut seed) } else { 0.0 },
                    since_ms: 0,
                    capacities: Vec::new(),
                    rates: VecDeque::new(),
                    shares: Shares::default(),
                    demand: Demand::default(),
                    grant: Grant::default(),
                    near,
                    phase_ms: seed.below(PERIOD_MS / TICK_MS) * TICK_MS,
                    delivered_ms: 0,
                }
            })
            .collect();
        Self {
            now_ms: 0,
            sites: all,
            latency,
            moves: 0,
            seed,
            flight: Vec::new(),
            ledger: Ledger::default(),
            heard_ms: vec![0; sites],
            capacity: vec![0.0; sites],
            asked: vec![0.0; sites],
            away: vec![Vec::new(); sites],
            known: vec![0; sites],
        }
    }

    /// Who has the parts of an ingress's connections, as its routers would send them.
    pub(crate) fn owners(&self, site: usize) -> Vec<usize> {
        let owners = self.sites[site].shares.owners();
        let rest = if self.sites[site].capacity > 0.0 { site } else { self.nearest_serving(site) };
        (0..PARTS).map(|part| owners.get(part).copied().flatten().unwrap_or(rest)).collect()
    }

    fn nearest_serving(&self, site: usize) -> usize {
        let near = self.sites[site].near.iter().copied();
        near.into_iter().find(|other| self.sites[*other].capacity > 0.0).unwrap_or(site)
    }

    /// One tick, in which so many connections a second enter each location.
    pub(crate) fn tick(&mut self, rates: &[f64]) {
        self.now_ms += TICK_MS;
        for (site, rate) in self.sites.iter_mut().zip(rates) {
            site.capacities.push(site.capacity);
            site.rates.push_back(*rate);
            if site.rates.len() > 100 {
                site.rates.pop_front();
            }
        }
        let now_ms = self.now_ms;
        let (arrived, flight) =
            std::mem::take(&mut self.flight).into_iter().partition(|(at, _)| *at <= now_ms);
        self.flight = flight;
        let mut arrived: Vec<(u64, Message)> = arrived;
        arrived.sort_by_key(|(at, _)| *at);
        for (_, message) in arrived {
            match message {
                Message::Report { site, sent_ms, capacity, asked, away, known } => {
                    if sent_ms > self.heard_ms[site] {
                        self.heard_ms[site] = sent_ms;
                        self.capacity[site] = capacity;
                        (self.asked[site], self.away[site], self.known[site]) = (asked, away, known);
                    }
                }
                Message::Grant { site, grant } => {
                    self.sites[site].grant = grant;
                    self.decide(site);
                }
            }
        }
        for site in 0..self.sites.len() {
            if now_ms % PERIOD_MS == self.sites[site].phase_ms {
                let window = self.sites[site].rates.iter().rev().take((WINDOW_MS / TICK_MS) as usize);
                let (sum, count) = window.fold((0.0, 0.0), |(sum, count), rate| (sum + rate, count + 1.0));
                self.sites[site].demand.measured(now_ms, sum / count);
                self.decide(site);
            }
        }
        if now_ms.is_multiple_of(ROUND_MS) {
            self.round();
        }
    }

    /// Decides at an ingress, and reports.
    fn decide(&mut self, index: usize) {
        // What is told of others is a second old.
        let serves: Vec<bool> = (0..self.sites.len())
            .map(|other| {
                let known = &self.sites[other].capacities;
                let age = if other == index { 0 } else { (1_000 / TICK_MS) as usize };
                known.len().checked_sub(age + 1).is_none_or(|tick| known[tick] > 0.0)
            })
            .collect();
        let site = &mut self.sites[index];
        let mut quotas: Vec<(usize, f64)> =
            site.grant.quotas.iter().map(|(site, quota)| (*site, *quota)).collect();
        quotas.sort_by(|a, b| self.latency[index][a.0].total_cmp(&self.latency[index][b.0]));
        let asked = site.demand.asked();
        let granted = if site.grant.quotas.is_empty() { asked } else { site.grant.asked.min(asked) };
        let want = Want { here: index, asked: granted, quotas: &quotas, serves: &|site| serves[site] };
        let before = site.shares.owners().to_vec();
        if site.shares.decide(self.now_ms, &want) {
            let owner = |owners: &[Option<usize>], part: usize| owners.get(part).copied().flatten();
            let after = site.shares.owners();
            self.moves +=
                (0..PARTS).filter(|part| owner(&before, *part) != owner(after, *part)).count() as u64;
        }
        let known = site.grant.revision;
        // New capacity warms up.
        let capacity = site.capacity * warmth(self.now_ms - site.since_ms);
        let mut away: Vec<(usize, usize)> = Vec::new();
        for owner in self.owners(index).into_iter().filter(|owner| *owner != index) {
            match away.iter_mut().find(|(site, _)| *site == owner) {
                Some((_, parts)) => *parts += 1,
                None => away.push((owner, 1)),
            }
        }
        if !self.seed.chance(5) {
            let at = self.now_ms + self.delay();
            self.flight.push((
                at,
                Message::Report { site: index, sent_ms: self.now_ms, capacity, asked, away, known },
            ));
        }
    }

    /// Mostly some tenths of a second, seldom seconds.
    fn delay(&mut self) -> u64 {
        if self.seed.chance(2) { 1_000 + self.seed.below(2_000) } else { 50 + self.seed.below(450) }
    }

    fn round(&mut self) {
        let latency = |from: usize, to: usize| self.latency[from][to];
        let view = View {
            asked: &self.asked,
            away: &self.away,
            known: &self.known,
            capacity: &self.capacity,
            latency_ms: &latency,
        };
        for site in self.ledger.round(&view) {
            let grant = self.ledger.grant(site).cloned().unwrap_or_default();
            let at = (self.now_ms + self.delay()).max(self.sites[site].delivered_ms);
            self.sites[site].delivered_ms = at;
            self.flight.push((at, Message::Grant { site, grant }));
        }
    }
}
