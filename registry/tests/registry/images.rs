//! Our own client against our own registry: push, pull, unpack, mount.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyplace_images::{
    Client, Credentials, Digest, Error, Item, NoProgress, Options, Progress, PullOptions, PulledImage,
    Reference, SharedProgress, Source, Store, pack, push,
};

use crate::support::{Mounted, Proxy, Registry, assert_mounts, is_root, noise, source, tree};

/// Adds up what is reported.
#[derive(Default)]
struct Sums {
    total: AtomicU64,
    advanced: AtomicU64,
    finished: AtomicUsize,
    skipped: Mutex<Vec<String>>,
}

impl Progress for Sums {
    fn started(&self, _: &Item, total_bytes: u64) {
        self.total.fetch_add(total_bytes, Ordering::SeqCst);
    }
    fn advanced(&self, _: &Item, bytes: u64) {
        self.advanced.fetch_add(bytes, Ordering::SeqCst);
    }
    fn finished(&self, _: &Item) {
        self.finished.fetch_add(1, Ordering::SeqCst);
    }
    fn skipped(&self, item: &Item, _: u64) {
        self.skipped.lock().unwrap().push(item.name.clone());
    }
}

struct Bed {
    dir: tempfile::TempDir,
    root: PathBuf,
    work: PathBuf,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let (root, work) = (dir.path().join("tree"), dir.path().join("work"));
    std::fs::create_dir(&root).unwrap();
    tree(&root);
    Bed { dir, root, work }
}

#[tokio::test]
async fn what_is_pushed_is_what_is_unpacked() {
    if !is_root() {
        return;
    }
    let bed = bed();
    let registry = Registry::start(&bed.dir.path().join("registry")).await;
    let (client, reference) = (registry.client(), "team/app:v1".parse::<Reference>().unwrap());
    let sums = Arc::new(Sums::default());
    let progress: SharedProgress = sums.clone();
    let packed = pack(&source(&bed.root), &bed.work, &progress).await.unwrap();
    let summary = push(&packed, &reference, &client, &progress).await.unwrap();
    assert_eq!((summary.bytes_sent, summary.skipped), (summary.bytes_packed, 0));
    assert_eq!(sums.advanced.load(Ordering::SeqCst), sums.total.load(Ordering::SeqCst));
    assert_eq!(sums.finished.load(Ordering::SeqCst), 3);

    // Again, and to another repository: nothing is sent.
    for name in ["team/app:v1", "team/app:v2", "other:v1"] {
        let again = push(&packed, &name.parse().unwrap(), &client, &progress).await.unwrap();
        assert_eq!((again.bytes_sent, again.skipped), (0, 2), "{name}");
    }

    let options = PullOptions { progress: progress.clone(), ..PullOptions::default() };
    let store = Store::open(&bed.dir.path().join("store"), Options::default()).unwrap();
    assert!(!store.has(&reference));
    let image = store.pull(&reference, &client, &options).await.unwrap();
    assert_eq!(image.digest, summary.digest);
    assert_eq!(image.config.container().entrypoint.unwrap(), ["/bin/sh"]);
    assert_eq!((image.stats.layers, image.stats.layers_reused), (1, 0));
    assert_mounts(&bed.root, &image);
    assert!(store.has(&reference));
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(store.find(&reference).unwrap().unwrap(), image);
    // The same layer under another name is not fetched again.
    sums.skipped.lock().unwrap().clear();
    store.pull(&"other:v1".parse().unwrap(), &client, &options).await.unwrap();
    assert_eq!(sums.skipped.lock().unwrap().len(), 1);
    // With the registry gone, what is here is enough; what isn't, says so.
    registry.stop().await;
    assert_eq!(store.pull(&reference, &client, &options).await.unwrap(), image);
    let by_digest: Reference = format!("team/app@{}", image.digest).parse().unwrap();
    let error = store.pull(&by_digest, &client, &options).await.unwrap_err();
    assert!(matches!(error, Error::RegistryUnreachable { .. }));
    assert!(error.to_string().contains("check that the registry at http://127.0.0.1:"), "{error}");
}

#[tokio::test]
async fn concurrent_pulls_of_one_image_fetch_it_once() {
    if !is_root() {
        return;
    }
    let bed = bed();
    let registry = Registry::start(&bed.dir.path().join("registry")).await;
    let reference: Reference = "app".parse().unwrap();
    let progress = NoProgress::shared();
    let packed = pack(&source(&bed.root), &bed.work, &progress).await.unwrap();
    push(&packed, &reference, &registry.client(), &progress).await.unwrap();
    let proxy = Proxy::to(&registry).await;
    let client = Client::new(&proxy.url, Some(registry.credentials())).unwrap();
    let store = Store::open(&bed.dir.path().join("store"), Options::default()).unwrap();
    let pulls: Vec<_> = (0..8)
        .map(|_| {
            let (store, client, reference) = (store.clone(), client.clone(), reference.clone());
            tokio::spawn(async move { store.pull(&reference, &client, &PullOptions::default()).await })
        })
        .collect();
    // One that is given up takes none of the others with it.
    pulls[0].abort();
    for pull in pulls.into_iter().skip(1) {
        pull.await.unwrap().unwrap();
    }
    let configs_and_layer = proxy.blob_fetches.load(Ordering::SeqCst);
    assert!(configs_and_layer <= 8 + 2, "{configs_and_layer} fetches");
    assert_mounts(&bed.root, &store.find(&reference).unwrap().unwrap());
    registry.stop().await;
}

#[tokio::test]
async fn damaged_layers_are_refused_and_nothing_is_kept() {
    if !is_root() {
        return;
    }
    let bed = bed();
    let registry = Registry::start(&bed.dir.path().join("registry")).await;
    let (client, progress) = (registry.client(), NoProgress::shared());
    let reference: Reference = "app:v1".parse().unwrap();
    let packed = pack(&source(&bed.root), &bed.work, &progress).await.unwrap();
    push(&packed, &reference, &client, &progress).await.unwrap();
    let file = registry.blob_file(&packed.blobs[0].digest);
    let good = std::fs::read(&file).unwrap();
    let store_dir = bed.dir.path().join("store");
    let options = PullOptions::default();
    let store = Store::open(&store_dir, Options::default()).unwrap();
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for bad in [flipped, good[..middle].to_vec(), [good.clone(), vec![0]].concat()] {
        std::fs::write(&file, bad).unwrap();
        let error = store.pull(&reference, &client, &options).await.unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { .. } | Error::SizeMismatch { .. }), "{error:?}");
        assert!(!store.has(&reference));
        for sub in ["tmp", "layers", "images"] {
            assert_eq!(std::fs::read_dir(store_dir.join(sub)).unwrap().count(), 0, "{sub}");
        }
    }
    std::fs::write(&file, good).unwrap();
    store.pull(&reference, &client, &options).await.unwrap();
    registry.stop().await;
}

#[tokio::test]
async fn errors_name_the_next_command() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let reference: Reference = "nobody/knows:v1".parse().unwrap();
    let error = registry.client().get_manifest(&reference).await.unwrap_err();
    assert!(matches!(error, Error::RepositoryOrTagNotFound { .. }));
    assert!(error.to_string().contains("run `anyplace push DIRECTORY nobody/knows:v1`"), "{error}");
    let wrong = Credentials { user: "anyplace".into(), password: "wrong".into() };
    for credentials in [None, Some(wrong)] {
        let client = Client::new(&registry.url(), credentials).unwrap();
        let error = client.get_manifest(&reference).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { status: 401, .. }), "{error}");
        assert!(error.to_string().contains("credentials file"), "{error}");
    }
    registry.stop().await;
}

/// A layer of plain files; a name that ends in `/` is a folder.
fn layer(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, contents) in files {
        let mut header = tar::Header::new_ustar();
        let is_dir = name.ends_with('/');
        header.set_entry_type(if is_dir { tar::EntryType::Directory } else { tar::EntryType::Regular });
        header.set_mode(if is_dir { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(contents.len() as u64);
        builder.append_data(&mut header, name, contents.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// An OCI layout with an index of two platforms, whose layers are plain, gzip and plain archives.
pub(crate) fn layout(dir: &Path, layers: &[Vec<u8>]) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(dir.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    let put = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        serde_json::json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    };
    let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
    let described: Vec<_> = layers
        .iter()
        .enumerate()
        .map(|(i, layer)| match i % 2 {
            0 => put("application/vnd.oci.image.layer.v1.tar", layer),
            _ => {
                let gzip = gzip(layer);
                put("application/vnd.oci.image.layer.v1.tar+gzip", &gzip)
            }
        })
        .collect();
    let mut manifests = Vec::new();
    for architecture in ["s390x", if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }] {
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux", "config": { "Env": null },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": crate::support::OCI_MANIFEST, "config": config, "layers": described,
        });
        let mut manifest = put(crate::support::OCI_MANIFEST, manifest.to_string().as_bytes());
        manifest["platform"] = serde_json::json!({ "architecture": architecture, "os": "linux" });
        manifests.push(manifest);
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = serde_json::json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests });
    let index = put(media_type, index.to_string().as_bytes());
    let top = serde_json::json!({ "schemaVersion": 2, "manifests": [index] });
    std::fs::write(dir.join("index.json"), top.to_string()).unwrap();
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child = std::process::Command::new("gzip")
        .arg("-c")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    child.wait_with_output().unwrap().stdout
}

#[tokio::test]
async fn layers_mount_as_the_image_that_they_describe() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let oci = dir.path().join("oci");
    let bottom = layer(&[
        ("etc/", ""),
        ("etc/kept", "1"),
        ("etc/gone", "1"),
        ("d/", ""),
        ("d/old", "1"),
        ("over", "1"),
    ]);
    let middle =
        layer(&[("etc/.wh.gone", ""), ("d/", ""), ("d/.wh..wh..opq", ""), ("d/new", "2"), ("over", "2")]);
    layout(&oci, &[bottom.clone(), middle.clone(), layer(&[("top", "3")]), bottom.clone()]);
    // The archive is the same layout in a tar file: both must give the same image.
    let archive = dir.path().join("oci.tar");
    let tar =
        std::process::Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&oci).arg(".").status();
    assert!(tar.unwrap().success());
    let registry = Registry::start(&dir.path().join("registry")).await;
    let (client, progress) = (registry.client(), NoProgress::shared());
    let mut digests = Vec::new();
    for (path, name) in [(&oci, "app:folder"), (&archive, "other:archive")] {
        let source = Source::detect(path, Default::default()).unwrap();
        let packed = pack(&source, &dir.path().join("work"), &progress).await.unwrap();
        let summary = push(&packed, &name.parse().unwrap(), &client, &progress).await.unwrap();
        digests.push(summary.digest);
    }
    assert_eq!(digests[0], digests[1]);
    let options = PullOptions::default();
    let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
    let image = store.pull(&"app:folder".parse().unwrap(), &client, &options).await.unwrap();
    assert_eq!((&image.digest, image.stats.layers), (&digests[0], 4));
    let read = |image: &PulledImage, paths: &[&str]| -> Vec<Option<String>> {
        let mounted = Mounted::of(image);
        paths.iter().map(|path| std::fs::read_to_string(mounted.path().join(path)).ok()).collect()
    };
    let some = |text: &str| Some(text.to_owned());
    let found = read(&image, &["etc/kept", "d/old", "d/new", "top"]);
    assert_eq!(found, [some("1"), some("1"), some("2"), some("3")]);
    // The bottom layer once more on top: its files are back.
    assert_eq!(read(&image, &["etc/gone", "over"]), [some("1"), some("1")]);
    // Without it, what the middle hides is hidden.
    let three = dir.path().join("three");
    layout(&three, &[bottom, middle, layer(&[("top", "3")])]);
    let source = Source::detect(&three, Default::default()).unwrap();
    let packed = pack(&source, &dir.path().join("work"), &progress).await.unwrap();
    push(&packed, &"app:three".parse().unwrap(), &client, &progress).await.unwrap();
    let image = store.pull(&"app:three".parse().unwrap(), &client, &options).await.unwrap();
    assert_eq!((image.stats.layers, image.stats.layers_reused, image.stats.bytes_fetched), (3, 3, 0));
    let found = read(&image, &["etc/kept", "etc/gone", "d/old", "d/new", "over", "top"]);
    assert_eq!(found, [some("1"), None, None, some("2"), some("2"), some("3")]);
    registry.stop().await;
}

#[tokio::test]
async fn large_blobs_go_in_parts_and_tokens_work() {
    // A registry that asks for a bearer token, in front of ours, which asks for a password.
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let front = TokenFront::start(&registry).await;
    let client =
        Client::new(&front.url, Some(Credentials { user: "u".into(), password: "p".into() })).unwrap();
    let bytes = noise(21, 700_000);
    let file = dir.path().join("blob");
    std::fs::write(&file, [&b"skipped"[..], &bytes].concat()).unwrap();
    let blob = anyplace_images::BlobFile {
        digest: Digest::of(&bytes),
        size: bytes.len() as u64,
        path: file,
        offset: 7,
    };
    let item = Item { stage: anyplace_images::Stage::Send, name: "blob".into() };
    let reference: Reference = "app".parse().unwrap();
    client.put_blob(&reference, &blob, &item, &NoProgress::shared()).await.unwrap();
    assert!(front.patches.load(Ordering::SeqCst) >= 7, "parts of at most 100,000 bytes were asked for");
    let read = client.get_blob(&reference, &blob.digest, Some(blob.size)).await.unwrap();
    assert_eq!(read.read(1 << 20).await.unwrap(), bytes);
    assert_eq!(front.tokens.load(Ordering::SeqCst), 2, "one token to push, one to pull");
    registry.stop().await;
}

struct TokenFront {
    url: String,
    patches: Arc<AtomicUsize>,
    tokens: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for TokenFront {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TokenFront {
    async fn start(registry: &Registry) -> TokenFront {
        use axum::response::{IntoResponse as _, Response};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (patches, tokens) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (behind, auth, http) = (registry.url(), registry.credentials(), reqwest::Client::new());
        let (front, patched, given) = (url.clone(), patches.clone(), tokens.clone());
        let handler = move |request: axum::extract::Request| {
            let (behind, auth, http) = (behind.clone(), auth.clone(), http.clone());
            let (front, patched, given) = (front.clone(), patched.clone(), given.clone());
            async move {
                let authorization =
                    request.headers().get("authorization").map(|v| v.to_str().unwrap().to_owned());
                let uri = request.uri().to_string();
                if let Some(query) = uri.strip_prefix("/token?") {
                    assert_eq!(authorization.as_deref(), Some("Basic dTpw"));
                    given.fetch_add(1, Ordering::SeqCst);
                    let scope = query.split("scope=").nth(1).unwrap();
                    return axum::Json(serde_json::json!({ "token": scope })).into_response();
                }
                let action = if request.method() == "GET" { "pull" } else { "pull,push" };
                let expected = format!("repository:app:{action}");
                let token = format!("Bearer {}", expected.replace(':', "%3A").replace(',', "%2C"));
                if authorization.as_deref() != Some(&token) {
                    let challenge = format!("Bearer realm=\"{front}/token\",service=\"test\"");
                    return (http_status(401), [("www-authenticate", challenge)]).into_response();
                }
                if request.method() == "PATCH" {
                    patched.fetch_add(1, Ordering::SeqCst);
                }
                let mut forwarded = http.request(request.method().clone(), format!("{behind}{uri}"));
                for name in ["content-range", "content-length", "content-type"] {
                    if let Some(value) = request.headers().get(name) {
                        forwarded = forwarded.header(name, value);
                    }
                }
                let body = reqwest::Body::wrap_stream(request.into_body().into_data_stream());
                let forwarded = forwarded.basic_auth(auth.user, Some(auth.password)).body(body);
                let answer = forwarded.send().await.unwrap();
                let mut response = Response::builder().status(answer.status());
                for (name, value) in answer.headers().iter().filter(|(n, _)| *n != "oci-chunk-max-length") {
                    response = response.header(name, value);
                }
                let response = response.header("oci-chunk-max-length", "100000");
                response.body(axum::body::Body::from_stream(answer.bytes_stream())).unwrap()
            }
        };
        let router = axum::Router::new().fallback(handler);
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        TokenFront { url, patches, tokens, task }
    }
}

fn http_status(code: u16) -> axum::http::StatusCode {
    axum::http::StatusCode::from_u16(code).unwrap()
}
