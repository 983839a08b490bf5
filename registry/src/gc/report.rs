//! What a collection did, does, or would do.

use std::fmt;

use anyplace_registry_core::plan::Plan;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Most problems that a report names.
const PROBLEMS_MAX: usize = 100;

/// A collection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// Its name.
    pub run: String,
    /// It only says what it would do.
    pub dry_run: bool,
    /// When it began, by the store's clock.
    pub started: Timestamp,
    /// When it ended, by the store's clock; none while it runs.
    pub finished: Option<Timestamp>,
    /// Where it is, or how it ended.
    pub phase: GcPhase,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What it took away, or would.
    pub plan: Plan,
    /// What it looked at.
    pub seen: GcSeen,
    /// Links that it left although nothing seemed to need them.
    pub spared: GcSpared,
    /// Deletions that can't be undone any more.
    pub trash_emptied: u64,
    /// Marks left over by collections that didn't come to their end.
    pub stale_removed: u64,
    /// Uploads in a bucket that nobody went on with.
    pub uploads_abandoned: u64,
    /// Bytes of a bucket's data that was nobody's, that of deleted content included.
    pub swept_bytes: u64,
    /// Why nothing was let go by rules, though there are some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention_skipped: Option<String>,
    /// What it couldn't do; the rest it did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// Where a collection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GcPhase {
    /// Reads what manifests need, and lets go what rules say.
    Manifests,
    /// Looks for links that nothing needs.
    Links,
    /// Looks for content without links.
    Content,
    /// It came to its end.
    Done,
    /// It was stopped, and the next one does the rest.
    Stopped,
    /// It failed, and the next one does the rest.
    Failed,
}

/// What a collection looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcSeen {
    /// Repositories in all.
    pub repositories: u64,
    /// Repositories that were read.
    pub repositories_read: u64,
    /// Manifests.
    pub manifests: u64,
    /// Links.
    pub links: u64,
    /// Content, manifests and blobs.
    pub content: u64,
}

/// Links that stayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcSpared {
    /// Pushed within the grace.
    pub young: u64,
    /// Needed or renewed meanwhile.
    pub needed: u64,
    /// In a repository with a manifest that can't be read.
    pub unclear: u64,
}

/// The collector's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcStatus {
    /// The collection that runs in this process.
    pub running: Option<GcReport>,
    /// The last one that took something away, in whatever process.
    pub last: Option<GcReport>,
    /// The last one that only looked, in this process.
    pub last_dry_run: Option<GcReport>,
}

impl GcReport {
    pub(super) fn new(run: String, dry_run: bool, started: Timestamp) -> GcReport {
        GcReport {
            run,
            dry_run,
            started,
            finished: None,
            phase: GcPhase::Manifests,
            error: None,
            plan: Plan::default(),
            seen: GcSeen::default(),
            spared: GcSpared::default(),
            trash_emptied: 0,
            stale_removed: 0,
            uploads_abandoned: 0,
            swept_bytes: 0,
            retention_skipped: None,
            problems: Vec::new(),
        }
    }

    pub(super) fn problem(&mut self, problem: impl fmt::Display) {
        tracing::warn!(%problem, "the collector goes on");
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem.to_string());
        }
    }
}

impl fmt::Display for GcPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GcPhase::Manifests => "reading manifests",
            GcPhase::Links => "looking for links that nothing needs",
            GcPhase::Content => "looking for content without links",
            GcPhase::Done => "done",
            GcPhase::Stopped => "stopped; the next one does the rest",
            GcPhase::Failed => "failed; the next one does the rest",
        })
    }
}
