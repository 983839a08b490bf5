//! Drives the schedulers' cores in simulated time from one seed, over a network that delays, repeats, reorders, loses and
//! stalls, with kills, frozen processes, partitions, clocks that are set, and a store that fails or whose answers are lost.
//!
//! Planning, what a report or a silence means, and carrying a plan out are the product's own functions. The store, the
//! network, the agents, and the order of a round (hear, plan, commit, publish) are the simulator's. The judge
//! ([`oracle`]) shares nothing with either: it sums what machines really run and what is booked.
//!
//! Nothing here ships, and nothing here reads a clock or draws numbers but the seed's.

mod agent;
mod clock;
mod fleet;
mod location;
mod oracle;
mod scheduler;
mod things;

use clock::Clock;
pub use clock::Fence;

/// Milliseconds with faults, and without them after that.
const FAULTS_MS: u64 = 60_000;
const CALM_MS: u64 = 60_000;

/// What a seed gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Of everything that happened, in order.
    pub trace: u64,
    /// Events.
    pub steps: u64,
    /// Milliseconds simulated.
    pub simulated_ms: u64,
    /// What was violated first.
    pub violation: Option<String>,
}

/// Runs one seed over a fleet of three locations with three machines each, without a fence if one is named.
pub fn run(seed: u64, without: Option<Fence>) -> Outcome {
    run_in(Clock::new(seed, without))
}

/// The same with all fences, and tells on standard error what happens.
pub fn replay(seed: u64) -> Outcome {
    let mut clock = Clock::new(seed, None);
    clock.tells = true;
    run_in(clock)
}

fn run_in(mut clock: Clock) -> Outcome {
    let mut fleet = fleet::Fleet::new(&mut clock);
    let violation = fleet.run(&mut clock, FAULTS_MS, CALM_MS).err();
    let violation = violation.map(|what| format!("at {} ms: {what}", clock.now_ms));
    Outcome { trace: clock.trace, steps: clock.steps, simulated_ms: clock.now_ms, violation }
}
