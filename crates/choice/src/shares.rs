//! Which parts of an ingress's connections go where: nearest first within its grants, and no part moves twice in a short
//! time.
//!
//! ```text
//! part    0 1 2 3 4 5 6 7 8 9 ...          255
//! owner   A A A B B A - - C | this location's instances, as at -
//! ```
//!
//! The first parts go away first and the last come home first, so that a table can give away buckets in an order of its
//! own, which takes as many from each instance.

use std::collections::{BTreeMap, VecDeque};

use crate::transport::NOTHING;

/// An ingress's connections are shared in so many parts: 0.4 % each.
pub const PARTS: usize = 256;
/// A part that was moved stays for so long.
pub const REST_MS: u64 = 10_000;
/// A part that had to leave a lost site may move so often more within that time: it goes where something is granted at that
/// moment, however little, and then where grants are made for it.
const SETTLING: u8 = 2;
/// Changes that are remembered: what was in force before, so that running connections are found. At least as many as can
/// come within [`REST_MS`], with one decision a second.
const REMEMBERED: usize = 16;
/// Moving fewer parts than this only to save latency isn't worth it: 2 %.
const DEAD_BAND: usize = 5;
/// No more parts than this move at once only to save latency: a quarter. What was wrongly decided is wrong for few.
const MOST_AT_ONCE: usize = 64;

/// What is away at one time, and since when.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Away {
    /// Since when, in milliseconds.
    pub since_ms: u64,
    /// The sites that have the first parts; the ingress's own instances have those of none, and all that are left.
    pub owners: Vec<Option<usize>>,
}

/// What an ingress wants to decide by.
pub struct Want<'a> {
    /// The ingress itself.
    pub here: usize,
    /// What it asks for, or what its grants are for where that is less.
    pub asked: f64,
    /// What it may send where, itself included, nearest first. Where it is empty, all stays here.
    pub quotas: &'a [(usize, f64)],
    /// Whether a site can take connections at all; parts move away from others at once.
    pub serves: &'a dyn Fn(usize) -> bool,
}

/// What is away now, and was before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shares {
    /// The newest first.
    changes: VecDeque<Away>,
    /// When the ingress itself and those that had parts were last seen to serve: what is older than twice [`REST_MS`] is
    /// forgotten.
    served_ms: BTreeMap<usize, u64>,
}

impl Shares {
    /// As they were remembered, the newest first.
    pub fn remembered(changes: impl IntoIterator<Item = Away>) -> Self {
        Self { changes: changes.into_iter().take(REMEMBERED).collect(), served_ms: BTreeMap::new() }
    }

    /// What was in force, the newest first.
    pub fn changes(&self) -> impl Iterator<Item = &Away> {
        self.changes.iter()
    }

    /// Who has which parts, as in [`Away::owners`].
    pub fn owners(&self) -> &[Option<usize>] {
        self.changes.front().map_or(&[], |newest| &newest.owners)
    }

    /// How many parts each other site has.
    pub fn counts(&self) -> BTreeMap<usize, usize> {
        let mut counts = BTreeMap::new();
        self.owners().iter().flatten().for_each(|site| *counts.entry(*site).or_default() += 1);
        counts
    }

    /// Decides anew; returns whether anything changes.
    pub fn decide(&mut self, now_ms: u64, want: &Want<'_>) -> bool {
        self.served_ms.retain(|_, at| *at + 2 * REST_MS > now_ms);
        let now = self.counts();
        let seen = now.keys().copied().chain([want.here]).filter(|site| (want.serves)(*site));
        self.served_ms.extend(seen.map(|site| (site, now_ms)));
        let parts = |quota: f64| match want.asked {
            asked if asked > NOTHING => ((quota / asked * PARTS as f64) + 1e-6) as usize,
            // Nothing comes, so that it could go anywhere.
            _ => PARTS,
        };
        let (wanted, limits) = wanted(want, parts);
        let has = |site: usize, counts: &BTreeMap<usize, usize>| match site {
            site if site == want.here => PARTS - counts.values().sum::<usize>(),
            site => counts.get(&site).copied().unwrap_or(0),
        };
        let limit =
            |site: usize| if (want.serves)(site) { limits.get(&site).copied().unwrap_or(0) } else { 0 };
        let too_many = now.keys().copied().chain([want.here]).any(|site| has(site, &now) > limit(site));
        let target = if too_many {
            // Only what must move: it comes whenever it has to.
            let mut target: BTreeMap<usize, usize> = now
                .keys()
                .copied()
                .chain([want.here])
                .map(|site| (site, has(site, &now).min(limit(site))))
                .collect();
            let mut homeless = PARTS - target.values().sum::<usize>();
            for (site, _) in want.quotas {
                let held = target.entry(*site).or_default();
                let more = limit(*site).saturating_sub(*held).min(homeless);
                *held += more;
                homeless -= more;
            }
            // Where nothing is granted.
            *target.entry(want.here).or_default() += homeless;
            target
        } else {
            let rested = self.changes.front().is_none_or(|newest| newest.since_ms + REST_MS <= now_ms);
            let moves =
                wanted.iter().map(|(site, wanted)| wanted.saturating_sub(has(*site, &now))).sum::<usize>();
            let home = now.keys().all(|site| wanted.get(site).is_none_or(|parts| *parts == 0));
            if !rested || moves == 0 || (moves < DEAD_BAND && !home) {
                return false;
            }
            stepped(&now, &wanted, has, moves)
        };
        let owners = self.moved(now_ms, want, &target);
        if owners == self.owners() {
            return false;
        }
        self.changes.push_front(Away { since_ms: now_ms, owners });
        self.changes.truncate(REMEMBERED);
        true
    }

    /// The owners that come nearest to `target` (parts by site) without moving a part that rests, and otherwise move few.
    fn moved(&self, now_ms: u64, want: &Want<'_>, target: &BTreeMap<usize, usize>) -> Vec<Option<usize>> {
        let old = |part: usize| self.owners().get(part).copied().flatten().unwrap_or(want.here);
        let resting = self.resting(now_ms, want);
        let rests = |part: &usize| resting[*part] && (want.serves)(old(*part));
        let mut left = target.clone();
        let mut take = |site: usize| match left.get_mut(&site) {
            Some(parts) if *parts > 0 => {
                *parts -= 1;
                Some(site)
            }
            _ => None,
        };
        let mut owners: Vec<Option<usize>> = vec![None; PARTS];
        for part in (0..PARTS).filter(rests) {
            take(old(part));
            owners[part] = Some(old(part));
        }
        // Of those who lose some, what is away comes from the last parts, and what is here goes from the first.
        let others = |part: &usize| !rests(part);
        for part in (0..PARTS).filter(others).filter(|part| old(*part) != want.here) {
            owners[part] = take(old(part));
        }
        for part in (0..PARTS).rev().filter(others).filter(|part| old(*part) == want.here) {
            owners[part] = take(want.here);
        }
        let away = want.quotas.iter().map(|(site, _)| *site).filter(|site| *site != want.here);
        let mut fill = away.chain([want.here]).peekable();
        let mut next = || {
            while let Some(site) = fill.peek().copied() {
                if take(site).is_some() {
                    return Some(site);
                }
                fill.next();
            }
            None
        };
        for (part, owner) in owners.iter_mut().enumerate() {
            // What is left over, because other parts rest, stays where it was.
            let site = owner.or_else(&mut next).unwrap_or_else(|| old(part));
            *owner = (site != want.here).then_some(site);
        }
        owners.truncate(owners.iter().rposition(Option::is_some).map_or(0, |last| last + 1));
        owners
    }

    /// Which parts moved within the last [`REST_MS`], and may not move again. Those that had to leave a site which still
    /// can't take any may [`SETTLING`] times.
    fn resting(&self, now_ms: u64, want: &Want<'_>) -> [bool; PARTS] {
        let nothing = Away::default();
        let mut moves_left = [None; PARTS];
        let recent = self.changes.iter().take_while(|change| change.since_ms + REST_MS > now_ms).count();
        for (index, change) in self.changes.iter().enumerate().take(recent).rev() {
            let before = self.changes.get(index + 1).unwrap_or(&nothing);
            for (part, left) in moves_left.iter_mut().enumerate() {
                let owner = |away: &Away| away.owners.get(part).copied().flatten().unwrap_or(want.here);
                let from = owner(before);
                if from != owner(change) {
                    let settling = self.settling(from, change.since_ms, want);
                    *left = settling.or(Some(left.unwrap_or(0_u8).saturating_sub(1)));
                }
            }
        }
        moves_left.map(|left| left == Some(0))
    }

    /// How often a part may move more that left a site then, where it had to: the site had been lost, and still is.
    fn settling(&self, from: usize, left_ms: u64, want: &Want<'_>) -> Option<u8> {
        if (want.serves)(from) {
            return None;
        }
        match (self.served_ms.get(&from), from == want.here) {
            // It went while that site still served.
            (Some(at), _) if *at >= left_ms => None,
            // Routers had already sent it to the nearest.
            (Some(at), true) if at + REST_MS > left_ms => Some(SETTLING - 1),
            (_, true) => None,
            (_, false) => Some(SETTLING),
        }
    }
}

/// The parts that each site should have, and may have at most.
fn wanted(want: &Want<'_>, parts: impl Fn(f64) -> usize) -> (BTreeMap<usize, usize>, BTreeMap<usize, usize>) {
    let granted: Vec<(usize, f64)> = want
        .quotas
        .iter()
        .copied()
        .filter(|(site, quota)| *quota > NOTHING && (want.serves)(*site))
        .collect();
    if granted.is_empty() {
        let all = BTreeMap::from([(want.here, PARTS)]);
        return (all.clone(), all);
    }
    let mut limits: BTreeMap<usize, usize> =
        granted.iter().map(|(site, quota)| (*site, parts(*quota))).collect();
    let mut wanted = BTreeMap::from([(want.here, 0)]);
    let mut left = PARTS;
    for (site, _) in &granted {
        let some = limits[site].min(left);
        wanted.insert(*site, some);
        left -= some;
    }
    if left > 0 {
        // Too little is granted: all bear it alike.
        let sum: f64 = granted.iter().map(|(_, quota)| quota).sum();
        let (mut given, mut before) = (0.0, 0);
        for (site, quota) in &granted {
            given += quota;
            let upto = (given / sum * PARTS as f64 + 0.5) as usize;
            wanted.insert(*site, upto - before);
            before = upto;
        }
        limits.clone_from(&wanted);
    }
    (wanted, limits)
}

/// A step from what is to what is wanted, of no more than [`MOST_AT_ONCE`] parts.
fn stepped(
    now: &BTreeMap<usize, usize>,
    wanted: &BTreeMap<usize, usize>,
    has: impl Fn(usize, &BTreeMap<usize, usize>) -> usize,
    moves: usize,
) -> BTreeMap<usize, usize> {
    if moves <= MOST_AT_ONCE {
        return wanted.clone();
    }
    let (mut more, mut fewer) = (MOST_AT_ONCE, MOST_AT_ONCE);
    let sites: std::collections::BTreeSet<usize> = now.keys().chain(wanted.keys()).copied().collect();
    let step = |site: usize| {
        let (is, wanted) = (has(site, now), wanted.get(&site).copied().unwrap_or(0));
        let parts = if wanted > is {
            let step = more.min(wanted - is);
            more -= step;
            is + step
        } else {
            let step = fewer.min(is - wanted);
            fewer -= step;
            is - step
        };
        (site, parts)
    };
    sites.into_iter().map(step).collect()
}

#[cfg(test)]
mod tests {
    use anyplace_seed::Seed;

    use super::*;

    /// Whatever is granted, and however fast it changes.
    #[test]
    fn no_part_moves_twice_in_a_short_time() {
        let mut seed = Seed::from_env();
        for _ in 0..200 {
            let mut shares = Shares::default();
            let mut moved_ms = vec![None; PARTS];
            for now_ms in (0_u64..200).map(|second| second * 1_000) {
                let quotas: Vec<(usize, f64)> = (0..4).map(|site| (site, seed.below(100) as f64)).collect();
                let owner = |shares: &Shares, part| shares.owners().get(part).copied().flatten();
                let before = shares.clone();
                let want = Want { here: 0, asked: 100.0, quotas: &quotas, serves: &|_| true };
                let changes = shares.decide(now_ms, &want);
                assert_eq!(changes, before.changes != shares.changes);
                for (part, moved) in moved_ms.iter_mut().enumerate() {
                    if owner(&before, part) != owner(&shares, part) {
                        let last = moved.replace(now_ms);
                        assert!(last.is_none_or(|last| now_ms - last >= REST_MS), "part {part}");
                    }
                }
            }
        }
    }

    fn decide(
        shares: &mut Shares,
        now_ms: u64,
        quotas: &[(usize, f64)],
        gone: usize,
    ) -> BTreeMap<usize, usize> {
        shares.decide(now_ms, &Want { here: 0, asked: 256.0, quotas, serves: &|site| site != gone });
        shares.counts()
    }

    #[test]
    fn the_nearest_get_what_they_grant() {
        let mut shares = Shares::default();
        let counts = decide(&mut shares, 0, &[(0, 100.0), (1, 100.0), (2, 100.0)], 9);
        assert_eq!(counts, BTreeMap::from([(1, 100), (2, 56)]));
        // Less of one at once; its parts that have just come stay.
        let counts = decide(&mut shares, 1_000, &[(0, 100.0), (1, 50.0), (2, 106.0)], 9);
        assert_eq!(counts, BTreeMap::from([(1, 100), (2, 56)]));
        let counts = decide(&mut shares, 10_000, &[(0, 100.0), (1, 50.0), (2, 106.0)], 9);
        assert_eq!(counts, BTreeMap::from([(1, 50), (2, 106)]));
        // Who is gone has nothing, at once.
        let counts = decide(&mut shares, 11_000, &[(0, 100.0), (1, 50.0), (2, 256.0)], 1);
        assert_eq!(counts, BTreeMap::from([(2, 156)]));
        // Those that left it needn't rest, but those that left others.
        let counts = decide(&mut shares, 12_000, &[(0, 100.0), (2, 116.0), (3, 40.0)], 1);
        assert_eq!(counts, BTreeMap::from([(2, 116), (3, 40)]));
        let counts = decide(&mut shares, 13_000, &[(0, 100.0), (2, 156.0)], 1);
        assert_eq!(counts, BTreeMap::from([(2, 116), (3, 40)]));
        // Home again in steps.
        let steps: Vec<usize> =
            (3..7).map(|step| decide(&mut shares, step * 10_000, &[], 9).values().sum()).collect();
        assert_eq!(steps, [0, 0, 0, 0]);
    }

    /// A grant that was made before all of the news came covers few of them, the next one all: they needn't wait.
    #[test]
    fn parts_that_left_a_lost_site_may_move_twice_more() {
        let first = BTreeMap::from([(1, 256)]);
        let both = BTreeMap::from([(2, 28), (3, 228)]);
        // Where nothing was granted elsewhere, and where something was.
        for (granted, fled) in [(&[(1, 256.0)][..], vec![]), (&[(1, 228.0), (3, 28.0)][..], vec![(3, 256)])] {
            let mut shares = Shares::default();
            let mut decide = |now_ms: u64, quotas: &[(usize, f64)], lost: usize| {
                let serves = |site: usize| site != 0 && site != lost;
                shares.decide(now_ms, &Want { here: 0, asked: 256.0, quotas, serves: &serves });
                shares.counts()
            };
            assert_eq!(decide(0, &[(1, 256.0)], 9), first);
            assert_eq!(decide(20_000, granted, 1), fled.into_iter().collect());
            assert_eq!(decide(20_200, &[(1, 228.0), (2, 28.0)], 1), BTreeMap::from([(2, 256)]));
            assert_eq!(decide(21_200, &[(2, 28.0), (3, 228.0)], 1), both);
            assert_eq!(decide(22_200, &[(2, 256.0)], 1), both, "those have moved often enough");
            assert_eq!(decide(31_200, &[(2, 256.0)], 1), BTreeMap::from([(2, 256)]));
        }
    }

    #[test]
    fn parts_that_left_a_site_before_it_was_lost_rest() {
        let mut shares = Shares::default();
        let mut decide =
            |now_ms: u64, quotas: &[(usize, f64)], gone| decide(&mut shares, now_ms, quotas, gone);
        assert_eq!(decide(0, &[(1, 256.0)], 9), BTreeMap::from([(1, 256)]));
        let moved = BTreeMap::from([(1, 156), (2, 100)]);
        assert_eq!(decide(20_000, &[(1, 156.0), (2, 100.0)], 9), moved);
        let fled = BTreeMap::from([(2, 100), (3, 156)]);
        assert_eq!(decide(21_000, &[(2, 100.0), (3, 156.0)], 1), fled);
        assert_eq!(decide(22_000, &[(3, 256.0)], 1), fled);
        assert_eq!(decide(30_000, &[(3, 256.0)], 1), BTreeMap::from([(3, 256)]));
    }
}
