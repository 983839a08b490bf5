//! Members of etcd, each a process of its own with a folder of its own.

#![allow(dead_code, reason = "each test crate uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyplace_store::{EtcdConfig, EtcdStore, MAX_TXN_OPS};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Far above what any machine needs to start a member.
const START_MAX: Duration = Duration::from_secs(120);

/// An etcd of this version, which `cargo xtask setup` fetches. None, with the reason printed, where it isn't; CI must have
/// it.
pub(crate) fn program(version: &str) -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|folder| folder.join("target/tools"))
        .find(|tools| tools.is_dir())
        .unwrap_or_default();
    let program = tools.join(format!("etcd-{version}/usr/bin/etcd"));
    let found = Command::new(&program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return Some(program);
    }
    let reason = format!("needs etcd {version} ({}); `cargo xtask setup` fetches it", program.display());
    assert!(std::env::var_os("CI").is_none(), "{reason}");
    eprintln!("skipped: {reason}");
    None
}

/// Files for TLS: of the authority, and a certificate that is valid for 127.0.0.1 as a server's and a client's.
pub(crate) struct Tls {
    pub(crate) ca_file: PathBuf,
    pub(crate) cert_file: PathBuf,
    pub(crate) key_file: PathBuf,
}

impl Tls {
    pub(crate) fn new(folder: &Path) -> Tls {
        let openssl = |words: &[&str]| {
            let done = Command::new("openssl").args(words).current_dir(folder).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        let new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"];
        let ca = ["req", "-x509", "-subj", "/CN=test", "-keyout", "ca.key", "-out", "ca.pem"];
        openssl(&[&ca[..], &new_key].concat());
        let own = ["req", "-x509", "-CA", "ca.pem", "-CAkey", "ca.key", "-subj", "/CN=member"];
        let names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"];
        openssl(&[&own[..], &names, &["-keyout", "key.pem", "-out", "cert.pem"], &new_key].concat());
        let path = |name| folder.join(name);
        Tls { ca_file: path("ca.pem"), cert_file: path("cert.pem"), key_file: path("key.pem") }
    }
}

struct Member {
    child: Child,
    client: u16,
    peer: u16,
}

/// A cluster. Dropping it ends its members.
pub(crate) struct Cluster {
    program: PathBuf,
    members: Vec<Member>,
    tls: Option<Tls>,
    more: Vec<String>,
    home: TempDir,
}

impl Cluster {
    /// Starts `size` members, with further arguments, and waits until they serve.
    pub(crate) async fn start(program: PathBuf, size: usize, with_tls: bool, more: &[&str]) -> Cluster {
        let home = tempfile::tempdir().unwrap();
        let tls = with_tls.then(|| Tls::new(home.path()));
        let more = more.iter().map(|word| (*word).to_owned()).collect();
        let mut cluster = Cluster { program, members: Vec::new(), tls, more, home };
        let pairs: Vec<(u16, u16)> = (0..size).map(|_| (free_port(), free_port())).collect();
        for index in 0..size {
            let child = cluster.spawn(index, &pairs);
            cluster.members.push(Member { child, client: pairs[index].0, peer: pairs[index].1 });
        }
        cluster.wait("prefix/of-the-start").await;
        cluster
    }

    /// One member whose limits may be too low to serve a store; waits only until it answers.
    pub(crate) async fn start_unprepared(program: PathBuf, more: &[&str]) -> Cluster {
        let home = tempfile::tempdir().unwrap();
        let more = more.iter().map(|word| (*word).to_owned()).collect();
        let mut cluster = Cluster { program, members: Vec::new(), tls: None, more, home };
        let (client, peer) = (free_port(), free_port());
        let child = cluster.spawn(0, &[(client, peer)]);
        cluster.members.push(Member { child, client, peer });
        let begun = Instant::now();
        while let Err(anyplace_store::Error::Unavailable { .. }) = EtcdStore::open(&cluster.config("x")).await
        {
            assert!(begun.elapsed() < START_MAX, "etcd doesn't answer");
        }
        cluster
    }

    fn spawn(&self, index: usize, pairs: &[(u16, u16)]) -> Child {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let initial: Vec<_> =
            pairs.iter().enumerate().map(|(n, (_, peer))| format!("m{n}=http://127.0.0.1:{peer}")).collect();
        let client = format!("{scheme}://127.0.0.1:{}", pairs[index].0);
        let peer = format!("http://127.0.0.1:{}", pairs[index].1);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log(index)).unwrap();
        let mut command = Command::new(&self.program);
        command
            .args(["--name", &format!("m{index}"), "--data-dir"])
            .arg(self.home.path().join(format!("m{index}")));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &initial.join(","), "--log-level", "warn"]);
        if !self.more.iter().any(|word| word.starts_with("--max-txn-ops")) {
            command.arg(format!("--max-txn-ops={MAX_TXN_OPS}"));
        }
        if let Some(tls) = &self.tls {
            command.arg("--cert-file").arg(&tls.cert_file).arg("--key-file").arg(&tls.key_file);
            command.arg("--trusted-ca-file").arg(&tls.ca_file).arg("--client-cert-auth");
        }
        command.args(&self.more).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command.spawn().unwrap_or_else(|error| panic!("can't start {command:?}: {error}"))
    }

    fn log(&self, index: usize) -> PathBuf {
        self.home.path().join(format!("m{index}.log"))
    }

    /// The configuration of a store with a prefix.
    pub(crate) fn config(&self, prefix: &str) -> EtcdConfig {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let file = |path: fn(&Tls) -> &PathBuf| self.tls.as_ref().map(|tls| path(tls).clone());
        EtcdConfig {
            endpoints: self.members.iter().map(|m| format!("{scheme}://127.0.0.1:{}", m.client)).collect(),
            prefix: prefix.to_owned(),
            ca_file: file(|tls| &tls.ca_file),
            cert_file: file(|tls| &tls.cert_file),
            key_file: file(|tls| &tls.key_file),
        }
    }

    /// Waits until the cluster serves.
    async fn wait(&mut self, prefix: &str) {
        let begun = Instant::now();
        while let Err(error) = EtcdStore::open(&self.config(prefix)).await {
            let unserved = matches!(error, anyplace_store::Error::Unavailable { .. });
            if !unserved || begun.elapsed() > START_MAX {
                let logs: Vec<_> = (0..self.members.len())
                    .map(|n| std::fs::read_to_string(self.log(n)).unwrap_or_default())
                    .collect();
                panic!("etcd doesn't serve: {error}\n{}", logs.join("\n"));
            }
        }
    }

    /// An empty store.
    pub(crate) async fn store(&self, prefix: &str) -> Arc<EtcdStore> {
        EtcdStore::open(&self.config(prefix)).await.unwrap()
    }

    /// Stops a member at once, as a power cut would.
    pub(crate) fn kill(&mut self, index: usize) {
        self.members[index].child.kill().unwrap();
        self.members[index].child.wait().unwrap();
    }

    /// Starts a member that was killed, with what is on its disk.
    pub(crate) fn restart(&mut self, index: usize) {
        let pairs: Vec<_> = self.members.iter().map(|member| (member.client, member.peer)).collect();
        self.members[index].child = self.spawn(index, &pairs);
    }

    /// Freezes a member, or lets it go on.
    pub(crate) fn freeze(&self, index: usize, frozen: bool) {
        let signal = if frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        kill(Pid::from_raw(self.members[index].child.id() as i32), signal).unwrap();
    }
}

/// A port that is free now; another process may take it before a member does.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
    }
}
