//! Seeds hold, replay, and would not hold without any one of the fences.
#![allow(clippy::unwrap_used, reason = "tests")]

use anyplace_sim::{Fence, run};

#[test]
fn two_hundred_seeds_hold() {
    for seed in 1..=200 {
        let outcome = run(seed, None);
        assert_eq!(outcome.violation, None, "replay with `cargo xtask sim --seed {seed}`");
    }
}

#[test]
fn a_seed_replays_to_the_event() {
    for seed in [1, 77, 4_711] {
        assert_eq!(run(seed, None), run(seed, None));
    }
    assert_ne!(run(1, None).trace, run(2, None).trace);
}

#[test]
fn each_fence_is_needed() {
    let held = Fence::ALL.into_iter().filter(|fence| {
        let found = (1..=100).find_map(|seed| Some((seed, run(seed, Some(*fence)).violation?)));
        if let Some((seed, violation)) = &found {
            eprintln!("without {fence:?}, seed {seed}: {violation}");
        }
        found.is_none()
    });
    let held: Vec<Fence> = held.collect();
    assert!(held.is_empty(), "100 seeds hold without {held:?}");
}
