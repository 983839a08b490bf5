//! Tells the location scheduler what is so: at each change at once, and as a sign of life in between.

use std::{sync::Arc, time::Duration};

use anyplace_api::Client;
use anyplace_model::MachineReport;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use crate::board::Board;

/// A third of the location scheduler's machine lease (600 ms), so that two lost reports cost nothing.
const HEARTBEAT: Duration = Duration::from_millis(200);
/// A report that takes longer is given up for a newer one.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Pause after a failure.
const RETRY: Duration = Duration::from_millis(50);
/// How often the same failure is logged.
const COMPLAINT: Duration = Duration::from_secs(10);
/// A new agent doesn't report before it knows again what the instances that it found are like, lest ready ones lose
/// their traffic for a moment; but it waits no longer than a lease allows.
const SETTLING: Duration = Duration::from_millis(400);

/// Reports for ever. `frame` is what never changes; `settled` ends when every instance that was found is known.
pub(crate) async fn run(
    client: Client,
    board: Arc<Board>,
    mut frame: MachineReport,
    mut settled: mpsc::Receiver<()>,
) {
    // Nothing is ever sent: the channel closes when the last sender is dropped.
    let _ = timeout(SETTLING, settled.recv()).await;
    let mut changed = board.subscribe();
    let mut complained: Option<Instant> = None;
    loop {
        changed.mark_unchanged();
        let facts = board.facts();
        frame.sequence += 1;
        frame.images = facts.all_images();
        frame.conditions = facts.conditions;
        frame.mark = facts.mark;
        frame.instances = facts.instances.into_values().collect();
        let failure = match timeout(TIMEOUT, client.report_machine(&frame)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer in time".into()),
        };
        match failure {
            Some(error) => {
                if complained.is_none_or(|at| at.elapsed() > COMPLAINT) {
                    tracing::warn!(
                        error,
                        "can't report to the location scheduler; going on with what is here"
                    );
                    complained = Some(Instant::now());
                }
                sleep(RETRY).await;
            }
            None => {
                if complained.take().is_some() {
                    tracing::info!("reporting to the location scheduler again");
                }
                tokio::select! {
                    // The board lives as long as this task.
                    _ = changed.changed() => {}
                    () = sleep(HEARTBEAT) => {}
                }
            }
        }
    }
}
