//! When leases expire. In memory only; see [`super`].

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Error, LeaseId, Result};

struct Lease {
    ttl: Duration,
    deadline: Instant,
}

/// The live leases.
pub(super) struct Leases(Mutex<BTreeMap<LeaseId, Lease>>);

impl Leases {
    /// Begins each of `leases` now.
    pub(super) fn new(leases: Vec<(LeaseId, Duration)>) -> Self {
        let this = Self(Mutex::default());
        for (id, ttl) in leases {
            this.insert(id, ttl);
        }
        this
    }

    pub(super) fn insert(&self, id: LeaseId, ttl: Duration) {
        self.lock().insert(id, Lease { ttl, deadline: Instant::now() + ttl });
    }

    pub(super) fn remove(&self, id: LeaseId) {
        self.lock().remove(&id);
    }

    pub(super) fn keep_alive(&self, id: LeaseId) -> Result<()> {
        let mut leases = self.lock();
        let lease = leases.get_mut(&id).ok_or(Error::LeaseNotFound(id))?;
        lease.deadline = Instant::now() + lease.ttl;
        Ok(())
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.lock().values().map(|lease| lease.deadline).min()
    }

    /// Removes and returns the leases whose time is over. From then on they can't be kept alive.
    pub(super) fn take_expired(&self, now: Instant) -> Vec<LeaseId> {
        let mut leases = self.lock();
        let expired: Vec<LeaseId> =
            leases.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect();
        for id in &expired {
            leases.remove(id);
        }
        expired
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<LeaseId, Lease>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
