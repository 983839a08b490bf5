//! An OCI distribution registry over object storage, with a pull-through cache.
//!
//! Any OCI tool can push to it and pull from it. With `[[upstreams]]` it also answers for what other registries have,
//! keeps a verified copy, and goes on serving that when they are gone; pushes stay here.
//!
//! From a request to the disk: `routes` tells the endpoints apart, `manifests`, `blobs`, `uploads` and `tags`
//! answer them, `storage` keeps content and links; `upstream` gets what is elsewhere, and `cache` keeps that.
//!
//! This crate must not know about schedulers, machines or deployments.

mod access;
mod admin;
mod blobs;
mod cache;
mod conditions;
mod config;
mod connections;
mod counters;
mod errors;
mod gc;
mod manifests;
#[cfg(test)]
mod mutations;
mod references;
mod referrers;
mod remembered;
mod routes;
mod scrub;
mod server;
mod storage;
mod stored;
mod tags;
mod unread;
mod uploads;
mod upstream;

pub use access::{
    AccountSpec, AccountView, Config as AccessConfig, Event as AuditEvent, TAIL_MAX as AUDIT_TAIL_MAX, Team,
    TeamView, check_account_name,
};
pub use admin::{
    CachedTag, Emptied, GcRequest, RepositoryPage, RepositoryUsage, RepositoryView, TagView, TrashView,
    Undelete, Undeleted, UploadView, UsageView,
};
pub use anyplace_registry_core::access::Grant;
pub use anyplace_registry_core::pattern::Pattern;
pub use anyplace_service::ScrubConfig;
pub use cache::counters::CacheCounters;
pub use config::{CacheConfig, Config, UploadsConfig, Upstream};
pub use gc::{GcConfig, GcPhase, GcReport, GcSeen, GcSpared, GcStatus, RetentionConfig, RuleConfig};
pub use scrub::{ScrubFinding, ScrubOutcome, ScrubPhase, ScrubReport, ScrubStatus};
pub use server::{Server, run};
pub use storage::{Bucket, Container, StorageConfig};
pub use upstream::{CacheUsage, Cached, CachedRepository};
