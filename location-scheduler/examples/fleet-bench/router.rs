//! A simulated router: follows its location's routes and keeps them, through a relay that counts what comes.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyplace_api::{Client, WatchEvent, Watcher};
use anyplace_model::{InstanceId, LocationId, RouteRecord};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use crate::{PATIENCE, fleet::Location};

/// A change of one instance's health, and what routers must come to know of it.
pub(crate) struct Change {
    /// Where it is.
    pub(crate) location: LocationId,
    /// Key of its deployment's route.
    pub(crate) key: String,
    pub(crate) instance: InstanceId,
    pub(crate) ready: bool,
    /// How many are ready there then.
    pub(crate) ready_there: u32,
}

pub(crate) struct Router {
    location: LocationId,
    seen: watch::Receiver<Seen>,
    bytes: Arc<AtomicU64>,
    misfits: Arc<AtomicU64>,
    /// End with it.
    _tasks: JoinSet<()>,
}

struct Seen {
    routes: BTreeMap<String, RouteRecord>,
    at: Instant,
}

impl Router {
    pub(crate) fn follow(location: &Location, patches: bool) -> Self {
        let (bytes, misfits) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (sender, seen) = watch::channel(Seen { routes: BTreeMap::new(), at: Instant::now() });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let client = Client::new(&url, Some(location.token.clone())).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(relay(TcpListener::from_std(listener).unwrap(), location.address, bytes.clone()));
        tasks.spawn(follow(client, patches, sender, misfits.clone()));
        Self { location: location.name.clone(), seen, bytes, misfits, _tasks: tasks }
    }

    /// Virtual IPs that it has a route to, with so many instances in other locations and this one together.
    pub(crate) fn vips_with(&self, ready: u32) -> usize {
        let complete = |record: &&RouteRecord| match record {
            RouteRecord::Vip(route) => {
                let here = route.local.iter().filter(|it| it.ready).count() as u32;
                here + route.remote.iter().map(|it| it.ready).sum::<u32>() == ready
            }
            RouteRecord::Announcement(_) => false,
        };
        self.seen.borrow().routes.values().filter(complete).count()
    }

    /// Bytes that came, with all of HTTP.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn misfits(&self) -> u64 {
        self.misfits.load(Ordering::Relaxed)
    }

    /// When it knew of a change that is the only one under way.
    pub(crate) async fn reached(&self, change: &Change) -> Instant {
        let knows = |seen: &Seen| {
            let Some(RouteRecord::Vip(route)) = seen.routes.get(&change.key) else { return false };
            if self.location == change.location {
                route.local.iter().any(|it| it.instance == change.instance && it.ready == change.ready)
            } else {
                let there = route.remote.iter().find(|it| it.location == change.location);
                there.map_or(0, |it| it.ready) == change.ready_there
            }
        };
        let mut seen = self.seen.clone();
        let reached = tokio::time::timeout(PATIENCE, seen.wait_for(knows)).await;
        reached.expect("a router learns of a change").unwrap().at
    }
}

async fn follow(client: Client, patches: bool, seen: watch::Sender<Seen>, misfits: Arc<AtomicU64>) {
    let mut watcher = Watcher::<RouteRecord>::new(client, Client::ROUTES_PATH);
    let ignore = |_: &anyplace_api::ClientError| {};
    loop {
        let event = if patches {
            // As the router does, which has them on disk.
            let text = |key: &str| serde_json::to_vec(seen.borrow().routes.get(key)?).ok();
            watcher.next_patched(text, ignore).await
        } else {
            watcher.next(ignore).await
        };
        misfits.store(watcher.misfits(), Ordering::Relaxed);
        seen.send_modify(|seen| {
            seen.at = Instant::now();
            match event {
                WatchEvent::Reset { .. } => seen.routes.clear(),
                WatchEvent::Put { key, value, .. } => drop(seen.routes.insert(key, value)),
                WatchEvent::Delete { key, .. } => drop(seen.routes.remove(&key)),
                WatchEvent::Synced { .. } => {}
            }
        });
    }
}

/// Passes connections on, and counts what comes back.
async fn relay(listener: TcpListener, to: SocketAddr, bytes: Arc<AtomicU64>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let bytes = bytes.clone();
        connections.spawn(async move {
            let Ok(server) = TcpStream::connect(to).await else { return };
            // What is small goes at once.
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            let requests = async { drop(tokio::io::copy(&mut from_client, &mut to_server).await) };
            let answers = async {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(read) = from_server.read(&mut buffer).await
                    && read > 0
                {
                    bytes.fetch_add(read as u64, Ordering::Relaxed);
                    if to_client.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = requests => {}
                () = answers => {}
            }
        });
    }
}
