//! A garage cluster: three nodes with a copy of everything each, and a gateway beside them that keeps nothing, as garage's
//! documentation has one on each machine that uses it. Reads and writes need two nodes.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{BUCKET, Protocol, START_MAX, Store, tool_path};

/// Nodes that keep something.
pub(crate) const NODES: usize = 3;
/// In the form that garage wants.
const ID: &str = "GK000000000000000000000001";
const SECRET: &str = "00000000000000000000000000000000000000000000000000000000000000aa";
/// How long nodes may take to have the same on a busy machine.
const SYNC_MAX: Duration = Duration::from_secs(300);
/// From the order to compare tables to the comparison.
const SYNC_BEGINS: Duration = Duration::from_secs(2);
/// A node looks for a block that it should have after twice the nodes' time-out (6 s), at the next of its turns (10 s).
const BLOCKS_SETTLE: Duration = Duration::from_secs(25);

pub(crate) struct Garage {
    /// The gateway's address.
    pub(crate) store: Store,
    /// The last one is the gateway.
    pub(crate) nodes: Vec<Node>,
}

/// One node; killed when it is dropped.
pub(crate) struct Node {
    program: PathBuf,
    dir: PathBuf,
    s3: SocketAddr,
    /// Its key and address, by which others find it.
    id: String,
    process: Option<Child>,
}

/// Starts a cluster; none, with the reason printed, where garage is not installed.
pub(crate) async fn start() -> Option<Garage> {
    let program = tool_path("garage/bin/garage");
    if !program.exists() {
        eprintln!("NOT TESTED: needs {}; `cargo xtask setup --garage` builds it", program.display());
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut nodes: Vec<_> = (0..=NODES).map(|number| Node::new(&program, dir.path(), number)).collect();
    nodes.iter_mut().for_each(Node::start);
    for node in &mut nodes {
        let begun = Instant::now();
        // The first thing that works once it runs.
        while node.try_run(&["status"]).is_err() {
            assert!(begun.elapsed() < START_MAX, "a node doesn't start:\n{}", node.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        node.id = node.run(&["node", "id", "-q"]).trim().to_owned();
    }
    let gateway = &nodes[NODES];
    for (number, id) in nodes.iter().map(|node| &node.id).enumerate() {
        let short = &id[..16];
        if number == NODES {
            gateway.run(&["layout", "assign", short, "--zone", "z", "--gateway"]);
            continue;
        }
        gateway.run(&["node", "connect", id]);
        gateway.run(&["layout", "assign", short, "--zone", &format!("z{number}"), "--capacity", "10GB"]);
    }
    gateway.run(&["layout", "apply", "--version", "1"]);
    let address = gateway.s3;
    let protocol = Protocol::S3 { id: ID, secret: SECRET, region: "garage" };
    let garage = Garage { store: Store { address, task: None, process: None, protocol, dir }, nodes };
    garage.whole().await;
    let gateway = &garage.nodes[NODES];
    gateway.run(&["key", "import", "--yes", "-n", "test", ID, SECRET]);
    gateway.run(&["bucket", "create", BUCKET]);
    gateway.run(&["bucket", "allow", "--read", "--write", "--owner", "--key", ID, BUCKET]);
    Some(garage)
}

impl Garage {
    /// Starts a node that was killed, and tells it where the others are.
    pub(crate) async fn back(&mut self, number: usize) {
        self.nodes[number].start();
        let begun = Instant::now();
        while self.nodes[number].try_run(&["status"]).is_err() {
            assert!(begun.elapsed() < START_MAX, "a node doesn't start:\n{}", self.nodes[number].log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // They would find each other within 30 s. One may be away itself.
        for other in (0..self.nodes.len()).filter(|other| *other != number) {
            let _ = self.nodes[number].try_run(&["node", "connect", &self.nodes[other].id]);
        }
    }

    /// Waits until each node sees each other one.
    pub(crate) async fn whole(&self) {
        let begun = Instant::now();
        for node in &self.nodes {
            loop {
                let health = node.try_run(&["json-api", "GetClusterHealth"]);
                let health: Value =
                    health.as_ref().map_or(Value::Null, |text| serde_json::from_str(text).unwrap());
                if health["status"] == "healthy" && health["connectedNodes"] == json!(self.nodes.len()) {
                    break;
                }
                if begun.elapsed() > SYNC_MAX {
                    let ends = self.nodes.iter().map(|node| {
                        let log = node.log();
                        log.chars().skip(log.chars().count().saturating_sub(2_000)).collect::<String>()
                    });
                    panic!("the cluster isn't whole: {health}\n{}", ends.collect::<Vec<_>>().join("\n---\n"));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Waits until each node has everything that is there now.
    pub(crate) async fn synced(&self) {
        self.whole().await;
        let gateway = &self.nodes[NODES];
        gateway.run(&["repair", "--all-nodes", "--yes", "tables"]);
        tokio::time::sleep(SYNC_BEGINS).await;
        let begun = Instant::now();
        loop {
            let asked = json!({ "node": "*", "body": {} }).to_string();
            let answer: Value =
                serde_json::from_str(&gateway.run(&["json-api", "ListWorkers", &asked])).unwrap();
            let workers = answer["success"].as_object().unwrap().values();
            let workers: Vec<&Value> = workers.flat_map(|workers| workers.as_array().unwrap()).collect();
            assert!(!workers.is_empty(), "{answer}");
            let at_it = workers.iter().filter(|worker| worker["name"].as_str().unwrap().ends_with(" sync"));
            let at_it: Vec<_> =
                at_it.filter(|worker| worker["state"] == "busy" || worker["queueLength"] != 0).collect();
            if at_it.is_empty() {
                break;
            }
            assert!(begun.elapsed() < SYNC_MAX, "the tables aren't the same: {at_it:#?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        // With as many nodes as copies, each has each block; none is deleted within ten minutes. Of a write that failed
        // some keep a block that nothing needs, and others never get it.
        let expected: BTreeSet<String> = self.nodes[..NODES].iter().flat_map(Node::blocks).collect();
        for node in &self.nodes[..NODES] {
            let (mut missing, mut since) = (usize::MAX, Instant::now());
            while missing > 0 && since.elapsed() < BLOCKS_SETTLE {
                let blocks = node.blocks();
                let now = expected.iter().filter(|block| !blocks.contains(*block)).count();
                if now != missing {
                    (missing, since) = (now, Instant::now());
                }
                assert!(begun.elapsed() < SYNC_MAX, "{missing} of {} blocks are missing", expected.len());
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            assert!(missing * 20 <= expected.len(), "{missing} of {} blocks don't come", expected.len());
        }
    }
}

impl Node {
    fn new(program: &Path, dir: &Path, number: usize) -> Node {
        let dir = dir.join(format!("node-{number}"));
        std::fs::create_dir(&dir).unwrap();
        let (rpc, s3) = (free_address(), free_address());
        let config = format!(
            "metadata_dir = '{0}/meta'\ndata_dir = '{0}/data'\ndb_engine = 'lmdb'\nreplication_factor = {NODES}\n\
             rpc_bind_addr = '{rpc}'\nrpc_public_addr = '{rpc}'\nrpc_secret = '{1}'\nrpc_timeout_msec = 3000\n\
             [s3_api]\ns3_region = 'garage'\napi_bind_addr = '{s3}'\n",
            dir.display(),
            "5e".repeat(32),
        );
        std::fs::write(dir.join("garage.toml"), config).unwrap();
        Node { program: program.to_owned(), dir, s3, id: String::new(), process: None }
    }

    pub(crate) fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut command = self.command();
        command.arg("server").env("RUST_LOG", "garage=info").stdin(Stdio::null());
        let process = command.stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.process = Some(process.unwrap_or_else(|e| panic!("can't start {command:?}: {e}")));
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Removes all that it keeps, but not who it is: as if its disks had been replaced.
    pub(crate) fn wipe(&self) {
        std::fs::remove_dir_all(self.dir.join("data")).unwrap();
        for entry in std::fs::read_dir(self.dir.join("meta")).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            if ["node_key", "cluster_layout", "peer_list"].iter().any(|kept| name.starts_with(kept)) {
                continue;
            }
            match entry.path().is_dir() {
                true => std::fs::remove_dir_all(entry.path()).unwrap(),
                false => std::fs::remove_file(entry.path()).unwrap(),
            }
        }
    }

    /// The names of the files of its blocks.
    fn blocks(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut folders = vec![self.dir.join("data")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().map(Result::unwrap) {
                let name = entry.file_name().into_string().unwrap();
                match entry.path().is_dir() {
                    true => folders.push(entry.path()),
                    // 32 bytes; compressed or not is each node's own.
                    false => found.extend(name.get(..64).map(str::to_owned)),
                }
            }
        }
        found
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("-c").arg(self.dir.join("garage.toml"));
        command
    }

    fn run(&self, args: &[&str]) -> String {
        self.try_run(args).unwrap_or_else(|error| panic!("garage {args:?}: {error}\n{}", self.log()))
    }

    fn try_run(&self, args: &[&str]) -> Result<String, String> {
        let output = self.command().args(args).output().map_err(|e| e.to_string())?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One that nothing listens at, and that no outgoing connection gets while the node is away: below those ports.
fn free_address() -> SocketAddr {
    loop {
        let address = SocketAddr::from(([127, 0, 0, 1], 10_000 + rand::random::<u16>() % 20_000));
        if std::net::TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}
