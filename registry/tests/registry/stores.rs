//! Object stores for tests, on loopback, each with an empty bucket: s3s-fs in this process, moto in one of its own.
//!
//! moto is installed by `cargo xtask setup` and `cargo xtask test`. Where it is missing, its tests fail in CI, and are
//! skipped with the reason elsewhere.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tempfile::TempDir;

const BUCKET: &str = "images";
/// How long a server may take to start on a busy machine.
const START_MAX: Duration = Duration::from_secs(120);

/// A store that ends with the test.
pub(crate) struct Store {
    pub(crate) address: SocketAddr,
    task: Option<tokio::task::JoinHandle<()>>,
    process: Option<Child>,
    dir: TempDir,
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Store {
    /// What `[storage]` says for this store at `address`, itself or something before it; keys begin with `prefix`.
    pub(crate) fn settings(&self, address: SocketAddr, prefix: &str) -> String {
        let credentials = self.dir.path().join("credentials");
        std::fs::write(&credentials, "AWS_ACCESS_KEY_ID=test\nAWS_SECRET_ACCESS_KEY=secret\n").unwrap();
        format!(
            "kind = 's3'\nbucket = '{BUCKET}'\nprefix = '{prefix}'\nendpoint = 'http://{address}'\n\
             region = 'us-east-1'\ncredentials_file = '{}'\nallow_http = true\n",
            credentials.display()
        )
    }
}

/// s3s-fs.
pub(crate) async fn s3s() -> Store {
    s3s_that_fails(0, Arc::default()).await
}

/// Answers one request in `one_in` with an error that should be tried again, and late; counts them.
pub(crate) async fn s3s_that_fails(one_in: u64, failures: Arc<AtomicU64>) -> Store {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("s3");
    std::fs::create_dir_all(root.join(BUCKET)).unwrap();
    let mut builder = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
    builder.set_auth(s3s::auth::SimpleAuth::from_single("test", "secret"));
    let service = builder.build();
    let count = Arc::new(AtomicU64::new(0));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        loop {
            let Ok((socket, _)) = listener.accept().await else { return };
            let (service, count, failures) = (service.clone(), count.clone(), failures.clone());
            let service = hyper::service::service_fn(move |request| {
                let number = count.fetch_add(1, Ordering::SeqCst) + 1;
                let fails = one_in > 0 && number.is_multiple_of(one_in);
                let (service, failures) = (service.clone(), failures.clone());
                async move {
                    if !fails {
                        return hyper::service::Service::call(&service, request).await;
                    }
                    failures.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    let mut answer = hyper::Response::new(s3s::Body::empty());
                    let status = [500, 503, 429][(number / one_in) as usize % 3];
                    *answer.status_mut() = hyper::StatusCode::from_u16(status).unwrap();
                    Ok(answer)
                }
            });
            tokio::spawn(async move {
                let http = hyper::server::conn::http1::Builder::new();
                let _ = http.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    Store { address, task: Some(task), process: None, dir }
}

/// moto; none, with the reason printed, where it is not installed.
pub(crate) async fn moto() -> Option<Store> {
    let program = tool("moto/bin/moto_server")?;
    let arguments =
        |port: u16| vec!["-H".to_owned(), "127.0.0.1".to_owned(), "-p".to_owned(), port.to_string()];
    let store = start(&program, tempfile::tempdir().unwrap(), arguments, async |http, address| {
        let made = http.put(format!("http://{address}/{BUCKET}")).send().await;
        made.is_ok_and(|answer| answer.status().is_success())
    });
    Some(store.await)
}

/// Starts a program that listens on a port that was free a moment ago, and waits until its bucket is made.
async fn start(
    program: &Path,
    dir: TempDir,
    arguments: impl Fn(u16) -> Vec<String>,
    make_bucket: impl AsyncFn(&reqwest::Client, SocketAddr) -> bool,
) -> Store {
    anyplace_service::install_crypto_provider();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    let process = Command::new(program)
        .args(arguments(address.port()))
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|e| panic!("can't start {}: {e}", program.display()));
    let mut store = Store { address, task: None, process: Some(process), dir };
    let begun = Instant::now();
    while !make_bucket(&http, address).await {
        let ended = store.process.as_mut().and_then(|process| process.try_wait().unwrap());
        if ended.is_some() || begun.elapsed() > START_MAX {
            let log = std::fs::read_to_string(store.dir.path().join("log")).unwrap_or_default();
            panic!("{} doesn't answer on {address} ({ended:?}):\n{log}", program.display());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    store
}

/// A program that `cargo xtask setup` installs.
fn tool(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools").join(name);
    if path.exists() {
        return Some(path);
    }
    let reason = format!("needs {}; `cargo xtask setup` installs it", path.display());
    assert!(std::env::var_os("CI").is_none(), "{reason}");
    eprintln!("skipped: {reason}");
    None
}
