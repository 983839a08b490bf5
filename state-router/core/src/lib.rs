//! Chooses the backends of each bucket of a virtual IP. Pure: a route in, tables out.
//!
//! Tables are a function of the route alone, so that all routers of a location build the same ones, also a router that
//! started a moment ago. Buckets are apportioned exactly by weight among the location's instances that take new
//! connections ([`apportion`]). They give away those of the parts that go to other locations, in a fixed order, so that
//! a part that moves takes no other along; a bucket of another location goes to one of its machines, which will choose
//! the instance.
//!
//! The hop before is who owned the bucket until its last change of owner: the route says when each instance began or
//! stopped taking new connections, and when parts moved, so those changes are undone, the latest first, until
//! another owner appears. An instance that began stops, one that drains takes connections again.
//!
//! Where nothing is away, new connections stay in the location while any instance is ready; else they go to the nearest
//! other location, which the route names; only where nothing is ready anywhere they go to instances that drain.
//!
//! [`Prober`] measures round trips to other locations, from which that is decided. [`Peers`] and [`without`] are for the time
//! in which no scheduler answers.
//!
//! This crate must not know about deployments, images, sockets or maps.

mod apportion;
mod latency;
mod liveness;

use std::{cmp::Reverse, net::Ipv4Addr};

use anyplace_model::{Away, Endpoint, LocationId, PARTS, RemoteLocation, Route};

pub use apportion::{MAX_BUCKETS, MIN_BUCKETS};
pub use latency::{PACKET_BYTES, Prober, answer};
pub use liveness::{Peers, ROLL_CALL_BYTES, roll_call, without};

use apportion::{Base, MAX_SLOTS, given, quotas, rank};

/// One bucket: where its new flows go, and where its older flows may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// Takes new flows.
    pub now: Ipv4Addr,
    /// May hold older flows.
    pub before: Option<Ipv4Addr>,
}

/// The tables of one VIP; an empty table has no backend.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tables {
    /// For packets from clients.
    pub full: Vec<Bucket>,
    /// For packets that another location sent on: never leaves this location again.
    pub local: Vec<Bucket>,
}

/// Builds the tables of a route.
pub fn tables(route: &Route) -> Tables {
    let slots = slots(route);
    let here = Candidates { slots: &slots, remote: &[], away: &[], nearest: &[] };
    let ready = here.now();
    let local = if ready.weighs_nothing() {
        // With nothing ready, draining instances keep serving the flows that they have, and a relayed flow must still
        // find them.
        let taking = taking(&slots, |it| it.ready || it.draining);
        here.table(&Moment { taking, away: None, nearest: 0 }, &[])
    } else {
        here.table(&ready, &here.changes())
    };
    let serving = serving(route);
    if serving.is_empty() {
        return Tables { full: local.clone(), local };
    }
    let nearest = nearest(route, &serving);
    let all = Candidates { slots: &slots, remote: &serving, away: &route.away, nearest: &nearest };
    let full = all.table(&all.now(), &all.changes());
    Tables { full, local }
}

/// The location's instances by slot. Instances without one, or with one that another has, get the lowest that is free.
fn slots(route: &Route) -> Vec<Option<&Endpoint>> {
    let mut order: Vec<&Endpoint> = route.local.iter().collect();
    order.sort_by_key(|it| (it.slot, it.address));
    let mut slots: Vec<Option<&Endpoint>> = Vec::with_capacity(order.len());
    let mut homeless = Vec::new();
    for endpoint in order {
        let slot = usize::from(endpoint.slot);
        if slot < slots.len() || slot >= MAX_SLOTS {
            homeless.push(endpoint);
        } else {
            slots.resize(slot, None);
            slots.push(Some(endpoint));
        }
    }
    let mut free = 0;
    for endpoint in homeless {
        while slots.get(free).is_some_and(Option::is_some) {
            free += 1;
        }
        match slots.get_mut(free) {
            Some(slot) => *slot = Some(endpoint),
            None => slots.push(Some(endpoint)),
        }
    }
    slots
}

/// Locations that have ready instances and machines to send to.
fn serving(route: &Route) -> Vec<&RemoteLocation> {
    let mut serving: Vec<&RemoteLocation> = route.serving().collect();
    serving.sort_by(|a, b| a.location.cmp(&b.location));
    serving
}

/// Which of them was the nearest since when, the newest first; none that doesn't serve any more.
fn nearest(route: &Route, serving: &[&RemoteLocation]) -> Vec<(u64, Option<usize>)> {
    let place = |location: &LocationId| serving.iter().position(|it| it.location == *location);
    let now = route.takes_over().and_then(|it| place(&it.location));
    let since_ms = route.nearest.first().map_or(0, |newest| newest.since_ms);
    let earlier = route.nearest.iter().skip(1).map(|it| (it.since_ms, place(&it.location)));
    std::iter::once((since_ms, now)).chain(earlier).collect()
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.ready && !endpoint.draining
}

/// The weight of each slot for which `takes` holds; 0 for others.
fn taking(slots: &[Option<&Endpoint>], takes: impl Fn(&Endpoint) -> bool) -> Vec<u64> {
    let weight = |endpoint: &&Endpoint| u64::from(endpoint.weight.max(1));
    slots.iter().map(|slot| slot.filter(|it| takes(it)).as_ref().map_or(0, weight)).collect()
}

/// All that could own a bucket.
struct Candidates<'a> {
    slots: &'a [Option<&'a Endpoint>],
    remote: &'a [&'a RemoteLocation],
    /// What went to other locations, the newest first.
    away: &'a [Away],
    /// Since when which of `remote` was the nearest, the newest first.
    nearest: &'a [(u64, Option<usize>)],
}

/// Who took which part of new connections at one time.
#[derive(Clone)]
struct Moment {
    /// Weight of each slot; 0 where it took none.
    taking: Vec<u64>,
    /// Which of what went to other locations was in force.
    away: Option<usize>,
    /// Which of the nearest.
    nearest: usize,
}

impl Moment {
    fn weighs_nothing(&self) -> bool {
        self.taking.iter().all(|weight| *weight == 0)
    }
}

/// A step in the history of a table; those of one time are one change.
struct Change {
    /// In milliseconds, and whether it came before other steps of that millisecond.
    time: (u64, bool),
    step: Step,
}

/// What changed.
enum Step {
    /// An instance began or stopped taking new connections.
    Instance { slot: usize, began: bool },
    /// Parts moved; before, this was in force.
    Parts { before: Option<usize> },
    /// Another location is the nearest.
    Nearest { before: usize },
}

impl Candidates<'_> {
    fn now(&self) -> Moment {
        let away = (!self.away.is_empty()).then_some(0);
        Moment { taking: taking(self.slots, is_ready), away, nearest: 0 }
    }

    /// What led to now, the latest first.
    fn changes(&self) -> Vec<Change> {
        let mut changes = Vec::with_capacity(2 * self.slots.len() + 1);
        for (slot, endpoint) in self.slots.iter().enumerate() {
            let Some(endpoint) = endpoint.filter(|it| it.ready || it.draining) else { continue };
            let stopped = !is_ready(endpoint);
            // An instance stops after it began, also where both times are unknown.
            let time = (endpoint.began_ms, stopped && endpoint.began_ms >= endpoint.stopped_ms);
            changes.push(Change { time, step: Step::Instance { slot, began: true } });
            if stopped {
                let time = (endpoint.stopped_ms, false);
                changes.push(Change { time, step: Step::Instance { slot, began: false } });
            }
        }
        for (index, away) in self.away.iter().enumerate() {
            let before = Some(index + 1).filter(|before| *before < self.away.len());
            // Of two in one millisecond, the list says which came last.
            changes.push(Change { time: (away.since_ms, false), step: Step::Parts { before } });
        }
        for (before, (since_ms, _)) in (1..self.nearest.len()).zip(self.nearest) {
            changes.push(Change { time: (*since_ms, false), step: Step::Nearest { before } });
        }
        changes.sort_by_key(|change| (Reverse(change.time.0), change.time.1));
        changes
    }

    /// The table of `now`; `changes` say how it came to be.
    fn table(&self, now: &Moment, changes: &[Change]) -> Vec<Bucket> {
        let Some(owners) = self.owners(now) else { return Vec::new() };
        let mut table: Vec<Bucket> = owners
            .iter()
            .enumerate()
            .map(|(bucket, owner)| Bucket { now: self.hop(*owner, bucket, owners.len()), before: None })
            .collect();
        let mut unknown: Vec<usize> = (0..table.len()).collect();
        let mut then = now.clone();
        let mut changes = changes.iter().peekable();
        while let Some(Change { time, step }) = changes.next().filter(|_| !unknown.is_empty()) {
            match step {
                Step::Instance { slot, began: true } => then.taking[*slot] = 0,
                Step::Instance { slot, began: false } => {
                    then.taking[*slot] = self.slots[*slot].map_or(0, |it| u64::from(it.weight.max(1)));
                }
                Step::Parts { before } => then.away = *before,
                Step::Nearest { before } => then.nearest = *before,
            }
            if changes.peek().is_some_and(|next| next.time == *time) {
                continue;
            }
            // Flows that went abroad before the first local instance was ready stay there.
            let Some(owners) = self.owners(&then) else { continue };
            unknown.retain(|bucket| {
                let now = table[*bucket].now;
                let before = corresponding(*bucket, table.len(), owners.len())
                    .map(|bucket| self.hop(owners[bucket], bucket, owners.len()))
                    .find(|hop| *hop != now);
                table[*bucket].before = before;
                before.is_none()
            });
        }
        table
    }

    /// The owner of each bucket. Where nobody took connections it is the nearest other location, if there is one.
    fn owners(&self, moment: &Moment) -> Option<Vec<Owner>> {
        // Slots behind the last that takes connections leave no trace, so it doesn't matter when they came and went.
        let used = moment.taking.iter().rposition(|weight| *weight > 0).map_or(0, |last| last + 1);
        let taking = &moment.taking[..used];
        let base = Base::of(used);
        // The size must not depend on what is away now, since that may be nothing for a moment.
        let scale = if self.away.is_empty() { 1 } else { (usize::from(PARTS) / base.len()).max(1) };
        let nearest = self.nearest.get(moment.nearest).and_then(|(_, place)| *place);
        let slots = if moment.weighs_nothing() {
            nearest?;
            Vec::new()
        } else {
            let keys: Vec<u64> = (0..used as u64).collect();
            let slots = base.assign(&keys, &quotas(taking, base.len()));
            slots.into_iter().flat_map(|slot| std::iter::repeat_n(slot, scale)).collect()
        };
        let mut owners: Vec<Owner> = slots.iter().map(|slot| Owner::Slot(usize::from(*slot))).collect();
        // Only where nobody here takes connections is anything left.
        owners.resize(base.len() * scale, Owner::Remote(nearest.unwrap_or_default()));
        let Some(away) = moment.away.and_then(|index| self.away.get(index)) else { return Some(owners) };
        let given = given(&slots, taking, owners.len());
        let each = owners.len() / usize::from(PARTS);
        let mut given = given.chunks(each);
        for span in &away.spans {
            let to = span.to.as_ref().and_then(|to| self.remote.iter().position(|it| it.location == *to));
            for part in given.by_ref().take(usize::from(span.parts)) {
                if let Some(remote) = to {
                    part.iter().for_each(|bucket| owners[usize::from(*bucket)] = Owner::Remote(remote));
                }
            }
        }
        Some(owners)
    }

    /// The address to which an owner's bucket of a table of `len` is sent.
    fn hop(&self, owner: Owner, bucket: usize, len: usize) -> Ipv4Addr {
        let address = match owner {
            Owner::Slot(slot) => self.slots[slot].map(|endpoint| endpoint.address),
            Owner::Remote(remote) => {
                let bucket = (bucket * (MAX_BUCKETS / len)) as u64;
                let machines = self.remote[remote].ingress.iter().copied();
                machines.max_by_key(|address| (rank(bucket, u64::from(u32::from(*address))), *address))
            }
        };
        // Owners have a weight, and only instances and locations with machines have one.
        address.unwrap_or(Ipv4Addr::UNSPECIFIED)
    }
}

/// Who owns a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Slot(usize),
    Remote(usize),
}

/// The buckets of a table of `other` in which the flows of a bucket of a table of `len` are.
fn corresponding(bucket: usize, len: usize, other: usize) -> std::ops::Range<usize> {
    if other > len {
        let scale = other / len;
        bucket * scale..(bucket + 1) * scale
    } else {
        let bucket = bucket / (len / other);
        bucket..bucket + 1
    }
}

#[cfg(test)]
mod tests;
