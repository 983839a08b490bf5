use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU16,
};

use anyplace_model::{
    Endpoint, FULL_WEIGHT, InstanceId, LocationId, MachineId, Nearest, Port, Protocol, RemoteLocation, Span,
};
use proptest::prelude::*;

use super::*;

fn endpoint(index: u8, ready: bool, draining: bool) -> Endpoint {
    Endpoint {
        instance: InstanceId::new(format!("hello-{index}")).unwrap(),
        machine: MachineId::new("ams-1").unwrap(),
        address: Ipv4Addr::new(10, 1, 1, index),
        ready,
        draining,
        began_ms: 0,
        stopped_ms: 0,
        slot: u16::from(index),
        weight: FULL_WEIGHT,
    }
}

fn remote(index: u8, distance_km: f64, ready: u32, ingress: u8) -> RemoteLocation {
    RemoteLocation {
        location: LocationId::new(format!("l{index}")).unwrap(),
        distance_km,
        ready,
        ingress: (0..ingress).map(|machine| Ipv4Addr::new(10, index, machine, 1)).collect(),
    }
}

fn route(local: Vec<Endpoint>, remote: Vec<RemoteLocation>) -> Route {
    let port = Port { port: NonZeroU16::MIN, container_port: None, protocol: Protocol::Tcp };
    Route {
        vip: Ipv4Addr::new(203, 0, 113, 1).into(),
        ports: vec![port],
        local,
        remote,
        away: Vec::new(),
        nearest: Vec::new(),
    }
}

prop_compose! {
    fn any_route()(
        local in prop::collection::btree_map(1_u8..30, (any::<bool>(), any::<bool>()), 0..12),
        remotes in prop::collection::btree_map(100_u8..110, (1.0..20_000.0, 0_u32..3, 0_u8..3), 0..4),
    ) -> Route {
        route(
            local.into_iter().map(|(index, (ready, draining))| endpoint(index, ready, draining)).collect(),
            remotes.into_iter().map(|(index, (km, ready, ingress))| remote(index, km, ready, ingress)).collect(),
        )
    }
}

/// The buckets of a table as flows see them: as if it had the largest size.
fn spread(table: &[Bucket]) -> impl Iterator<Item = &Bucket> {
    table.iter().flat_map(|bucket| std::iter::repeat_n(bucket, MAX_BUCKETS / table.len()))
}

/// The oracle: who may get new flows, stated as sets, without hashing.
fn allowed(route: &Route) -> BTreeSet<Ipv4Addr> {
    let local: BTreeSet<_> =
        route.local.iter().filter(|e| e.ready && !e.draining).map(|e| e.address).collect();
    if !local.is_empty() {
        return local;
    }
    let draining: BTreeSet<_> =
        route.local.iter().filter(|e| e.ready || e.draining).map(|e| e.address).collect();
    let serving = route.remote.iter().filter(|r| r.ready > 0 && !r.ingress.is_empty());
    let distance = serving.clone().map(|r| r.distance_km).fold(f64::INFINITY, f64::min);
    let abroad: BTreeSet<_> =
        serving.filter(|r| r.distance_km <= distance).flat_map(|r| r.ingress.iter().copied()).collect();
    if abroad.is_empty() { draining } else { abroad }
}

proptest! {
    #[test]
    fn new_flows_go_only_where_they_may_and_somewhere_if_anywhere(route in any_route()) {
        let tables = tables(&route);
        let allowed = allowed(&route);
        prop_assert_eq!(tables.full.is_empty(), allowed.is_empty());
        prop_assert!(tables.full.iter().all(|bucket| allowed.contains(&bucket.now)));
        let local: BTreeSet<_> = route.local.iter().filter(|e| e.ready || e.draining).map(|e| e.address).collect();
        prop_assert!(tables.local.iter().all(|b| local.contains(&b.now) && b.before.is_none_or(|a| local.contains(&a))));
        prop_assert!(tables.full.iter().all(|bucket| bucket.before != Some(bucket.now)));
    }

    #[test]
    fn a_new_instance_takes_buckets_only_for_itself_and_their_flows_are_found(mut route in any_route(), added in 31_u8..60) {
        // The location scheduler gives slots without gaps.
        route.local.retain(|it| it.ready && !it.draining);
        (0..).zip(&mut route.local).for_each(|(slot, it)| it.slot = slot);
        let before = tables(&route);
        let mut changed = route.clone();
        let slot = route.local.len() as u16;
        changed.local.push(Endpoint { began_ms: 1, slot, ..endpoint(added, true, false) });
        let after = tables(&changed);
        let new = Ipv4Addr::new(10, 1, 1, added);
        for (old, now) in spread(&before.full).zip(spread(&after.full)) {
            if old.now != now.now {
                prop_assert_eq!(now.now, new);
                // Where nothing was ready here, its flows are with the nearest other location.
                let had_ready = route.local.iter().any(|e| e.ready && !e.draining);
                if had_ready {
                    prop_assert_eq!(now.before, Some(old.now));
                }
            }
        }
    }

    #[test]
    fn draining_moves_only_the_drained_buckets_and_their_flows_are_found(
        count in 2_u8..30, gone in 0_u8..29,
    ) {
        let all: Vec<Endpoint> = (0..count).map(|index| endpoint(index, true, false)).collect();
        let before = tables(&route(all.clone(), vec![]));
        let mut drained = all;
        let gone = usize::from(gone % count);
        drained[gone].draining = true;
        drained[gone].ready = false;
        drained[gone].stopped_ms = 1;
        let gone = drained[gone].address;
        let after = tables(&route(drained, vec![]));
        for (old, now) in spread(&before.full).zip(spread(&after.full)) {
            if old.now == gone {
                prop_assert_eq!(now.before, Some(gone));
            } else {
                prop_assert_eq!(old.now, now.now);
            }
        }
    }
}

proptest! {
    /// The oracle remembers: it watches the owners of all buckets through a random history of changes that overlap, and
    /// the hop before must be the last other owner. (Of an instance that is gone the route says nothing, so what it hid
    /// while it was there can't be known; it has drained by then.)
    #[test]
    fn the_hop_before_is_the_last_other_owner(steps in prop::collection::vec((1_u8..9, 0_u8..2), 1..40)) {
        let mut instances = BTreeMap::<u8, Endpoint>::new();
        let mut owners: Vec<Vec<Ipv4Addr>> = vec![Vec::new(); MIN_BUCKETS];
        for (since, (index, step)) in (1_u64..).zip(steps) {
            match (step, instances.get(&index).map(|it| it.draining)) {
                (0, None) => drop(instances.insert(index, Endpoint { began_ms: since, ..endpoint(index, true, false) })),
                (1, Some(false)) => {
                    let began_ms = instances[&index].began_ms;
                    let drained = Endpoint { began_ms, stopped_ms: since, ..endpoint(index, false, true) };
                    instances.insert(index, drained);
                }
                _ => continue,
            }
            let tables = tables(&route(instances.values().cloned().collect(), vec![]));
            for (bucket, history) in tables.full.iter().zip(&mut owners) {
                if instances.values().any(|it| it.ready) {
                    history.retain(|owner| *owner != bucket.now);
                    if let Some(last) = history.last() {
                        prop_assert_eq!(bucket.before, Some(*last), "step {}", since);
                    }
                    history.push(bucket.now);
                }
            }
        }
    }
}

fn away(since_ms: u64, spans: &[(u16, u8)]) -> Away {
    let to = |location| (location > 0).then(|| LocationId::new(format!("l{location}")).unwrap());
    Away {
        since_ms,
        spans: spans.iter().map(|(parts, location)| Span { parts: *parts, to: to(*location) }).collect(),
    }
}

/// In which location each bucket is, 1 being this one.
fn locations(table: &[Bucket]) -> Vec<u8> {
    table.iter().map(|bucket| bucket.now.octets()[1]).collect()
}

#[test]
fn weights_and_parts_are_met_to_the_bucket() {
    let mut local: Vec<Endpoint> = (1..=5).map(|index| endpoint(index, true, false)).collect();
    local[4].weight = FULL_WEIGHT / 2;
    let mut route = route(local, vec![remote(102, 100.0, 1, 3)]);
    for parts in [0, 1, 64, 100, 200, 255, 256] {
        route.away = vec![away(1, &[(parts, 102)])];
        let table = tables(&route).full;
        let count = |own: &dyn Fn(Ipv4Addr) -> bool| table.iter().filter(|bucket| own(bucket.now)).count();
        assert_eq!(table.len(), usize::from(PARTS));
        assert_eq!(count(&|it| it.octets()[1] == 102), usize::from(parts));
        let stay = f64::from(PARTS - parts);
        // Where nearly all stay, as exact as the 64 buckets that the table has without away parts.
        let most = if parts < 64 { 4.0 } else { 1.5 };
        let exact = |count: usize, weight: f64| (count as f64 - stay * weight / 4.5).abs() <= most;
        assert!(
            exact(count(&|it| it == Ipv4Addr::new(10, 1, 1, 5)), 0.5),
            "{parts}: half of what others have"
        );
        assert!(
            (1..=4).all(|index| exact(count(&|it| it == Ipv4Addr::new(10, 1, 1, index)), 1.0)),
            "{parts}"
        );
    }
}

proptest! {
    /// Parts that don't move take no bucket along, and those that do keep their flows, over several changes.
    #[test]
    fn only_parts_that_move_move_and_their_flows_are_found(
        count in 1_u8..40,
        history in prop::collection::vec(prop::collection::vec((0_u16..80, 0_usize..3), 0..5), 1..6),
    ) {
        let local: Vec<Endpoint> =
            (0..count).map(|index| Endpoint { slot: u16::from(index), ..endpoint(index, true, false) }).collect();
        let mut route = route(local, vec![remote(102, 100.0, 1, 2), remote(103, 200.0, 1, 1)]);
        // An empty beginning, so that all tables have one size.
        route.away = vec![away(0, &[])];
        let mut last = tables(&route).full;
        let mut owners: Vec<Vec<Ipv4Addr>> = last.iter().map(|bucket| vec![bucket.now]).collect();
        let part = |away: &Away| -> Vec<Option<LocationId>> {
            let mut parts: Vec<_> =
                away.spans.iter().flat_map(|span| std::iter::repeat_n(span.to.clone(), span.parts.into())).collect();
            parts.resize(usize::from(PARTS), None);
            parts
        };
        for (since_ms, spans) in (1..).zip(history) {
            let spans: Vec<(u16, u8)> = spans.into_iter().map(|(parts, to)| (parts.min(50), [0, 102, 103][to])).collect();
            let next = away(since_ms, &spans);
            let moved = part(&route.away[0]).iter().zip(part(&next)).filter(|(before, after)| *before != after).count();
            route.away.insert(0, next);
            let table = tables(&route).full;
            prop_assert_eq!(table.len(), last.len());
            let changed = table.iter().zip(&last).filter(|(now, before)| now.now != before.now).count();
            prop_assert_eq!(changed, moved * table.len() / usize::from(PARTS));
            for (bucket, history) in table.iter().zip(&mut owners) {
                history.retain(|owner| *owner != bucket.now);
                if let Some(last) = history.last() {
                    prop_assert_eq!(bucket.before, Some(*last));
                }
                history.push(bucket.now);
            }
            last = table;
        }
    }
}

#[test]
fn the_first_part_that_goes_away_moves_no_other() {
    for count in [1, 3, 5, 16, 20] {
        let local =
            (0..count).map(|index| Endpoint { slot: u16::from(index), ..endpoint(index, true, false) });
        let mut route = route(local.collect(), vec![remote(102, 100.0, 1, 2)]);
        let before = tables(&route).full;
        route.away = vec![away(5, &[(10, 102)])];
        let after = tables(&route).full;
        for (before, after) in
            spread(&before).zip(spread(&after)).filter(|(before, after)| before.now != after.now)
        {
            assert_eq!((after.now.octets()[1], after.before), (102, Some(before.now)));
        }
        assert_eq!(
            locations(&after).iter().filter(|it| **it == 102).count(),
            10 * after.len() / usize::from(PARTS)
        );
    }
}

#[test]
fn parts_of_a_location_that_serves_no_more_come_home() {
    let local: Vec<Endpoint> = (1..=4).map(|index| endpoint(index, true, false)).collect();
    let mut route = route(local, vec![remote(102, 100.0, 0, 2), remote(103, 200.0, 1, 1)]);
    route.away = vec![away(5, &[(100, 102), (50, 103)])];
    let found = locations(&tables(&route).full);
    assert_eq!(found.iter().filter(|it| **it == 103).count(), 50);
    assert_eq!(found.iter().filter(|it| **it == 1).count(), 206);
    // And where nothing is ready here either, all that isn't elsewhere goes to the nearest.
    route.local.iter_mut().for_each(|it| it.ready = false);
    assert!(locations(&tables(&route).full).iter().all(|it| *it == 103));
}

proptest! {
    /// The oracle remembers, like that of the instances, but a location is one owner.
    #[test]
    fn the_hop_before_is_in_the_last_other_location_that_was_the_nearest(
        history in prop::collection::vec(102_u8..106, 1..8),
    ) {
        let remotes = (102..106).map(|index| remote(index, f64::from(index), 1, 3)).collect();
        let mut route = route(vec![endpoint(1, false, false)], remotes);
        let mut owners: Vec<u8> = Vec::new();
        for (since_ms, nearest) in (1..).zip(history) {
            let location = LocationId::new(format!("l{nearest}")).unwrap();
            route.nearest.insert(0, Nearest { since_ms, location });
            owners.retain(|owner| *owner != nearest);
            let tables = tables(&route);
            for bucket in &tables.full {
                prop_assert_eq!(bucket.now.octets()[1], nearest);
                prop_assert_eq!(bucket.before.map(|hop| hop.octets()[1]), owners.last().copied());
            }
            prop_assert!(tables.local.is_empty());
            owners.push(nearest);
        }
    }
}

#[test]
fn the_nearest_is_who_the_route_says_and_else_the_one_at_the_least_distance() {
    let remotes = vec![remote(102, 100.0, 1, 1), remote(103, 200.0, 1, 1), remote(104, 300.0, 0, 1)];
    let mut route = route(vec![], remotes);
    let to = |route: &Route| {
        let found: BTreeSet<u8> = locations(&tables(route).full).into_iter().collect();
        found.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(to(&route), [102]);
    let nearest =
        |location: u8, since_ms| Nearest { since_ms, location: format!("l{location}").parse().unwrap() };
    route.nearest = vec![nearest(103, 5)];
    assert_eq!(to(&route), [103]);
    route.nearest = vec![nearest(104, 6), nearest(103, 5)];
    assert_eq!(to(&route), [102], "it serves no more");
    // Flows that went abroad are found when an instance comes, also where two were the nearest by turns.
    route.nearest = vec![nearest(102, 6), nearest(103, 5)];
    route.local = vec![Endpoint { began_ms: 9, ..endpoint(1, true, false) }];
    assert!(tables(&route).full.iter().all(|bucket| bucket.before.unwrap().octets()[1] == 102));
}

#[test]
fn slots_that_two_claim_are_given_away_in_order() {
    let mut local: Vec<Endpoint> = (1..=4).map(|index| endpoint(index, true, false)).collect();
    local.iter_mut().for_each(|it| it.slot = 0);
    local[3].slot = u16::MAX;
    let forward = tables(&route(local.clone(), vec![]));
    local.reverse();
    assert_eq!(forward, tables(&route(local, vec![])), "whatever the order of the route");
    let owners: BTreeSet<_> = forward.full.iter().map(|bucket| bucket.now).collect();
    assert_eq!((owners.len(), forward.full.len()), (4, MIN_BUCKETS));
}

#[test]
fn flows_that_went_abroad_stay_there_when_the_first_local_instance_comes() {
    let tables = tables(&route(vec![endpoint(1, true, false)], vec![remote(102, 100.0, 1, 1)]));
    assert!(tables.full.iter().all(|bucket| bucket.before == Some(Ipv4Addr::new(10, 102, 0, 1))));
}

#[test]
fn flows_of_the_last_local_instance_stay_while_it_drains() {
    let tables = tables(&route(vec![endpoint(1, false, true)], vec![remote(102, 100.0, 1, 1)]));
    let expected = Bucket { now: Ipv4Addr::new(10, 102, 0, 1), before: Some(Ipv4Addr::new(10, 1, 1, 1)) };
    assert!(tables.full.iter().all(|bucket| *bucket == expected));
    assert!(
        tables.local.iter().all(|bucket| bucket.now == Ipv4Addr::new(10, 1, 1, 1)),
        "relayed flows find it"
    );
}
