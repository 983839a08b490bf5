//! What the registry decides, as pure functions: time and entropy come in as arguments, a decision comes out.
//!
//! - [`retention`]: which tags and manifests rules let go, and why
//! - [`reach`]: what a manifest keeps alive
//! - [`plan`]: what a collection takes away, as a value
//! - [`marks`]: what was seen in use, within a bound of memory
//! - [`pattern`]: names with `*`
//! - [`access`]: who may do what
//! - [`clock`]: ages by a clock that may be wrong
//!
//! Digests are whatever type the caller has. This crate must not know about HTTP, disks or object stores.

pub mod access;
pub mod clock;
pub mod marks;
pub mod pattern;
pub mod plan;
pub mod reach;
pub mod retention;
