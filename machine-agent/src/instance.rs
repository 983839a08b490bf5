//! One instance: a task that feeds the state machine with what happens, and does what it says.

mod lifecycle;
mod start;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyplace_images::{Digest, PulledImage};
use anyplace_model::{Assignment, InstanceId, InstanceStatus};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::sleep,
};

use crate::{
    Config,
    board::Board,
    bundle::Compiled,
    cgroup::Cgroups,
    cleanup, firewall, health,
    images::{ImageProblem, Images},
    paths::{InstancePaths, Paths},
    runtime::Runtimes,
    shim::Started,
};
pub(crate) use lifecycle::Exit;
use lifecycle::{Action, Event, Lifecycle};

/// Pause before what failed to be removed is tried again.
const CLEAN_RETRY: Duration = Duration::from_secs(1);
/// How often it is asked whether the last owner of an address has let go of it.
const ADDRESS_POLL: Duration = Duration::from_millis(20);
/// Messages between an instance's own tasks; they wait when it is full.
const MESSAGES: usize = 16;

/// What all instances share.
pub(crate) struct Context {
    pub(crate) config: Config,
    pub(crate) paths: Paths,
    pub(crate) board: Arc<Board>,
    pub(crate) images: Images,
    pub(crate) runtimes: Runtimes,
    pub(crate) filter: Compiled,
    pub(crate) cgroups: Option<Cgroups>,
    pub(crate) mtu: u32,
    pub(crate) claims: Claims,
    /// Whether the firewall is in place; no instance starts without it.
    pub(crate) firewall: Mutex<bool>,
}

impl Context {
    /// Sets the firewall, unless this agent has. Blocks.
    pub(crate) fn ensure_firewall(&self) -> anyhow::Result<()> {
        let mut installed = self.firewall.lock().unwrap_or_else(PoisonError::into_inner);
        if !*installed {
            firewall::install(&self.config)?;
            *installed = true;
        }
        Ok(())
    }
}

/// Who has which address: the next owner of an address waits until the last one's network is gone.
#[derive(Debug, Default)]
pub(crate) struct Claims(Mutex<BTreeMap<Ipv4Addr, InstanceId>>);

impl Claims {
    pub(crate) fn claim(&self, address: Ipv4Addr, instance: &InstanceId) -> bool {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        claims.entry(address).or_insert_with(|| instance.clone()) == instance
    }

    fn release(&self, address: Ipv4Addr, instance: &InstanceId) {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if claims.get(&address) == Some(instance) {
            claims.remove(&address);
        }
    }
}

/// What is kept on disk of an instance, so that a new agent can go on with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) assignment: Assignment,
    pub(crate) restarts: u32,
    /// Manifest of the image that it was started from, which must stay as long as it runs.
    #[serde(default)]
    pub(crate) image: Option<Digest>,
}

/// What the location scheduler wants of an instance.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Wanted {
    Run(Arc<Assignment>),
    Gone,
}

/// How an instance's task begins.
pub(crate) enum Origin {
    New,
    /// An earlier agent left it. The sender is dropped once it is known what it is like now.
    Found {
        restarts: u32,
        image: Option<Box<PulledImage>>,
        settled: mpsc::Sender<()>,
    },
}

/// What the instance's own tasks tell it. `run` numbers the containers: what an earlier one's tasks say is void.
enum Message {
    Pulled(Box<Result<PulledImage, ImageProblem>>),
    Started { run: u32, started: Started },
    Event { run: u32, event: Event },
}

/// Runs an instance until it is removed. Dropping the future leaves the container as it is.
pub(crate) async fn run(
    ctx: Arc<Context>,
    assignment: Arc<Assignment>,
    mut wanted: watch::Receiver<Wanted>,
    origin: Origin,
) -> InstanceId {
    let (sender, mut messages) = mpsc::channel(MESSAGES);
    let paths = ctx.paths.instance(&assignment.instance);
    let (restarts, image, mut settled) = match origin {
        Origin::New => (0, None, None),
        Origin::Found { restarts, image, settled } => (restarts, image.map(|image| *image), Some(settled)),
    };
    let has_readiness = assignment.health.readiness.is_some();
    let mut task = Task {
        lifecycle: Lifecycle::new(assignment.restart, assignment.timeout_ms, has_readiness, restarts),
        ctx,
        assignment,
        paths,
        sender,
        image,
        run: 0,
        work: JoinSet::new(),
        checks: Vec::new(),
    };
    task.handle(Event::Draining(task.assignment.draining));
    if settled.is_some() {
        task.handle(Event::Adopt);
        task.adopt();
    } else {
        task.handle(Event::Begin);
    }
    task.follow(&mut wanted);
    while !task.lifecycle.gone() {
        task.publish();
        let message = tokio::select! {
            biased;
            Some(message) = messages.recv() => message,
            Ok(()) = wanted.changed() => {
                task.follow(&mut wanted);
                continue;
            }
            () = until(task.lifecycle.deadline()) => Message::Event { run: task.run, event: Event::Deadline },
            // Ended tasks are only forgotten; they have said what they had to.
            Some(_) = task.work.join_next() => continue,
        };
        // Known again: with what it came from still on the board, the first report says nothing wrong.
        if !matches!(message, Message::Started { .. }) || !has_readiness {
            settled = None;
        }
        task.take(message);
    }
    task.ctx.claims.release(task.assignment.address, &task.assignment.instance);
    task.ctx.board.remove_instance(&task.assignment.instance);
    drop(settled);
    let ctx = task.ctx.clone();
    // A log too many is no reason to fail.
    let _ = tokio::task::spawn_blocking(move || cleanup::prune_logs(&ctx)).await;
    task.assignment.instance.clone()
}

async fn until(deadline: Option<Timestamp>) {
    match deadline {
        Some(deadline) => {
            let left = deadline.duration_since(Timestamp::now());
            sleep(Duration::try_from(left).unwrap_or_default()).await;
        }
        None => std::future::pending().await,
    }
}

struct Task {
    ctx: Arc<Context>,
    assignment: Arc<Assignment>,
    paths: InstancePaths,
    lifecycle: Lifecycle,
    sender: mpsc::Sender<Message>,
    image: Option<PulledImage>,
    run: u32,
    /// Ends with the task.
    work: JoinSet<()>,
    /// Of the container that runs.
    checks: Vec<AbortHandle>,
}

impl Task {
    /// Takes what the location scheduler wants now. The container is what it was started as: instances aren't
    /// changed but replaced, so only `draining` and the generation count.
    fn follow(&mut self, wanted: &mut watch::Receiver<Wanted>) {
        let wanted = wanted.borrow_and_update().clone();
        match wanted {
            Wanted::Gone => self.handle(Event::Removed),
            Wanted::Run(assignment) => {
                self.handle(Event::Draining(assignment.draining));
                if *assignment != *self.assignment {
                    self.assignment = assignment;
                    if let Err(error) = self.record() {
                        tracing::error!(error = format!("{error:#}"), "can't keep the assignment");
                    }
                }
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Pulled(result) => match *result {
                Ok(image) => {
                    self.image = Some(image);
                    self.handle(Event::ImageReady);
                }
                Err(ImageProblem { reason, message, permanent }) => {
                    tracing::warn!(instance = %self.assignment.instance, message, "can't fetch the image");
                    self.handle(Event::ImageFailed { reason, message, permanent });
                }
            },
            Message::Started { run, started } if run == self.run => {
                let at = started.started_at;
                self.handle(Event::Started { at });
                self.watch_container(started);
            }
            Message::Event { run, event } if run == self.run => self.handle(event),
            Message::Started { .. } | Message::Event { .. } => {}
        }
    }

    fn handle(&mut self, event: Event) {
        match &event {
            Event::Exited(exit) => {
                tracing::info!(instance = %self.assignment.instance, status = exit.exit_code, "exited");
            }
            Event::StartFailed { message } | Event::Unhealthy(message) => {
                tracing::warn!(instance = %self.assignment.instance, message);
            }
            _ => {}
        }
        let action = self.lifecycle.handle(Timestamp::now(), event);
        if !self.lifecycle.running() {
            self.checks.drain(..).for_each(|check| check.abort());
        }
        match action {
            Some(Action::Pull) => self.pull(),
            Some(Action::Start) => self.start(),
            Some(Action::Terminate) => {
                let signal = self.image.as_ref().and_then(|image| image.config.container().stop_signal);
                self.signal(signal.unwrap_or_else(|| "TERM".into()));
            }
            Some(Action::Kill) => self.signal("KILL".into()),
            Some(Action::Clean) => self.clean(),
            None => {}
        }
    }

    fn publish(&self) {
        let (assignment, life) = (&self.assignment, &self.lifecycle);
        if self.image.is_some() {
            self.ctx.board.use_image(&assignment.instance, &assignment.image);
        }
        self.ctx.board.set_instance(InstanceStatus {
            instance: assignment.instance.clone(),
            workload: assignment.workload.clone(),
            generation: assignment.generation,
            machine: self.ctx.config.machine.clone(),
            address: assignment.address,
            phase: life.phase(),
            ready: life.ready(),
            restarts: life.restarts,
            exit_code: life.last_exit.as_ref().map(|exit| exit.exit_code),
            started_at: life.started_at,
            ended_at: life.last_exit.as_ref().map(|exit| exit.ended_at),
            reason: life.reason().cloned(),
        });
    }

    fn record(&self) -> anyhow::Result<()> {
        let record = Record {
            assignment: (*self.assignment).clone(),
            restarts: self.lifecycle.restarts,
            image: self.image.as_ref().map(|image| image.manifest.clone()),
        };
        std::fs::create_dir_all(&self.paths.dir)?;
        crate::files::write_json(&self.paths.record, &record)
    }

    fn pull(&mut self) {
        let (ctx, assignment, sender) = (self.ctx.clone(), self.assignment.clone(), self.sender.clone());
        self.work.spawn(async move {
            let result = Box::new(ctx.images.ensure(&assignment.image).await);
            // Here and not while it starts: an instance that only waits can be removed at once.
            while !ctx.claims.claim(assignment.address, &assignment.instance) {
                sleep(ADDRESS_POLL).await;
            }
            send(&sender, Message::Pulled(result)).await;
        });
    }

    fn start(&mut self) {
        self.run += 1;
        let run = self.run;
        // Before anything is made: what a killed agent leaves must have a name.
        let recorded = self.record();
        let (ctx, assignment, paths) = (self.ctx.clone(), self.assignment.clone(), self.paths.clone());
        let (image, sender) = (self.image.clone(), self.sender.clone());
        self.work.spawn(async move {
            let started = async {
                recorded?;
                let image = image.ok_or_else(|| anyhow::anyhow!("the image is not here"))?;
                start::start(&ctx, &assignment, &paths, image).await
            };
            let message = match started.await {
                Ok(started) => Message::Started { run, started },
                Err(error) => {
                    Message::Event { run, event: Event::StartFailed { message: format!("{error:#}") } }
                }
            };
            send(&sender, message).await;
        });
    }

    fn adopt(&mut self) {
        let (ctx, assignment, paths) = (self.ctx.clone(), self.assignment.clone(), self.paths.clone());
        let (run, sender) = (self.run, self.sender.clone());
        self.work.spawn(async move {
            let message = match start::adopt(&ctx, &assignment, &paths).await {
                start::Found::Running(started) => Message::Started { run, started },
                start::Found::Ended(exit) => Message::Event { run, event: Event::Exited(exit) },
                start::Found::Failed(message) => {
                    Message::Event { run, event: Event::StartFailed { message } }
                }
                start::Found::Nothing => Message::Event { run, event: Event::Begin },
            };
            send(&sender, message).await;
        });
    }

    fn watch_container(&mut self, started: Started) {
        let (ctx, assignment, paths) = (self.ctx.clone(), self.assignment.clone(), self.paths.clone());
        let (run, sender) = (self.run, self.sender.clone());
        self.work.spawn(async move {
            start::init_gone(&paths, &started).await;
            send(&sender, Message::Event { run, event: Event::InitGone }).await;
            let exit = start::exit(&ctx, &assignment, &paths).await;
            send(&sender, Message::Event { run, event: Event::Exited(exit) }).await;
        });
        let Some(runtime) = self.ctx.runtimes.get(self.assignment.isolation) else { return };
        if !self.lifecycle.running() {
            return;
        }
        let target = health::Target {
            address: self.assignment.address,
            container: self.assignment.instance.to_string(),
            runtime: runtime.clone(),
            pid_file: self.paths.run.join("check.pid"),
        };
        if let Some(check) = self.assignment.health.readiness.clone() {
            let (target, sender) = (target.clone(), self.sender.clone());
            self.checks.push(self.work.spawn(async move {
                let (changes, mut changed) = mpsc::unbounded_channel();
                let check = health::readiness(&check, &target, |result| {
                    // The receiver lives as long as the check.
                    let _ = changes.send(result);
                });
                let tell = async {
                    while let Some(result) = changed.recv().await {
                        let event = result.map_or_else(Event::NotReady, |()| Event::Ready);
                        send(&sender, Message::Event { run, event }).await;
                    }
                };
                tokio::join!(check, tell);
            }));
        }
        if let Some(check) = self.assignment.health.liveness.clone() {
            let sender = self.sender.clone();
            self.checks.push(self.work.spawn(async move {
                let message = health::liveness(&check, &target).await;
                send(&sender, Message::Event { run, event: Event::Unhealthy(message) }).await;
            }));
        }
    }

    fn signal(&mut self, signal: String) {
        let (ctx, assignment, paths) = (self.ctx.clone(), self.assignment.clone(), self.paths.clone());
        self.work.spawn_blocking(move || {
            if signal == "KILL" {
                return cleanup::kill_container(&ctx, &assignment, &paths);
            }
            if let Some(runtime) = ctx.runtimes.get(assignment.isolation) {
                // A container that has just ended needs no signal; one that doesn't get it is killed after its grace.
                let _ = runtime.command(&["kill", assignment.instance.as_str(), &signal]).status();
            }
        });
    }

    fn clean(&mut self) {
        // Nothing else may go on: what a fetch or a start would tell doesn't count any more.
        self.work.abort_all();
        self.run += 1;
        let (ctx, assignment, paths) = (self.ctx.clone(), self.assignment.clone(), self.paths.clone());
        let (run, sender) = (self.run, self.sender.clone());
        self.work.spawn(async move {
            loop {
                let (ctx, assignment, paths) = (ctx.clone(), assignment.clone(), paths.clone());
                let clean = move || cleanup::remove_instance(&ctx, &assignment, &paths);
                match tokio::task::spawn_blocking(clean).await {
                    Ok(Ok(())) => break,
                    Ok(Err(error)) => {
                        tracing::error!(error = format!("{error:#}"), "can't remove an instance")
                    }
                    Err(error) => tracing::error!(%error, "removing an instance panicked"),
                }
                sleep(CLEAN_RETRY).await;
            }
            send(&sender, Message::Event { run, event: Event::Cleaned }).await;
        });
    }
}

async fn send(sender: &mpsc::Sender<Message>, message: Message) {
    // The receiver is gone only where the whole instance's task is.
    let _ = sender.send(message).await;
}
