//! `--wait`: follows the watch stream until what was asked for is there, and shows each state on the way: in
//! place on a terminal, a line for each elsewhere.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use anyhow::bail;
use anyplace_api::{
    Client, ClientError, DeploymentPhase, DeploymentView, ErrorCode, JobView, LocationShare, WatchEvent,
    Watcher,
};
use anyplace_images::{Item, SharedProgress, Stage};
use anyplace_model::{InstanceStatus, JobPhase};
use indicatif::{ProgressBar, ProgressStyle};
use serde::de::DeserializeOwned;

use crate::output;

const DEPLOYMENTS: &str = "/v1/watch/deployments";
const JOBS: &str = "/v1/watch/jobs";
/// Pause before the stream is opened again.
const RETRY: Duration = Duration::from_millis(300);
/// Exit code for what isn't there yet at the deadline.
pub(crate) const PENDING: u8 = 4;
/// How long a registry may say nothing before that is told.
const SILENT: Duration = Duration::from_secs(3);
/// How often it is looked whether a registry went away.
const AWAY_CHECK: Duration = Duration::from_millis(500);
/// How often the spinner turns.
const TICK: Duration = Duration::from_millis(100);

/// How waiting ended.
pub(crate) enum Outcome<T> {
    /// It is there.
    Done(Box<T>),
    /// The deadline passed; the last state that was seen.
    Pending(Option<Box<T>>),
}

/// Waits until all instances of the deployment are ready in its generation.
pub(crate) async fn deployment(
    client: &Client,
    applied: &DeploymentView,
    timeout: Duration,
) -> anyhow::Result<Outcome<DeploymentView>> {
    let generation = applied.generation;
    Follow {
        client,
        path: DEPLOYMENTS,
        name: applied.name.as_str(),
        name_of: (|view| view.name.as_str()) as fn(&DeploymentView) -> &str,
        state: deployment_state,
        done: |view: &DeploymentView| view.generation >= generation && view.phase == DeploymentPhase::Ready,
    }
    .run(timeout)
    .await
}

/// Waits until the job has ended.
pub(crate) async fn job(
    client: &Client,
    submitted: &JobView,
    timeout: Duration,
) -> anyhow::Result<Outcome<JobView>> {
    Follow {
        client,
        path: JOBS,
        name: submitted.name.as_str(),
        name_of: (|view| view.name.as_str()) as fn(&JobView) -> &str,
        state: job_state,
        done: |view: &JobView| {
            matches!(view.phase, JobPhase::Succeeded | JobPhase::Failed | JobPhase::Cancelled)
        },
    }
    .run(timeout)
    .await
}

/// Runs a question to a registry to its end, and says that it waits if `is_silent` after a while.
pub(crate) async fn answer<T>(
    registry: &impl std::fmt::Display,
    asked: impl Future<Output = T>,
    is_silent: impl Fn() -> bool,
) -> T {
    let mut asked = std::pin::pin!(asked);
    if let Ok(answer) = tokio::time::timeout(SILENT, asked.as_mut()).await {
        return answer;
    }
    if is_silent() {
        output::note(format_args!("waiting for the registry {registry} to answer"));
    }
    asked.await
}

/// Runs a pull to its end, and says when the registry is away meanwhile.
pub(crate) async fn pulled<T>(
    client: &anyplace_images::Client,
    progress: &SharedProgress,
    pull: impl Future<Output = T>,
) -> T {
    let mut pull = std::pin::pin!(
        answer(client.registry(), pull, || client.stats().retries == 0 && client.stats().answered == 0)
    );
    let (mut before, mut is_told) = (client.stats(), false);
    loop {
        if let Ok(done) = tokio::time::timeout(AWAY_CHECK, pull.as_mut()).await {
            return done;
        }
        let now = client.stats();
        if now.answered > before.answered {
            is_told = false;
        } else if now.retries > before.retries && !is_told {
            let item = Item { stage: Stage::Fetch, name: "registry".to_owned() };
            progress.said(&item, &format!("the registry {} is away, trying again ...", client.registry()));
            is_told = true;
        }
        before = now;
    }
}

struct Follow<'a, N, S, D> {
    client: &'a Client,
    path: &'a str,
    name: &'a str,
    name_of: N,
    state: S,
    done: D,
}

impl<N, S, D> Follow<'_, N, S, D> {
    async fn run<T>(self, timeout: Duration) -> anyhow::Result<Outcome<T>>
    where
        T: DeserializeOwned,
        N: Fn(&T) -> &str,
        S: Fn(&T) -> String,
        D: Fn(&T) -> bool,
    {
        let deadline = Instant::now() + timeout;
        let mut shown = Shown::new();
        let mut watcher = Watcher::<T>::new(self.client.clone(), self.path);
        let mut last: Option<Box<T>> = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(event) = tokio::time::timeout(left, watcher.try_next()).await else {
                return Ok(Outcome::Pending(last));
            };
            match event {
                Ok(WatchEvent::Put { value, .. }) if (self.name_of)(&value) == self.name => {
                    shown.state((self.state)(&value));
                    if (self.done)(&value) {
                        return Ok(Outcome::Done(Box::new(value)));
                    }
                    last = Some(Box::new(value));
                }
                // Only what was seen before can be gone: the stream may be a moment behind the request.
                Ok(WatchEvent::Delete { key, .. })
                    if last.is_some() && key.rsplit('/').next() == Some(self.name) =>
                {
                    bail!("{} was deleted by someone else meanwhile; apply it again", self.name);
                }
                Ok(_) => {}
                Err(error) if is_final(&error) => return Err(error.into()),
                Err(error) => {
                    shown.state(format!("{}: {error}; trying again", self.name));
                    tokio::time::sleep(RETRY.min(deadline.saturating_duration_since(Instant::now()))).await;
                }
            }
        }
    }
}

/// Whether asking again can't help.
fn is_final(error: &ClientError) -> bool {
    matches!(
        error.code(),
        Some(
            ErrorCode::InvalidRequest
                | ErrorCode::Unauthenticated
                | ErrorCode::TokenExpired
                | ErrorCode::Forbidden
                | ErrorCode::NotFound
        )
    )
}

/// Where states are shown.
pub(crate) struct Shown {
    spinner: Option<ProgressBar>,
    last: String,
}

impl Shown {
    pub(crate) fn new() -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let spinner = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}") {
                spinner.set_style(style);
            }
            spinner.enable_steady_tick(TICK);
            spinner
        });
        Self { spinner, last: String::new() }
    }

    pub(crate) fn state(&mut self, state: String) {
        if state == self.last {
            return;
        }
        match &self.spinner {
            Some(spinner) => spinner.set_message(state.clone()),
            None => output::note(&state),
        }
        self.last = state;
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}

fn deployment_state(view: &DeploymentView) -> String {
    let mut state =
        format!("{}: {}, {} of {} ready", view.name, output::word(&view.phase), view.ready, view.wanted);
    let shares: Vec<String> = view.locations.iter().map(share).collect();
    if !shares.is_empty() {
        state += &format!("; {}", shares.join(", "));
    }
    if let Some(first) = view.reasons.first() {
        state += &format!("; {}: {}", first.reason, first.message);
    }
    state
}

fn share(share: &LocationShare) -> String {
    let waiting = share
        .instances
        .iter()
        .find(|instance| !instance.ready)
        .map(instance_state)
        .or_else(|| share.refusals.first().map(|refusal| refusal.reason.to_string()));
    let waiting = waiting.map(|waiting| format!(" ({waiting})")).unwrap_or_default();
    format!("{} {}/{}{waiting}", share.location, share.ready, share.wanted)
}

fn instance_state(instance: &InstanceStatus) -> String {
    match &instance.reason {
        Some(reason) => reason.reason.to_string(),
        None => output::word(&instance.phase),
    }
}

fn job_state(view: &JobView) -> String {
    let mut state = format!("{}: {}", view.name, output::word(&view.phase));
    if let Some(position) = view.queue_position {
        state += &format!(", place {position} in the queue");
    }
    if let Some(start) = view.predicted_start.filter(|_| view.phase == JobPhase::Queued) {
        state += &format!(", starts about {}", output::moment(start));
    }
    if let Some(location) = &view.location {
        state += &format!(", attempt {} in {location}", view.attempt);
    }
    if let Some(first) = view.reasons.first() {
        state += &format!("; {}: {}", first.reason, first.message);
    }
    state
}
