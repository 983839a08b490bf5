//! Which parts of a deployment's new connections go to other locations. The decisions are `anyplace-choice`'s, for which
//! locations are numbers; here they have names.

use std::{collections::BTreeMap, iter};

use anyplace_choice::{self as choice, Demand, Shares, Want, warmth};
use anyplace_model::{Away, Grant, LocationId, PARTS, RemoteLocation, Route, Span, Traffic};

use crate::routes::by_latency;

const _: () = assert!(PARTS as usize == choice::PARTS);

/// The new connections of one deployment that enter this location.
#[derive(Debug, Clone)]
pub struct Sharing {
    /// Locations by their number in `shares`, this one first. Only grows.
    sites: Vec<LocationId>,
    demand: Demand,
    shares: Shares,
}

impl Sharing {
    /// Goes on with what was away and asked for before a restart.
    pub fn remembered(here: &LocationId, away: &[Away], asked: f64, now_ms: u64) -> Self {
        let mut sharing = Self {
            sites: vec![here.clone()],
            demand: Demand::remembered(now_ms, asked),
            shares: Shares::default(),
        };
        let changes: Vec<choice::Away> = away.iter().map(|away| sharing.numbered(away)).collect();
        sharing.shares = Shares::remembered(changes);
        sharing
    }

    /// Takes in how many new connections a second have entered lately.
    pub fn measured(&mut self, now_ms: u64, entering: f64) {
        self.demand.measured(now_ms, entering);
    }

    /// Decides anew which parts go where, by a grant, by who serves at all, and by the measured round trips; returns
    /// whether anything changes.
    pub fn decide(
        &mut self,
        now_ms: u64,
        grant: &Grant,
        route: &Route,
        latency_ms: &BTreeMap<LocationId, f64>,
    ) -> bool {
        self.follow_clock(now_ms);
        let here = self.sites[0].clone();
        let mut others: Vec<&RemoteLocation> = route.serving().collect();
        let order = by_latency(latency_ms);
        others.sort_by(|a, b| order(a, b));
        let serving: Vec<usize> = iter::once(&here)
            .filter(|_| serves_here(route))
            .chain(others.into_iter().map(|remote| &remote.location))
            .map(|location| self.number(location))
            .collect();
        // What is granted by who doesn't serve comes last, and counts for nothing.
        let mut quotas: Vec<(usize, f64)> =
            grant.quotas.iter().map(|(location, quota)| (self.number(location), *quota)).collect();
        quotas.sort_by_key(|(site, _)| serving.iter().position(|it| it == site).unwrap_or(usize::MAX));
        let asked = self.demand.asked();
        let asked = if quotas.is_empty() { asked } else { grant.asked.min(asked) };
        let want = Want { here: 0, asked, quotas: &quotas, serves: &|site| serving.contains(&site) };
        self.shares.decide(now_ms, &want)
    }

    /// What is away and was, the newest first.
    pub fn away(&self) -> Vec<Away> {
        let named = |change: &choice::Away| {
            let mut spans: Vec<Span> = Vec::new();
            for owner in &change.owners {
                let to = owner.map(|site| self.sites[site].clone());
                match spans.last_mut().filter(|span| span.to == to) {
                    Some(span) => span.parts += 1,
                    None => spans.push(Span { parts: 1, to }),
                }
            }
            spans.pop_if(|last| last.to.is_none());
            Away { since_ms: change.since_ms, spans }
        };
        self.shares.changes().map(named).collect()
    }

    /// What to tell the global scheduler.
    pub fn traffic(&self, entering: f64, capacity: f64, grant: &Grant, route: &Route) -> Traffic {
        let counts = self.shares.counts();
        let mut away: BTreeMap<LocationId, u16> =
            counts.into_iter().map(|(site, parts)| (self.sites[site].clone(), parts as u16)).collect();
        let stays = PARTS - away.values().sum::<u16>();
        // As the tables have it.
        if let Some(nearest) = route.takes_over().filter(|_| stays > 0 && !serves_here(route)) {
            *away.entry(nearest.location.clone()).or_default() += stays;
        }
        Traffic { entering, asked: self.demand.asked(), capacity, away, grant: grant.clone() }
    }

    /// After a clock was set back, what has happened happened now: a part that was moved in the future would rest until
    /// then.
    fn follow_clock(&mut self, now_ms: u64) {
        let newest_ms = self.shares.changes().next().map_or(0, |newest| newest.since_ms);
        if newest_ms > now_ms {
            let back = |change: &choice::Away| choice::Away {
                since_ms: change.since_ms.saturating_sub(newest_ms - now_ms),
                owners: change.owners.clone(),
            };
            let changes: Vec<choice::Away> = self.shares.changes().map(back).collect();
            self.shares = Shares::remembered(changes);
        }
    }

    fn numbered(&mut self, away: &Away) -> choice::Away {
        let mut owners = Vec::with_capacity(choice::PARTS);
        for span in &away.spans {
            let owner = span.to.as_ref().map(|location| self.number(location));
            owners.extend(iter::repeat_n(owner, span.parts.into()));
        }
        // As decisions leave them: without those at the end that stay.
        owners.truncate(owners.iter().rposition(Option::is_some).map_or(0, |last| last + 1));
        choice::Away { since_ms: away.since_ms, owners }
    }

    fn number(&mut self, location: &LocationId) -> usize {
        self.sites.iter().position(|site| site == location).unwrap_or_else(|| {
            self.sites.push(location.clone());
            self.sites.len() - 1
        })
    }
}

/// New connections a second that the ready instances of a route's location can serve, if each should have so many.
/// Those that have begun to serve since `warm_ms` count for a part of it until they are warm.
pub fn capacity(route: &Route, each: f64, warm_ms: u64, now_ms: u64) -> f64 {
    let ready = route.local.iter().filter(|endpoint| endpoint.ready && !endpoint.draining);
    let counts = ready.map(|endpoint| match endpoint.began_ms {
        // In the future: a clock was set back.
        began_ms if began_ms <= warm_ms || began_ms > now_ms => 1.0,
        began_ms => warmth(now_ms.saturating_sub(began_ms)),
    });
    each * counts.sum::<f64>()
}

fn serves_here(route: &Route) -> bool {
    route.local.iter().any(|endpoint| endpoint.ready && !endpoint.draining)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn route(ready_here: bool, others: &[&str]) -> Route {
        let local = json!({"instance": "hello-1", "machine": "ams-1", "address": "10.1.1.65", "ready": ready_here,
            "draining": false, "began_ms": 5_000});
        let remote = others
            .iter()
            .map(|name| json!({"location": name, "distance_km": 100.0, "ready": 1, "ingress": ["10.2.1.1"]}));
        let remote: Vec<_> = remote.collect();
        serde_json::from_value(
            json!({"vip": "203.0.113.1", "ports": [{"port": 80}], "local": [local], "remote": remote}),
        )
        .unwrap()
    }

    fn grant(quotas: &[(&str, f64)]) -> Grant {
        let quotas = quotas.iter().map(|(name, quota)| (name.parse().unwrap(), *quota)).collect();
        Grant { revision: 1, asked: 126.0, quotas }
    }

    /// Nothing: the tests' locations are told apart by name.
    fn measured() -> BTreeMap<LocationId, f64> {
        BTreeMap::new()
    }

    fn sharing() -> Sharing {
        let mut sharing = Sharing::remembered(&"ams".parse().unwrap(), &[], 0.0, 0);
        sharing.measured(1_000, 100.0);
        sharing
    }

    fn parts(sharing: &Sharing) -> Vec<(u16, String)> {
        let to = |span: Span| (span.parts, span.to.map_or("-".into(), |to| to.to_string()));
        sharing.away().first().map_or(Vec::new(), |away| away.spans.iter().cloned().map(to).collect())
    }

    #[test]
    fn parts_go_to_the_nearest_within_the_grant_and_are_named() {
        let (mut sharing, both) = (sharing(), route(true, &["fra", "nrt"]));
        assert!(!sharing.decide(1_000, &Grant::default(), &both, &measured()), "without a grant all stays");
        let grant = grant(&[("ams", 63.0), ("nrt", 63.0), ("fra", 31.5)]);
        assert!(sharing.decide(1_000, &grant, &both, &measured()));
        assert_eq!(parts(&sharing), [(64, "fra".into()), (64, "nrt".into())]);
        let traffic = sharing.traffic(100.0, 50.0, &grant, &both);
        assert_eq!((traffic.entering, traffic.asked, traffic.capacity), (100.0, 126.0, 50.0));
        assert_eq!((traffic.away.len(), traffic.away["fra"]), (2, 64));
        // A location that has gone has nothing any more, at once.
        assert!(sharing.decide(2_000, &grant, &route(true, &["nrt"]), &measured()));
        assert_eq!(parts(&sharing).iter().map(|(parts, _)| *parts).sum::<u16>(), 128);
        assert!(parts(&sharing).iter().all(|(_, to)| to == "nrt"), "{:?}", parts(&sharing));
    }

    #[test]
    fn parts_go_to_who_is_the_nearest_by_measurement() {
        let (mut sharing, both) = (sharing(), route(true, &["fra", "nrt"]));
        let measured = BTreeMap::from([("fra".parse().unwrap(), 30.0), ("nrt".parse().unwrap(), 20.0)]);
        let grant = grant(&[("ams", 63.0), ("nrt", 31.5), ("fra", 63.0)]);
        assert!(sharing.decide(1_000, &grant, &both, &measured));
        assert_eq!(parts(&sharing), [(64, "nrt".into()), (64, "fra".into())]);
    }

    #[test]
    fn a_restart_goes_on_where_it_was() {
        let (mut sharing, both) = (sharing(), route(true, &["fra", "nrt"]));
        let grant = grant(&[("ams", 63.0), ("fra", 63.0)]);
        assert!(sharing.decide(1_000, &grant, &both, &measured()));
        let away = sharing.away();
        let mut again = Sharing::remembered(&"ams".parse().unwrap(), &away, grant.asked, 2_000);
        assert_eq!(again.away(), away);
        assert!(!again.decide(2_000, &grant, &both, &measured()), "nothing to do");
        assert_eq!(again.away(), away);
        // And with a clock that was set back: what has moved rests from now on, not for hours.
        let mut again = Sharing::remembered(&"ams".parse().unwrap(), &away, grant.asked, 10);
        assert!(!again.decide(10, &Grant::default(), &both, &measured()));
        assert!(again.decide(10 + choice::REST_MS, &Grant::default(), &both, &measured()), "home again");
    }

    #[test]
    fn where_nothing_is_ready_what_stays_is_the_nearest_others() {
        let sharing = sharing();
        let traffic = sharing.traffic(100.0, 0.0, &Grant::default(), &route(false, &["fra", "nrt"]));
        assert_eq!(traffic.away, BTreeMap::from([("fra".parse().unwrap(), PARTS)]));
        assert!(sharing.traffic(100.0, 0.0, &Grant::default(), &route(false, &[])).away.is_empty());
    }

    #[test]
    fn new_instances_warm_up_and_those_of_before_a_restart_are_warm() {
        let route = route(true, &[]);
        assert!((capacity(&route, 50.0, 0, 5_000) - 5.0).abs() < 1e-9);
        assert!((capacity(&route, 50.0, 0, 15_000) - 50.0).abs() < 1e-9);
        assert!((capacity(&route, 50.0, 6_000, 6_000) - 50.0).abs() < 1e-9);
        assert!((capacity(&route, 50.0, 0, 1_000) - 50.0).abs() < 1e-9, "the clock was set back");
    }
}
