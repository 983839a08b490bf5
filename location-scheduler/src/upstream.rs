//! The link to the global scheduler: its wishes in, our state out. When it is gone, the last wishes stay in force.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_api::{Client, ClientError, ErrorCode, WatchEvent, Watcher};
use anyplace_location_core::{
    advert, attempt_statuses, ingress, move_statuses, placement_statuses, prewarm_statuses,
};
use anyplace_model::{LocationDesired, LocationReport};
use anyplace_service::Backoff;

use crate::scheduler::Scheduler;

/// A report goes out so often, changed or not: a third of the global scheduler's default lease.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Changes that come together go out together.
const COALESCE: Duration = Duration::from_millis(10);
/// A report that takes longer is given up for a newer one.
const PATIENCE: Duration = Duration::from_secs(2);

/// Follows what the global scheduler wants until the shutdown. It is kept by the reconcile loop, in one write with the
/// plan that follows from it.
pub(crate) async fn watch(scheduler: Arc<Scheduler>) -> anyhow::Result<()> {
    let path = Client::location_desired_path(&scheduler.config.location);
    let mut watcher = Watcher::<LocationDesired>::new(scheduler.global.clone(), path.clone());
    let (mut wanted, mut dirty) = (BTreeMap::<String, LocationDesired>::new(), false);
    let mut link = Link::default();
    loop {
        let event = tokio::select! {
            event = watcher.next_patched(
                |key| serde_json::to_vec(wanted.get(key)?).ok(),
                |error| link.down("watch", error),
            ) => event,
            () = scheduler.shutdown.cancelled() => return Ok(()),
        };
        link.up("watch");
        match event {
            // What is wanted changes only when the snapshot is complete.
            WatchEvent::Reset { .. } => {
                wanted.clear();
                dirty = true;
            }
            WatchEvent::Put { key, value, .. } => {
                wanted.insert(key, value);
                dirty = true;
            }
            WatchEvent::Delete { key, .. } => dirty |= wanted.remove(&key).is_some(),
            WatchEvent::Synced { .. } if dirty => {
                let (before, now) = (term(&scheduler.live().wanted), term(&wanted));
                if now < before {
                    // One that led, slept, and hasn't noticed yet that another leads.
                    tracing::warn!(
                        before,
                        now,
                        "an earlier global scheduler still speaks; it is not listened to"
                    );
                    tokio::select! {
                        () = tokio::time::sleep(HEARTBEAT) => {}
                        () = scheduler.shutdown.cancelled() => return Ok(()),
                    }
                    watcher = Watcher::new(scheduler.global.clone(), path.clone());
                    continue;
                }
                dirty = false;
                if *scheduler.live().wanted != wanted {
                    scheduler.want(Arc::new(wanted.clone()));
                }
            }
            WatchEvent::Synced { .. } => {}
        }
    }
}

/// The global scheduler's term in which this was wanted.
fn term(wanted: &BTreeMap<String, LocationDesired>) -> u64 {
    match wanted.get("term") {
        Some(LocationDesired::Term(term)) => *term,
        _ => 0,
    }
}

/// Reports at each change and each heartbeat until the shutdown.
pub(crate) async fn report(scheduler: Arc<Scheduler>) -> anyhow::Result<()> {
    let mut sequence = 0;
    let mut last: Option<(LocationReport, Instant)> = None;
    let mut backoff = Backoff::new(Duration::from_millis(100), HEARTBEAT);
    let mut link = Link::default();
    loop {
        tokio::select! {
            () = scheduler.report.notified() => tokio::time::sleep(COALESCE).await,
            () = tokio::time::sleep(HEARTBEAT) => {}
            () = scheduler.shutdown.cancelled() => return Ok(()),
        }
        let Some(mut report) = compose(&scheduler) else { continue };
        if let Some((sent, at)) = &last {
            report.sequence = sent.sequence;
            if at.elapsed() < HEARTBEAT - COALESCE && *sent == report {
                continue;
            }
        }
        sequence += 1;
        report.sequence = sequence;
        let sent = tokio::select! {
            sent = tokio::time::timeout(PATIENCE, scheduler.global.report_location(&report)) => sent,
            () = scheduler.shutdown.cancelled() => return Ok(()),
        };
        let failed = match sent {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error),
            Err(_) => Some(ClientError::Unreachable {
                url: scheduler.config.global.clone(),
                reason: "no answer in time".into(),
            }),
        };
        match failed {
            None => {
                link.up("report");
                backoff.reset();
                last = Some((report, Instant::now()));
            }
            Some(error) => {
                link.down("report", &error);
                last = None;
                tokio::select! {
                    () = tokio::time::sleep(backoff.pause()) => scheduler.report.notify_one(),
                    () = scheduler.shutdown.cancelled() => return Ok(()),
                }
            }
        }
    }
}

/// The report now; none while it isn't known which machines are there.
fn compose(scheduler: &Scheduler) -> Option<LocationReport> {
    let live = scheduler.live();
    (live.is_warm() && live.is_planned()).then(|| LocationReport {
        location: scheduler.config.location.clone(),
        epoch: scheduler.epoch,
        sequence: 0,
        advertise: scheduler.config.advertise.clone(),
        log_token: scheduler.log_token.clone(),
        advert: advert(&live.state),
        ingress: ingress(&live.state),
        placements: placement_statuses(&live.state, &live.plan),
        attempts: attempt_statuses(&live.state, &live.plan),
        moves: move_statuses(&live.state),
        prewarms: prewarm_statuses(&live.state),
        traffic: live.choice.traffic.clone(),
        latency_ms: live.state.latency_ms.clone(),
    })
}

/// Says once that the link broke, and once that it is back.
#[derive(Debug, Default)]
struct Link {
    broken: bool,
}

impl Link {
    fn up(&mut self, what: &str) {
        if std::mem::take(&mut self.broken) {
            tracing::info!(what, "the global scheduler answers again");
        }
    }

    fn down(&mut self, what: &str, error: &ClientError) {
        if std::mem::replace(&mut self.broken, true) {
            tracing::debug!(what, %error, "the global scheduler is still gone");
        } else if matches!(error.code(), Some(ErrorCode::Unauthenticated | ErrorCode::TokenExpired)) {
            tracing::error!(
                what, %error,
                "the global scheduler refuses the token; make one with `anyplace token create --role location`"
            );
        } else {
            tracing::warn!(what, %error, "the global scheduler is gone; going on without it");
        }
    }
}
