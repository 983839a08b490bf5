//! Ages by a clock that may be wrong: only time that somebody saw pass counts.
//!
//! A store dates what is put by its clock, and clocks are set: by hand, after a battery was empty, when a virtual
//! machine wakes. What was pushed a minute ago then looks ten years old. So processes compare the clock with their own
//! steady one each time they read it. A stretch that the clock went and time didn't is skipped, and so is one in which
//! nobody looked. An age is the time from the put until now, less what was skipped in between: never more than what
//! has really passed, and less for a while after a jump.

use serde::{Deserialize, Serialize};

/// How far the clock may be from what is expected, in ms: an answer may take a minute, and a store's machines may
/// disagree by some seconds.
pub const TOLERANCE_MS: u64 = 120_000;
/// Most stretches that are remembered. Beyond it, the two that are next to each other become one, which makes ages smaller.
pub const SKIPPED_MAX: usize = 1_000;

/// What is known of a clock. All times are its own, in ms since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witnessed {
    /// Begin and end of what nobody saw pass; sorted, and apart from each other.
    skipped: Vec<(u64, u64)>,
    /// What it said when it was last seen to have gone back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    set_back_ms: Option<u64>,
}

/// How a clock went between two looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// About as time did.
    Steady,
    /// Further, by so many ms: it was set, or nobody looked.
    Ahead(u64),
    /// Back, by so many ms.
    Back(u64),
}

impl Witnessed {
    /// Nothing that came before this moment has an age yet.
    pub fn since(now_ms: u64) -> Witnessed {
        Witnessed { skipped: vec![(0, now_ms)], set_back_ms: None }
    }

    /// The clock said `last_ms`, and after `passed_ms` or some more it says `now_ms`.
    pub fn see(&mut self, last_ms: u64, passed_ms: u64, now_ms: u64) -> Step {
        if now_ms.saturating_add(TOLERANCE_MS) < last_ms {
            // What was skipped beyond will pass after all.
            self.skipped.retain_mut(|(begin, end)| {
                *end = (*end).min(now_ms);
                begin < end
            });
            self.set_back_ms = Some(now_ms);
            return Step::Back(last_ms - now_ms);
        }
        let expected = last_ms.saturating_add(passed_ms);
        if now_ms <= expected.saturating_add(TOLERANCE_MS) {
            return Step::Steady;
        }
        self.skip(expected, now_ms);
        Step::Ahead(now_ms - expected)
    }

    /// Ms since the put, as far as somebody saw them pass; none if it is dated after now.
    pub fn age_ms(&self, put_ms: u64, now_ms: u64) -> Option<u64> {
        let all = now_ms.checked_sub(put_ms)?;
        let within = |(begin, end): &(u64, u64)| (*end).min(now_ms).saturating_sub((*begin).max(put_ms));
        Some(all.saturating_sub(self.skipped.iter().map(within).sum()))
    }

    /// The same for what was surely put before now: what is dated later was put before the clock was set back.
    pub fn age_of_past_ms(&self, put_ms: u64, now_ms: u64) -> u64 {
        let since_set_back = || self.age_ms(self.set_back_ms?, now_ms);
        self.age_ms(put_ms, now_ms).or_else(since_set_back).unwrap_or(0)
    }

    fn skip(&mut self, begin: u64, end: u64) {
        self.skipped.push((begin, end));
        self.skipped.sort_unstable();
        let mut apart: Vec<(u64, u64)> = Vec::with_capacity(self.skipped.len());
        for (begin, end) in self.skipped.drain(..) {
            match apart.last_mut() {
                Some(last) if begin <= last.1 => last.1 = last.1.max(end),
                _ => apart.push((begin, end)),
            }
        }
        while apart.len() > SKIPPED_MAX {
            let gap = |at: &usize| match (apart.get(*at), apart.get(*at + 1)) {
                (Some(one), Some(next)) => next.0 - one.1,
                _ => u64::MAX,
            };
            let Some(at) = (0..apart.len() - 1).min_by_key(gap) else { break };
            let next = apart.remove(at + 1);
            if let Some(one) = apart.get_mut(at) {
                one.1 = next.1;
            }
        }
        self.skipped = apart;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60_000;
    const HOUR: u64 = 60 * MINUTE;
    const YEAR: u64 = 365 * 24 * HOUR;
    /// 2026.
    const NOW: u64 = 56 * YEAR;

    #[test]
    fn an_age_leaves_out_what_the_clock_jumped_over() {
        for jump in [2 * HOUR, 10 * YEAR] {
            let mut clock = Witnessed::default();
            assert_eq!(clock.see(NOW, 5 * MINUTE, NOW + 5 * MINUTE + 30_000), Step::Steady);
            assert_eq!(clock.see(NOW, 5 * MINUTE, NOW + 5 * MINUTE + jump), Step::Ahead(jump));
            let now = NOW + 5 * MINUTE + jump;
            assert_eq!(clock.age_ms(NOW - HOUR, now), Some(HOUR + 5 * MINUTE));
            // Before the jump, and after it: when it was in the five minutes, nobody knows.
            assert_eq!(clock.age_ms(NOW + MINUTE, now), Some(4 * MINUTE));
            assert_eq!(clock.age_ms(now - MINUTE, now), Some(0));
            assert_eq!(clock.age_ms(now + 1, now), None);
            // Time goes on.
            assert_eq!(clock.age_ms(now - MINUTE, now + HOUR), Some(HOUR));
        }
    }

    #[test]
    fn a_clock_that_is_put_right_counts_on_from_there() {
        let mut clock = Witnessed::default();
        let wrong = NOW + 10 * YEAR;
        assert_eq!(clock.see(NOW, 0, wrong), Step::Ahead(10 * YEAR));
        let right = NOW + HOUR;
        assert_eq!(clock.see(wrong + HOUR, 0, right), Step::Back(10 * YEAR));
        // The hour under the wrong clock isn't known any more; what comes is.
        assert_eq!(clock.age_ms(NOW - HOUR, right + 2 * HOUR), Some(3 * HOUR));
        // What was put under it is dated ahead, and its age begins when the clock went back.
        assert_eq!(clock.age_ms(wrong + 1, right + 2 * HOUR), None);
        assert_eq!(clock.age_of_past_ms(wrong + 1, right + 2 * HOUR), 2 * HOUR);
        assert_eq!(Witnessed::default().age_of_past_ms(wrong, right), 0);
        // Behind for a while, and put right: what was put meanwhile isn't old.
        let mut clock = Witnessed::default();
        let behind = NOW - 10 * YEAR;
        assert_eq!(clock.see(NOW, 0, behind), Step::Back(10 * YEAR));
        assert_eq!(clock.see(behind + HOUR, 0, NOW + HOUR), Step::Ahead(10 * YEAR));
        assert_eq!(clock.age_ms(behind + HOUR / 2, NOW + HOUR), Some(HOUR / 2));
    }

    #[test]
    fn an_age_is_never_more_than_what_passed() {
        // The oracle moves the clock itself, and knows when everything was put.
        let mut seed = anyplace_seed::Seed::from_env();
        for _ in 0..2_000 {
            let (mut clock, mut says, mut passed) = (Witnessed::default(), NOW, 0_u64);
            let (mut puts, mut last, mut last_passed) = (Vec::new(), says, passed);
            for _ in 0..40 {
                let time = seed.below(10 * MINUTE);
                (says, passed) = (says + time, passed + time);
                match seed.below(6) {
                    0 => says += seed.pick(&[3 * MINUTE, 2 * HOUR, 10 * YEAR]),
                    1 => says -= seed.pick(&[3 * MINUTE, 2 * HOUR, 10 * YEAR]).min(says - YEAR),
                    2 => puts.push((says, passed)),
                    _ => {}
                }
                // A jump there and back between two looks can't be seen.
                clock.see(last, passed - last_passed, says);
                (last, last_passed) = (says, passed);
                for (put, at) in &puts {
                    let age = clock.age_ms(*put, says).unwrap_or(0);
                    assert!(age <= passed - at, "{age} of {}", passed - at);
                }
            }
        }
    }

    #[test]
    fn what_is_remembered_has_a_bound_and_beyond_it_ages_are_smaller() {
        let mut clock = Witnessed::default();
        let (mut says, mut passed) = (NOW, 0);
        for night in 0..3 * SKIPPED_MAX as u64 {
            let day = 8 * HOUR + night;
            assert_eq!(clock.see(says, day, says + day), Step::Steady);
            (says, passed) = (says + day, passed + day);
            assert_eq!(clock.see(says, 0, says + 16 * HOUR), Step::Ahead(16 * HOUR));
            says += 16 * HOUR;
        }
        assert_eq!(clock.skipped.len(), SKIPPED_MAX);
        assert!(clock.age_ms(NOW, says).unwrap() < passed);
        assert!(clock.age_ms(NOW, says).unwrap() > 300 * 24 * HOUR);
        assert_eq!(Witnessed::since(says).age_ms(NOW, says + HOUR), Some(HOUR));
    }
}
