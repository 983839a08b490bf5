//! An OCI distribution registry over object storage, with a pull-through cache.
//!
//! Any OCI tool can push to it and pull from it. With an `[upstream]` it also answers for what another registry has,
//! keeps a verified copy, and goes on serving that when the upstream is gone; pushes stay here.
//!
//! From a request to the disk: `routes` tells the endpoints apart, `manifests`, `blobs`, `uploads` and `tags`
//! answer them, `storage` keeps content and links, `upstream` fills in what is missing.
//!
//! This crate must not know about schedulers, machines or deployments.

mod access;
mod blobs;
mod conditions;
mod config;
mod connections;
mod counters;
mod errors;
mod gc;
mod manifests;
mod references;
mod referrers;
mod remembered;
mod routes;
mod scrub;
mod server;
mod storage;
mod tags;
mod uploads;
mod upstream;

pub use access::Config as AccessConfig;
pub use config::{Config, Upstream};
pub use gc::{GcConfig, GcPhase, GcReport, GcSeen, GcSpared, GcStatus, RetentionConfig, RuleConfig};
pub use scrub::ScrubConfig;
pub use server::{Server, run};
pub use storage::{Bucket, Container, StorageConfig};
