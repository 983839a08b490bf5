//! What a cache counts.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[doc = $help:literal])+ $name:ident),+ $(,)?) => {
        /// Counters of a cache since its start.
        #[derive(Debug, Default)]
        #[non_exhaustive]
        pub struct CacheCounters {
            $($(#[doc = $help])+ pub $name: AtomicU64,)+
        }

        impl CacheCounters {
            /// Name, meaning and value of each counter.
            pub fn all(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), concat!($($help),+).trim_ascii(), self.$name.load(Ordering::Relaxed)),)+]
            }
        }
    };
}

counters! {
    /// Pieces of blobs that were in memory
    memory_hits,
    /// Pieces of blobs that were on disk, and right
    disk_hits,
    /// Pieces of blobs that had to be fetched
    misses,
    /// Manifests that were here
    manifest_hits,
    /// Manifests that had to be fetched
    manifest_misses,
    /// Bytes of blobs and manifests that came from upstreams, wrong ones included
    upstream_bytes,
    /// Blobs that had to be fetched whole before any of it could be verified
    whole_fetches,
    /// Answers of upstreams whose content was not what its digest says
    upstream_corrupt,
    /// Questions that an upstream didn't answer, or answered with an error
    upstream_failures,
    /// Pieces, manifests and tags on disk that were damaged
    disk_corrupt,
    /// Pieces that made room for others on disk
    evicted_pieces,
    /// Manifests, tags and lists of pieces that made room for others on disk
    evicted_records,
    /// Writes that the disk had no room for
    disk_full,
    /// Requests that were refused because too many were waiting already
    refused_waiters,
    /// Requests that were refused because what they need is larger than the cache
    refused_large,
    /// Lists of pieces in manifests that were not taken
    refused_lists,
    /// Tags that were answered by what the upstream said last, since it can't be asked
    stale_tags,
}

impl CacheCounters {
    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// As Prometheus reads them.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        for (name, help, value) in self.all() {
            let name = format!("anyplace_registry_cache_{name}_total");
            // Writing to a string can't fail.
            let _ = write!(text, "# HELP {name} {help}.\n# TYPE {name} counter\n{name} {value}\n");
        }
        text
    }

    pub(crate) fn one(counter: &AtomicU64) {
        CacheCounters::add(counter, 1);
    }
}
