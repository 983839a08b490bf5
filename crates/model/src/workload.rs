//! What an instance belongs to.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{DeploymentName, JobName};

/// One try to run a job to its end. Results that carry an older attempt are refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AttemptId {
    /// The job.
    pub job: JobName,
    /// 1 for the first try.
    pub attempt: u32,
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.job, self.attempt)
    }
}

/// What an instance belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// A copy of a deployment.
    Deployment(DeploymentName),
    /// An attempt of a job.
    Job(AttemptId),
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deployment(name) => write!(f, "deployment/{name}"),
            Self::Job(attempt) => write!(f, "job/{attempt}"),
        }
    }
}
