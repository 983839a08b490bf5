//! The loop that makes what is desired and what is published follow what is observed. It takes no hint: whatever
//! woke it, it looks at everything.

use std::{sync::Arc, time::Duration};

use anyplace_service::Failure;

use crate::app::{App, Writer};

/// The longest pause between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Runs until the shutdown.
pub(crate) async fn run(app: Arc<App>) {
    loop {
        tokio::select! {
            () = app.wake.notified() => {}
            () = tokio::time::sleep(app.interval()) => {}
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
        // Before that, locations that are only slow to report look as if they had nothing.
        if *self.settled.borrow() {
            self.place_deployments(writer).await?;
            self.place_jobs(writer).await?;
        }
        Ok(())
    }
}
