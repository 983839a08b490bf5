//! What an ingress asks for: its demand with head-room, and held while it flaps.

use std::collections::VecDeque;

/// An ingress has grants for so many times its demand whenever it has been heard: what demand may grow by until everybody
/// has reacted.
pub const HEAD_ROOM: f64 = 1.25;
/// It asks for so many times its demand when it asks anew: the difference spares a change of grants for the smallest rises.
const ASKED: f64 = 1.26;
/// It asks for less when that would be so much less: frees capacity that is worth a change.
const LESS: f64 = 0.96;
/// It asks for less only by the peak of so long: flaps that are shorter than this move nothing.
const HOLD_MS: u64 = 10_000;

/// An instance that has just become ready counts for this part of itself: what it needs to warm up.
const COLD: f64 = 0.1;
/// It counts for all of itself after so long.
const WARM_MS: u64 = 10_000;

/// For which part of itself an instance counts that has been ready for so long.
pub fn warmth(ready_ms: u64) -> f64 {
    (COLD + (1.0 - COLD) * ready_ms as f64 / WARM_MS as f64).min(1.0)
}

/// The demand of one virtual IP at one ingress.
#[derive(Debug, Clone, Default)]
pub struct Demand {
    asked: f64,
    /// Measurements of the last [`HOLD_MS`], falling from the front: those that a later one exceeds are left out.
    peaks: VecDeque<(u64, f64)>,
}

impl Demand {
    /// Goes on with what was asked for before a restart, as if its peak had been measured just now.
    pub fn remembered(now_ms: u64, asked: f64) -> Self {
        Self { asked, peaks: VecDeque::from([(now_ms, asked / ASKED)]) }
    }

    /// Takes in new connections a second, as measured lately. Returns what to ask for, in the same unit.
    pub fn measured(&mut self, now_ms: u64, rate: f64) -> f64 {
        // After a clock was set back, what was measured before was measured now.
        self.peaks.iter_mut().for_each(|(at, _)| *at = now_ms.min(*at));
        while self.peaks.back().is_some_and(|(_, peak)| *peak <= rate) {
            self.peaks.pop_back();
        }
        self.peaks.push_back((now_ms, rate));
        while self.peaks.front().is_some_and(|(at, _)| at + HOLD_MS < now_ms) {
            self.peaks.pop_front();
        }
        let peak = self.peaks.front().map_or(rate, |(_, peak)| *peak);
        if rate * HEAD_ROOM > self.asked || peak * ASKED < self.asked * LESS {
            self.asked = peak * ASKED;
        }
        self.asked
    }

    /// What was asked for last.
    pub fn asked(&self) -> f64 {
        self.asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_flaps_ask_for_nothing_new() {
        let mut demand = Demand::default();
        let asked = demand.measured(0, 100.0);
        assert!(asked >= 100.0 * HEAD_ROOM);
        assert!((1..60).all(|second| {
            let rate = if second % 5 < 2 { 50.0 } else { 100.0 };
            demand.measured(second * 1_000, rate) == asked
        }));
        assert!(demand.measured(60_000, 120.0) > asked, "grows at once");
        assert!(demand.measured(61_000, 20.0) > asked);
        assert!(demand.measured(80_000, 20.0) < 30.0, "falls after a while");
        assert_eq!(demand.measured(99_000, 0.0), 0.0);
    }

    #[test]
    fn what_was_asked_for_before_a_restart_is_held_like_a_peak() {
        let mut demand = Demand::remembered(1_000, 126.0);
        assert_eq!(demand.measured(2_000, 0.0), 126.0);
        assert_eq!(demand.measured(11_000, 50.0), 126.0);
        assert!(demand.measured(12_000, 50.0) < 70.0);
    }

    #[test]
    fn a_clock_that_is_set_back_holds_a_peak_no_longer() {
        let mut demand = Demand::default();
        demand.measured(1_000_000, 100.0);
        assert_eq!(demand.measured(1_000, 50.0), 126.0);
        assert!(demand.measured(12_000, 50.0) < 70.0);
    }
}
