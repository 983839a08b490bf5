//! Which backend owns which bucket: exact shares, few moves, and no memory.
//!
//! ```text
//! slots 0..m of equal weight      base(m): slot m-1 took its buckets, evenly, from the slots below it
//! slots that take less or nothing give what they have too much, in an order of their own
//! backends that lack buckets      take those: each bucket prefers some backends to others, by a hash
//! ```
//!
//! All of it is a function of which slots have which weight, so routers that never met build equal tables. A slot that
//! joins at the end, or one that leaves and comes back, moves exactly the buckets that must move; weights that change
//! move a few more, for which the tests have a bound (decision 7).

use std::{
    cmp::Reverse,
    sync::{Arc, OnceLock},
};

/// Buckets of the smallest table: 512 bytes, and 16 backends are within a quarter of each other.
pub const MIN_BUCKETS: usize = 64;
/// Buckets of the largest: 32 KiB.
pub const MAX_BUCKETS: usize = 4_096;
/// Slots from here on are given away like those that two instances claim.
pub(crate) const MAX_SLOTS: usize = 4_096;
/// Buckets that a slot has at least where all weights are equal, up to 1,024 slots.
const BUCKETS_PER_SLOT: usize = 4;
/// Tables of so many slots are made once: hundreds of thousands of virtual IPs share them.
const REMEMBERED: usize = 128;
/// No backend.
const NOBODY: u16 = u16::MAX;

/// How many buckets a virtual IP has whose highest slot in use is `slots - 1`: a power of two.
pub(crate) fn buckets(slots: usize) -> usize {
    (slots.max(1).next_power_of_two() * BUCKETS_PER_SLOT).clamp(MIN_BUCKETS, MAX_BUCKETS)
}

/// Splits `total` by weight: nobody is a whole bucket off (largest remainder). Of equal remainders the first come first.
pub(crate) fn quotas(weights: &[u64], total: usize) -> Vec<u32> {
    let sum: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    if sum == 0 {
        return vec![0; weights.len()];
    }
    let exact = |weight: u64| u128::from(weight) * total as u128;
    let mut quotas: Vec<u32> = weights.iter().map(|weight| (exact(*weight) / sum) as u32).collect();
    let left = total - quotas.iter().map(|quota| *quota as usize).sum::<usize>();
    if left > 0 {
        let mut order: Vec<(Reverse<u128>, usize)> = weights
            .iter()
            .enumerate()
            .map(|(index, weight)| (Reverse(exact(*weight) % sum), index))
            .collect();
        order.select_nth_unstable(left - 1);
        order[..left].iter().for_each(|(_, index)| quotas[*index] += 1);
    }
    quotas
}

/// The table of `slots` backends of equal weight.
#[derive(Debug)]
pub(crate) struct Base {
    owners: Vec<u16>,
    counts: Vec<u32>,
}

impl Base {
    /// The table of so many slots.
    pub(crate) fn of(slots: usize) -> Arc<Self> {
        static TABLES: [OnceLock<Arc<Base>>; REMEMBERED] = [const { OnceLock::new() }; REMEMBERED];
        let slots = slots.min(MAX_SLOTS);
        match TABLES.get(slots) {
            Some(table) => table.get_or_init(|| Arc::new(Self::new(slots))).clone(),
            None => Arc::new(Self::new(slots)),
        }
    }

    fn new(slots: usize) -> Self {
        let first = if slots == 0 { NOBODY } else { 0 };
        let mut owners = vec![first; MIN_BUCKETS];
        let mut counts = vec![MIN_BUCKETS as u32; slots.min(1)];
        for slot in 1..slots {
            if buckets(slot + 1) > owners.len() {
                // A flow's bucket j is 2j or 2j+1 in a table twice as large.
                owners = owners.iter().flat_map(|owner| [*owner, *owner]).collect();
                counts.iter_mut().for_each(|count| *count *= 2);
            }
            let share = owners.len() / (slot + 1);
            let larger = owners.len() % (slot + 1);
            let quota = |slot: usize| (share + usize::from(slot < larger)) as u32;
            counts.push(quota(slot));
            let mut wanted = quota(slot);
            for step in 0..owners.len() {
                if wanted == 0 {
                    break;
                }
                let bucket = scattered(step, owners.len());
                let owner = usize::from(owners[bucket]);
                if owner < slot && counts[owner] > quota(owner) {
                    counts[owner] -= 1;
                    owners[bucket] = slot as u16;
                    wanted -= 1;
                }
            }
        }
        Self { owners, counts }
    }

    /// The number of buckets.
    pub(crate) fn len(&self) -> usize {
        self.owners.len()
    }

    /// The owner of each bucket, as an index into `quotas`, where backend `i` gets `quotas[i]` buckets. The first
    /// backends are the slots of this table, any others follow; `keys` name them all, and must differ.
    pub(crate) fn assign(&self, keys: &[u64], quotas: &[u32]) -> Vec<u16> {
        let mut owners = self.owners.clone();
        let mut surplus: Vec<u32> =
            self.counts.iter().zip(quotas).map(|(count, quota)| count.saturating_sub(*quota)).collect();
        let takers: Vec<Taker> = quotas
            .iter()
            .enumerate()
            .filter_map(|(index, quota)| {
                let lacks = quota.saturating_sub(self.counts.get(index).copied().unwrap_or(0));
                (lacks > 0).then(|| Taker { index: index as u16, key: keys[index], lacks })
            })
            .collect();
        if takers.is_empty() {
            return owners;
        }
        let mut given = Vec::with_capacity(takers.iter().map(|taker| taker.lacks as usize).sum());
        for step in 0..owners.len() {
            let bucket = scattered(step, owners.len());
            match surplus.get_mut(usize::from(owners[bucket])) {
                Some(0) => continue,
                Some(left) => *left -= 1,
                None => {}
            }
            given.push(bucket as u16);
        }
        hand_out(&given, &takers, MAX_BUCKETS / owners.len(), &mut owners);
        owners
    }
}

/// A backend that lacks buckets.
struct Taker {
    index: u16,
    key: u64,
    lacks: u32,
}

/// Gives each bucket to a backend that lacks some: the stable matching, in which no bucket and backend rank each other
/// above what they got. It is unique, and the loss of one backend or bucket disturbs few others.
fn hand_out(given: &[u16], takers: &[Taker], scale: usize, owners: &mut [u16]) {
    if let [only] = takers {
        given.iter().for_each(|bucket| owners[usize::from(*bucket)] = only.index);
        return;
    }
    // What each taker holds, side by side: (rank, place in `given`).
    let mut held: Vec<(u64, usize)> = vec![(0, 0); given.len()];
    let mut offsets = Vec::with_capacity(takers.len());
    let mut counts = vec![0_usize; takers.len()];
    let mut offset = 0;
    for taker in takers {
        offsets.push(offset);
        offset += taker.lacks as usize;
    }
    // The rank that refused a bucket last; it asks those below.
    let mut refused = vec![u64::MAX; given.len()];
    for start in 0..given.len() {
        let mut asking = start;
        loop {
            let bucket = usize::from(given[asking]) * scale;
            let below = refused[asking];
            let best = takers
                .iter()
                .enumerate()
                .map(|(place, taker)| {
                    ((rank(bucket as u64, taker.key) & !0xfff) | (place as u64 & 0xfff), place)
                })
                .filter(|(rank, _)| *rank < below)
                .max();
            // Takers lack as many as are given, so one is left.
            let Some((rank, place)) = best else { break };
            refused[asking] = rank;
            let lacks = takers[place].lacks as usize;
            let slots = &mut held[offsets[place]..offsets[place] + lacks];
            if counts[place] < lacks {
                slots[counts[place]] = (rank, asking);
                counts[place] += 1;
                break;
            }
            let Some(worst) = slots.iter_mut().min() else { continue };
            if worst.0 < rank {
                asking = std::mem::replace(worst, (rank, asking)).1;
            }
        }
    }
    for (place, taker) in takers.iter().enumerate() {
        for (_, index) in &held[offsets[place]..offsets[place] + counts[place]] {
            owners[usize::from(given[*index])] = taker.index;
        }
    }
}

/// The order in which buckets are given to other locations: each slot keeps as much as its weight says of what is left,
/// however many are given. `len` buckets, of nobody where `slots` is empty.
pub(crate) fn given(slots: &[u16], weights: &[u64], len: usize) -> Vec<u16> {
    let walk = (0..len).map(|step| scattered(step, len));
    if slots.is_empty() {
        return walk.map(|bucket| bucket as u16).collect();
    }
    let mut left = vec![0_u64; weights.len()];
    slots.iter().for_each(|slot| left[usize::from(*slot)] += 1);
    // What a slot had before it gave the bucket, its weight, the slot, the bucket.
    let mut order: Vec<(u64, u64, u16, u16)> = walk
        .map(|bucket| {
            let slot = slots[bucket];
            let had = left[usize::from(slot)];
            left[usize::from(slot)] -= 1;
            (had, weights[usize::from(slot)], slot, bucket as u16)
        })
        .collect();
    // Who has most by its weight gives first.
    order.sort_by(|a, b| (b.0 * a.1).cmp(&(a.0 * b.1)).then(b.2.cmp(&a.2)));
    order.into_iter().map(|(.., bucket)| bucket).collect()
}

/// A walk over all buckets that spreads its beginning over the table; `len` is a power of two.
fn scattered(step: usize, len: usize) -> usize {
    step.wrapping_mul(0x9e37_79b1) & (len - 1)
}

/// A hash of bucket and key: the finaliser of splitmix64, whose output bits all depend on all input bits.
pub(crate) fn rank(bucket: u64, key: u64) -> u64 {
    let mut x = ((bucket << 48) ^ key).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests;
