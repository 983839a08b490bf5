//! What is asked for, and how often.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{Ask, Free};

/// Kinds of asks that count: the most frequent. The rest are too rare to reserve room for.
const MAX_KINDS: usize = 64;
/// All weights together.
const WHOLE: i64 = 1 << 20;

/// What people ask for, with the part of all asks that each kind is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mix {
    kinds: Vec<(Ask, i64)>,
}

impl Mix {
    /// Counts asks. Those without GPUs are left out: whatever they do, they can use none.
    pub fn of(asks: impl IntoIterator<Item = (Ask, u64)>) -> Self {
        let mut counts: BTreeMap<Ask, u64> = BTreeMap::new();
        for (ask, count) in asks.into_iter().filter(|(ask, count)| ask.gpus > 0 && *count > 0) {
            let counted = counts.entry(Ask { disk: 0, ..ask }).or_default();
            *counted = counted.saturating_add(count);
        }
        let mut counts: Vec<(Ask, u64)> = counts.into_iter().collect();
        counts.sort_by_key(|(ask, count)| (Reverse(*count), *ask));
        counts.truncate(MAX_KINDS);
        let all: u128 = counts.iter().map(|(_, count)| u128::from(*count)).sum();
        let weight = |count: u64| (u128::from(count) * WHOLE as u128 / all.max(1)) as i64;
        Self { kinds: counts.into_iter().map(|(ask, count)| (ask, weight(count))).collect() }
    }

    /// Parts of GPUs that are free on a machine and of no use, on the average of what is asked for.
    pub(super) fn fragments(&self, free: &Free) -> i64 {
        if free.gpus.is_empty() {
            return 0;
        }
        let parts: Vec<i64> = free.gpus.iter().map(super::Gpu::parts).collect();
        let all: i64 = parts.iter().sum();
        let fragments = |ask: &Ask| {
            if free.cpu < ask.cpu || free.memory < ask.memory {
                return all;
            }
            let (mut able, mut useful) = (0, 0);
            for (gpu, parts) in free.gpus.iter().zip(&parts) {
                if gpu.can(ask) {
                    able += 1;
                    useful += parts;
                }
            }
            if able < ask.gpus { all } else { all - useful }
        };
        self.kinds.iter().map(|(ask, weight)| fragments(ask) * weight).sum::<i64>() / WHOLE
    }
}
