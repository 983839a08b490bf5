//! Runs the built command as users do, and looks at what it prints, where, and with which exit code. The platform
//! behind it is a small fake of the global scheduler's API, and the real registry.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's helpers may fail the test")]

mod access;
mod bad_input;
mod contexts;
mod examples;
mod fake;
mod happy;
mod real;
mod registry;
mod runner;
mod validator;
mod vip;
