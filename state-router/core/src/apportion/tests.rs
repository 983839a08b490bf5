use super::*;
use anyplace_seed::Seed;

/// The owners, and the quotas of other locations, then of slots; a slot that takes nothing has weight 0.
fn assign(slots: &[u64], others: &[u64]) -> (Vec<u16>, Vec<u32>) {
    let used = slots.iter().rposition(|weight| *weight > 0).map_or(0, |last| last + 1);
    let weights: Vec<u64> = slots[..used].iter().chain(others).copied().collect();
    let keys: Vec<u64> =
        (0..used as u64).chain((0..others.len() as u64).map(|other| (1 << 47) | (other * 7_919))).collect();
    let base = Base::of(used);
    let quotas = quotas(&weights, base.len());
    // Named by what doesn't depend on how many slots are used.
    let owner = |index: u16| if usize::from(index) < used { index } else { index - used as u16 + 10_000 };
    let owners = base.assign(&keys, &quotas).into_iter().map(owner).collect();
    let quotas = (0..slots.len()).map(|slot| quotas[..used].get(slot).copied().unwrap_or(0));
    let others = self::quotas(&weights, base.len())[used..].to_vec();
    (owners, others.into_iter().chain(quotas).collect())
}

fn counts(owners: &[u16], slots: usize, others: usize) -> Vec<u32> {
    let mut counts = vec![0; slots + others];
    for owner in owners {
        let owner = usize::from(*owner);
        counts[if owner >= 10_000 { owner - 10_000 } else { others + owner }] += 1;
    }
    counts
}

/// Parts of all flows that move from one table to the other, and that must, in buckets of the largest table.
fn moves(before: &(Vec<u16>, Vec<u32>), after: &(Vec<u16>, Vec<u32>)) -> (u64, u64) {
    let scale = |len: usize| (MAX_BUCKETS / len) as u64;
    let (old, new) = (scale(before.0.len()), scale(after.0.len()));
    let moved = (0..MAX_BUCKETS)
        .filter(|bucket| before.0[bucket / old as usize] != after.0[bucket / new as usize])
        .count() as u64;
    let quota =
        |quotas: &[u32], index: usize, scale| u64::from(quotas.get(index).copied().unwrap_or(0)) * scale;
    let must = (0..before.1.len().max(after.1.len()))
        .map(|index| quota(&after.1, index, new).saturating_sub(quota(&before.1, index, old)))
        .sum();
    (moved, must)
}

#[test]
fn nobody_is_a_whole_bucket_off() {
    let mut random = Seed::from_env();
    for _ in 0..500 {
        let slots: Vec<u64> = (0..random.below(40)).map(|_| random.below(4) * random.below(100)).collect();
        let others: Vec<u64> = (0..random.below(5)).map(|_| random.below(2_000)).collect();
        let sum: u64 = slots.iter().chain(&others).sum();
        if sum == 0 {
            continue;
        }
        let (owners, quotas) = assign(&slots, &others);
        let counts = counts(&owners, slots.len(), others.len());
        assert_eq!(counts, quotas, "slots {slots:?}, others {others:?}");
        let mut remainders = Vec::new();
        for (weight, count) in others.iter().chain(&slots).zip(&counts) {
            let exact = *weight as f64 * owners.len() as f64 / sum as f64;
            assert!((f64::from(*count) - exact).abs() < 1.0, "{count} for {exact}");
            remainders.push((exact.fract(), f64::from(*count) > exact));
        }
        let up = remainders.iter().filter(|it| it.1).map(|it| it.0).fold(1.0, f64::min);
        let down = remainders.iter().filter(|it| !it.1).map(|it| it.0).fold(0.0, f64::max);
        assert!(up >= down - 1e-9, "the largest remainders are rounded up");
    }
}

#[test]
fn joining_leaving_and_coming_back_moves_what_must_move_and_nothing_else() {
    for count in 1..40_usize {
        let full = assign(&vec![100; count], &[]);
        let (moved, must) = moves(&full, &assign(&vec![100; count + 1], &[]));
        assert_eq!(moved, must, "slot {count} joins");
        for gone in (0..count).filter(|_| count > 1) {
            let mut slots = vec![100; count];
            slots[gone] = 0;
            let less = assign(&slots, &[]);
            if less.0.len() == full.0.len() {
                let (moved, must) = moves(&full, &less);
                assert_eq!(moved, must, "slot {gone} of {count} leaves");
            }
        }
    }
}

#[test]
fn a_table_of_another_size_keeps_its_flows() {
    for count in [16_usize, 32, 64, 128] {
        let small = assign(&vec![100; count], &[]);
        let large = assign(&vec![100; count + 1], &[]);
        assert_eq!(2 * small.0.len(), large.0.len());
        let kept = (0..large.0.len()).filter(|bucket| large.0[*bucket] == small.0[bucket / 2]).count();
        assert!(kept + large.0.len() / count >= large.0.len(), "{count}: {kept}");
    }
}

/// Moves of a random life, against the least that its shares allow.
fn life(seed: u64, slots: usize, weighted: bool, others: usize) -> (u64, u64) {
    let mut random = Seed::new(seed);
    let mut weights = vec![100_u64; slots];
    let mut shares = vec![0_u64; others];
    let mut before = assign(&weights, &shares);
    let (mut moved, mut must) = (0, 0);
    for _ in 0..60 {
        match random.below(if others > 0 { 6 } else { 4 }) {
            // An instance flaps, or is replaced in its slot.
            0 | 1 => {
                let away = weights.iter().position(|weight| *weight == 0);
                match away.filter(|_| {
                    weights.iter().filter(|weight| **weight == 0).count() > 1 || random.below(2) == 0
                }) {
                    Some(slot) => weights[slot] = 100,
                    None => {
                        let slot = random.below(weights.len() as u64) as usize;
                        weights[slot] = 0;
                    }
                }
            }
            // More or fewer of them: the last ones.
            2 if weights.len() < slots + 4 => weights.push(100),
            2 => weights.truncate(slots),
            3 if weighted => {
                let slot = random.below(weights.len() as u64) as usize;
                weights[slot] = 10 * (1 + random.below(10));
            }
            3 => {}
            _ => {
                let other = random.below(others as u64) as usize;
                let step = 10 + random.below(100);
                shares[other] = if random.below(2) == 0 {
                    shares[other] + step
                } else {
                    shares[other].saturating_sub(step)
                };
            }
        }
        if weights.iter().sum::<u64>() == 0 {
            continue;
        }
        let after = assign(&weights, &shares);
        let step = moves(&before, &after);
        assert!(step.0 >= step.1);
        moved += step.0;
        must += step.1;
        before = after;
    }
    (moved, must)
}

#[test]
fn a_life_of_changes_moves_little_more_than_must_move() {
    let mut random = Seed::from_env();
    for (weighted, others, bound) in [(false, 0, 1.8), (true, 0, 2.2), (true, 3, 2.2)] {
        for slots in [2, 4, 8, 16, 24, 40] {
            let (mut moved, mut must) = (0, 0);
            for _ in 0..8 {
                let one = life(random.below(u64::MAX), slots, weighted, others);
                moved += one.0;
                must += one.1;
            }
            let ratio = moved as f64 / must as f64;
            println!("{slots} slots, weighted {weighted}, {others} other locations: {ratio:.3} of the least");
            assert!(ratio < bound, "{slots} slots, weighted {weighted}, {others} others: {ratio}");
        }
    }
}
