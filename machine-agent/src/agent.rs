//! The agent: watches what the machine should have, keeps one task for each instance and image, and wires the rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context as _;
use anyplace_api::{Client, ClientError, WatchEvent, Watcher};
use anyplace_images::{Credentials, Store};
use anyplace_model::{
    Assignment, Condition, InstanceId, InstanceStatus, MachineDesired, MachineReport, Mark, ReasonCode,
};
use anyplace_service::{TokenHash, install_crypto_provider, read_token, serve, unix_epoch};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    api::{self, Api},
    board::Board,
    bundle::Compiled,
    cgroup::{self, Cgroups},
    cleanup, files, firewall,
    images::Images,
    instance::{self, Claims, Context, Origin, Record, Wanted},
    machine, network,
    paths::{Paths, names},
    report,
    runtime::Runtimes,
};

/// An agent that is being replaced gets so long to let go of the image store.
const STORE_PATIENCE: Duration = Duration::from_secs(5);
/// How often the same failure is logged.
const COMPLAINT: Duration = Duration::from_secs(10);

/// Runs the machine agent until the shutdown. Containers go on running.
///
/// # Errors
/// The configuration can't be used: a file can't be read or written, or the address can't be listened on. What is
/// wrong with the machine is reported to the location scheduler in place.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    install_crypto_provider();
    let paths = Paths::new(&config);
    for folder in [paths.instances(), paths.netns(), paths.logs(), paths.runtime()] {
        files::make_private(&folder)
            .with_context(|| format!("can't make {}; check `data_dir`", folder.display()))?;
    }
    let token = read_token(&config.token_file)?;
    let client =
        Client::new(&config.location_scheduler, Some(token.clone())).context("location_scheduler")?;
    let registry = registry(&config)?;
    let options = anyplace_images::Options {
        budget_bytes: Some(machine::image_budget(config.image_budget, &config.data_dir)?.0),
        prewarm_bytes_per_s: Some(machine::prewarm_rate(config.prewarm_rate, &config.uplink).0),
    };
    let store = open_store(&paths.images(), options).await?;
    let images = store.clone();

    let mut conditions = Vec::new();
    let cgroups = Cgroups::detect(Path::new(cgroup::MOUNT))
        .map_err(|message| {
            tracing::error!(message, "no instance can start");
            let message = format!("{message}, and restart the agent");
            conditions.push(Condition { reason: ReasonCode::NoCgroups, message });
        })
        .ok();
    let board = Arc::new(Board::new(conditions));
    network::prepare_machine(&config);
    let ctx = Arc::new(Context {
        runtimes: Runtimes::detect(cgroups.as_ref(), &paths.runtime()),
        images: Images::new(store, registry, board.clone()),
        mtu: network::instance_mtu(&config.uplink),
        claims: Claims::default(),
        filter: Compiled::default(),
        firewall: Mutex::new(false),
        paths: paths.clone(),
        board: board.clone(),
        cgroups,
        config,
    });

    let (settling, settled) = mpsc::channel(1);
    let mut control = Control {
        ctx: ctx.clone(),
        instances: BTreeMap::new(),
        images: BTreeMap::new(),
        tasks: JoinSet::new(),
        stale: BTreeSet::new(),
        swept: false,
        mark: None,
    };
    control.find_instances(&settling);
    drop(settling);
    ctx.images.start_evicting();
    if !control.instances.is_empty() {
        // They may run already: under the rules of today's configuration, not of the last agent's.
        let ctx = ctx.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || ctx.ensure_firewall()).await? {
            tracing::error!(error = format!("{error:#}"), "the firewall is not set");
        }
    }

    let (token, shutdown_api) = (TokenHash::of(&token), shutdown.clone());
    let api = Api { board: board.clone(), paths, store: images, token, shutdown: shutdown_api };
    let mut services = JoinSet::new();
    services.spawn(serve(ctx.config.listen, api::router(api), shutdown.clone()));
    let reporter = report::run(client.clone(), board, frame(&ctx), settled);
    let desired = Watcher::new(client, Client::machine_desired_path(&ctx.config.machine));
    tokio::select! {
        () = control.follow(desired) => {}
        () = reporter => {}
        never = ctx.images.tidy() => match never {},
        never = ctx.images.scrub(ctx.config.scrub) => match never {},
        () = shutdown.cancelled() => {}
        Some(ended) = services.join_next() => ended.context("the HTTP server panicked")??,
    }
    // The tasks first: none may begin anything while the rest is taken down.
    control.tasks.shutdown().await;
    while let Some(ended) = services.join_next().await {
        ended.context("the HTTP server panicked")??;
    }
    leave(ctx).await;
    Ok(())
}

/// Without instances nothing of the agent's stays on the machine; with them, what they need does.
async fn leave(ctx: Arc<Context>) {
    if !names(&ctx.paths.instances()).is_empty() {
        return;
    }
    let left = tokio::task::spawn_blocking(move || {
        if let Some(cgroups) = &ctx.cgroups {
            cgroups.remove_if_empty(ctx.paths.machine_cgroup());
        }
        // Also where an earlier agent set it.
        firewall::uninstall()
    });
    match left.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = format!("{error:#}"), "the firewall's table stays"),
        Err(error) => tracing::warn!(%error, "leaving panicked"),
    }
}

/// A client of the registries, in their order.
fn registry(config: &Config) -> anyhow::Result<anyplace_images::Client> {
    let mut clients = config.registries().map(|(url, file)| {
        let credentials = file.map(Credentials::from_file).transpose()?;
        anyplace_images::Client::new(url, credentials)
    });
    let first = clients.next().context("no registry is configured; say `registry` or `registries`")??;
    clients.try_fold(first, |client, other| Ok(client.or(other?)))
}

async fn open_store(folder: &Path, options: anyplace_images::Options) -> anyhow::Result<Store> {
    let begun = Instant::now();
    loop {
        match Store::open(folder, options) {
            Err(anyplace_images::Error::StoreInUse { .. }) if begun.elapsed() < STORE_PATIENCE => {
                sleep(Duration::from_millis(50)).await;
            }
            other => return Ok(other?),
        }
    }
}

/// Names this run in reports: later than any run before, also where the clock was set back between.
fn epoch(paths: &Paths) -> u64 {
    let last = files::read_json::<u64>(&paths.epoch()).unwrap_or(0);
    let epoch = unix_epoch().max(last.saturating_add(1));
    if let Err(error) = files::write_json(&paths.epoch(), &epoch) {
        tracing::warn!(error = format!("{error:#}"), "can't keep when this agent began");
    }
    epoch
}

/// The part of a report that never changes.
fn frame(ctx: &Context) -> MachineReport {
    let (config, resources) = (&ctx.config, machine::resources(&ctx.config));
    MachineReport {
        machine: config.machine.clone(),
        epoch: epoch(&ctx.paths),
        sequence: 0,
        address: config.address,
        instance_cidr: config.instance_cidr,
        advertise: config.advertise.clone(),
        cpu: resources.cpu,
        memory: resources.memory,
        disk: resources.disk,
        gpus: machine::gpus(config),
        isolations: ctx.runtimes.isolations(),
        conditions: Vec::new(),
        images: BTreeMap::new(),
        instances: Vec::new(),
        mark: None,
    }
}

/// An instance that has a task.
struct Known {
    wanted: watch::Sender<Wanted>,
    address: Ipv4Addr,
}

/// An image that has a task.
struct Kept {
    priority: watch::Sender<u8>,
    task: AbortHandle,
}

/// What is wanted, and a task for each part of it.
struct Control {
    ctx: Arc<Context>,
    instances: BTreeMap<InstanceId, Known>,
    /// By reference.
    images: BTreeMap<String, Kept>,
    tasks: JoinSet<Option<InstanceId>>,
    /// Keys that a snapshot under way hasn't named yet.
    stale: BTreeSet<String>,
    swept: bool,
    /// The last mark that came; it holds once everything that came with it is known.
    mark: Option<Mark>,
}

impl Control {
    /// Takes over what earlier agents left.
    fn find_instances(&mut self, settling: &mpsc::Sender<()>) {
        for name in names(&self.ctx.paths.instances()) {
            let Ok(instance) = name.parse::<InstanceId>() else { continue };
            let paths = self.ctx.paths.instance(&instance);
            let Some(Record { assignment, restarts, image }) = files::read_json::<Record>(&paths.record)
            else {
                continue;
            };
            tracing::info!(%instance, "found an instance");
            self.ctx.claims.claim(assignment.address, &instance);
            let image = image.and_then(|manifest| self.ctx.images.hold(&manifest)).map(Box::new);
            self.spawn(assignment, Origin::Found { restarts, image, settled: settling.clone() });
        }
    }

    fn spawn(&mut self, assignment: Assignment, origin: Origin) {
        let (instance, address, assignment) =
            (assignment.instance.clone(), assignment.address, Arc::new(assignment));
        // Before its task has said anything: a report without it would say that it is gone.
        self.ctx.board.expect_instance(InstanceStatus::assigned(&self.ctx.config.machine, &assignment));
        let (sender, wanted) = watch::channel(Wanted::Run(assignment.clone()));
        let task = instance::run(self.ctx.clone(), assignment, wanted, origin);
        self.tasks.spawn(async { Some(task.await) });
        self.instances.insert(instance, Known { wanted: sender, address });
    }

    async fn follow(&mut self, mut desired: Watcher<MachineDesired>) {
        let mut complained: Option<Instant> = None;
        let mut complain = |error: &ClientError| {
            if complained.is_none_or(|at| at.elapsed() > COMPLAINT) {
                tracing::warn!(%error, "can't watch the location scheduler; going on with what is here");
                complained = Some(Instant::now());
            }
        };
        loop {
            tokio::select! {
                event = desired.next(&mut complain) => self.apply(event).await,
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(Some(instance)) => {
                        self.instances.remove(&instance);
                    }
                    Ok(None) => {}
                    Err(error) if error.is_panic() => tracing::error!(%error, "a task panicked"),
                    Err(_) => {}
                }
            }
        }
    }

    async fn apply(&mut self, event: WatchEvent<MachineDesired>) {
        match event {
            WatchEvent::Reset { .. } => {
                let instances = self.instances.keys().map(|instance| format!("instances/{instance}"));
                let images = self.images.keys().map(|reference| format!("images/{reference}"));
                self.stale = instances.chain(images).collect();
                // Only now is it known that a snapshot follows; nothing is removed before its end.
                self.swept = false;
            }
            WatchEvent::Put { key, value, .. } => {
                self.stale.remove(&key);
                self.want(value);
            }
            WatchEvent::Delete { key, .. } => {
                self.stale.remove(&key);
                self.drop_key(&key);
            }
            WatchEvent::Synced { .. } => {
                for key in std::mem::take(&mut self.stale) {
                    self.drop_key(&key);
                }
                if !std::mem::replace(&mut self.swept, true) {
                    self.sweep().await;
                }
                // Last: a report that has it says what came of all before.
                if let Some(mark) = self.mark {
                    self.ctx.board.set_mark(mark);
                }
            }
        }
    }

    fn want(&mut self, desired: MachineDesired) {
        match desired {
            MachineDesired::Instance(assignment) => match self.instances.get(&assignment.instance) {
                Some(Known { wanted, .. }) => {
                    let assignment = Arc::new(*assignment);
                    wanted.send_if_modified(|wanted| {
                        // An instance that is going doesn't come back: its name is never used again.
                        let changes = match wanted {
                            Wanted::Run(now) => *now != assignment,
                            Wanted::Gone => false,
                        };
                        if changes {
                            *wanted = Wanted::Run(assignment);
                        }
                        changes
                    });
                }
                None => {
                    tracing::info!(instance = %assignment.instance, image = assignment.image, "assigned");
                    self.spawn(*assignment, Origin::New);
                }
            },
            MachineDesired::Mark(mark) => self.mark = Some(mark),
            MachineDesired::Image { image: reference, priority } => {
                if let Some(kept) = self.images.get(&reference) {
                    kept.priority.send_if_modified(|now| std::mem::replace(now, priority) != priority);
                    return;
                }
                let (ctx, name) = (self.ctx.clone(), reference.clone());
                let (sender, receiver) = watch::channel(priority);
                let task = self.tasks.spawn(async move {
                    ctx.images.keep(&name, receiver).await;
                    None
                });
                self.images.insert(reference, Kept { priority: sender, task });
            }
        }
    }

    fn drop_key(&mut self, key: &str) {
        match key.split_once('/') {
            Some(("instances", instance)) => {
                if let Some(Known { wanted, .. }) = self.instances.get(instance) {
                    wanted.send_if_modified(|wanted| std::mem::replace(wanted, Wanted::Gone) != Wanted::Gone);
                }
            }
            Some(("images", reference)) => {
                if let Some(kept) = self.images.remove(reference) {
                    kept.task.abort();
                    self.ctx.board.remove_image(reference);
                }
            }
            None if key == "mark" => {}
            _ => tracing::warn!(key, "the location scheduler named something unknown"),
        }
    }

    /// Removes what belongs to no instance. Waited for, so that no instance begins in the meantime which the sweep
    /// would take for a leftover.
    async fn sweep(&mut self) {
        let ctx = self.ctx.clone();
        let known: BTreeMap<InstanceId, Ipv4Addr> =
            self.instances.iter().map(|(instance, known)| (instance.clone(), known.address)).collect();
        if let Err(error) = tokio::task::spawn_blocking(move || cleanup::sweep(&ctx, &known)).await {
            tracing::error!(%error, "removing leftovers panicked");
        }
    }
}
