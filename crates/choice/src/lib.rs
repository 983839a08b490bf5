//! Chooses which location serves which part of the new connections of a virtual IP. Pure: what was measured in, what
//! should be out; time is an argument.
//!
//! ```text
//! ingress      Demand    what it asks for: its rate of new connections, with head-room, held while it flaps
//! all          Ledger    what each destination grants to each ingress: never more than it can serve
//! ingress      Shares    which parts of its connections go where: nearest first within its grants
//! ```
//!
//! Why it is stable, whatever is late, lost or repeated:
//!
//! - What a destination has granted, an ingress that hasn't answered may still be using, and what connections sent there
//!   may amount to, is never granted to another. So no herd can meet anywhere.
//! - An ingress asks for [`HEAD_ROOM`] times what it has. What it has may grow so much before anybody reacts.
//! - A part that was moved stays for [`REST_MS`], whatever is decided. Decisions that only save latency come no more
//!   often than that, and only where they save enough.
//! - Without news, everybody goes on with the last grants.
//!
//! Sites are numbers here: who uses this crate knows which number is which location. It must not know about instances,
//! packets, or how anything is measured.

mod demand;
mod grants;
mod shares;
mod transport;

pub use demand::{Demand, HEAD_ROOM, warmth};
pub use grants::{Grant, Ledger, View};
pub use shares::{Away, PARTS, REST_MS, Shares, Want};
