//! `push` and `build` against the real registry: over a network that fails, killed in the middle, and from and to other
//! tools.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's helpers may fail the test")]

mod bed;
mod build_options;
mod buildkit;
mod docker;
mod faults;
mod interop;
mod kills;
mod next_version;
mod proxy;
#[allow(dead_code, reason = "the other test target uses the rest")]
#[path = "../cli/runner.rs"]
mod runner;
mod sources;
mod tokens;
