//! What each destination grants to each ingress: together never more than it can serve, also while news is on its way.
//!
//! Each round makes a target from what ingresses ask for and destinations can serve, and takes a step towards it. What an
//! ingress may be using of a destination is the most of: what it was granted last, what it was granted since its last
//! answer, and what the parts of its connections amount to that it says it sends there. Only what all these leave is
//! granted to others. An ingress loses a grant only once others make up for it.

use std::collections::BTreeMap;

use crate::transport::{Flow, NOTHING, Room, Transport};

/// Grants are cut to whole parts of an ingress's connections, at up to three destinations or so: they are larger by this.
const CUTTING: f64 = 1.0 + 3.0 / crate::shares::PARTS as f64;
/// Above this utilisation (of what is asked for, so with head-room) connections had better go elsewhere, if near.
const BUSY: f64 = 0.9;
/// How much farther.
const BUSY_MS: f64 = 1.0;

/// What is known of all sites, by number; where one is silent, what it said last.
pub struct View<'a> {
    /// What each ingress asks for: new connections a second.
    pub asked: &'a [f64],
    /// How many parts of its connections each ingress sends to which other sites.
    pub away: &'a [Vec<(usize, usize)>],
    /// The revision of its grant that each ingress knew when it said so.
    pub known: &'a [u64],
    /// What each site can serve: new connections a second; 0 for one that must not get any.
    pub capacity: &'a [f64],
    /// From one site to another, in milliseconds.
    pub latency_ms: &'a dyn Fn(usize, usize) -> f64,
}

/// What an ingress may send where.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Grant {
    /// Grows with each change.
    pub revision: u64,
    /// What the ingress asked for when it was made.
    pub asked: f64,
    /// New connections a second by site, itself included; empty where all may stay at the ingress.
    pub quotas: BTreeMap<usize, f64>,
}

/// All grants of one virtual IP.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    rows: Vec<Row>,
    first_revision: u64,
}

#[derive(Debug, Clone, Default)]
struct Row {
    grant: Grant,
    /// The most that it was granted of each since it answered.
    outstanding: Flow,
}

impl Ledger {
    /// An empty one, whose revisions are at least this: more than any of an earlier ledger, which ingresses may know.
    pub fn starting_at(first_revision: u64) -> Self {
        Self { rows: Vec::new(), first_revision }
    }

    /// Goes on with a grant that an ingress says it has, where that is newer than what is known here: an earlier ledger
    /// made it.
    pub fn adopt(&mut self, ingress: usize, grant: &Grant) {
        if self.rows.len() <= ingress {
            self.rows.resize_with(ingress + 1, Row::default);
        }
        let row = &mut self.rows[ingress];
        if grant.revision > row.grant.revision {
            for (site, quota) in &grant.quotas {
                let most = row.outstanding.entry(*site).or_default();
                *most = most.max(*quota);
            }
            row.grant = grant.clone();
        }
    }

    /// The grant of an ingress.
    pub fn grant(&self, ingress: usize) -> Option<&Grant> {
        self.rows.get(ingress).map(|row| &row.grant)
    }

    /// Takes a step towards the best; returns whose grant changed.
    pub fn round(&mut self, view: &View<'_>) -> Vec<usize> {
        let sites = view.asked.len();
        self.rows.resize_with(sites.max(self.rows.len()), Row::default);
        for (row, known) in self.rows.iter_mut().zip(view.known) {
            if row.grant.revision == *known {
                row.outstanding.clone_from(&row.grant.quotas);
            }
        }
        let needs: Vec<f64> = view.asked.iter().map(|asked| asked * CUTTING).collect();
        let plan = Plan { view, needs: &needs, capacity: &capacity(view, &needs) };
        // Where all stays and fits, there is nothing to decide.
        if self.rows.iter().all(|row| row.grant.quotas.is_empty())
            && (0..sites).all(|site| needs[site] <= plan.capacity[site] * BUSY && view.away[site].is_empty())
        {
            return Vec::new();
        }
        let used: Vec<Flow> = (0..sites).map(|site| self.rows[site].used(site, view)).collect();
        let mut free = plan.capacity.to_vec();
        used.iter().flatten().for_each(|(site, used)| free[*site] -= used);
        let now: Vec<Flow> = (0..sites).map(|site| self.rows[site].flow(site, needs[site])).collect();
        let target = plan.target(&now);
        // Those who lack something come before those who would only have it better.
        let lacks = |site: usize| now[site].values().sum::<f64>() + NOTHING < needs[site];
        let mut order: Vec<usize> = (0..sites).collect();
        order.sort_by_key(|site| !lacks(*site));
        let mut changed = Vec::new();
        for site in order {
            let next = plan.step(site, &now[site], &target[site], &used[site], &mut free);
            if self.rows[site].set(site, next, view.asked[site], self.first_revision) {
                changed.push(site);
            }
        }
        changed
    }
}

impl Row {
    /// What may be in use of each site.
    fn used(&self, here: usize, view: &View<'_>) -> Flow {
        let asked = view.asked[here];
        let part = asked / crate::shares::PARTS as f64;
        let mut used = self.outstanding.clone();
        let mut most = |site: usize, amount: f64| {
            let used = used.entry(site).or_default();
            *used = used.max(amount);
        };
        let mut stays = crate::shares::PARTS;
        for (site, parts) in &view.away[here] {
            most(*site, *parts as f64 * part);
            stays -= (*parts).min(stays);
        }
        most(here, stays as f64 * part);
        if self.grant.quotas.is_empty() {
            most(here, asked);
        }
        used
    }

    /// What is granted, where nothing was said that all stays.
    fn flow(&self, here: usize, need: f64) -> Flow {
        if self.grant.quotas.is_empty() { Flow::from([(here, need)]) } else { self.grant.quotas.clone() }
    }

    fn set(&mut self, here: usize, mut quotas: Flow, asked: f64, first_revision: u64) -> bool {
        quotas.retain(|_, quota| *quota > NOTHING);
        if quotas.keys().all(|site| *site == here) && quotas.values().sum::<f64>() >= asked {
            quotas.clear();
        }
        let for_same = quotas.is_empty() || asked == self.grant.asked;
        let same = |(a, b): ((&usize, &f64), (&usize, &f64))| a.0 == b.0 && (a.1 - b.1).abs() <= 1e-6 * a.1;
        if for_same
            && quotas.len() == self.grant.quotas.len()
            && self.grant.quotas.iter().zip(&quotas).all(same)
        {
            return false;
        }
        for (site, quota) in &quotas {
            let most = self.outstanding.entry(*site).or_default();
            *most = most.max(*quota);
        }
        let revision = (self.grant.revision + 1).max(first_revision);
        self.grant = Grant { revision, asked, quotas };
        true
    }
}

/// What can be served. Where that is too little for all, everybody is overloaded alike instead of a few without bound.
fn capacity(view: &View<'_>, needs: &[f64]) -> Vec<f64> {
    let (need, capacity): (f64, f64) = (needs.iter().sum(), view.capacity.iter().sum());
    let scale = if need > capacity && capacity > 0.0 { need / capacity * (1.0 + 1e-6) } else { 1.0 };
    view.capacity.iter().map(|capacity| capacity * scale).collect()
}

struct Plan<'a> {
    view: &'a View<'a>,
    needs: &'a [f64],
    capacity: &'a [f64],
}

impl Plan<'_> {
    /// What would be best to have, little different from what there is: nobody has more than it needs, nobody serves more
    /// than it can, everybody has a place, and nothing that matters could be nearer.
    fn target(&self, now: &[Flow]) -> Vec<Flow> {
        let mut flows = now.to_vec();
        let mut over: Vec<f64> = self.capacity.iter().map(|capacity| -capacity).collect();
        for (site, flow) in flows.iter_mut().enumerate() {
            let more = flow.values().sum::<f64>() - self.needs[site];
            self.cut(site, flow, more);
            flow.iter().for_each(|(to, amount)| over[*to] += amount);
        }
        // From far away first.
        let mut served: Vec<(f64, usize, usize)> = Vec::new();
        for (site, flow) in flows.iter().enumerate() {
            let on = flow.keys().filter(|to| over[**to] > NOTHING);
            served.extend(on.map(|to| ((self.view.latency_ms)(site, *to), site, *to)));
        }
        served.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, site, to) in served {
            if let Some(amount) = flows[site].get_mut(&to) {
                let less = over[to].clamp(0.0, *amount);
                *amount -= less;
                over[to] -= less;
            }
        }
        let mut rooms = Vec::with_capacity(2 * self.capacity.len());
        for (site, capacity) in self.capacity.iter().enumerate() {
            rooms.push(Room { site, free: capacity * BUSY, surcharge_ms: 0.0 });
            rooms.push(Room { site, free: capacity * (1.0 - BUSY), surcharge_ms: BUSY_MS });
        }
        let mut transport = Transport::new(&flows, rooms, self.view.latency_ms);
        transport.place(self.needs);
        transport.improve();
        transport.flows()
    }

    /// Takes so much of a flow away, where it costs most.
    fn cut(&self, site: usize, flow: &mut Flow, mut more: f64) {
        let mut far: Vec<(f64, usize)> =
            flow.keys().map(|to| ((self.view.latency_ms)(site, *to), *to)).collect();
        far.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, to) in far {
            if more <= NOTHING {
                return;
            }
            if let Some(amount) = flow.get_mut(&to) {
                let less = more.min(*amount);
                *amount -= less;
                more -= less;
            }
        }
    }

    /// The next grant of an ingress: more of what is free now, less only of what it can do without then.
    fn step(&self, here: usize, now: &Flow, target: &Flow, used: &Flow, free: &mut [f64]) -> Flow {
        let mut next = now.clone();
        for (site, target) in target {
            let has = next.get(site).copied().unwrap_or(0.0);
            let used = used.get(site).copied().unwrap_or(0.0);
            // Where more may be in use than can be served, what an ingress may be using beyond its grant isn't granted either:
            // it would keep it, and take its share of all that it lacks on top.
            let can = (used.max(has) + free[*site]).min(*target);
            if can > has {
                next.insert(*site, can);
                free[*site] -= (can - used).max(0.0);
            }
        }
        let mut spare = next.values().sum::<f64>() - self.needs[here];
        let mut fewer: Vec<(f64, usize)> = next
            .iter()
            .filter(|(site, has)| **has > target.get(site).copied().unwrap_or(0.0))
            .map(|(site, _)| ((self.view.latency_ms)(here, *site), *site))
            .collect();
        fewer.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, site) in fewer {
            let Some(has) = next.get_mut(&site) else { continue };
            let less = spare.clamp(0.0, *has - target.get(&site).copied().unwrap_or(0.0));
            *has -= less;
            spare -= less;
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use anyplace_seed::Seed;

    use super::*;

    const SITES: usize = 8;

    fn latency(from: usize, to: usize) -> f64 {
        from.abs_diff(to) as f64 * 10.0
    }

    /// One ingress or several, which answer after a while or not, and use whatever they were ever told since they answered,
    /// and say that they use more than that, as those do that lack something.
    #[test]
    fn what_is_granted_is_never_more_than_can_be_served() {
        let mut seed = Seed::from_env();
        for _ in 0..200 {
            let mut ledger = Ledger::default();
            let capacity: Vec<f64> = (0..SITES).map(|_| seed.below(200) as f64).collect();
            let mut asked = vec![0.0; SITES];
            let mut told: Vec<Vec<Grant>> = vec![vec![Grant::default()]; SITES];
            for _ in 0..60 {
                let site = seed.index(SITES);
                // All together ask for less than there is, each for more than it has.
                asked[site] = capacity.iter().sum::<f64>() / SITES as f64 * seed.below(95) as f64 / 100.0;
                for told in told.iter_mut().filter(|told| told.len() > 1) {
                    if seed.chance(30) {
                        told.drain(..told.len() - 1);
                    }
                }
                let known: Vec<u64> = told.iter().map(|told| told[0].revision).collect();
                let mut away = vec![Vec::new(); SITES];
                for (site, away) in away.iter_mut().enumerate() {
                    away.push(((site + 1 + seed.index(SITES - 1)) % SITES, seed.index(crate::PARTS)));
                }
                let view = View {
                    asked: &asked,
                    away: &away,
                    known: &known,
                    capacity: &capacity,
                    latency_ms: &latency,
                };
                for site in ledger.round(&view) {
                    told[site].push(ledger.grant(site).unwrap().clone());
                }
                for (site, capacity) in capacity.iter().enumerate() {
                    let most = |ingress: usize| {
                        let quotas = told[ingress].iter().filter_map(|grant| grant.quotas.get(&site));
                        quotas.copied().fold(0.0, f64::max)
                    };
                    // What a site's own clients bring is not granted, but comes.
                    let others: f64 = (0..SITES).filter(|ingress| *ingress != site).map(most).sum();
                    assert!(others <= capacity + 1e-6, "{others} of {capacity}");
                }
            }
        }
    }

    /// A new ledger hears of grants that an earlier one made, and makes none that was meant for others.
    #[test]
    fn a_new_ledger_goes_on_with_what_ingresses_have() {
        let (asked, capacity) = ([150.0, 0.0, 60.0], [100.0, 100.0, 100.0]);
        let away = vec![Vec::new(); 3];
        let round = |ledger: &mut Ledger, known: &[u64]| {
            let view = View { asked: &asked, away: &away, known, capacity: &capacity, latency_ms: &latency };
            ledger.round(&view)
        };
        let mut first = Ledger::starting_at(7);
        assert_eq!(round(&mut first, &[0; 3]), [0]);
        let grant = first.grant(0).unwrap().clone();
        assert_eq!(grant.revision, 7);
        assert!(grant.quotas[&1] > 50.0);
        let mut second = Ledger::starting_at(1_000);
        second.adopt(0, &grant);
        assert_eq!(second.grant(0), Some(&grant));
        assert_eq!(round(&mut second, &[7, 0, 0]), [] as [usize; 0]);
        second.adopt(0, &Grant { revision: 6, ..Grant::default() });
        assert_eq!(second.grant(0), Some(&grant), "older ones change nothing");
        let more = [170.0, 0.0, 60.0];
        let view =
            View { asked: &more, away: &away, known: &[7, 0, 0], capacity: &capacity, latency_ms: &latency };
        assert_eq!(second.round(&view), [0]);
        assert_eq!(second.grant(0).unwrap().revision, 1_000);
    }

    #[test]
    fn where_all_are_too_few_everybody_bears_it_alike() {
        let mut ledger = Ledger::default();
        let (asked, capacity) = ([300.0, 100.0, 0.0], [100.0, 80.0, 20.0]);
        let away = vec![Vec::new(); 3];
        let mut known = vec![0; 3];
        for _ in 0..10 {
            let view =
                View { asked: &asked, away: &away, known: &known, capacity: &capacity, latency_ms: &latency };
            for site in ledger.round(&view) {
                known[site] = ledger.grant(site).unwrap().revision;
            }
        }
        let mut served = [0.0; 3];
        for from in 0..3 {
            let quotas = &ledger.grant(from).unwrap().quotas;
            quotas.iter().for_each(|(to, quota)| served[*to] += quota);
            // Where nothing is granted, all stays.
            served[from] += if quotas.is_empty() { asked[from] } else { 0.0 };
        }
        let loads: Vec<f64> =
            served.iter().zip(&capacity).map(|(served, capacity)| served / capacity).collect();
        assert!(loads.iter().all(|load| (load - 2.0).abs() < 0.1), "{loads:?}");
    }
}
