//! Round trips between locations: as their routers measured them, else estimated by distance.
//!
//! Each location reports what it measured; a way that only the other end has measured is as long as that.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use anyplace_api::LatencyView;
use anyplace_global_core::{FAR_MS, Latency};
use anyplace_model::{LocationId, distance_km, estimated_latency_ms};

use crate::world::{LocationState, World};

/// What a location says of its ways.
#[derive(Debug, Clone)]
struct Ways {
    /// Degrees north and east, where it has ever reported.
    place: Option<(f64, f64)>,
    measured_ms: Arc<BTreeMap<LocationId, f64>>,
}

impl Ways {
    /// What a location said that is gone isn't so any more.
    fn of(location: Option<&LocationState>) -> Self {
        let observed = location.and_then(|location| location.observed.as_ref());
        let alive = location.is_some_and(LocationState::is_alive);
        Self {
            place: observed.map(|observed| (observed.advert.latitude, observed.advert.longitude)),
            measured_ms: observed.filter(|_| alive).map(|it| it.latency_ms.clone()).unwrap_or_default(),
        }
    }

    fn distance_km(&self, to: &Self) -> Option<f64> {
        Some(distance_km(self.place?, to.place?))
    }
}

/// Round trips between these locations, by their numbers. The work is in what is returned, which needs no lock.
pub(crate) fn latency(world: &World, ids: &[LocationId]) -> impl FnOnce() -> Latency + use<> {
    let ids = ids.to_vec();
    let ways: Vec<Ways> = ids.iter().map(|id| Ways::of(world.locations.get(id))).collect();
    move || between(&ids, &ways)
}

fn between(ids: &[LocationId], ways: &[Ways]) -> Latency {
    let size = ids.len();
    let numbers: HashMap<&LocationId, usize> = ids.iter().zip(0..).collect();
    let mut measured = vec![None; size * size];
    for (from, way) in ways.iter().enumerate() {
        for (to, ms) in way.measured_ms.iter() {
            if let Some(to) = numbers.get(to) {
                measured[from * size + to] = Some(*ms);
            }
        }
    }
    Latency::between(ids, |from, to| {
        if from == to {
            return 0.0;
        }
        let measured = measured[from * size + to].or(measured[to * size + from]);
        let estimated = || Some(estimated_latency_ms(ways[from].distance_km(&ways[to])?));
        measured.or_else(estimated).unwrap_or(FAR_MS)
    })
}

/// For operators: the round trips between locations that have said where they are, all or those from one.
pub(crate) fn views(world: &World, only: Option<&LocationId>) -> Vec<LatencyView> {
    let known = world.locations.iter().filter(|(_, it)| it.known.is_some() && it.observed.is_some());
    let ways: Vec<(&LocationId, Ways)> = known.map(|(id, it)| (id, Ways::of(Some(it)))).collect();
    let mut views = Vec::new();
    for (from, there) in ways.iter().filter(|(from, _)| only.is_none_or(|only| only == *from)) {
        for (to, back) in ways.iter().filter(|(to, _)| to != from) {
            let Some(distance_km) = there.distance_km(back) else { continue };
            let measured = there.measured_ms.get(*to).or(back.measured_ms.get(*from)).copied();
            views.push(LatencyView {
                from: (*from).clone(),
                to: (*to).clone(),
                latency_ms: measured.unwrap_or_else(|| estimated_latency_ms(distance_km)),
                measured: measured.is_some(),
                distance_km,
            });
        }
    }
    views
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ways(place: Option<(f64, f64)>, measured: &[(&str, f64)]) -> Ways {
        let measured = measured.iter().map(|(name, ms)| (name.parse().unwrap(), *ms));
        Ways { place, measured_ms: Arc::new(measured.collect()) }
    }

    #[test]
    fn what_is_measured_counts_from_either_end_and_the_distance_elsewhere() {
        let ids: Vec<LocationId> = ["ams", "fra", "nrt", "new"].map(|id| id.parse().unwrap()).into();
        let (ams, fra, nrt) = ((52.31, 4.76), (50.03, 8.57), (35.76, 140.39));
        let ways = [
            ways(Some(ams), &[("nrt", 120.0), ("unknown", 1.0)]),
            ways(Some(fra), &[("ams", 9.0)]),
            ways(Some(nrt), &[("ams", 130.0)]),
            ways(None, &[]),
        ];
        let matrix = between(&ids, &ways);
        assert_eq!((matrix.ms(0, 2), matrix.ms(2, 0)), (120.0, 130.0), "what it measured itself");
        assert_eq!((matrix.ms(0, 1), matrix.ms(1, 0)), (9.0, 9.0), "what the other end measured");
        assert!((matrix.ms(1, 2) - 140.7).abs() < 2.0, "by the distance: {}", matrix.ms(1, 2));
        assert_eq!((matrix.ms(0, 3), matrix.ms(3, 2), matrix.ms(3, 3)), (FAR_MS, FAR_MS, 0.0));
        assert_eq!((matrix.ms(4, 1), matrix.ms(4, 4)), (FAR_MS, 0.0), "who came since");
    }
}
