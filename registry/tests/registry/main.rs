//! The registry over HTTP: by the specification's rows, by skopeo, through caches, and by our own client.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

mod access;
mod api;
mod bucket_down;
mod bucket_slow;
mod cache;
mod cache_campaigns;
mod cache_faults;
mod cache_members;
mod cache_pieces;
mod cache_referrers;
mod cache_slow;
mod cache_tags;
mod cache_usage;
mod clock;
mod connections;
mod damage;
mod fake;
mod gc;
mod images;
mod interop;
mod killable;
mod logins;
mod metadata;
mod metrics;
mod next_version;
mod node_loss;
mod pull_kills;
mod quota;
mod refused;
mod skopeo;
mod spec;
mod steps;
mod storage_clients;
mod storage_full;
mod storage_kill;
mod stores;
mod support;
mod uploads;
