//! The loop that makes what is desired and what is published follow what is observed. It takes no hint: whatever
//! woke it, it looks at everything.

use std::{sync::Arc, time::Duration};

use anyplace_service::Failure;
use jiff::Timestamp;

use crate::app::{App, Writer};

/// The longest pause between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long after a job's deadline it is looked at.
const AFTER_DEADLINE: Duration = Duration::from_millis(10);

/// Runs until the shutdown.
pub(crate) async fn run(app: Arc<App>) {
    loop {
        tokio::select! {
            () = app.wake.notified() => {}
            () = tokio::time::sleep(app.pause()) => {}
            () = app.shutdown.cancelled() => return,
        }
        let writer = app.writer().await;
        if let Err(Failure(problem)) = app.reconcile(&writer).await {
            tracing::error!(%problem, "reconciliation failed; it is tried again");
        }
    }
}

impl App {
    /// One look, at the start.
    pub(crate) async fn reconcile_once(&self) -> anyhow::Result<()> {
        let writer = self.writer().await;
        self.reconcile(&writer).await.map_err(|Failure(problem)| anyhow::anyhow!("{problem}"))
    }

    /// The longest pause between two looks: leases expire between reports, so it is a part of the lease.
    pub(crate) fn interval(&self) -> Duration {
        INTERVAL.min(self.config.lease() / 4)
    }

    /// The pause until the next look: no longer than until the next deadline of a job.
    fn pause(&self) -> Duration {
        let (now, world) = (Timestamp::now(), self.world());
        let next = world.jobs.deadlines().map(|(deadline, _)| now.duration_until(*deadline)).next();
        let until = next.map_or(Duration::MAX, |until| Duration::try_from(until).unwrap_or_default());
        // A little later, so that it has passed by then, and so that one that can't be dealt with is no busy loop.
        self.interval().min(until.saturating_add(AFTER_DEADLINE))
    }

    /// Looks at everything, writes what has to change, and publishes.
    pub(crate) async fn reconcile(&self, writer: &Writer<'_>) -> Result<(), Failure> {
        let outcome = self.decide(writer).await;
        // What was written before a failure is published all the same.
        self.publish();
        outcome
    }

    async fn decide(&self, writer: &Writer<'_>) -> Result<(), Failure> {
        let leases = self.check_leases()?;
        writer.commit(leases).await?;
        self.follow_attempts(writer).await?;
        self.drop_orphans(writer).await?;
        self.end_cancelled_arrays(writer).await?;
        self.end_missed(writer).await?;
        // Before that, locations that are only slow to report look as if they had nothing.
        if *self.settled.borrow() {
            self.place_deployments(writer).await?;
            self.place_jobs(writer).await?;
        }
        Ok(())
    }
}
