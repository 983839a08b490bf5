//! The daemon as its clients see it: over HTTP, with locations that follow a script.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod api;
mod choice;
mod deployments;
mod jobs;
mod logs;
mod prewarm;
mod routes;
mod support;
