//! Registries on loopback, a tree to pack, and a walk that compares trees without any of our code.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyplace_images::{Client, Credentials, Digest, ImageSpec, Source};
use anyplace_registry::{AccessConfig, CacheCounters, Config, Server, Upstream};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use reqwest::{Method, RequestBuilder};
use tokio_util::sync::CancellationToken;

/// A registry that runs in this process.
pub(crate) struct Registry {
    pub(crate) address: SocketAddr,
    pub(crate) dir: PathBuf,
    /// What its cache counts, if it is one.
    pub(crate) counters: Option<Arc<CacheCounters>>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
    http: reqwest::Client,
}

impl Registry {
    /// Starts one on a free port.
    pub(crate) async fn start(dir: &Path) -> Registry {
        Registry::start_with(Config { listen: LOOPBACK, ..Config::new(dir) }).await
    }

    /// Starts one that caches the registry at `url`, whose data folder is `upstream`.
    pub(crate) async fn cache(dir: &Path, url: &str, upstream: &Path) -> Registry {
        Registry::start_with(cache_config(dir, &[(url, upstream)])).await
    }

    /// Starts one from which anyone may pull.
    pub(crate) async fn start_open(dir: &Path) -> Registry {
        let access = AccessConfig { anonymous_pull: true, ..AccessConfig::default() };
        Registry::start_with(Config { access, listen: LOOPBACK, ..Config::new(dir) }).await
    }

    /// Starts one with these settings.
    pub(crate) async fn start_with(config: Config) -> Registry {
        let dir = config.data_dir.clone();
        let server = Server::bind(config).await.unwrap();
        let (address, shutdown) = (server.local_addr().unwrap(), CancellationToken::new());
        let counters = server.cache_counters();
        let task = tokio::spawn(server.serve(shutdown.clone()));
        anyplace_service::install_crypto_provider();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Registry { address, dir, counters, shutdown, task, http }
    }

    /// Stops it, with open connections ended.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn credentials(&self) -> Credentials {
        Credentials::from_file(&self.dir.join("credentials")).unwrap()
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.url(), Some(self.credentials())).unwrap()
    }

    /// A raw request with the right password.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let Credentials { user, password } = self.credentials();
        self.anonymous(method, path).basic_auth(user, Some(password))
    }

    pub(crate) fn anonymous(&self, method: Method, path: &str) -> RequestBuilder {
        let url = if path.starts_with("http") { path.to_owned() } else { format!("{}{path}", self.url()) };
        self.http.request(method, url)
    }

    /// Puts a blob in one request.
    pub(crate) async fn put_blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let path = format!("/v2/{repository}/blobs/uploads/?digest={digest}");
        let answer = self.request(Method::POST, &path).body(bytes.to_vec()).send().await.unwrap();
        assert_eq!(answer.status(), 201);
        digest
    }

    /// Puts an image without layers worth the name, and gives its manifest.
    pub(crate) async fn put_image(&self, repository: &str, tag: &str, seed: &str) -> (Digest, Vec<u8>) {
        let config = self.put_blob(repository, format!("{{\"seed\":\"{seed}\"}}").as_bytes()).await;
        let layer = self.put_blob(repository, seed.as_bytes()).await;
        let manifest = manifest(&config, seed.len() + 11, &[(&layer, seed.len())]);
        let path = format!("/v2/{repository}/manifests/{tag}");
        let request = self.request(Method::PUT, &path).header("content-type", OCI_MANIFEST);
        let answer = request.body(manifest.clone()).send().await.unwrap();
        assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
        (Digest::of(&manifest), manifest)
    }

    /// The file of a blob in the registry's storage.
    pub(crate) fn blob_file(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(&digest.hex()[..2]).join(digest.hex())
    }
}

/// A free port on loopback.
pub(crate) const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Settings of a cache of the registries at these addresses, with these data folders. Tags are always asked for.
pub(crate) fn cache_config(dir: &Path, upstreams: &[(&str, &Path)]) -> Config {
    let mut config = Config { listen: LOOPBACK, ..Config::new(dir) };
    config.cache.tag_ttl_ms = 0;
    config.cache.disk_budget = Some("4GiB".parse().unwrap());
    config.upstreams = upstreams
        .iter()
        .map(|(url, folder)| Upstream {
            url: (*url).to_owned(),
            credentials_file: Some(folder.join("credentials")).filter(|file| file.exists()),
            namespace: None,
        })
        .collect();
    config
}

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A manifest with odd spacing, so that rewriting it would show.
pub(crate) fn manifest(config: &Digest, config_size: usize, layers: &[(&Digest, usize)]) -> Vec<u8> {
    let layers: Vec<String> = layers
        .iter()
        .map(|(digest, size)| {
            format!(
                "{{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\", \"digest\":\"{digest}\",\"size\":{size}}}"
            )
        })
        .collect();
    format!(
        "{{ \"schemaVersion\" : 2, \"mediaType\":\"{OCI_MANIFEST}\",\n\"config\": {{\"mediaType\":\
         \"application/vnd.oci.image.config.v1+json\",\"digest\":\"{config}\",\"size\":{config_size}}},\
         \"layers\":[{}] }}\n",
        layers.join(",")
    )
    .into_bytes()
}

/// The code of a refusal, checked to be in the specification's form.
pub(crate) async fn code(answer: reqwest::Response) -> (u16, String) {
    let status = answer.status().as_u16();
    let body: serde_json::Value = answer.json().await.unwrap();
    let error = &body["errors"][0];
    assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{body}");
    (status, error["code"].as_str().unwrap().to_owned())
}

pub(crate) fn header(answer: &reqwest::Response, name: &str) -> String {
    answer.headers().get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default()
}

/// Bytes that don't compress, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Stands between a cache and its upstream: counts the blobs that are fetched, and takes its time.
pub(crate) struct Proxy {
    pub(crate) url: String,
    pub(crate) blob_fetches: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Behind {
    url: String,
    http: reqwest::Client,
    blob_fetches: Arc<AtomicUsize>,
}

impl Proxy {
    pub(crate) async fn to(registry: &Registry) -> Proxy {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let blob_fetches = Arc::new(AtomicUsize::new(0));
        let behind =
            Behind { url: registry.url(), http: registry.http.clone(), blob_fetches: blob_fetches.clone() };
        let router = axum::Router::new().fallback(forward).with_state(behind);
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Proxy { url, blob_fetches, task }
    }
}

async fn forward(State(behind): State<Behind>, request: Request) -> Response {
    if request.method() == Method::GET && request.uri().path().contains("/blobs/") {
        behind.blob_fetches.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let url = format!("{}{}", behind.url, request.uri());
    let mut forwarded = behind.http.request(request.method().clone(), url);
    for name in ["authorization", "accept", "range"] {
        if let Some(value) = request.headers().get(name) {
            forwarded = forwarded.header(name, value);
        }
    }
    let answer = forwarded.send().await.unwrap();
    let mut response = Response::builder().status(answer.status());
    for (name, value) in answer.headers() {
        response = response.header(name, value);
    }
    response.body(Body::from_stream(answer.bytes_stream())).unwrap()
}

/// False, with the reason printed, where this user can't make device nodes.
pub(crate) fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none(), "this test needs root");
    if !root {
        eprintln!("skipped: device nodes and unpacking need root");
    }
    root
}

/// A root filesystem with a bit of everything.
pub(crate) fn tree(root: &Path) {
    let mode = |path: &str, mode| {
        std::fs::set_permissions(root.join(path), PermissionsExt::from_mode(mode)).unwrap();
    };
    for dir in ["bin", "etc/deep/er", "empty", "var/opaque", "dev", "tmp"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::write(root.join("bin/busybox"), noise(1, 3_000_000)).unwrap();
    mode("bin/busybox", 0o4755);
    std::fs::hard_link(root.join("bin/busybox"), root.join("bin/sh")).unwrap();
    symlink("busybox", root.join("bin/ls")).unwrap();
    symlink("/bin/busybox", root.join("bin/absolute")).unwrap();
    symlink("../nowhere", root.join("etc/dangling")).unwrap();
    symlink("t".repeat(200), root.join("etc/long-target")).unwrap();
    std::fs::write(root.join("etc/nothing"), "").unwrap();
    std::fs::write(root.join("etc/deep/er/config"), "key = value\n".repeat(1_000)).unwrap();
    mode("etc/deep/er/config", 0o640);
    mode("etc/deep", 0o700);
    mode("tmp", 0o1777);
    let long = root.join("l".repeat(150)).join("m".repeat(200));
    std::fs::create_dir_all(&long).unwrap();
    std::fs::write(long.join("name"), "long").unwrap();
    std::fs::write(root.join(std::ffi::OsStr::from_bytes(b"odd \xff\n name")), "odd").unwrap();
    xattr::set(root.join("etc/nothing"), "user.note", b"kept\n\0 5 a=b\n").unwrap();
    mknod(&root.join("dev/null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3)).unwrap();
    mknod(&root.join("dev/disk"), SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), makedev(8, 1)).unwrap();
    mknod(&root.join("dev/pipe"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o600), 0).unwrap();
    mode("dev/null", 0o666);
    // An overlay's upper folder: a deleted name, and a folder that hides what is below it.
    mknod(&root.join("etc/deleted"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
    xattr::set(root.join("var/opaque"), "trusted.overlay.opaque", b"y").unwrap();
    mode("", 0o755);
}

/// The tree as a source, run as a shell.
pub(crate) fn source(root: &Path) -> Source {
    let spec = ImageSpec { entrypoint: vec!["/bin/sh".into()], ..ImageSpec::default() };
    Source::Directory { root: root.to_owned(), spec }
}

/// A tree as coreutils see it: kind, mode, owner, links, device, name, link target, contents, attributes.
pub(crate) fn walk(root: &Path) -> Vec<String> {
    let find = |args: &[&str]| {
        let output = Command::new("find").current_dir(root).arg(".").args(args).output().unwrap();
        assert!(output.status.success(), "find: {}", String::from_utf8_lossy(&output.stderr));
        let lines = output.stdout.split(|b| *b == 0).map(|line| line.escape_ascii().to_string());
        lines.filter(|line| !line.is_empty()).collect::<Vec<_>>()
    };
    let mut lines = find(&["-printf", "%y %m %U:%G %P -> %l\\0"]);
    lines.extend(find(&["!", "-type", "d", "-exec", "stat", "--printf", "%h %t:%T %n\\0", "{}", "+"]));
    lines.extend(find(&["-type", "f", "-exec", "sha256sum", "--zero", "{}", "+"]));
    for (path, name) in [("etc/nothing", "user.note"), ("var/opaque", "trusted.overlay.opaque")] {
        lines.push(format!("{path} {name} {:?}", xattr::get(root.join(path), name).ok().flatten()));
    }
    lines.sort();
    lines
}

/// Compares a tree with an image of it, mounted, and shows only what differs.
pub(crate) fn assert_mounts(expected: &Path, image: &anyplace_images::PulledImage) {
    // What says that something is hidden is not seen itself.
    let is_sign = |line: &String| line.contains("etc/deleted") || line.contains("trusted.overlay.opaque");
    let mounted = Mounted::of(image);
    let lines = |root: &Path| walk(root).into_iter().filter(|line| !is_sign(line)).collect::<Vec<_>>();
    let (expected, found) = (lines(expected), lines(&mounted.path()));
    let missing: Vec<_> = expected.iter().filter(|line| !found.contains(line)).collect();
    let extra: Vec<_> = found.iter().filter(|line| !expected.contains(line)).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing: {missing:#?}\nextra: {extra:#?}");
    assert!(!mounted.path().join("etc/deleted").exists());
}

/// An image as a container sees it; unmounted when it is dropped.
pub(crate) struct Mounted(tempfile::TempDir);

impl Mounted {
    pub(crate) fn of(image: &anyplace_images::PulledImage) -> Mounted {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for made in ["upper", "work", "merged"] {
            std::fs::create_dir(at(made)).unwrap();
        }
        image.mount(&at("upper"), &at("work"), &at("merged")).unwrap();
        Mounted(dir)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("merged")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        nix::mount::umount(&self.path()).unwrap();
    }
}
