//! What the registry's HTTP side counts: requests, bytes, and what it refused and why.

mod requests;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use requests::{Kind, Requests};

/// Counters since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Connections over the bound.
    pub(crate) connections_refused: AtomicU64,
    /// Requests that came while the registry was draining.
    pub(crate) draining_refused: AtomicU64,
    /// Parts of uploads over the longest that is taken.
    pub(crate) parts_refused: AtomicU64,
    /// Bytes that uploads copied from the repository's blobs.
    pub(crate) copied_bytes: AtomicU64,
    /// Manifests over the size or number of references that is taken.
    pub(crate) manifests_refused: AtomicU64,
    /// Manifests answered from memory.
    pub(crate) manifests_remembered: AtomicU64,
    /// Manifests answered from storage.
    pub(crate) manifests_read: AtomicU64,
    /// Bytes that came over connections.
    pub(crate) received_bytes: AtomicU64,
    /// Bytes that went over connections.
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) requests: Requests,
}

impl Counters {
    /// As Prometheus reads them, with those of other parts: name, help and counter each.
    pub(crate) fn render(&self, more: &[(&str, &str, &AtomicU64)]) -> String {
        let mut text = String::new();
        let own = [
            ("connections_refused", "Connections over the bound", &self.connections_refused),
            ("draining_refused", "Requests refused while draining", &self.draining_refused),
            ("parts_refused", "Upload parts over the longest that is taken", &self.parts_refused),
            (
                "copied_bytes",
                "Bytes of uploads that were copied from blobs that are here",
                &self.copied_bytes,
            ),
            ("manifests_refused", "Manifests over a bound", &self.manifests_refused),
            ("manifests_remembered", "Manifests answered from memory", &self.manifests_remembered),
            ("manifests_read", "Manifests answered from storage", &self.manifests_read),
            ("received_bytes", "Bytes from clients, heads included", &self.received_bytes),
            ("sent_bytes", "Bytes to clients, heads included", &self.sent_bytes),
        ];
        for (name, help, counter) in own.iter().chain(more) {
            let value = counter.load(Ordering::Relaxed);
            // Writing to a string can't fail.
            let _ = write!(
                text,
                "# HELP anyplace_registry_{name}_total {help}.\n# TYPE anyplace_registry_{name}_total counter\n\
                 anyplace_registry_{name}_total {value}\n"
            );
        }
        self.requests.render(&mut text);
        text
    }
}
