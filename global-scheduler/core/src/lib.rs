//! Decides how many copies of what run in which location (pure).
//!
//! The narrow door: a caller fills one [`State`] and gets a value back, a [`Plan`] for deployments or a list of
//! [`JobDecision`]s for jobs. What locations advertise is a hint: a location may still refuse, and the refused part
//! is then planned again elsewhere. So a plan from old adverts costs a round trip, never a double booking.
//!
//! This crate must not know clocks, randomness, sockets, storage, machines or packets. Time comes in as an argument.

mod demand;
mod explain;
mod filter;
mod jobs;
mod limits;
mod order;
mod plan;
mod room;
mod state;

pub use demand::{FAR_MS, Latency};
pub use explain::{explain_deployment, explain_job};
pub use jobs::{JobDecision, JobOutcome, is_off_peak, plan_jobs};
pub use limits::JobLimits;
pub use order::Totals;
pub use plan::{Missing, Plan, plan};
pub use state::{Deployment, Liveness, Location, QueuedJob, RefusedUntil, Share, State, TeamState};

#[cfg(test)]
mod tests;
