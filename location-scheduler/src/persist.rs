//! The store: keys, reading everything at start, and writing plans.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use anyhow::Context as _;
use anyplace_location_core::{Change, Moving, Reservation, State};
use anyplace_model::{
    Away, DeploymentName, InstanceId, LocationDesired, LocationId, MachineId, MachineReport, MoveCause,
};
use anyplace_store::{MAX_VALUE_BYTES, Revision, Store, StoreExt as _, Txn, TxnOutcome};
use serde::{Deserialize, Serialize};

const FENCE: &str = "fence";
const INSTANCES: &str = "instances/";
const MACHINES: &str = "machines/";
const DESIRED: &str = "desired/";
const RAN: &str = "ran/";
const AWAY: &str = "away/";
const LATENCY: &str = "latency";
const MOVES: &str = "moves/";

/// A transaction is closed when it has so many operations or bytes: well below the store's limits of 1,024 and
/// 1.5 MiB, whatever the last operation adds.
const MAX_OPS: usize = 500;
const MAX_BYTES: usize = 64 << 10;

/// Ended instances whose machine is remembered.
const MAX_RAN: usize = 5_000;

/// Who ran an ended instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Ran {
    machine: MachineId,
    ended_ms: u64,
}

/// What was stored.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) revision: Revision,
    pub(crate) reservations: BTreeMap<InstanceId, Reservation>,
    pub(crate) machines: BTreeMap<MachineId, MachineReport>,
    pub(crate) desired: BTreeMap<String, LocationDesired>,
    pub(crate) away: BTreeMap<DeploymentName, Vec<Away>>,
    pub(crate) latency_ms: BTreeMap<LocationId, f64>,
    pub(crate) moves: BTreeMap<MoveCause, Moving>,
    pub(crate) history: History,
}

/// Which machine ran which ended instance, for their logs; the oldest are forgotten.
#[derive(Debug, Default)]
pub(crate) struct History {
    machines: BTreeMap<InstanceId, MachineId>,
    /// Oldest first.
    order: VecDeque<InstanceId>,
}

impl History {
    pub(crate) fn machine(&self, instance: &InstanceId) -> Option<&MachineId> {
        self.machines.get(instance)
    }

    /// Adds one; returns the ones that are forgotten for it.
    pub(crate) fn add(&mut self, instance: InstanceId, machine: MachineId) -> Option<InstanceId> {
        self.order.push_back(instance.clone());
        self.machines.insert(instance, machine);
        let oldest = (self.order.len() > MAX_RAN).then(|| self.order.pop_front()).flatten()?;
        self.machines.remove(&oldest);
        Some(oldest)
    }
}

/// The location's store.
#[derive(Clone)]
pub(crate) struct Disk {
    store: Arc<dyn Store>,
}

impl Disk {
    pub(crate) const fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// Shuts out the process before, then reads everything: what is still on its way from there (to etcd) isn't written any
    /// more, so that nothing changes behind the back of this one.
    pub(crate) async fn load(&self, now_ms: u64) -> anyhow::Result<Stored> {
        let store = &self.store;
        let claimed = store.txn(Txn::new().put_json(FENCE, &now_ms)?).await;
        let (TxnOutcome::Committed { revision } | TxnOutcome::Conflict { revision, .. }) =
            claimed.context("the store can't be written")?;
        let context = "the store can't be read";
        let (reservations, _) = store.list_json::<Reservation>(INSTANCES).await.context(context)?;
        let (machines, _) = store.list_json::<MachineReport>(MACHINES).await.context(context)?;
        let (desired, _) = store.list_json::<LocationDesired>(DESIRED).await.context(context)?;
        let (away, _) = store.list_json::<Vec<Away>>(AWAY).await.context(context)?;
        let latency: Option<(BTreeMap<LocationId, f64>, _)> =
            store.get_json(LATENCY).await.context(context)?;
        let (moves, _) = store.list_json::<Moving>(MOVES).await.context(context)?;
        let (ran, _) = store.list_json::<Ran>(RAN).await.context(context)?;
        let mut ran: Vec<(u64, InstanceId, MachineId)> = ran
            .into_iter()
            .filter_map(|(key, ran, _)| {
                Some((ran.ended_ms, key.strip_prefix(RAN)?.parse().ok()?, ran.machine))
            })
            .collect();
        ran.sort();
        let mut history = History::default();
        for (_, instance, machine) in ran {
            history.add(instance, machine);
        }
        Ok(Stored {
            revision,
            reservations: reservations
                .into_iter()
                .map(|(_, held, _)| (held.assignment.instance.clone(), held))
                .collect(),
            machines: machines.into_iter().map(|(_, report, _)| (report.machine.clone(), report)).collect(),
            desired: desired
                .into_iter()
                .filter_map(|(key, item, _)| Some((key.strip_prefix(DESIRED)?.to_string(), item)))
                .collect(),
            away: away
                .into_iter()
                .filter_map(|(key, away, _)| Some((key.strip_prefix(AWAY)?.parse().ok()?, away)))
                .collect(),
            moves: moves.into_iter().map(|(_, moving, _)| (moving.cause.clone(), moving)).collect(),
            latency_ms: latency.map(|(latency, _)| latency).unwrap_or_default(),
            history,
        })
    }

    /// Writes a plan's changes, if nothing was planned since `revision`, and before them or together with them `wish`;
    /// returns the new revision. More than fits in one transaction is written in several, each of which leaves a valid
    /// state.
    pub(crate) async fn commit(
        &self,
        before: &State,
        wish: Txn,
        changes: &[Change],
        forgotten: &[InstanceId],
    ) -> anyhow::Result<Revision> {
        let mut fence =
            Fence { store: self.store.as_ref(), revision: before.revision, now_ms: before.now_ms };
        let mut txn = wish;
        for change in changes {
            txn = match change {
                Change::Put(held) => {
                    txn.put_json(format!("{INSTANCES}{}", held.assignment.instance), held.as_ref())?
                }
                Change::Delete(instance) => {
                    txn = txn.delete(format!("{INSTANCES}{instance}"));
                    match before.reservations.get(instance) {
                        Some(held) => {
                            let ran = Ran { machine: held.machine.clone(), ended_ms: before.now_ms };
                            txn.put_json(format!("{RAN}{instance}"), &ran)?
                        }
                        None => txn,
                    }
                }
                Change::Moves(cause, Some(moving)) => txn.put_json(moves_key(cause), moving.as_ref())?,
                Change::Moves(cause, None) => txn.delete(moves_key(cause)),
            };
            if txn.ops.len() >= MAX_OPS || txn.size_bytes() >= MAX_BYTES {
                fence.write(std::mem::take(&mut txn)).await?;
            }
        }
        if !txn.ops.is_empty() {
            fence.write(txn).await?;
        }
        for instances in forgotten.chunks(MAX_OPS) {
            let delete = |txn: Txn, instance: &InstanceId| txn.delete(format!("{RAN}{instance}"));
            let _ = self.store.txn(instances.iter().fold(Txn::new(), delete)).await?;
        }
        Ok(fence.revision)
    }

    /// Writes what machines are, and removes those that are forgotten.
    pub(crate) async fn machines(&self, saved: &[MachineReport], gone: &[MachineId]) -> anyhow::Result<()> {
        for report in saved {
            self.store.put_json(&format!("{MACHINES}{}", report.machine), report).await?;
        }
        for machine in gone {
            self.store.delete(&format!("{MACHINES}{machine}")).await?;
        }
        Ok(())
    }

    /// Writes which parts go elsewhere; removes what is none.
    pub(crate) async fn away(&self, changes: &[(DeploymentName, Option<Vec<Away>>)]) -> anyhow::Result<()> {
        let mut txn = Txn::new();
        for (name, away) in changes {
            txn = match away {
                Some(away) => txn.put_json(format!("{AWAY}{name}"), away)?,
                None => txn.delete(format!("{AWAY}{name}")),
            };
            if txn.ops.len() >= MAX_OPS || txn.size_bytes() >= MAX_BYTES {
                self.write(std::mem::take(&mut txn)).await?;
            }
        }
        self.write(txn).await
    }

    /// Writes the round trips to other locations.
    pub(crate) async fn latency(&self, latency_ms: &BTreeMap<LocationId, f64>) -> anyhow::Result<()> {
        self.write(Txn::new().put_json(LATENCY, latency_ms)?).await
    }

    /// What changed of the global scheduler's wish, to be written: what is too much for one transaction is. It is only
    /// a copy: half of it is mended by the next snapshot.
    pub(crate) async fn wish(
        &self,
        before: &BTreeMap<String, LocationDesired>,
        now: &BTreeMap<String, LocationDesired>,
    ) -> anyhow::Result<Txn> {
        let mut txn = Txn::new();
        for (key, item) in now.iter().filter(|(key, item)| before.get(*key) != Some(item)) {
            txn = txn.put_json(format!("{DESIRED}{key}"), item)?;
            if txn.ops.len() >= MAX_OPS || txn.size_bytes() >= MAX_BYTES {
                self.write(std::mem::take(&mut txn)).await?;
            }
        }
        for key in before.keys().filter(|key| !now.contains_key(*key)) {
            txn = txn.delete(format!("{DESIRED}{key}"));
            if txn.ops.len() >= MAX_OPS {
                self.write(std::mem::take(&mut txn)).await?;
            }
        }
        Ok(txn)
    }

    /// Writes what no plan depends on.
    pub(crate) async fn write(&self, txn: Txn) -> anyhow::Result<()> {
        if !txn.ops.is_empty() {
            let _ = self.store.txn(txn).await?;
        }
        Ok(())
    }
}

fn moves_key(cause: &MoveCause) -> String {
    match cause {
        MoveCause::Room(newcomer) => format!("{MOVES}room/{newcomer}"),
        MoveCause::Tidying => format!("{MOVES}tidying"),
        MoveCause::Drain => format!("{MOVES}drain"),
    }
}

/// Whether a reservation is too large for the store; it is then never made.
pub(crate) fn too_large(change: &Change) -> bool {
    match change {
        Change::Put(held) => {
            serde_json::to_vec(held).is_ok_and(|json| json.len() + MAX_BYTES > MAX_VALUE_BYTES)
        }
        Change::Delete(_) | Change::Moves(..) => false,
    }
}

struct Fence<'a> {
    store: &'a dyn Store,
    revision: Revision,
    now_ms: u64,
}

impl Fence<'_> {
    async fn write(&mut self, txn: Txn) -> anyhow::Result<()> {
        let txn = txn.when_revision(FENCE, self.revision).put_json(FENCE, &self.now_ms)?;
        match self.store.txn(txn).await.context("the plan can't be written")? {
            TxnOutcome::Committed { revision } => {
                self.revision = revision;
                Ok(())
            }
            TxnOutcome::Conflict { revision, .. } => anyhow::bail!(
                "the reservations were changed by another process (planned on revision {}, found {revision}); \
                 stop the other one and restart",
                self.revision
            ),
        }
    }
}
