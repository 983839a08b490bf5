//! What `demo --check` measured, and what it promises.

use anyplace_tests::LoadReport;
use serde_json::{Value, json};

/// The first answer after the platform's start.
const FIRST_RESPONSE_MS: u64 = 10_000;
/// Losing a container is noticed by its own machine.
const CONTAINER_GAP_MS: u64 = 500;
/// Losing a machine or a location is noticed by BGP and by leases.
const MACHINE_GAP_MS: u64 = 1_500;

/// One number or report for each promise; nothing where the demo didn't come so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) first_response_ms: Option<u64>,
    pub(super) container_kill: Option<LoadReport>,
    pub(super) machine_kill: Option<LoadReport>,
    pub(super) location_withdraw: Option<LoadReport>,
    pub(super) job_exit_code: Option<i64>,
    pub(super) leftovers: Option<usize>,
}

impl Report {
    /// The last line of `demo --check`.
    pub(super) fn json(&self) -> Value {
        let outage = |report: &Option<LoadReport>| {
            let shown = |one: &LoadReport| json!({"failed_requests": one.failed_requests, "longest_gap_ms": one.longest_gap_ms});
            report.as_ref().map_or(Value::Null, shown)
        };
        json!({
            "first_response_ms": self.first_response_ms,
            "container_kill": outage(&self.container_kill),
            "machine_kill": outage(&self.machine_kill),
            "location_withdraw": outage(&self.location_withdraw),
            "job_exit_code": self.job_exit_code,
            "leftovers": self.leftovers,
        })
    }

    /// Every promise that was not kept, as a sentence.
    pub(super) fn broken_promises(&self) -> Vec<String> {
        let gap = |report: &Option<LoadReport>| report.map(|one| one.longest_gap_ms);
        let limits = [
            ("first_response_ms", self.first_response_ms, FIRST_RESPONSE_MS),
            ("container_kill.longest_gap_ms", gap(&self.container_kill), CONTAINER_GAP_MS),
            ("machine_kill.longest_gap_ms", gap(&self.machine_kill), MACHINE_GAP_MS),
            ("location_withdraw.longest_gap_ms", gap(&self.location_withdraw), MACHINE_GAP_MS),
            ("job_exit_code", self.job_exit_code.map(i64::unsigned_abs), 0),
            ("leftovers", self.leftovers.map(|count| count as u64), 0),
        ];
        let broken = limits.into_iter().filter_map(|(name, value, limit)| match value {
            None => Some(format!("{name} was not measured")),
            Some(value) if value > limit => Some(format!("{name} is {value}, expected at most {limit}")),
            Some(_) => None,
        });
        broken.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_too_slow_is_a_broken_promise() {
        let fine = LoadReport { requests: 9, failed_requests: 1, longest_gap_ms: 400 };
        let mut report = Report {
            first_response_ms: Some(3_000),
            container_kill: Some(fine),
            machine_kill: Some(fine),
            location_withdraw: Some(fine),
            job_exit_code: Some(0),
            leftovers: Some(0),
        };
        assert_eq!(report.broken_promises(), Vec::<String>::new());
        report.job_exit_code = Some(-1);
        report.machine_kill = Some(LoadReport { longest_gap_ms: 1_501, ..fine });
        report.first_response_ms = None;
        assert_eq!(report.broken_promises().len(), 3, "{:?}", report.broken_promises());
    }
}
