//! Reads the machine's images again at a bounded rate, and has fetched anew what the disk spoilt. The store keeps how far
//! it came, so that the next agent goes on there.

use std::time::{Duration, SystemTime};

use anyplace_images::{NoProgress, PullClass, PullOptions, Scrubbed};
use anyplace_service::ScrubConfig;

use super::Images;

/// How often it is looked whether it is time, and how soon what failed is tried again.
const CHECK_EVERY: Duration = Duration::from_secs(60);
/// The shortest pause between two looks at everything, however often they are asked for.
const LEAST: Duration = Duration::from_secs(1);

impl Images {
    /// Scrubs whenever it is time. Never ends.
    pub(crate) async fn scrub(&self, config: ScrubConfig) -> std::convert::Infallible {
        let every = config.every.to_std();
        loop {
            // What an earlier agent found first.
            self.repair().await;
            if !every.is_zero() && self.is_time(every) {
                match self.store.scrub(config.rate.0).await {
                    Ok(Scrubbed::Damaged(_)) => continue,
                    Ok(Scrubbed::Done) => {
                        let state = self.store.scrub_state();
                        let (objects, bytes, damaged) = (state.objects, state.bytes, state.damaged);
                        tracing::info!(objects, bytes, damaged, "read all images again");
                    }
                    Err(error) => tracing::warn!(%error, "can't read the image store again"),
                }
            }
            let pause = if every.is_zero() { CHECK_EVERY } else { every.clamp(LEAST, CHECK_EVERY) };
            tokio::time::sleep(pause).await;
        }
    }

    fn is_time(&self, every: Duration) -> bool {
        match self.store.scrub_state().finished_s {
            None => true,
            Some(finished_s) => {
                let finished = SystemTime::UNIX_EPOCH + Duration::from_secs(finished_s);
                // A clock that was set back must not stop it for good.
                finished.elapsed().map_or(true, |age| age >= every)
            }
        }
    }

    /// Fetches what is missing since something was found damaged.
    async fn repair(&self) {
        if self.store.scrub_state().lacking.is_empty() {
            return;
        }
        let options = PullOptions { progress: NoProgress::shared(), class: PullClass::Live };
        if let Err(error) = self.store.repair(&self.client, &options).await {
            tracing::warn!(%error, "can't fetch anew what was damaged; it is tried again");
        }
    }
}
