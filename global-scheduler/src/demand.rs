//! Where new connections enter, smoothed, for the plan: what moves instances must not follow each burst.
//!
//! It is in memory. After a restart it begins with what locations report then.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_global_core::Latency;
use anyplace_model::{DeploymentName, LocationId};

use crate::world::LocationState;

/// After so long, all but a third of a change has been taken over: longer than bursts and restarts, and short beside
/// the life of an instance.
const SMOOTHED_OVER: Duration = Duration::from_secs(60);
/// New connections a second that are none: nothing ever falls to 0 by halves.
const NONE_BELOW: f64 = 0.001;

/// All deployments' demand.
#[derive(Debug, Default)]
pub(crate) struct Demand {
    /// Between the locations.
    pub(crate) latency: Arc<Latency>,
    by_deployment: BTreeMap<DeploymentName, BTreeMap<LocationId, f64>>,
    updated: Option<Instant>,
}

impl Demand {
    /// New connections a second of a deployment, by the location that they enter at.
    pub(crate) fn of(&self, name: &DeploymentName) -> BTreeMap<LocationId, f64> {
        self.by_deployment.get(name).cloned().unwrap_or_default()
    }

    /// Follows what locations last said of these deployments; the others have no demand.
    pub(crate) fn follow<'a>(
        &mut self,
        names: impl Iterator<Item = &'a DeploymentName>,
        locations: &BTreeMap<LocationId, LocationState>,
        now: Instant,
    ) {
        let elapsed = self.updated.replace(now).map_or(Duration::ZERO, |before| now - before);
        let before = std::mem::take(&mut self.by_deployment);
        for name in names {
            let entering = locations.iter().filter_map(|(id, location)| {
                // Who enters at a location that is gone enters elsewhere now.
                let observed = location.observed.as_ref().filter(|_| location.is_alive())?;
                Some((id, observed.traffic.get(name)?.entering))
            });
            let smoothed = smoothed(before.get(name), entering.collect(), elapsed);
            self.by_deployment.insert(name.clone(), smoothed);
        }
    }
}

/// The first figures count as they are; later ones by and by.
fn smoothed(
    before: Option<&BTreeMap<LocationId, f64>>,
    entering: BTreeMap<&LocationId, f64>,
    elapsed: Duration,
) -> BTreeMap<LocationId, f64> {
    let kept = match before {
        Some(before) if !before.is_empty() => (-elapsed.as_secs_f64() / SMOOTHED_OVER.as_secs_f64()).exp(),
        _ => 0.0,
    };
    let mut smoothed: BTreeMap<LocationId, f64> =
        before.into_iter().flatten().map(|(id, rate)| (id.clone(), rate * kept)).collect();
    for (id, rate) in entering.into_iter().filter(|(_, rate)| rate.is_finite()) {
        *smoothed.entry(id.clone()).or_default() += rate.max(0.0) * (1.0 - kept);
    }
    smoothed.retain(|_, rate| *rate >= NONE_BELOW);
    smoothed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_begins_as_it_is_and_follows_over_a_minute() {
        let (ams, nrt): (LocationId, LocationId) = ("ams".parse().unwrap(), "nrt".parse().unwrap());
        let step = |before: Option<&_>, rates: &[(&LocationId, f64)], seconds| {
            let after = smoothed(before, rates.iter().copied().collect(), seconds);
            [&ams, &nrt]
                .map(|id| after.get(id).copied().unwrap_or(0.0))
                .map(|rate| (rate * 10.0).round() / 10.0)
        };
        assert_eq!(step(None, &[(&ams, 100.0), (&nrt, f64::NAN)], Duration::ZERO), [100.0, 0.0]);
        let before = BTreeMap::from([(ams.clone(), 100.0)]);
        let minute = Duration::from_secs(60);
        assert_eq!(step(Some(&before), &[(&nrt, 100.0)], Duration::ZERO), [100.0, 0.0]);
        assert_eq!(step(Some(&before), &[(&nrt, 100.0)], minute), [36.8, 63.2]);
        assert_eq!(step(Some(&before), &[], 20 * minute), [0.0, 0.0], "what is gone is forgotten");
    }
}
