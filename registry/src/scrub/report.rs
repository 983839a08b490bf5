//! What a scrub found.

use std::fmt;

use anyplace_images::Digest;
use anyplace_registry_core::plan::Listed;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Most problems that a report names.
const PROBLEMS_MAX: usize = 100;

/// A scrub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// When it began, by the store's clock.
    pub started: Timestamp,
    /// When it ended; none if it goes on, now or later.
    pub finished: Option<Timestamp>,
    /// Where it is.
    pub phase: ScrubPhase,
    /// Why it stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Contents that were read.
    pub checked: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Contents that were wrong.
    pub wrong: Listed<ScrubFinding>,
    /// What couldn't be read, for reasons that may pass.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// Where a scrub is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubPhase {
    /// It reads.
    Running,
    /// It was stopped, and goes on from there.
    Stopped,
    /// It read everything.
    Done,
}

/// Content that was wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubFinding {
    /// What it should be.
    pub digest: String,
    /// What it is.
    pub found: String,
    /// Repositories that have it.
    pub repositories: Vec<String>,
    /// Where it was moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved_to: Option<String>,
    /// What came of it.
    pub outcome: ScrubOutcome,
}

/// What came of wrong content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubOutcome {
    /// It came back from an upstream.
    Repaired,
    /// Nobody here has it now: push it again.
    Missing,
    /// No repository has it.
    Unneeded,
    /// Someone stored it again meanwhile.
    Replaced,
}

/// The scrubber's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// The scrub that runs in this process.
    pub running: Option<ScrubReport>,
    /// The last one that read everything.
    pub last: Option<ScrubReport>,
}

impl ScrubReport {
    pub(super) fn new(started: Timestamp) -> ScrubReport {
        ScrubReport {
            started,
            finished: None,
            phase: ScrubPhase::Running,
            error: None,
            checked: 0,
            bytes: 0,
            wrong: Listed::default(),
            problems: Vec::new(),
        }
    }

    pub(super) fn problem(&mut self, problem: String) {
        tracing::warn!(problem, "the scrub goes on");
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}

impl ScrubFinding {
    pub(super) fn new(
        digest: &Digest,
        found: String,
        repositories: Vec<String>,
        moved_to: Option<String>,
        outcome: ScrubOutcome,
    ) -> ScrubFinding {
        ScrubFinding { digest: digest.to_string(), found, repositories, moved_to, outcome }
    }
}

impl fmt::Display for ScrubPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ScrubPhase::Running => "reading",
            ScrubPhase::Stopped => "stopped; it goes on from there",
            ScrubPhase::Done => "done",
        })
    }
}

impl fmt::Display for ScrubOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ScrubOutcome::Repaired => "repaired from an upstream",
            ScrubOutcome::Missing => "missing now; push it again",
            ScrubOutcome::Unneeded => "no repository has it",
            ScrubOutcome::Replaced => "stored again meanwhile",
        })
    }
}
