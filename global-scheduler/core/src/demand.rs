//! Where a deployment's new connections enter, and how far they go to the nearest instance.
//!
//! The cost of a set of locations with instances is the sum over entry locations of new connections a second times the
//! round trip to the nearest of the set. One more location makes it fall, by the less the more there are already.

use std::collections::BTreeMap;

use anyplace_model::LocationId;

/// To and from a location that has never said where it is, and to an instance where there is none. What takes longer
/// counts as no answer.
pub const FAR_MS: f64 = 1_000.0;

/// Round trips between locations, by their numbers.
#[derive(Debug, Clone, Default)]
pub struct Latency {
    numbers: BTreeMap<LocationId, usize>,
    /// All that lead to the first location, then all that lead to the second, and so on: those to one are read together.
    ms: Vec<f64>,
}

impl Latency {
    /// Between locations that are numbered as in `ids`; `ms` says how long it is from one to another, in milliseconds.
    pub fn between(ids: &[LocationId], ms: impl Fn(usize, usize) -> f64) -> Self {
        let size = ids.len();
        let to_each = (0..size * size).map(|index| ms(index % size, index / size));
        Self { numbers: ids.iter().cloned().zip(0..).collect(), ms: to_each.collect() }
    }

    /// In milliseconds; far for a number that isn't known.
    pub fn ms(&self, from: usize, to: usize) -> f64 {
        match self.to(to).and_then(|row| row.get(from)) {
            Some(ms) => *ms,
            None if from == to => 0.0,
            None => FAR_MS,
        }
    }

    fn to(&self, to: usize) -> Option<&[f64]> {
        let size = self.numbers.len();
        self.ms.get(to.checked_mul(size)?..).filter(|rest| rest.len() >= size).map(|rest| &rest[..size])
    }
}

/// How far a deployment's new connections go, while locations are added. By the number of the entry location, as rows
/// of latency are: 330 locations are compared for 330 entries in some 50 us only if all is read in one go.
#[derive(Debug)]
pub(crate) struct Travel<'a> {
    latency: &'a Latency,
    per_second: Vec<f64>,
    nearest_ms: Vec<f64>,
    any: bool,
}

impl<'a> Travel<'a> {
    /// With instances in `present`. Demand of locations that nobody knows counts for nothing.
    pub(crate) fn new<'b>(
        latency: &'a Latency,
        demand: &BTreeMap<LocationId, f64>,
        present: impl Iterator<Item = &'b LocationId>,
    ) -> Self {
        let size = latency.numbers.len();
        let (mut per_second, mut any) = (vec![0.0; size], false);
        for (id, rate) in demand.iter().filter(|(_, rate)| rate.is_finite() && **rate > 0.0) {
            if let Some(number) = latency.numbers.get(id) {
                (per_second[*number], any) = (*rate, true);
            }
        }
        let mut travel = Self { latency, per_second, nearest_ms: vec![FAR_MS; size], any };
        present.for_each(|id| travel.add(id));
        travel
    }

    fn row(&self, to: &LocationId) -> Option<&'a [f64]> {
        self.latency.to(*self.latency.numbers.get(to)?)
    }

    /// By how much the cost falls with instances in a further location, in thousandths of connections/s x ms.
    pub(crate) fn gain(&self, to: &LocationId) -> u64 {
        let Some(row) = self.row(to).filter(|_| self.any) else { return 0 };
        let gain = |rate: f64, nearest: f64, ms: f64| rate * (nearest - ms).max(0.0);
        thousandths(sum(&self.per_second, &self.nearest_ms, row, gain))
    }

    /// Instances are in this location too.
    pub(crate) fn add(&mut self, to: &LocationId) {
        let Some(row) = self.row(to).filter(|_| self.any) else { return };
        for (nearest, ms) in self.nearest_ms.iter_mut().zip(row) {
            *nearest = nearest.min(*ms);
        }
    }

    /// New connections a second, of all entry locations.
    pub(crate) fn per_second(&self) -> f64 {
        self.per_second.iter().sum()
    }

    /// The round trip of the average connection in milliseconds; none without demand.
    pub(crate) fn average_ms(&self) -> Option<f64> {
        let cost: f64 = self.per_second.iter().zip(&self.nearest_ms).map(|(rate, ms)| rate * ms).sum();
        self.any.then(|| cost / self.per_second())
    }
}

/// By how much the cost rises without each of the locations with instances, in thousandths of connections/s x ms.
pub(crate) fn losses<'a>(
    latency: &Latency,
    demand: &BTreeMap<LocationId, f64>,
    present: &[&'a LocationId],
) -> BTreeMap<&'a LocationId, u64> {
    let mut travel = Travel::new(latency, demand, std::iter::empty());
    if !travel.any {
        return BTreeMap::new();
    }
    let rows: Vec<_> = present.iter().filter_map(|id| Some((*id, travel.row(id)?))).collect();
    let mut next_ms = travel.nearest_ms.clone();
    for (_, row) in &rows {
        for ((next, nearest), ms) in next_ms.iter_mut().zip(&mut travel.nearest_ms).zip(*row) {
            *next = next.min(nearest.max(*ms));
            *nearest = nearest.min(*ms);
        }
    }
    // What each entry loses with its nearest location. Where two are equally near, that is nothing.
    let detours: Vec<f64> = travel
        .per_second
        .iter()
        .zip(next_ms.iter().zip(&travel.nearest_ms))
        .map(|(rate, (next, nearest))| rate * (next - nearest))
        .collect();
    let loss = |detour: f64, nearest: f64, ms: f64| if ms <= nearest { detour } else { 0.0 };
    let loss = |row: &[f64]| thousandths(sum(&detours, &travel.nearest_ms, row, loss));
    rows.into_iter().map(|(id, row)| (id, loss(row))).collect()
}

/// The sum of `term` over three columns, in eight parts that a processor adds side by side.
fn sum(a: &[f64], b: &[f64], c: &[f64], term: impl Fn(f64, f64, f64) -> f64) -> f64 {
    let ((a, a_rest), (b, b_rest), (c, c_rest)) =
        (a.as_chunks::<8>(), b.as_chunks::<8>(), c.as_chunks::<8>());
    let mut parts = [0.0; 8];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..8 {
            parts[lane] += term(a[lane], b[lane], c[lane]);
        }
    }
    let rest = a_rest.iter().zip(b_rest).zip(c_rest).map(|((a, b), c)| term(*a, *b, *c));
    parts.iter().sum::<f64>() + rest.sum::<f64>()
}

/// Whole thousandths, so that they can be put into an order. The cast stays within bounds by itself.
fn thousandths(value: f64) -> u64 {
    (value * 1_000.0) as u64
}
