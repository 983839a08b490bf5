//! Requests by kind, method and status, and how long their answers took to begin. All of it has a bound: nothing of a
//! client's words becomes a label.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::http::{Method, StatusCode};

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Base,
    Manifest,
    Blob,
    Upload,
    Tags,
    Referrers,
    /// `/auth/...` and `/v1/...`.
    Manage,
    Other,
}

/// In the order of [`Kind`].
const KINDS: [&str; 8] = ["base", "manifest", "blob", "upload", "tags", "referrers", "manage", "other"];
/// The last stands for all others.
const METHODS: [&str; 7] = ["GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "other"];
/// What the registry answers; 0 stands for all others.
const STATUSES: [u16; 26] = [
    200, 201, 202, 204, 206, 304, 307, 400, 401, 403, 404, 405, 408, 409, 412, 413, 414, 416, 429, 500, 501,
    502, 503, 504, 507, 0,
];
/// Bounds of the histogram in microseconds, and as texts in seconds: from what memory answers to what waits for another
/// registry.
const BOUNDS: [(u64, &str); 8] = [
    (1_000, "0.001"),
    (5_000, "0.005"),
    (25_000, "0.025"),
    (100_000, "0.1"),
    (500_000, "0.5"),
    (2_500_000, "2.5"),
    (10_000_000, "10"),
    (60_000_000, "60"),
];

/// Counters since the start.
#[derive(Debug)]
pub(crate) struct Requests {
    /// By kind, method and status.
    counts: Vec<AtomicU64>,
    latencies: [Latency; KINDS.len()],
}

#[derive(Debug, Default)]
struct Latency {
    /// By the bound that they are within; the last are within none.
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum_us: AtomicU64,
}

impl Default for Requests {
    fn default() -> Requests {
        let counts = (0..KINDS.len() * METHODS.len() * STATUSES.len()).map(|_| AtomicU64::new(0)).collect();
        Requests { counts, latencies: Default::default() }
    }
}

impl Requests {
    /// Counts a request whose answer began after `took`.
    pub(crate) fn count(&self, kind: Kind, method: &Method, status: StatusCode, took: Duration) {
        let (last_method, last_status) = (METHODS.len() - 1, STATUSES.len() - 1);
        let method = METHODS.iter().position(|name| *name == method.as_str()).unwrap_or(last_method);
        let status = STATUSES.iter().position(|code| *code == status.as_u16()).unwrap_or(last_status);
        let kind = kind as usize;
        if let Some(count) = self.counts.get((kind * METHODS.len() + method) * STATUSES.len() + status) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let Some(latency) = self.latencies.get(kind) else { return };
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let within = BOUNDS.iter().position(|(bound, _)| took_us <= *bound).unwrap_or(BOUNDS.len());
        if let Some(count) = latency.counts.get(within) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        latency.sum_us.fetch_add(took_us, Ordering::Relaxed);
    }

    /// Adds to the text that Prometheus reads. What never came is left out. Writing to a string can't fail.
    pub(super) fn render(&self, text: &mut String) {
        text.push_str("# HELP anyplace_registry_requests_total Requests by kind, method and status.\n");
        text.push_str("# TYPE anyplace_registry_requests_total counter\n");
        let mut counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        for kind in KINDS {
            for method in METHODS {
                for (status, count) in STATUSES.iter().zip(&mut counts).filter(|(_, count)| *count > 0) {
                    let status = if *status == 0 { "other".to_owned() } else { status.to_string() };
                    let labels = format!("kind=\"{kind}\",method=\"{method}\",status=\"{status}\"");
                    let _ = writeln!(text, "anyplace_registry_requests_total{{{labels}}} {count}");
                }
            }
        }
        text.push_str("# HELP anyplace_registry_answer_seconds Time until an answer began.\n");
        text.push_str("# TYPE anyplace_registry_answer_seconds histogram\n");
        for (kind, latency) in KINDS.iter().zip(&self.latencies) {
            let counts = latency.counts.each_ref().map(|count| count.load(Ordering::Relaxed));
            if counts.iter().all(|count| *count == 0) {
                continue;
            }
            let mut sum = 0;
            for (bound, count) in BOUNDS.iter().map(|(_, bound)| *bound).chain(["+Inf"]).zip(counts) {
                sum += count;
                let labels = format!("kind=\"{kind}\",le=\"{bound}\"");
                let _ = writeln!(text, "anyplace_registry_answer_seconds_bucket{{{labels}}} {sum}");
            }
            let seconds = latency.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
            let _ = writeln!(text, "anyplace_registry_answer_seconds_sum{{kind=\"{kind}\"}} {seconds}");
            let _ = writeln!(text, "anyplace_registry_answer_seconds_count{{kind=\"{kind}\"}} {sum}");
        }
    }
}
