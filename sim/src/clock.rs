//! Simulated time: what happens when, in one order, and by which chance.

use std::{cmp::Ordering, collections::BinaryHeap};

use anyplace_seed::Seed;

use crate::fleet::Event;

/// Messages that arrive at all do within this time; most within the shorter one.
const DELAY_MS: u64 = 150;
const USUAL_DELAY_MS: u64 = 5;

/// Something that keeps the platform safe, and that the simulator can leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// A plan is written only on the revision that it was made from.
    Revision,
    /// Room is free only by a report of who knows what was taken back. Without it, by one that comes a lease later.
    Mark,
    /// An older report doesn't replace a newer one.
    Sequence,
    /// A machine that runs what it shouldn't takes nothing new.
    Strangers,
    /// Waits are measured by a clock that nobody sets.
    Steady,
    /// A wait begins when what it waits for is published. Without it, when that is planned.
    Published,
    /// A process doesn't count how long others before it have waited.
    Anew,
    /// A process that starts makes void what others have on their way to the store.
    Claim,
}

impl Fence {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Revision,
        Self::Mark,
        Self::Sequence,
        Self::Strangers,
        Self::Steady,
        Self::Published,
        Self::Anew,
        Self::Claim,
    ];
}

/// Time, order and chance of one run.
pub(crate) struct Clock {
    pub(crate) now_ms: u64,
    pub(crate) seed: Seed,
    /// Whether anything may fail.
    pub(crate) faults: bool,
    pub(crate) trace: u64,
    pub(crate) steps: u64,
    /// Whether what happens is told on standard error.
    pub(crate) tells: bool,
    without: Option<Fence>,
    order: u64,
    events: BinaryHeap<Timed>,
}

struct Timed {
    at_ms: u64,
    order: u64,
    event: Event,
}

impl Clock {
    pub(crate) fn new(seed: u64, without: Option<Fence>) -> Self {
        Self {
            now_ms: 0,
            seed: Seed::new(seed),
            faults: true,
            trace: seed,
            steps: 0,
            tells: false,
            without,
            order: 0,
            events: BinaryHeap::new(),
        }
    }

    pub(crate) fn is_without(&self, fence: Fence) -> bool {
        self.without == Some(fence)
    }

    /// Lets something happen later; what is due at the same time happens in the order of these calls.
    pub(crate) fn after(&mut self, wait_ms: u64, event: Event) {
        self.order += 1;
        self.events.push(Timed { at_ms: self.now_ms + wait_ms, order: self.order, event });
    }

    /// What happens next, if it is before `end_ms`; time goes on to it.
    pub(crate) fn next(&mut self, end_ms: u64) -> Option<Event> {
        let due = self.events.peek().is_some_and(|next| next.at_ms < end_ms);
        let next = if due { self.events.pop() } else { None };
        self.now_ms = next.as_ref().map_or(end_ms, |next| next.at_ms);
        self.steps += u64::from(next.is_some());
        next.map(|next| next.event)
    }

    /// How long a message takes.
    pub(crate) fn delay(&mut self) -> u64 {
        let most_ms = if self.seed.chance(70) { USUAL_DELAY_MS } else { DELAY_MS };
        1 + self.seed.below(most_ms)
    }

    /// Whether a fault of this chance in a hundred happens.
    pub(crate) fn fails(&mut self, percent: u64) -> bool {
        self.faults && self.seed.chance(percent)
    }

    /// Tells what happens in a location, where somebody listens.
    pub(crate) fn tell(&self, location: usize, what: impl FnOnce() -> String) {
        if self.tells {
            eprintln!("{:>6} ms, location {location}: {}", self.now_ms, what());
        }
    }

    /// Makes something part of the trace.
    pub(crate) fn note(&mut self, what: u64) {
        self.trace = (self.trace.rotate_left(5) ^ what ^ self.now_ms).wrapping_mul(0x0100_0000_01b3);
    }
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    /// The soonest is the greatest: a heap gives that first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at_ms, other.order).cmp(&(self.at_ms, self.order))
    }
}
