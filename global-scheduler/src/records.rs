//! What is stored, and under which key.
//!
//! | Key | Value |
//! |---|---|
//! | `deployments/<name>` | [`DeploymentRecord`] |
//! | `placements/<deployment>/<location>` | [`PlacementRecord`] |
//! | `vips/<address>` | the deployment's name |
//! | `jobs/<name>` | [`JobRecord`] |
//! | `attempts/<job>/<attempt>` | [`AttemptRecord`] |
//! | `prewarms/<image>` | `Prewarm` |
//! | `settings/<location>` | `LocationSettings` |
//! | `teams/<team>` | `TeamSettings` |
//! | `locations/<location>` | [`LocationKnown`] |
//! | `tokens/<hash>` | [`TokenRecord`] |
//! | `tombstones/{deployments,jobs}/<name>` | [`Tombstone`] |
//! | `events/<number>` | `Event` |

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyplace_api::{ArrayIndex, Role, TokenScope};
use anyplace_model::{
    AttemptId, DeploymentName, DeploymentSpec, InstanceStatus, JobName, JobPhase, JobSpec, LocationId,
    Refusal,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A deployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeploymentRecord {
    pub(crate) spec: DeploymentSpec,
    pub(crate) generation: u64,
    pub(crate) vip: Ipv4Addr,
    #[serde(default)]
    pub(crate) vip6: Option<Ipv6Addr>,
    pub(crate) created_at: Timestamp,
    /// Images of which instances may still run, each by the last generation that had it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) earlier: BTreeMap<u64, String>,
}

/// Most earlier images of a deployment that are kept.
const EARLIER_MAX: usize = 16;

impl DeploymentRecord {
    pub(crate) fn vips(&self) -> impl Iterator<Item = IpAddr> + use<> {
        anyplace_model::vips(self.vip, self.vip6)
    }

    /// The record after a change; `oldest` is the oldest generation that may still run.
    pub(crate) fn changed(&self, spec: DeploymentSpec, oldest: u64) -> DeploymentRecord {
        let mut earlier = self.earlier.clone();
        if spec.image != self.spec.image {
            earlier.insert(self.generation, self.spec.image.clone());
        }
        earlier.retain(|generation, _| *generation >= oldest);
        while earlier.len() > EARLIER_MAX {
            earlier.pop_first();
        }
        DeploymentRecord { spec, generation: self.generation + 1, earlier, ..self.clone() }
    }
}

/// What a location was asked to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PlacementRecord {
    pub(crate) count: u32,
    /// Of the deployment, when this was planned.
    pub(crate) generation: u64,
}

/// A job, an index of an array, or an array: that has no attempts, and its phase is that of its indexes without records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct JobRecord {
    pub(crate) spec: JobSpec,
    /// What the client named the submission, so that it can send it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) idempotency_key: Option<String>,
    pub(crate) created_at: Timestamp,
    /// Place in the queue.
    pub(crate) order: u64,
    pub(crate) phase: JobPhase,
    /// The number of the present or last attempt.
    pub(crate) attempt: u32,
    /// Attempts that count against `max_attempts`: not those that their location refused, or that made way.
    pub(crate) tries: u32,
    /// Attempts that made way for deployments.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) preemptions: u32,
    pub(crate) location: Option<LocationId>,
    pub(crate) instance: Option<InstanceStatus>,
    pub(crate) exit_code: Option<i32>,
    pub(crate) reasons: Vec<Refusal>,
    /// Of an index of an array.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) index_of: Option<ArrayIndex>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_zero(count: &u32) -> bool {
    *count == 0
}

impl JobRecord {
    pub(crate) fn attempt_id(&self) -> AttemptId {
        AttemptId { job: self.spec.name.clone(), attempt: self.attempt }
    }

    pub(crate) const fn is_placed(&self) -> bool {
        matches!(self.phase, JobPhase::Starting | JobPhase::Running)
    }

    pub(crate) const fn has_ended(&self) -> bool {
        matches!(self.phase, JobPhase::Succeeded | JobPhase::Failed | JobPhase::Cancelled)
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Succeeded,
    Failed,
    /// Its location had no room for it after all.
    Refused,
    /// Its location stopped reporting.
    Lost,
    Cancelled,
    /// It made way for a deployment.
    Preempted,
    /// It hadn't started by the job's deadline.
    Missed,
}

/// One attempt of a job. The outcome is written once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AttemptRecord {
    pub(crate) location: LocationId,
    pub(crate) placed_at: Timestamp,
    pub(crate) ended_at: Option<Timestamp>,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) exit_code: Option<i32>,
}

/// A location that has joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LocationKnown {
    pub(crate) joined_at: Timestamp,
    pub(crate) alive: bool,
}

/// A token, by its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TokenRecord {
    pub(crate) role: Role,
    pub(crate) scope: TokenScope,
    pub(crate) expires_at: Option<Timestamp>,
}

/// The last generation or attempt of something deleted. A successor of the same name counts on from here, so that a
/// location can't take what is late of the one for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tombstone {
    pub(crate) last: u64,
    pub(crate) deleted_at: Timestamp,
}

pub(crate) fn deployment_key(name: &DeploymentName) -> String {
    format!("deployments/{name}")
}

pub(crate) fn placement_key(name: &DeploymentName, location: &LocationId) -> String {
    format!("placements/{name}/{location}")
}

pub(crate) fn vip_key(vip: IpAddr) -> String {
    format!("vips/{vip}")
}

pub(crate) fn job_key(name: &JobName) -> String {
    format!("jobs/{name}")
}

pub(crate) fn attempt_key(attempt: &AttemptId) -> String {
    format!("attempts/{attempt}")
}

pub(crate) fn event_key(number: u64) -> String {
    format!("events/{number:020}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_of_before_idempotency_keys_still_loads() {
        let stored = serde_json::json!({
            "spec": {"kind": "Job", "name": "work", "image": "work:1"},
            "created_at": "2026-11-24T12:00:00Z", "order": 3, "phase": "queued", "attempt": 1, "tries": 1,
            "location": null, "instance": null, "exit_code": null, "reasons": []
        });
        let record: JobRecord = serde_json::from_value(stored).unwrap();
        assert_eq!((record.idempotency_key, record.order), (None, 3));
    }
}
