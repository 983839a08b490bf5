use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU16,
};

use anyplace_model::{Endpoint, InstanceId, LocationId, MachineId, Port, Protocol, RemoteLocation};
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
    Route { vip: Ipv4Addr::new(203, 0, 113, 1), ports: vec![port], local, remote }
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
    fn a_new_instance_takes_buckets_only_for_itself_and_their_flows_are_found(route in any_route(), added in 31_u8..60) {
        let before = tables(&route);
        let mut changed = route.clone();
        changed.local.push(Endpoint { began_ms: 1, ..endpoint(added, true, false) });
        let after = tables(&changed);
        let new = Ipv4Addr::new(10, 1, 1, added);
        for (old, now) in before.full.iter().zip(&after.full) {
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
        indexes in prop::collection::btree_set(1_u8..30, 2..10),
    ) {
        let all: Vec<Endpoint> = indexes.iter().map(|index| endpoint(*index, true, false)).collect();
        let before = tables(&route(all.clone(), vec![]));
        let mut drained = all;
        drained[0].draining = true;
        drained[0].ready = false;
        drained[0].stopped_ms = 1;
        let gone = drained[0].address;
        let after = tables(&route(drained, vec![]));
        for (old, now) in before.full.iter().zip(&after.full) {
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
        let mut owners: Vec<Vec<Ipv4Addr>> = vec![Vec::new(); BUCKETS];
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

#[test]
fn buckets_are_shared_about_equally() {
    for count in [2_u8, 3, 5, 8, 16] {
        let tables = tables(&route((1..=count).map(|index| endpoint(index, true, false)).collect(), vec![]));
        let mut shares = BTreeMap::<Ipv4Addr, usize>::new();
        for bucket in &tables.full {
            *shares.entry(bucket.now).or_default() += 1;
        }
        let mean = BUCKETS as f64 / f64::from(count);
        assert_eq!(shares.len(), usize::from(count));
        for share in shares.into_values() {
            let off = (share as f64 / mean - 1.0).abs();
            assert!(off < 0.6, "{count} backends: {share} of {mean}");
        }
    }
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
