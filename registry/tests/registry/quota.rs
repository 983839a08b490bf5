//! A team that is over its quota, and what frees room for it.

use std::path::Path;

use anyplace_images::Digest;
use anyplace_registry::{Emptied, TrashView, UploadView};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::gc::{HOUR, age, collect, get, post};
use crate::support::{OCI_MANIFEST, Registry, header, manifest, noise};

const QUOTA_BYTES: usize = 1_000_000;

/// A registry of which a team may use a little.
async fn registry(dir: &Path) -> Registry {
    let registry = Registry::start(dir).await;
    let team = json!({ "name": "vision", "repositories": ["vision/**"], "quota_bytes": QUOTA_BYTES });
    let set = registry.request(Method::PUT, "/v1/teams/vision").json(&team).send().await.unwrap();
    assert_eq!(set.status(), StatusCode::OK);
    registry
}

/// Pushes 700 kB, and gives the refusal if there is one.
async fn push(registry: &Registry, seed: u64) -> Result<Digest, String> {
    let bytes = noise(seed, 700_000);
    let digest = Digest::of(&bytes);
    let path = format!("/v2/vision/app/blobs/uploads/?digest={digest}");
    let answer = registry.request(Method::POST, &path).body(bytes).send().await.unwrap();
    match answer.status() {
        StatusCode::CREATED => Ok(digest),
        StatusCode::FORBIDDEN => Err(answer.text().await.unwrap()),
        status => panic!("{status}"),
    }
}

async fn delete<T: serde::de::DeserializeOwned>(registry: &Registry, path: &str) -> T {
    let answer = registry.request(Method::DELETE, path).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK, "{path}");
    answer.json().await.unwrap()
}

async fn audited(registry: &Registry, action: &str) -> Vec<Value> {
    let events: Vec<Value> = get(registry, "/v1/audit?repository=vision/app").await;
    events.into_iter().filter(|event| event["action"] == action).collect()
}

#[tokio::test]
async fn what_is_deleted_gives_room_once_the_trash_is_emptied_and_collected() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path()).await;
    let layer = push(&registry, 1).await.unwrap();
    let manifest = manifest(&layer, 700_000, &[]);
    let (digest, path) = (Digest::of(&manifest), "/v2/vision/app/manifests/v1");
    let put = registry.request(Method::PUT, path).header("content-type", OCI_MANIFEST);
    assert_eq!(put.body(manifest).send().await.unwrap().status(), 201);
    let over = push(&registry, 2).await.unwrap_err();
    for step in
        ["manifests by digest", "after 7d", "older than 1d", "trash --empty", "registry gc", "uploads --drop"]
    {
        assert!(over.contains(step), "{step}: {over}");
    }

    let deleted = registry.request(Method::DELETE, &format!("/v2/vision/app/manifests/{digest}"));
    assert_eq!(deleted.send().await.unwrap().status(), 202);
    age(dir.path(), 25 * HOUR);
    collect(&registry, false).await;
    push(&registry, 2).await.unwrap_err();
    // A deletion that can't be understood goes too.
    std::fs::write(dir.path().join("repositories/vision/app/_trash/000000000001-damaged"), "{").unwrap();
    let elsewhere: Emptied = delete(&registry, "/v1/trash?repository=vision/other").await;
    assert_eq!(elsewhere.deletions, 0);
    let emptied: Emptied = delete(&registry, "/v1/trash").await;
    assert_eq!(emptied.deletions, 3);
    let trash: Vec<TrashView> = get(&registry, "/v1/trash").await;
    assert!(trash.is_empty(), "{trash:?}");
    let (status, _) =
        post(&registry, "/v1/undelete", json!({ "repository": "vision/app", "tag": "v1" })).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let report = collect(&registry, false).await;
    assert_eq!((report.plan.content.count, &report.problems), (2, &Vec::new()), "{report:?}");
    // At once: it is counted before the collection ends.
    push(&registry, 2).await.unwrap();
    assert_eq!(audited(&registry, "empty-trash").await.len(), 1);
    registry.stop().await;
}

#[tokio::test]
async fn unfinished_uploads_are_listed_and_dropped_when_nobody_goes_on_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path()).await;
    let begun = registry.request(Method::POST, "/v2/vision/app/blobs/uploads/").send().await.unwrap();
    let location = header(&begun, "location");
    let patch = async || {
        let patch = registry.request(Method::PATCH, &location).body(noise(3, 400_000));
        patch.send().await.unwrap().status()
    };
    assert_eq!(patch().await, 202);
    push(&registry, 4).await.unwrap_err();
    let uploads: Vec<UploadView> = get(&registry, "/v1/uploads?repository=vision/app").await;
    let found: Vec<_> = uploads.iter().map(|it| (it.repository.as_str(), it.bytes)).collect();
    assert_eq!(found, [("vision/app", 400_000)]);
    assert!(location.ends_with(&uploads[0].id), "{location}");
    let drop_idle = "/v1/uploads?idle_s=3600";
    assert!(delete::<Vec<UploadView>>(&registry, drop_idle).await.is_empty(), "it is young");
    age(dir.path(), 2 * HOUR);
    let other = format!("{drop_idle}&repository=vision/other");
    assert!(delete::<Vec<UploadView>>(&registry, &other).await.is_empty(), "it is elsewhere");
    let dropped: Vec<UploadView> = delete(&registry, drop_idle).await;
    assert_eq!(dropped.len(), 1, "{dropped:?}");
    assert!(get::<Vec<UploadView>>(&registry, "/v1/uploads").await.is_empty());
    assert_eq!(patch().await, 404);
    push(&registry, 4).await.unwrap();
    let events = audited(&registry, "drop-upload").await;
    assert_eq!((events.len(), events[0]["reference"].as_str()), (1, Some(dropped[0].id.as_str())));
    registry.stop().await;
}

#[tokio::test]
async fn only_operators_empty_and_drop() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start_open(dir.path()).await;
    for (method, path) in [
        (Method::DELETE, "/v1/trash"),
        (Method::GET, "/v1/uploads"),
        (Method::DELETE, "/v1/uploads?idle_s=0"),
    ] {
        let status = registry.anonymous(method, path).send().await.unwrap().status();
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
    }
    registry.stop().await;
}
