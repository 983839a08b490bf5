//! What the tasks share, and how they are started and stopped.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use anyplace_api::Client;
use anyplace_location_core::{Life, Machine, Moves, State, desired, desired_of_stranger, routes, stamp};
use anyplace_model::{LocationDesired, LocationSettings, MachineDesired, MachineId, RouteRecord};
use anyplace_service::{
    Feed, TokenHash, generate_token, install_crypto_provider, load_or_create_token, read_token, serve,
    unix_epoch,
};
use tokio::{sync::Notify, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    choice,
    config::Config,
    http,
    live::Live,
    persist::{Disk, History},
    reconcile, upstream,
};

/// Machines that are known, and watches of machines that aren't yet: well over what a location has.
pub(crate) const MAX_MACHINES: usize = 4_096;

/// The scheduler: one value that all tasks share. Locks are taken in the order of the fields, and never held over an
/// `await`.
pub(crate) struct Scheduler {
    live: Mutex<Live>,
    machine_feeds: Mutex<BTreeMap<MachineId, Arc<Feed<MachineDesired>>>>,
    history: Mutex<History>,
    pub(crate) routes: Arc<Feed<RouteRecord>>,
    pub(crate) config: Config,
    pub(crate) disk: Disk,
    /// Wakes the reconcile loop. It never says why: the loop looks at everything.
    pub(crate) reconcile: Notify,
    /// Has the routes computed and published.
    pub(crate) rerouted: Notify,
    /// Wakes the report to the global scheduler.
    pub(crate) report: Notify,
    /// Wakes the choice of what goes to other locations.
    pub(crate) granted: Notify,
    pub(crate) epoch: u64,
    pub(crate) machine_token: String,
    pub(crate) log_token: String,
    pub(crate) machine_token_hash: TokenHash,
    pub(crate) log_token_hash: TokenHash,
    /// Towards the global scheduler.
    pub(crate) global: Client,
    pub(crate) shutdown: CancellationToken,
}

impl Scheduler {
    /// The state.
    pub(crate) fn live(&self) -> MutexGuard<'_, Live> {
        lock(&self.live)
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        lock(&self.history)
    }

    /// Takes over what the global scheduler wants.
    pub(crate) fn want(&self, desired: Arc<BTreeMap<String, LocationDesired>>) {
        tracing::debug!(items = desired.len(), "the global scheduler wants something else");
        let mut live = self.live();
        live.want(desired);
        self.publish_routes(&live);
        drop(live);
        self.reconcile.notify_one();
        self.granted.notify_one();
    }

    /// Computes the routes and publishes them. Called with the state locked, so that an older one never follows a
    /// newer one.
    pub(crate) fn publish_routes(&self, live: &Live) {
        if live.is_warm() {
            let mut routes = routes(&live.state);
            stamp(&mut routes, &self.routes.entries(), &live.state.latency_ms, now_ms());
            self.routes.replace(routes);
        }
    }

    /// Publishes what machines should have. Called with the state locked, like the routes.
    pub(crate) fn publish_machines(&self, live: &Live) {
        let mut desired = desired(&live.state);
        let mut feeds = lock(&self.machine_feeds);
        for machine in desired.keys() {
            if !feeds.contains_key(machine) {
                feeds.insert(machine.clone(), Arc::new(Feed::new()));
            }
        }
        for (machine, feed) in feeds.iter() {
            let known = desired.remove(machine);
            feed.replace(known.unwrap_or_else(|| desired_of_stranger(&live.state)));
        }
    }

    /// The feed of a machine, known or not yet; none where there are too many.
    pub(crate) fn machine_feed(&self, machine: &MachineId) -> Option<Arc<Feed<MachineDesired>>> {
        let live = self.live();
        let mut feeds = lock(&self.machine_feeds);
        if let Some(feed) = feeds.get(machine) {
            return Some(feed.clone());
        }
        if feeds.len() >= MAX_MACHINES {
            return None;
        }
        let feed = Arc::new(Feed::new());
        let known = desired(&live.state).remove(machine);
        feed.replace(known.unwrap_or_else(|| desired_of_stranger(&live.state)));
        feeds.insert(machine.clone(), feed.clone());
        Some(feed)
    }

    /// Forgets machines that were lost long ago.
    pub(crate) fn forget(&self, machines: &[MachineId]) {
        let mut live = self.live();
        machines.iter().for_each(|machine| live.forget(machine));
        let mut feeds = lock(&self.machine_feeds);
        machines.iter().for_each(|machine| drop(feeds.remove(machine)));
    }
}

/// Milliseconds since 1970 when this was first asked, and from then on as they passed: no wait is shorter because
/// somebody has set the clock.
pub(crate) fn now_ms() -> u64 {
    static BEGINNING: OnceLock<(u64, Instant)> = OnceLock::new();
    let (began_ms, began) = BEGINNING.get_or_init(|| (unix_epoch() / 1_000, Instant::now()));
    began_ms.saturating_add(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX))
}

/// Nothing panics while it holds one of these locks with the value half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the location scheduler until the shutdown.
///
/// # Errors
/// The configuration, the store or a token can't be used, the address can't be listened on, or the store fails.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    config.validate()?;
    install_crypto_provider();
    let shutdown = shutdown.child_token();
    let scheduler = Arc::new(open(config, shutdown.clone()).await?);
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let listen = scheduler.config.listen;
    tasks.spawn(serve(listen, http::router(scheduler.clone()), shutdown.clone()));
    tasks.spawn(clock(scheduler.clone()));
    tasks.spawn(reconcile::run(scheduler.clone()));
    tasks.spawn(reroute(scheduler.clone()));
    tasks.spawn(choice::run(scheduler.clone()));
    tasks.spawn(upstream::watch(scheduler.clone()));
    tasks.spawn(upstream::report(scheduler));
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        // The first that ends takes the others with it.
        shutdown.cancel();
        result = result.and(ended.context("a task of the location scheduler panicked").flatten());
    }
    result
}

/// Reads what was stored; nothing listens yet.
async fn open(config: Config, shutdown: CancellationToken) -> anyhow::Result<Scheduler> {
    let location_token = read_token(&config.token_file)?;
    let machine_token = load_or_create_token(&config.data_dir.join("machine.token"))?;
    let store = anyplace_store::open(config.store_path(), config.etcd.as_ref()).await?;
    let disk = Disk::new(store);
    let stored = disk.load(now_ms()).await?;
    tracing::info!(
        instances = stored.reservations.len(),
        machines = stored.machines.len(),
        wanted = stored.desired.len(),
        "store read"
    );
    let state = State {
        revision: stored.revision,
        process: rand::random(),
        now_ms: 0,
        timing: config.timing(),
        site: config.site(),
        settings: LocationSettings::default(),
        vip_prefixes: None,
        machines: stored
            .machines
            .into_iter()
            .map(|(name, report)| (name, Machine::new(Life::Suspect, report)))
            .collect(),
        reservations: stored.reservations,
        withdrawn: BTreeMap::new(),
        placements: BTreeMap::new(),
        attempts: BTreeMap::new(),
        wishes: BTreeMap::new(),
        remote: BTreeMap::new(),
        away: stored.away,
        latency_ms: stored.latency_ms,
        prewarms: BTreeMap::new(),
        warm: BTreeMap::new(),
        moves: Moves { policy: config.moves(), under_way: stored.moves, ..Moves::default() },
    };
    let mut live = Live::new(state, config.lease(), Instant::now());
    live.want(Arc::new(stored.desired));
    let log_token = generate_token();
    let scheduler = Scheduler {
        live: Mutex::new(live),
        machine_feeds: Mutex::default(),
        history: Mutex::new(stored.history),
        routes: Arc::new(Feed::new()),
        global: Client::new(&config.global, Some(location_token))?,
        config,
        disk,
        reconcile: Notify::new(),
        rerouted: Notify::new(),
        report: Notify::new(),
        granted: Notify::new(),
        epoch: unix_epoch(),
        machine_token_hash: TokenHash::of(&machine_token),
        log_token_hash: TokenHash::of(&log_token),
        machine_token,
        log_token,
        shutdown,
    };
    let live = scheduler.live();
    scheduler.publish_machines(&live);
    scheduler.publish_routes(&live);
    drop(live);
    Ok(scheduler)
}

/// Publishes the routes after machines' reports. Reports that come meanwhile are published together, and half of the time is
/// left to others: in a large location this takes longer than the time between two reports.
async fn reroute(scheduler: Arc<Scheduler>) -> anyhow::Result<()> {
    let mut pause = Duration::ZERO;
    loop {
        tokio::time::sleep(pause).await;
        tokio::select! {
            () = scheduler.rerouted.notified() => {}
            () = scheduler.shutdown.cancelled() => return Ok(()),
        }
        let begun = Instant::now();
        scheduler.publish_routes(&scheduler.live());
        pause = begun.elapsed();
    }
}

/// Lets leases expire at the moment when they do.
async fn clock(scheduler: Arc<Scheduler>) -> anyhow::Result<()> {
    let lease = scheduler.config.lease();
    let mut wake = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(wake.into()) => {}
            () = scheduler.shutdown.cancelled() => return Ok(()),
        }
        let now = Instant::now();
        let late = now.saturating_duration_since(wake);
        let mut live = scheduler.live();
        // Woken late, this process was stopped or starved; reports may lie unread, so silence proves nothing.
        if late > lease / 6 {
            tracing::warn!(
                late_ms = late.as_millis(),
                "the scheduler was held up; machines get that time back"
            );
            live.forgive(late);
        }
        let (changed, next) = live.expire(now);
        if changed {
            // A machine that is lost must say that it knows, before it counts again.
            scheduler.publish_machines(&live);
            scheduler.publish_routes(&live);
            scheduler.reconcile.notify_one();
            scheduler.report.notify_one();
        }
        wake = next;
    }
}
