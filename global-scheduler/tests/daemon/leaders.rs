//! Several global schedulers over one etcd: one leads, and what was paused writes nothing.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyplace_api::{Client, ClientError, ErrorCode, Role};
use anyplace_global_scheduler::Config;
use anyplace_model::DeploymentName;
use anyplace_seed::Seed;
use anyplace_store::{Store, StoreExt as _};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    etcd::{self, Cluster},
    support::{Bed, deployment, eventually, job},
};

/// The child's configuration.
const CHILD: &str = "ANYPLACE_TEST_GLOBAL_TO_KILL";
const TOKEN: &str = "the-operators";
const PREFIX: &str = "anyplace/global";
/// Longer than a leader's lease.
const PAUSE: Duration = Duration::from_secs(7);

/// Not a test by itself: a global scheduler in a process of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_be_killed() {
    let Some(config) = std::env::var_os(CHILD) else { return };
    anyplace_service::install_crypto_provider();
    let config: Config = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
    let shutdown = CancellationToken::new();
    anyplace_global_scheduler::run(config, shutdown).await.unwrap();
}

struct Scheduler {
    config: PathBuf,
    url: String,
    child: Child,
}

impl Scheduler {
    fn start(home: &Path, name: &str, cluster: &Cluster) -> Scheduler {
        Scheduler::run(Scheduler::configure(home, name, cluster))
    }

    /// The file of a configuration, and the address in it.
    fn configure(home: &Path, name: &str, cluster: &Cluster) -> (PathBuf, String) {
        let listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let dir = home.join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("admin.token"), TOKEN).unwrap();
        let etcd = cluster.config(PREFIX);
        let config = json!({
            "data_dir": dir, "listen": listen, "vip_pools": ["203.0.113.0/24"],
            "etcd": { "endpoints": etcd.endpoints, "prefix": etcd.prefix },
        });
        let path = dir.join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        (path, format!("http://{listen}"))
    }

    fn run((config, url): (PathBuf, String)) -> Scheduler {
        let child = spawn(&config);
        Scheduler { config, url, child }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn client(&self) -> Client {
        Client::new(&self.url, Some(TOKEN.into())).unwrap()
    }

    async fn leads(&self) -> bool {
        self.client().deployments().await.is_ok()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(config: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "leaders::to_be_killed", "--nocapture"])
        .env(CHILD, config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Deployments are applied while leaders are killed and frozen. What was acknowledged is there, once, with an address of
/// its own; a leader that wakes after another one began writes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_come_and_go_and_no_write_is_lost_or_done_by_two() {
    let Some(program) = etcd::program("3.5") else { return };
    anyplace_service::install_crypto_provider();
    let mut seed = Seed::from_env();
    let cluster = Cluster::start(program, 1, false, &[]).await;
    let store = cluster.store(PREFIX).await;
    let home = tempfile::tempdir().unwrap();
    let mut schedulers: Vec<_> =
        ["a", "b", "c"].into_iter().map(|name| Scheduler::start(home.path(), name, &cluster)).collect();
    let urls: Vec<_> = schedulers.iter().map(|scheduler| scheduler.url.clone()).collect();
    let client = Client::new(&urls.join(","), Some(TOKEN.into())).unwrap();
    let (mut kept, mut perhaps, mut last_term) = (BTreeSet::new(), BTreeSet::new(), 0);
    for round in 0..anyplace_seed::rounds(4, 40) {
        eventually("one leads", || async { client.deployments().await.is_ok() }).await;
        let mut leading = None;
        for (index, scheduler) in schedulers.iter().enumerate() {
            if scheduler.leads().await {
                assert_eq!(leading.replace(index), None, "two lead");
            }
        }
        let Some(index) = leading else { continue };
        let (term, _): (u64, _) = store.get_json("term").await.unwrap().unwrap();
        assert!(term > last_term, "term {term} after {last_term}");
        last_term = term;
        let standby = schedulers[(index + 1) % 3].client().deployments().await.unwrap_err();
        assert_eq!(standby.code(), Some(ErrorCode::NotLeading));
        assert!(standby.to_string().contains(&urls[index]), "{standby}");

        let frozen = seed.one_in(2);
        if frozen {
            schedulers[index].signal(Signal::SIGSTOP);
            // Written once it wakes, if it may: its connection is accepted by the kernel meanwhile.
            let (old, name) = (schedulers[index].client(), format!("late-{round}"));
            let late = tokio::spawn(async move {
                let outcome = old.apply_deployment(&deployment(json!({"name": name}))).await;
                (name, outcome.map(drop))
            });
            apply(&client, &format!("d-{round}"), &mut kept).await;
            tokio::time::sleep(PAUSE).await;
            schedulers[index].signal(Signal::SIGCONT);
            match late.await.unwrap() {
                (name, Ok(())) => drop(kept.insert(name)),
                (name, Err(_)) => drop(perhaps.insert(name)),
            }
        } else {
            schedulers[index].child.kill().unwrap();
            schedulers[index].child.wait().unwrap();
            apply(&client, &format!("d-{round}"), &mut kept).await;
            schedulers[index].child = spawn(&schedulers[index].config);
        }
    }
    eventually("one leads", || async { client.deployments().await.is_ok() }).await;
    let there = client.deployments().await.unwrap();
    let names: BTreeSet<String> = there.iter().map(|view| view.name.to_string()).collect();
    assert!(names.is_superset(&kept), "{names:?} lacks some of {kept:?}");
    let known: BTreeSet<String> = kept.union(&perhaps).cloned().collect();
    assert!(known.is_superset(&names), "{names:?} has what nobody asked for: {known:?}");
    let addresses: BTreeSet<_> = there.iter().map(|view| view.vip).collect();
    assert_eq!(addresses.len(), there.len(), "an address was given twice");
    let (stored, _) = store.list("deployments/").await.unwrap();
    assert_eq!(stored.len(), there.len());
}

/// Applies until it is acknowledged: the same again is the same.
async fn apply(client: &Client, name: &str, kept: &mut BTreeSet<String>) {
    eventually("it is applied", || async {
        match client.apply_deployment(&deployment(json!({"name": name}))).await {
            Ok(_) => true,
            Err(ClientError::Refused(problem)) => {
                let passes = matches!(problem.code, ErrorCode::NotLeading | ErrorCode::Unavailable);
                assert!(passes, "{problem}");
                false
            }
            Err(_) => false,
        }
    })
    .await;
    kept.insert(name.to_owned());
}

/// From a file to etcd and back, with addresses, tokens and jobs; the backup is made while the scheduler runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduler_moves_to_etcd_and_back_with_all_it_knows() {
    let Some(program) = etcd::program("3.5") else { return };
    let mut bed = Bed::start().await;
    let viewer = bed.token(Role::Viewer, None).await;
    for name in ["a", "b", "c"] {
        bed.admin.apply_deployment(&deployment(json!({"name": name}))).await.unwrap();
    }
    bed.admin.delete_deployment(&"b".parse().unwrap()).await.unwrap();
    bed.admin.submit_job(&job(json!({"name": "nightly"}))).await.unwrap();
    let known = async |client: &Client| {
        let deployments = client.deployments().await.unwrap();
        let mut known: Vec<_> = deployments.iter().map(|view| (view.name.to_string(), view.vip)).collect();
        known.extend(
            client.jobs().await.unwrap().iter().map(|view| (view.name.to_string(), [0, 0, 0, 0].into())),
        );
        known
    };
    let before = known(&bed.admin).await;
    let file = bed.admin.export().await.unwrap();
    let refused = bed.client(Some(viewer.clone())).export().await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::Forbidden), "specs have secrets");
    bed.stop().await;

    let cluster = Cluster::start(program, 1, false, &[]).await;
    let home = tempfile::tempdir().unwrap();
    let config = Scheduler::configure(home.path(), "etcd", &cluster);
    let moved: Config = serde_json::from_slice(&std::fs::read(&config.0).unwrap()).unwrap();
    let entries = anyplace_global_scheduler::import(&moved, &file).await.unwrap();
    let scheduler = Scheduler::run(config);
    eventually("it leads", || scheduler.leads()).await;
    assert_eq!(known(&scheduler.client()).await, before);
    let again = Client::new(&scheduler.url, Some(viewer)).unwrap();
    assert_eq!(again.deployments().await.unwrap().len(), 2, "tokens go along");
    scheduler.client().delete_deployment(&"c".parse().unwrap()).await.unwrap();
    let left = known(&scheduler.client()).await;

    // Over etcd the store may be read while the scheduler runs; it knows no more about it.
    let back = anyplace_global_scheduler::export(&moved).await.unwrap();
    let folder = home.path().join("file");
    let file: Config =
        serde_json::from_value(json!({"data_dir": folder, "vip_pools": ["203.0.113.0/24"]})).unwrap();
    assert!(anyplace_global_scheduler::import(&file, &back).await.unwrap() > entries / 2);
    let refused = anyplace_global_scheduler::import(&file, &back).await.unwrap_err();
    assert!(refused.to_string().contains("the store isn't empty"), "{refused}");
    drop(scheduler);
    std::fs::copy(folder.join("store.redb"), bed.path().join("store.redb")).unwrap();
    bed.restart_stopped().await;
    assert_eq!(known(&bed.admin).await, left);
    bed.stop().await;
}

/// The fence itself: once a later term has begun, a leader that knows nothing of it, and whose lease still lasts, writes
/// nothing, and reads everything anew before it leads again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_term_ends_the_earlier_ones_writes() {
    let Some(program) = etcd::program("3.4") else { return };
    anyplace_service::install_crypto_provider();
    let cluster = Cluster::start(program, 1, false, &[]).await;
    let store = cluster.store(PREFIX).await;
    let home = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(home.path(), "a", &cluster);
    let client = scheduler.client();
    eventually("it leads", || scheduler.leads()).await;
    client.apply_deployment(&deployment(json!({"name": "before"}))).await.unwrap();
    let (term, _): (u64, _) = store.get_json("term").await.unwrap().unwrap();
    store.put_json("term", &(term + 1_000_000_000)).await.unwrap();
    let error = client.apply_deployment(&deployment(json!({"name": "after"}))).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotLeading), "{error}");
    assert_eq!(store.get("deployments/after").await.unwrap(), None);
    eventually("it leads again", || scheduler.leads()).await;
    let (again, _): (u64, _) = store.get_json("term").await.unwrap().unwrap();
    assert!(again > term + 1_000_000_000, "a term before its predecessor: {again}");
    let names: Vec<DeploymentName> =
        client.deployments().await.unwrap().into_iter().map(|view| view.name).collect();
    assert_eq!(names, ["before".parse::<DeploymentName>().unwrap()]);
    client.apply_deployment(&deployment(json!({"name": "after"}))).await.unwrap();
}
