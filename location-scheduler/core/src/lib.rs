//! Decides which machine runs which instance, and which parts of new connections go to other locations (pure).
//!
//! One [`State`] goes in; a [`Plan`], routes, an advert and statuses come out. Nothing here reads a clock, draws
//! random numbers, or does I/O: time is a field of the state, and instance names are the caller's.
//!
//! This crate must not know other locations as anything but distant backends, nor users, runtimes or packets.

mod advert;
mod moves;
mod packing;
mod plan;
mod protocol;
mod refusal;
mod room;
mod routes;
mod sharing;
mod state;
mod status;

pub use advert::advert;
pub use moves::{GaveUp, MovePolicy, Moves, Moving, Place, Replaced, Waiting};
pub use packing::{
    Ask, Clearing, Cost, Fit, Free, Gpu, GpuSet, Lack, Limits, Mix, Models, Move, Packer, Tenant, defragment,
    make_room,
};
pub use plan::{Change, Plan, Start, Verdict, plan};
pub use protocol::{carry_out, fall_silent, is_stale, life_after, wait_anew};
pub use room::{FreeRoom, InstanceMove, RoomPlan, plan_room, plan_tidying};
pub use routes::{routes, stamp};
pub use sharing::{Sharing, capacity};
pub use state::{Life, Machine, Reservation, Site, Stage, State, Timing};
pub use status::{
    attempt_statuses, desired, desired_of_stranger, ingress, instance_statuses, move_statuses,
    placement_statuses, prewarm_statuses,
};
