//! Teams: what an operator set for their jobs, and what these hold.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Bytes, InvalidSpec, JobSpec, MilliCpu, Resources};

/// The largest weight: a team of it holds a thousand times as much as one of weight 1.
const WEIGHT_MAX: u32 = 1_000;

/// What an operator set for a team's jobs: its weight beside other teams, and its quota. Without a quota's field there is
/// no such bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TeamSettings {
    /// 1 to 1000: how much its jobs may hold before another team's turn, in proportion; 1 unless said.
    pub weight: u32,
    /// CPU that its jobs hold at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpu: Option<MilliCpu>,
    /// Memory that its jobs hold at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<Bytes>,
    /// GPUs that its jobs hold at once; a part of a GPU counts as one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_gpus: Option<u32>,
    /// Jobs that wait in the queue at once. Those that wait for another attempt count, and are never refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_queued: Option<u32>,
}

impl Default for TeamSettings {
    fn default() -> Self {
        Self { weight: 1, max_cpu: None, max_memory: None, max_gpus: None, max_queued: None }
    }
}

/// Resources that attempts hold together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Held {
    /// CPU.
    pub cpu: MilliCpu,
    /// Memory.
    pub memory: Bytes,
    /// GPUs; a part of a GPU counts as one.
    pub gpus: u32,
}

impl Held {
    /// Adds what one attempt asks for.
    pub fn add(&mut self, resources: &Resources) {
        self.cpu.0 = self.cpu.0.saturating_add(resources.cpu.0);
        self.memory.0 = self.memory.0.saturating_add(resources.memory.0);
        self.gpus = self.gpus.saturating_add(gpus(resources));
    }

    /// Takes away what one attempt asked for.
    pub fn remove(&mut self, resources: &Resources) {
        self.cpu.0 = self.cpu.0.saturating_sub(resources.cpu.0);
        self.memory.0 = self.memory.0.saturating_sub(resources.memory.0);
        self.gpus = self.gpus.saturating_sub(gpus(resources));
    }
}

fn gpus(resources: &Resources) -> u32 {
    resources.gpu.as_ref().map_or(0, |gpu| gpu.count)
}

impl TeamSettings {
    /// Refuses impossible values.
    ///
    /// # Errors
    /// The first impossible value, with its field and what to write instead.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        if !(1..=WEIGHT_MAX).contains(&self.weight) {
            let found = format!("{} is no weight", self.weight);
            return Err(InvalidSpec::new("weight", found, format!("write 1 to {WEIGHT_MAX}")));
        }
        Ok(())
    }

    /// The first field of the quota that one more attempt would exceed beside what is held: its name, what is asked for,
    /// and the quota.
    pub fn exceeded(&self, held: Held, wanted: &Resources) -> Option<(&'static str, String, String)> {
        let mut then = held;
        then.add(wanted);
        if let Some(max) = self.max_cpu.filter(|max| then.cpu > *max) {
            return Some(("cpu", wanted.cpu.to_string(), max.to_string()));
        }
        if let Some(max) = self.max_memory.filter(|max| then.memory > *max) {
            return Some(("memory", wanted.memory.to_string(), max.to_string()));
        }
        let max = self.max_gpus.filter(|max| gpus(wanted) > 0 && then.gpus > *max)?;
        Some(("gpu", gpus(wanted).to_string(), max.to_string()))
    }
}

impl JobSpec {
    /// What a location has to know of the job: not what decides about its turn. So locations of before a field of the
    /// queue's can run it.
    #[must_use]
    pub fn for_location(&self) -> Self {
        Self { priority: crate::DEFAULT_PRIORITY, deadline: None, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_names_the_first_field_that_is_exceeded() {
        let wanted = |gpus: u32| {
            let gpu = serde_json::json!({"count": gpus});
            let gpu = if gpus > 0 { Some(serde_json::from_value(gpu).unwrap()) } else { None };
            Resources { cpu: MilliCpu(2_000), memory: Bytes(1 << 30), gpu, ..Resources::default() }
        };
        let mut held = Held::default();
        let quota = TeamSettings { max_cpu: Some(MilliCpu(4_000)), max_gpus: Some(0), ..Default::default() };
        assert_eq!(quota.exceeded(held, &wanted(0)), None);
        held.add(&wanted(0));
        assert_eq!(quota.exceeded(held, &wanted(0)), None);
        assert_eq!(quota.exceeded(held, &wanted(1)), Some(("gpu", "1".into(), "0".into())));
        held.add(&wanted(1));
        assert_eq!(quota.exceeded(held, &wanted(0)), Some(("cpu", "2".into(), "4".into())));
        held.remove(&wanted(1));
        held.remove(&wanted(0));
        assert_eq!(held, Held::default());
        let small = TeamSettings { max_memory: Some(Bytes(1 << 20)), ..Default::default() };
        assert_eq!(small.exceeded(held, &wanted(0)), Some(("memory", "1Gi".into(), "1Mi".into())));
        assert_eq!(TeamSettings { weight: 0, ..Default::default() }.validate().unwrap_err().field, "weight");
        assert!(TeamSettings { weight: 1_001, ..Default::default() }.validate().is_err());
    }
}
