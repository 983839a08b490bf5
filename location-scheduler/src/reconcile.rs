//! The reconcile loop: looks at everything, plans, writes, publishes. The only one that changes reservations.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_location_core::{Change, Plan, State, plan};
use anyplace_model::{InstanceId, LocationDesired};

use crate::{
    naming,
    persist::too_large,
    scheduler::{Scheduler, now_ms},
};

/// Looks at everything so often, whatever happens.
const TICK: Duration = Duration::from_secs(1);

/// Runs until the shutdown.
pub(crate) async fn run(scheduler: Arc<Scheduler>) -> anyhow::Result<()> {
    // What is on disk of the global scheduler's wish.
    let mut kept = scheduler.live().wanted.clone();
    loop {
        let wake = round(&scheduler, &mut kept).await?;
        tokio::select! {
            () = scheduler.reconcile.notified() => {}
            () = tokio::time::sleep(wake.min(TICK)) => {}
            () = scheduler.shutdown.cancelled() => return Ok(()),
        }
    }
}

/// One round; returns when time alone makes the next one necessary.
async fn round(
    scheduler: &Scheduler,
    kept: &mut Arc<BTreeMap<String, LocationDesired>>,
) -> anyhow::Result<Duration> {
    let (ready, wanted) = {
        let mut live = scheduler.live();
        let wanted = live.wanted.clone();
        let ready = live.is_warm().then(|| {
            let unsaved = live.take_unsaved();
            (live.at(now_ms()), unsaved, live.forgotten(Instant::now()))
        });
        (ready, wanted)
    };
    let wish = scheduler.disk.wish(kept, &wanted).await?;
    *kept = wanted;
    let Some((state, unsaved, forgotten)) = ready else {
        scheduler.disk.write(wish).await?;
        return Ok(TICK);
    };
    // Before anything is reserved on them: a reservation on an unknown machine counts as lost.
    scheduler.disk.machines(&unsaved, &forgotten).await?;
    scheduler.forget(&forgotten);

    let plan = plan(&state);
    let mut changes = Vec::new();
    let mut revision = state.revision;
    if plan.changes_nothing() {
        scheduler.disk.write(wish).await?;
    } else {
        changes = named(scheduler, &state, &plan);
        let dropped = remember(scheduler, &state, &changes);
        // One write, which takes half the time of two.
        revision = scheduler.disk.commit(&state, wish, &changes, &dropped).await?;
        log(&changes);
    }
    let wait =
        plan.wake_at_ms.map_or(TICK, |at| Duration::from_millis(at.saturating_sub(state.now_ms).max(1)));
    let mut live = scheduler.live();
    let images = plan.prewarms != live.state.prewarms || plan.warm != live.state.warm;
    let publish = !changes.is_empty() || images;
    live.carried_out(plan, changes, revision, now_ms());
    if publish {
        scheduler.publish_machines(&live);
        scheduler.publish_routes(&live);
    }
    drop(live);
    scheduler.report.notify_one();
    Ok(wait)
}

/// The plan's changes, with names for what starts.
fn named(scheduler: &Scheduler, state: &State, plan: &Plan) -> Vec<Change> {
    let mut made: Vec<InstanceId> = Vec::new();
    let history = scheduler.history();
    let mut changes = plan.changes(state, |start| {
        let id = naming::instance(&start.workload, |id| {
            state.reservations.contains_key(id) || history.machine(id).is_some() || made.contains(id)
        });
        made.push(id.clone());
        id
    });
    changes.retain(|change| {
        let refused = too_large(change);
        if refused {
            tracing::error!("a spec is too large for the store; shorten its env and command");
        }
        !refused
    });
    changes
}

/// Notes who ran what ends; returns what is forgotten for it.
fn remember(scheduler: &Scheduler, state: &State, changes: &[Change]) -> Vec<InstanceId> {
    let mut history = scheduler.history();
    changes
        .iter()
        .filter_map(|change| match change {
            Change::Delete(instance) => {
                let held = state.reservations.get(instance)?;
                history.add(instance.clone(), held.machine.clone())
            }
            Change::Put(_) | Change::Moves(..) => None,
        })
        .collect()
}

fn log(changes: &[Change]) {
    for change in changes {
        match change {
            Change::Put(held) => tracing::info!(
                instance = %held.assignment.instance,
                machine = %held.machine,
                address = %held.assignment.address,
                generation = held.generation,
                stage = ?held.stage,
                "reserved"
            ),
            Change::Delete(instance) => tracing::info!(%instance, "gone"),
            Change::Moves(cause, Some(moving)) => match &moving.gave_up {
                None => tracing::info!(?cause, moves = ?moving.moves, "instances move"),
                Some(gave_up) => tracing::warn!(?cause, why = %gave_up.why, "moves are given up"),
            },
            Change::Moves(cause, None) => tracing::info!(?cause, "moves are over"),
        }
    }
}
