//! Object stores for tests, on loopback, each with an empty bucket: s3s-fs in this process, moto (S3) and azurite (Azure)
//! in processes of their own.
//!
//! Those are installed by `cargo xtask setup` and `cargo xtask test`. Where one is missing, its tests fail in CI, and are
//! skipped with the reason elsewhere. garage (S3, several nodes) takes minutes to build, so it is there only where
//! somebody asked for it, by `cargo xtask setup --garage`.

#[path = "stores/garage.rs"]
pub(crate) mod garage;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyplace_seed::Seed;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use hmac::{Hmac, KeyInit as _, Mac as _};
use hyper_util::rt::TokioIo;
use tempfile::TempDir;

const BUCKET: &str = "images";
/// azurite's account, and its key in base64: "secret".
const ACCOUNT: (&str, &str) = ("test", "c2VjcmV0");
/// How long a server may take to start on a busy machine.
const START_MAX: Duration = Duration::from_secs(120);

/// A store that ends with the test.
pub(crate) struct Store {
    pub(crate) address: SocketAddr,
    task: Option<tokio::task::JoinHandle<()>>,
    process: Option<Child>,
    protocol: Protocol,
    dir: TempDir,
}

#[derive(Clone, Copy, Debug)]
enum Protocol {
    S3 { id: &'static str, secret: &'static str, region: &'static str },
    Azure,
}

/// What s3s-fs and moto are content with.
const S3: Protocol = Protocol::S3 { id: "test", secret: "secret", region: "us-east-1" };

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
        let (account, key) = ACCOUNT;
        let (secrets, settings) = match self.protocol {
            Protocol::S3 { id, secret, region } => (
                format!("AWS_ACCESS_KEY_ID={id}\nAWS_SECRET_ACCESS_KEY={secret}\n"),
                format!(
                    "kind = 's3'\nbucket = '{BUCKET}'\nendpoint = 'http://{address}'\nregion = '{region}'\n"
                ),
            ),
            Protocol::Azure => (
                format!("AZURE_STORAGE_ACCOUNT_KEY={key}\n"),
                format!(
                    "kind = 'azure'\naccount = '{account}'\ncontainer = '{BUCKET}'\n\
                     endpoint = 'http://{address}/{account}'\n"
                ),
            ),
        };
        let file = self.dir.path().join("credentials");
        std::fs::write(&file, secrets).unwrap();
        format!("{settings}prefix = '{prefix}'\ncredentials_file = '{}'\nallow_http = true\n", file.display())
    }
}

/// s3s-fs.
pub(crate) async fn s3s() -> Store {
    s3s_that_fails(0, Arc::default()).await
}

/// Answers one request in `one_in` with an error that should be tried again, and late; counts them.
pub(crate) async fn s3s_that_fails(one_in: u64, failures: Arc<AtomicU64>) -> Store {
    let count = Arc::new(AtomicU64::new(0));
    s3s_behind(move |_| {
        let number = count.fetch_add(1, Ordering::SeqCst) + 1;
        let fails = one_in > 0 && number.is_multiple_of(one_in);
        let failures = failures.clone();
        async move {
            if !fails {
                return None;
            }
            failures.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            Some(([500, 503, 429][(number / one_in) as usize % 3], ""))
        }
    })
    .await
}

/// s3s-fs, and before it something that may let a request wait, or answer it: with a status and a body.
async fn s3s_behind<F: Future<Output = Option<(u16, &'static str)>> + Send>(
    refuse: impl Fn(&hyper::Request<hyper::body::Incoming>) -> F + Send + Sync + 'static,
) -> Store {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("s3");
    std::fs::create_dir_all(root.join(BUCKET)).unwrap();
    let mut builder = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
    builder.set_auth(s3s::auth::SimpleAuth::from_single("test", "secret"));
    let (service, refuse) = (builder.build(), Arc::new(refuse));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        loop {
            let Ok((socket, _)) = listener.accept().await else { return };
            let (service, refuse) = (service.clone(), refuse.clone());
            let service = hyper::service::service_fn(move |request| {
                let (service, refused) = (service.clone(), refuse(&request));
                async move {
                    let Some((status, body)) = refused.await else {
                        return hyper::service::Service::call(&service, request).await;
                    };
                    let mut answer = hyper::Response::new(s3s::Body::from(body.to_owned()));
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
    Store { address, task: Some(task), process: None, protocol: S3, dir }
}

/// One that takes 2 to 8 s for one request in eight while it is slow, and never answers one in 60.
pub(crate) async fn s3s_that_is_slow(slow: Arc<AtomicBool>, seed: Seed) -> Store {
    let seed = Mutex::new(seed);
    s3s_behind(move |_| {
        let fate = {
            let mut seed = seed.lock().unwrap();
            let wait_ms = if seed.one_in(8) { 2_000 + seed.below(6_001) } else { 0 };
            (Duration::from_millis(wait_ms), seed.one_in(60))
        };
        let slow = slow.load(Ordering::SeqCst);
        async move {
            let (wait, never) = slow.then_some(fate)?;
            tokio::time::sleep(wait).await;
            if never {
                std::future::pending::<()>().await;
            }
            None
        }
    })
    .await
}

/// One that refuses requests of another time than its own, as Amazon's does.
pub(crate) async fn s3s_that_checks_the_time() -> Store {
    s3s_behind(|request| {
        let sent = request.headers().get("x-amz-date").and_then(|date| date.to_str().ok()).unwrap_or_default();
        let sent = jiff::fmt::strtime::parse("%Y%m%dT%H%M%S%z", sent.replace('Z', "+0000")).unwrap();
        let off = (sent.to_timestamp().unwrap().as_second() - jiff::Timestamp::now().as_second()).abs();
        let answer = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>RequestTimeTooSkewed</Code><Message>The \
                      difference between the request time and the current time is too large.</Message></Error>";
        async move { (off > 900).then_some((403, answer)) }
    })
    .await
}

/// moto; none, with the reason printed, where it is not installed.
pub(crate) async fn moto() -> Option<Store> {
    moto_with(|_| {}).await
}

/// The same, started as `prepare` says.
pub(crate) async fn moto_with(prepare: impl FnOnce(&mut Command)) -> Option<Store> {
    let program = tool("moto/bin/moto_server")?;
    let mut command = Command::new(program);
    prepare(&mut command);
    let arguments =
        |port: u16| vec!["-H".to_owned(), "127.0.0.1".to_owned(), "-p".to_owned(), port.to_string()];
    let make_bucket = |http: &reqwest::Client, address| http.put(format!("http://{address}/{BUCKET}"));
    Some(start(command, arguments, S3, make_bucket).await)
}

/// azurite; none, with the reason printed, where it is not installed.
pub(crate) async fn azurite() -> Option<Store> {
    let program = tool("azurite/node_modules/.bin/azurite-blob")?;
    let mut command = Command::new(program);
    command.args(["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobHost", "127.0.0.1"]);
    command.env("AZURITE_ACCOUNTS", format!("{}:{}", ACCOUNT.0, ACCOUNT.1));
    let arguments = |port: u16| vec!["--blobPort".to_owned(), port.to_string()];
    Some(start(command, arguments, Protocol::Azure, make_container).await)
}

/// As `Put Container` and `Authorize with Shared Key` of Azure's documentation say.
fn make_container(http: &reqwest::Client, address: SocketAddr) -> reqwest::RequestBuilder {
    let (account, key) = ACCOUNT;
    let printer = jiff::fmt::rfc2822::DateTimePrinter::new();
    let date = printer.timestamp_to_rfc9110_string(&jiff::Timestamp::now()).unwrap();
    let (version, path) = ("2023-11-03", format!("/{account}/{BUCKET}"));
    // The verb, eleven standard headers without a value, ours, and the resource.
    let to_sign = format!(
        "PUT{}x-ms-date:{date}\nx-ms-version:{version}\n/{account}{path}\nrestype:container",
        "\n".repeat(12)
    );
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&BASE64_STANDARD.decode(key).unwrap()).unwrap();
    mac.update(to_sign.as_bytes());
    let signature = BASE64_STANDARD.encode(mac.finalize().into_bytes());
    http.put(format!("http://{address}{path}?restype=container"))
        .header("x-ms-date", date)
        .header("x-ms-version", version)
        .header("authorization", format!("SharedKey {account}:{signature}"))
        .header("content-length", "0")
}

/// Starts a program that listens on a port that was free a moment ago, and waits until its bucket is made.
async fn start(
    mut command: Command,
    arguments: impl Fn(u16) -> Vec<String>,
    protocol: Protocol,
    make_bucket: impl Fn(&reqwest::Client, SocketAddr) -> reqwest::RequestBuilder,
) -> Store {
    let dir = tempfile::tempdir().unwrap();
    anyplace_service::install_crypto_provider();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    command.args(arguments(address.port())).current_dir(dir.path()).stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log);
    let process = command.spawn().unwrap_or_else(|e| panic!("can't start {command:?}: {e}"));
    let mut store = Store { address, task: None, process: Some(process), protocol, dir };
    let begun = Instant::now();
    loop {
        let answer = match make_bucket(&http, address).send().await {
            Ok(answer) if answer.status().is_success() => return store,
            Ok(answer) => format!("{}: {}", answer.status(), answer.text().await.unwrap_or_default()),
            Err(error) => format!("{error:?}"),
        };
        let ended = store.process.as_mut().and_then(|process| process.try_wait().unwrap());
        if ended.is_some() || begun.elapsed() > START_MAX {
            let log = std::fs::read_to_string(store.dir.path().join("log")).unwrap_or_default();
            panic!("{command:?} has no bucket ({ended:?}): {answer}\n{log}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A program that `cargo xtask setup` installs.
fn tool(name: &str) -> Option<PathBuf> {
    let path = tool_path(name);
    if path.exists() {
        return Some(path);
    }
    let reason = format!("needs {}; `cargo xtask setup` installs it", path.display());
    assert!(std::env::var_os("CI").is_none(), "{reason}");
    eprintln!("skipped: {reason}");
    None
}

fn tool_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools").join(name)
}
