//! S3 servers for the tests: s3s-fs in this process, moto in one of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tempfile::TempDir;

use crate::config::Config;
use crate::storage::{Bucket, StorageConfig};

/// Where moto is: its program `moto_server`, from PyPI's moto[server].
const MOTO: &str = "ANYPLACE_MOTO_SERVER";
const BUCKET: &str = "images";

/// A server that ends with the test.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    task: Option<tokio::task::JoinHandle<()>>,
    process: Option<Child>,
}

impl Drop for Server {
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

/// Settings for a registry on this server.
pub(super) fn config(dir: &Path, address: SocketAddr) -> Config {
    let credentials = dir.join("s3.credentials");
    std::fs::write(&credentials, "AWS_ACCESS_KEY_ID=test\nAWS_SECRET_ACCESS_KEY=secret\n").unwrap();
    let bucket = Bucket {
        bucket: BUCKET.to_owned(),
        prefix: "r".to_owned(),
        endpoint: Some(format!("http://{address}")),
        region: Some("us-east-1".to_owned()),
        credentials_file: Some(credentials),
        allow_http: true,
    };
    Config { storage: StorageConfig::S3(bucket), ..Config::new(dir.join("data")) }
}

pub(super) async fn s3s() -> (Server, TempDir) {
    s3s_that_fails(0, Arc::default()).await
}

/// Answers one request in `one_in` with an error that should be tried again, and late; counts them.
pub(super) async fn s3s_that_fails(one_in: u64, failures: Arc<AtomicU64>) -> (Server, TempDir) {
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
    (Server { address, task: Some(task), process: None }, dir)
}

/// None, with the reason printed, where moto is not asked for.
pub(super) async fn moto() -> Option<(Server, TempDir)> {
    let Some(program) = std::env::var_os(MOTO) else {
        eprintln!(
            "left out: set {MOTO} to the path of moto_server (pip install 'moto[server]') to run this on moto"
        );
        return None;
    };
    let dir = tempfile::tempdir().unwrap();
    // A port that was free a moment ago.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let process = Command::new(&program)
        .args(["-H", "127.0.0.1", "-p", &address.port().to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|e| panic!("can't start {program:?}: {e}"));
    let server = Server { address, task: None, process: Some(process) };
    let begun = Instant::now();
    anyplace_service::install_crypto_provider();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    loop {
        let made = http.put(format!("http://{address}/{BUCKET}")).send().await;
        if made.is_ok_and(|answer| answer.status().is_success()) {
            return Some((server, dir));
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "moto doesn't answer on {address}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
