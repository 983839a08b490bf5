//! Refusals that explain themselves: each machine is counted once, by the first thing that it lacks.

use std::collections::BTreeMap;

use anyplace_model::{Bytes, MilliCpu, ReasonCode, Refusal};

use crate::room::{Demand, Misfit};

/// Counts machines by reason, and keeps for each reason what came nearest.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    reasons: BTreeMap<ReasonCode, (u32, Misfit)>,
}

impl Tally {
    pub(crate) fn add(&mut self, misfit: Misfit) {
        let (count, nearest) = self.reasons.entry(misfit.reason).or_insert_with(|| (0, misfit.clone()));
        *count += 1;
        if misfit.have > nearest.have {
            *nearest = misfit;
        }
    }

    /// The reasons, most machines first.
    pub(crate) fn refusals(self, demand: Demand<'_>) -> Vec<Refusal> {
        if self.reasons.is_empty() {
            // Counted once, as the location: there is no machine to count.
            return vec![Refusal {
                reason: ReasonCode::NoMachines,
                count: 1,
                message: "the location has no machine yet; start `anyplace machine-agent` on one".into(),
            }];
        }
        let mut refusals: Vec<Refusal> = self
            .reasons
            .into_values()
            .map(|(count, nearest)| Refusal {
                reason: nearest.reason,
                count,
                message: sentence(&nearest, demand),
            })
            .collect();
        refusals.sort_by(|a, b| b.count.cmp(&a.count).then(a.reason.cmp(&b.reason)));
        refusals
    }
}

fn sentence(nearest: &Misfit, demand: Demand<'_>) -> String {
    let resources = demand.resources;
    let have = nearest.have;
    match nearest.reason {
        ReasonCode::InsufficientCpu => format!(
            "asks for {} CPU; the most that is free on one machine is {}",
            resources.cpu,
            MilliCpu(have)
        ),
        ReasonCode::InsufficientMemory => format!(
            "asks for {} memory; the most that is free on one machine is {}",
            resources.memory,
            Bytes(have)
        ),
        ReasonCode::InsufficientDisk => format!(
            "asks for {} disk; the most that is free on one machine is {}",
            resources.disk,
            Bytes(have)
        ),
        ReasonCode::NoGpu => "asks for a GPU; there is none on the machine".into(),
        ReasonCode::NoGpuModel => {
            let models = resources.gpu.as_ref().map(|gpu| gpu.models.join(" or ")).unwrap_or_default();
            format!("asks for a GPU of model {models}; there is {}", nearest.note)
        }
        ReasonCode::InsufficientGpu => {
            let (count, memory) = resources.gpu.as_ref().map_or((0, None), |gpu| (gpu.count, gpu.memory));
            let what = memory.map_or_else(
                || "that are entirely free".into(),
                |memory| format!("with {memory} of free memory each"),
            );
            format!("asks for {count} GPUs {what}; the most of them in one machine is {have}")
        }
        ReasonCode::IsolationUnavailable => {
            format!("asks for isolation {:?}; no runtime of the machine offers it", demand.isolation)
                .to_lowercase()
        }
        ReasonCode::NoAddress => "every address of the machine's instance_cidr is in use".into(),
        ReasonCode::Lost => "the machine has stopped reporting".into(),
        ReasonCode::AwaitingRoom => {
            "the machine's room is for an instance that waits for off-peak jobs to end".into()
        }
        ReasonCode::PullingImage if nearest.note.is_empty() => {
            format!("the machine is fetching the image {}, or would have to first", demand.image)
        }
        _ if nearest.note.is_empty() => format!("the machine says {}", nearest.reason),
        _ => nearest.note.clone(),
    }
}
