//! An upstream registry in memory that misbehaves on demand, and counts what it sends.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyplace_images::Digest;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::stream;
use sha2::{Digest as _, Sha256};

use crate::support::OCI_MANIFEST;

/// What is wrong with an answer that has content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// One bit of what is sent, the one with this number (modulo the length).
    Flip(u64),
    /// The answer ends early, its length says so too.
    Short,
    /// The connection breaks in the middle.
    Broken,
    /// An answer with this status.
    Status(u16),
    /// Another total length than the content has.
    WrongTotal,
    /// Ranges are answered with everything.
    NoRanges,
    /// No answer.
    Silent,
}

#[derive(Default)]
pub(crate) struct Content {
    blobs: Mutex<HashMap<Digest, Bytes>>,
    /// The blobs that only one repository has.
    only: Mutex<HashMap<Digest, String>>,
    manifests: Mutex<HashMap<String, Bytes>>,
    /// For the first answer of each content that wasn't sent yet.
    next_of_each: Mutex<VecDeque<Fault>>,
    seen: Mutex<HashSet<String>>,
    /// What is never answered whether it is there.
    silent_heads: Mutex<HashSet<String>>,
    /// For the next answers with content, one each.
    next: Mutex<VecDeque<Fault>>,
    /// For all answers with content after those.
    always: Mutex<Option<Fault>>,
    /// Bytes of blobs that were sent.
    pub(crate) blob_bytes: AtomicU64,
    /// Requests for blobs' content.
    pub(crate) blob_requests: AtomicUsize,
    /// Questions whether blobs are there.
    pub(crate) blob_heads: AtomicUsize,
    /// Requests about manifests.
    pub(crate) manifest_requests: AtomicUsize,
}

/// The registry.
pub(crate) struct Fake {
    pub(crate) url: String,
    pub(crate) content: Arc<Content>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    pub(crate) async fn start() -> Fake {
        Fake::start_at("127.0.0.1:0".parse().unwrap(), Arc::default()).await
    }

    /// The same content at another time.
    pub(crate) async fn start_at(address: SocketAddr, content: Arc<Content>) -> Fake {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = axum::Router::new().fallback(answer).with_state(content.clone());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Fake { url, content, task }
    }

    pub(crate) fn put_blob(&self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.content.blobs.lock().unwrap().insert(digest.clone(), bytes);
        digest
    }

    /// A blob that only this repository has, with any content.
    pub(crate) fn put_blob_only(&self, repository: &str, digest: &Digest, bytes: impl Into<Bytes>) {
        self.content.blobs.lock().unwrap().insert(digest.clone(), bytes.into());
        self.content.only.lock().unwrap().insert(digest.clone(), repository.to_owned());
    }

    pub(crate) fn put_manifest(&self, tag: &str, manifest: impl Into<Bytes>) -> Digest {
        let bytes = manifest.into();
        let digest = Digest::of(&bytes);
        let mut manifests = self.content.manifests.lock().unwrap();
        manifests.insert(digest.to_string(), bytes.clone());
        manifests.insert(tag.to_owned(), bytes);
        digest
    }

    /// An image of these layers, whose manifest lists their pieces if `piece_bytes` is given.
    pub(crate) fn put_image(&self, tag: &str, layers: &[Bytes], piece_bytes: Option<usize>) -> Digest {
        let lists = layers.iter().map(|layer| piece_bytes.map(|size| list(layer, size))).collect::<Vec<_>>();
        self.put_image_with(tag, layers, &lists)
    }

    pub(crate) fn put_image_with(&self, tag: &str, layers: &[Bytes], lists: &[Option<String>]) -> Digest {
        let config = Bytes::from_static(b"{}");
        let config_digest = self.put_blob(config);
        let layers: Vec<_> = std::iter::zip(layers, lists)
            .map(|(layer, list)| {
                let mut descriptor = serde_json::json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd",
                    "digest": self.put_blob(layer.clone()),
                    "size": layer.len(),
                });
                if let Some(list) = list {
                    descriptor["annotations"] = serde_json::json!({ "io.anyplace.pieces": list });
                }
                descriptor
            })
            .collect();
        let config = serde_json::json!({
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": 2,
        });
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers,
        });
        self.put_manifest(tag, manifest.to_string())
    }

    /// What goes wrong with the next answers that have content.
    pub(crate) fn next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.content.next.lock().unwrap().extend(faults);
    }

    /// What goes wrong with the first answer of each content that is asked for from now on.
    pub(crate) fn next_of_each(&self, faults: impl IntoIterator<Item = Fault>) {
        self.content.seen.lock().unwrap().clear();
        *self.content.next_of_each.lock().unwrap() = faults.into_iter().collect();
    }

    pub(crate) fn manifest(&self, key: &str) -> Bytes {
        self.content.manifests.lock().unwrap()[key].clone()
    }

    /// What goes wrong with all answers that have content.
    pub(crate) fn always(&self, fault: Fault) {
        self.content.next.lock().unwrap().clear();
        *self.content.always.lock().unwrap() = Some(fault);
    }

    /// Never answers again whether this tag or digest is there; its content is sent all the same.
    pub(crate) fn silence_head(&self, key: &str) {
        self.content.silent_heads.lock().unwrap().insert(key.to_owned());
    }

    pub(crate) fn sent(&self) -> u64 {
        self.content.blob_bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn blob_requests(&self) -> usize {
        self.content.blob_requests.load(Ordering::SeqCst)
    }
}

/// The value of the annotation `io.anyplace.pieces`.
pub(crate) fn list(layer: &[u8], piece_bytes: usize) -> String {
    let digests: Vec<u8> = layer.chunks(piece_bytes).flat_map(Sha256::digest).collect();
    format!("{piece_bytes}:{}", BASE64_STANDARD.encode(digests))
}

async fn answer(State(content): State<Arc<Content>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let (rest, key) = path.rsplit_once('/').unwrap();
    let is_blob = rest.ends_with("/blobs");
    let found = if is_blob {
        let repository = rest.trim_start_matches("/v2/").trim_end_matches("/blobs");
        let only = content.only.lock().unwrap().clone();
        let has = |digest: &Digest| only.get(digest).is_none_or(|owner| owner == repository);
        let digest = key.parse::<Digest>().ok().filter(has);
        digest.and_then(|digest| content.blobs.lock().unwrap().get(&digest).cloned())
    } else if rest.ends_with("/manifests") {
        content.manifest_requests.fetch_add(1, Ordering::SeqCst);
        content.manifests.lock().unwrap().get(key).cloned()
    } else {
        None
    };
    let Some(bytes) = found else { return StatusCode::NOT_FOUND.into_response() };
    let mut response = Response::builder().header("docker-content-digest", Digest::of(&bytes).to_string());
    if !is_blob {
        response = response.header("content-type", OCI_MANIFEST);
    }
    if request.method() == "HEAD" {
        let silent = content.silent_heads.lock().unwrap().contains(key);
        if silent {
            std::future::pending::<()>().await;
        }
        content.blob_heads.fetch_add(usize::from(is_blob), Ordering::SeqCst);
        let response = response.header("content-length", bytes.len()).body(Body::empty());
        return response.unwrap();
    }
    let mut fault = content.next.lock().unwrap().pop_front();
    if content.seen.lock().unwrap().insert(key.to_owned()) {
        fault = fault.or(content.next_of_each.lock().unwrap().pop_front());
    }
    let fault = fault.or(*content.always.lock().unwrap()).unwrap_or(Fault::None);
    if is_blob {
        content.blob_requests.fetch_add(1, Ordering::SeqCst);
    }
    let total = bytes.len() as u64;
    let range = request.headers().get("range").and_then(|value| {
        let (first, last) = value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
        let last = if last.is_empty() { total - 1 } else { last.parse::<u64>().ok()?.min(total - 1) };
        Some((first.parse::<u64>().ok()?, last))
    });
    let mut body = bytes.to_vec();
    if let Some((first, last)) = range.filter(|_| fault != Fault::NoRanges) {
        let total = if fault == Fault::WrongTotal { total + 1 } else { total };
        response = response.status(206).header("content-range", format!("bytes {first}-{last}/{total}"));
        body = body[usize::try_from(first).unwrap()..=usize::try_from(last).unwrap()].to_vec();
    }
    match fault {
        Fault::None | Fault::NoRanges | Fault::WrongTotal => {}
        Fault::Flip(bit) => {
            let bit = bit % (body.len() as u64 * 8);
            body[usize::try_from(bit / 8).unwrap()] ^= 1 << (bit % 8);
        }
        Fault::Short => body.truncate(body.len() / 2),
        Fault::Broken => {
            let half = body.len() / 2;
            content.blob_bytes.fetch_add(half as u64, Ordering::SeqCst);
            let response = response.header("content-length", body.len());
            let parts = [Ok(Bytes::copy_from_slice(&body[..half])), Err(std::io::Error::other("broken"))];
            return response.body(Body::from_stream(stream::iter(parts))).unwrap();
        }
        Fault::Status(status) => return StatusCode::from_u16(status).unwrap().into_response(),
        Fault::Silent => {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
    }
    if is_blob {
        content.blob_bytes.fetch_add(body.len() as u64, Ordering::SeqCst);
    }
    response.body(Body::from(body)).unwrap()
}
