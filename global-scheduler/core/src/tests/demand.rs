//! Placement near demand, against every choice that there is.

use proptest::prelude::*;

use super::*;

/// Locations `l0`, `l1`, ... with ample room, `ms` from each to each, and one deployment with demand.
fn world(instances: u32, ms: &[Vec<f64>], demand: &[f64]) -> State {
    let ids: Vec<LocationId> = (0..ms.len()).map(|index| id(&format!("l{index}"))).collect();
    let mut spec = deployment("{}");
    spec.instances.min = instances;
    let demand = ids.iter().cloned().zip(demand.iter().copied()).collect();
    State {
        deployments: BTreeMap::from([(name("hello"), Deployment { spec, shares: BTreeMap::new(), demand })]),
        locations: ids.iter().map(|id| (id.clone(), location(advert()))).collect(),
        latency: Latency::between(&ids, |from, to| ms[from][to]).into(),
        ..State::default()
    }
}

/// Chosen locations, by number.
fn chosen(state: &State) -> Vec<usize> {
    counts(state).iter().map(|(location, _)| location[1..].parse().unwrap()).collect()
}

/// What a set of locations costs: connections/s x ms to the nearest of them.
fn cost(ms: &[Vec<f64>], demand: &[f64], set: &[usize]) -> f64 {
    let nearest = |from: usize| set.iter().map(|to| ms[from][*to]).fold(1_000.0, f64::min);
    demand.iter().zip(0..).map(|(rate, from)| rate * nearest(from)).sum()
}

/// The cost of the best of all sets of so many locations.
fn least_cost(ms: &[Vec<f64>], demand: &[f64], size: usize) -> f64 {
    (0u32..1 << ms.len())
        .filter(|set| set.count_ones() as usize == size)
        .map(|set| (0..ms.len()).filter(|index| set >> index & 1 == 1).collect::<Vec<_>>())
        .map(|set| cost(ms, demand, &set))
        .fold(f64::INFINITY, f64::min)
}

prop_compose! {
    /// Places on a plane, some 300 ms wide; and demand, which may be 0.
    fn any_fleet()(places in prop::collection::vec((0.0..200.0, 0.0..200.0), 2..8usize))(
        demand in prop::collection::vec(prop_oneof![Just(0.0), 0.1..100.0], places.len()),
        instances in 1..=places.len().min(4), places in Just(places),
    ) -> (Vec<Vec<f64>>, Vec<f64>, usize) {
        let ms = |a: &(f64, f64), b: &(f64, f64)| (a.0 - b.0).hypot(a.1 - b.1);
        let ms = places.iter().map(|from| places.iter().map(|to| ms(from, to)).collect()).collect();
        (ms, demand, instances)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_saves_at_least_as_much_of_the_way_as_greed_must((ms, demand, instances) in any_fleet()) {
        let state = world(instances as u32, &ms, &demand);
        let set = chosen(&state);
        prop_assert_eq!(set.len(), instances, "one in each location");
        let (nothing, best) = (cost(&ms, &demand, &[]), least_cost(&ms, &demand, instances));
        let found = cost(&ms, &demand, &set);
        // Known of greedy choice where each choice saves less than the one before (Nemhauser 1978); for one it is exact.
        let part = 1.0 - (1.0 - 1.0 / instances as f64).powi(instances as i32);
        // Gains are compared in thousandths.
        let rounded = 0.001 * instances as f64;
        prop_assert!(nothing - found >= part * (nothing - best) - rounded, "{found} for {best} of {nothing}");
    }

    #[test]
    fn what_goes_first_is_missed_least((ms, demand, instances) in any_fleet()) {
        let mut state = world(instances as u32, &ms, &demand);
        settle(&mut state);
        let before = chosen(&state);
        state.deployments.get_mut(&name("hello")).unwrap().spec.instances.min = instances as u32 - 1;
        let left = chosen(&state);
        prop_assume!(instances > 1);
        let without = |gone: &usize| before.iter().copied().filter(|it| it != gone).collect::<Vec<_>>();
        let least = before.iter().map(|gone| cost(&ms, &demand, &without(gone))).fold(f64::INFINITY, f64::min);
        prop_assert!(cost(&ms, &demand, &left) <= least + 0.001);
    }

    #[test]
    fn demand_that_changes_moves_nothing((ms, demand, instances) in any_fleet(), other in any::<u64>()) {
        let mut state = world(instances as u32, &ms, &demand);
        settle(&mut state);
        let before = counts(&state);
        let turned = |index: usize| demand[(index + other as usize % demand.len()) % demand.len()];
        let turned = (0..demand.len()).map(|index| (id(&format!("l{index}")), turned(index)));
        state.deployments.get_mut(&name("hello")).unwrap().demand = turned.collect();
        prop_assert_eq!(counts(&state), before);
    }
}

#[test]
fn the_first_goes_where_connections_enter_and_the_next_where_they_have_furthest_to_go() {
    let ms = vec![vec![0.0, 10.0, 100.0], vec![10.0, 0.0, 100.0], vec![100.0, 100.0, 0.0]];
    // Near each other: 50 and 40 a second; far away: 15.
    let demand = [40.0, 50.0, 15.0];
    assert_eq!(chosen(&world(1, &ms, &demand)), [1]);
    assert_eq!(chosen(&world(2, &ms, &demand)), [1, 2]);
    assert_eq!(counts(&world(4, &ms, &demand)), pairs(&[("l0", 2), ("l1", 1), ("l2", 1)]));
    // A warm image and an emptier location decide between equals only.
    let mut state = world(1, &ms, &demand);
    state.locations.get_mut(&id("l0")).unwrap().advert.as_mut().unwrap().warm_images = vec!["hello:1".into()];
    assert_eq!(chosen(&state), [1]);
    state.deployments.get_mut(&name("hello")).unwrap().demand.clear();
    assert_eq!(chosen(&state), [0]);
    // What nobody knows and what is no number counts for nothing.
    let strange = [(id("l2"), f64::NAN), (id("l1"), f64::INFINITY), (id("stranger"), 5.0), (id("l0"), -1.0)];
    state.deployments.get_mut(&name("hello")).unwrap().demand = BTreeMap::from(strange);
    assert_eq!(chosen(&state), [0]);
}

#[test]
fn why_says_how_far_connections_go_and_where_an_instance_would_bring_them_nearer() {
    let ms = vec![vec![0.0, 10.0, 100.0], vec![10.0, 0.0, 100.0], vec![100.0, 100.0, 0.0]];
    let mut state = world(1, &ms, &[40.0, 50.0, 10.0]);
    settle(&mut state);
    let why = explain_deployment(&state, &name("hello"), noon()).unwrap();
    let said = "; of 100.0 new connections/s, the average one has 14.0 ms to the nearest instance";
    assert!(why.summary.ends_with(said), "{}", why.summary);
    let nearer: Vec<_> = why.locations.iter().map(|it| (it.entering, it.nearer_ms)).collect();
    assert_eq!(nearer, [(Some(40.0), Some(4.0)), (Some(50.0), Some(0.0)), (Some(10.0), Some(10.0))]);
}
