//! A router's view: follows the routes, and remembers the lowest it saw.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyplace_api::{Client, WatchEvent, Watcher};
use anyplace_model::{Away, Endpoint, Route, RouteRecord};

#[derive(Clone, Default)]
pub(crate) struct View(BTreeMap<String, RouteRecord>);

impl View {
    pub(crate) fn endpoints(&self, vip: &str) -> Vec<Endpoint> {
        self.route(vip).map_or(Vec::new(), |route| route.local.clone())
    }

    pub(crate) fn ready_endpoints(&self, vip: &str) -> Vec<Endpoint> {
        self.endpoints(vip).into_iter().filter(|endpoint| endpoint.ready).collect()
    }

    pub(crate) fn ready(&self, vip: &str) -> usize {
        self.ready_endpoints(vip).len()
    }

    pub(crate) fn draining(&self, vip: &str) -> usize {
        self.endpoints(vip).iter().filter(|endpoint| endpoint.draining).count()
    }

    fn route(&self, vip: &str) -> Option<&Route> {
        match self.0.get(&format!("vips/{vip}")) {
            Some(RouteRecord::Vip(route)) => Some(route),
            _ => None,
        }
    }

    /// What goes to other locations, and did before.
    pub(crate) fn away(&self, vip: &str) -> Vec<Away> {
        self.route(vip).map_or(Vec::new(), |route| route.away.clone())
    }

    pub(crate) fn parts(&self, vip: &str, location: &str) -> u16 {
        self.route(vip).map_or(0, |route| route.parts_to(&location.parse().unwrap()))
    }

    /// The other location that gets what nothing here is ready for.
    pub(crate) fn takes_over(&self, vip: &str) -> Option<String> {
        Some(self.route(vip)?.takes_over()?.location.to_string())
    }

    /// How many prefixes are announced, once it is known.
    pub(crate) fn announced(&self) -> Option<usize> {
        match self.0.get("announcement") {
            Some(RouteRecord::Announcement(announcement)) => Some(announcement.prefixes.len()),
            _ => None,
        }
    }
}

#[derive(Default)]
struct Seen {
    now: View,
    lowest: BTreeMap<String, usize>,
}

pub(crate) struct Routes {
    seen: Arc<Mutex<Seen>>,
    task: tokio::task::JoinHandle<()>,
}

impl Routes {
    pub(crate) fn watch(client: Client) -> Self {
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let task = tokio::spawn(follow(seen.clone(), client));
        Self { seen, task }
    }

    pub(crate) fn now(&self) -> View {
        self.seen.lock().unwrap().now.clone()
    }

    /// Waits until this holds; returns how long that took.
    pub(crate) async fn until(&self, limit: Duration, holds: impl Fn(&View) -> bool) -> Duration {
        let start = Instant::now();
        while !holds(&self.now()) {
            assert!(start.elapsed() < limit, "not within {limit:?}: {:#?}", self.now().0);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        start.elapsed()
    }

    pub(crate) fn forget_lows(&self) {
        self.seen.lock().unwrap().lowest.clear();
    }

    /// The fewest ready endpoints that were ever published, and are now.
    pub(crate) fn lowest(&self, vip: &str) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.lowest.get(vip).copied().unwrap_or(usize::MAX).min(seen.now.ready(vip))
    }
}

impl Drop for Routes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(seen: Arc<Mutex<Seen>>, client: Client) {
    let mut watcher = Watcher::<RouteRecord>::new(client, Client::ROUTES_PATH);
    let mut view = View::default();
    loop {
        match watcher.next(|_| {}).await {
            WatchEvent::Reset { .. } => view.0.clear(),
            WatchEvent::Put { key, value, .. } => drop(view.0.insert(key, value)),
            WatchEvent::Delete { key, .. } => drop(view.0.remove(&key)),
            WatchEvent::Synced { .. } => {
                let mut seen = seen.lock().unwrap();
                let vips = view.0.values().chain(seen.now.0.values()).filter_map(|record| match record {
                    RouteRecord::Vip(route) => Some(route.vip.to_string()),
                    RouteRecord::Announcement(_) => None,
                });
                for vip in vips.collect::<Vec<_>>() {
                    let ready = view.ready(&vip);
                    let low = seen.lowest.entry(vip).or_insert(ready);
                    *low = ready.min(*low);
                }
                seen.now = view.clone();
            }
        }
    }
}
