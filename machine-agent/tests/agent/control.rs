//! What the agent talks to: a location scheduler that serves a feed and keeps the reports, and a registry.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use anyplace_api::WatchQuery;
use anyplace_images::{ImageSpec, NoProgress, PackedImage, Source, pack};
use anyplace_model::{MachineDesired, MachineReport};
use anyplace_service::{Feed, Json, Query};
use axum::{
    Router,
    extract::{Path as UrlPath, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{get, put},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::bed::find;

/// Images by the names of their repositories, each with the tag `v1`.
pub(crate) type Images = Arc<Mutex<BTreeMap<String, Arc<PackedImage>>>>;

/// An image of busybox with a web server's page, and this file.
pub(crate) async fn image(dir: &Path, noise: &[u8]) -> PackedImage {
    fs::create_dir(dir).unwrap();
    let root = dir.join("rootfs");
    for folder in ["bin", "www", "etc", "tmp"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let busybox = find("busybox").unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for name in ["sh", "httpd", "sleep", "nc", "grep", "echo", "cat", "id", "mount", "true", "false"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(root.join("www/index.html"), "hello\n").unwrap();
    if !noise.is_empty() {
        fs::write(root.join("noise"), noise).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/tmp:/bin/sh\n").unwrap();
    let work = dir.join("packed");
    fs::create_dir(&work).unwrap();
    let spec = ImageSpec { entrypoint: vec!["/bin/true".into()], ..ImageSpec::default() };
    pack(&Source::Directory { root, spec }, &work, &NoProgress::shared()).await.unwrap()
}

pub(crate) struct Scheduler {
    pub(crate) feed: Arc<Feed<MachineDesired>>,
    pub(crate) reports: watch::Sender<Vec<MachineReport>>,
    pub(crate) images: Images,
    pub(crate) control: CancellationToken,
}

pub(crate) fn router(scheduler: Scheduler) -> Router {
    Router::new()
        .route("/v1/watch/machines/{machine}/desired", get(desired))
        .route("/v1/machines/{machine}/report", put(report))
        .route("/v2/{*rest}", get(registry))
        .with_state(Arc::new(scheduler))
}

async fn desired(State(state): State<Arc<Scheduler>>, Query(query): Query<WatchQuery>) -> Response {
    state.feed.response(query, state.control.clone())
}

async fn report(State(state): State<Arc<Scheduler>>, Json(report): Json<MachineReport>) -> StatusCode {
    state.reports.send_modify(|reports| {
        if let Some(last) = reports.last() {
            let position = |report: &MachineReport| (report.epoch, report.sequence);
            assert!(position(&report) > position(last), "an older report after a newer one");
        }
        reports.push(report);
    });
    StatusCode::NO_CONTENT
}

/// As much of a registry as a pull needs.
async fn registry(State(state): State<Arc<Scheduler>>, UrlPath(path): UrlPath<String>) -> Response {
    let parts: Vec<_> = path.split('/').collect();
    let found = state.images.lock().unwrap().get(parts[0]).cloned();
    let Some(image) = found else { return StatusCode::NOT_FOUND.into_response() };
    let top = image.manifests.last().unwrap();
    match parts[1..] {
        ["manifests", name] => {
            let found = image.manifests.iter().find(|manifest| manifest.digest.as_str() == name);
            let Some(manifest) = found.or((name == "v1").then_some(top)) else {
                return StatusCode::NOT_FOUND.into_response();
            };
            let headers = [
                ("content-type", manifest.media_type.clone()),
                ("docker-content-digest", manifest.digest.to_string()),
            ];
            (headers, manifest.bytes.clone()).into_response()
        }
        ["blobs", digest] => {
            let Some(blob) = image.blobs.iter().find(|blob| blob.digest.as_str() == digest) else {
                return StatusCode::NOT_FOUND.into_response();
            };
            let bytes = fs::read(&blob.path).unwrap();
            let (start, size) = (usize::try_from(blob.offset).unwrap(), usize::try_from(blob.size).unwrap());
            bytes[start..start + size].to_vec().into_response()
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}
