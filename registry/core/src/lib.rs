//! What the registry decides, as pure functions: time and entropy come in as arguments, a decision comes out.
//!
//! This crate must not know about HTTP, disks or object stores.
