//! The daemon as its clients see it: over HTTP, with locations that follow a script.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod api;
mod arrays;
mod choice;
mod deployments;
#[path = "../../../crates/store/tests/common/mod.rs"]
mod etcd;
mod jobs;
mod leaders;
mod logs;
mod prewarm;
mod queue;
mod routes;
mod support;
