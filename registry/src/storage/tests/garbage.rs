//! Collections on every store. What can come between their steps has a campaign of its own (`gc::campaign`).

use std::sync::Arc;
use std::time::Duration;

use anyplace_images::manifest::OCI_MANIFEST;
use anyplace_images::{Algorithm, Digest};
use anyplace_model::DurationMs;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::super::NewManifest;
use super::{Bed, Process, noise};
use crate::access::Audit;
use crate::config::Config;
use crate::gc::{self, Collector, GcConfig, GcPhase};
use crate::references;

pub(super) async fn collections_take_what_nothing_needs(bed: &Bed) {
    let process = bed.open().await;
    let storage = &process.storage;
    let (kept, kept_manifest, kept_bytes) = push(&process, noise(8, bed.large())).await;
    let (gone, gone_manifest, gone_bytes) = push(&process, noise(9, bed.large())).await;
    let orphan = Digest::of(b"orphan");
    storage.put_link("a/b", &orphan).await.unwrap();
    storage.put_content(&orphan, b"orphan".as_slice().into()).await.unwrap();
    let deleted = gc::delete_manifest(storage, "a/b", &gone_manifest, Duration::ZERO).await.unwrap();
    assert!(deleted.is_some());
    // Stores that count in seconds call what is younger than one of no age.
    tokio::time::sleep(Duration::from_millis(1_100)).await;

    let folder = tempfile::tempdir().unwrap();
    let grace = GcConfig { grace: DurationMs(0), ..GcConfig::default() };
    let config = Config { gc: grace, ..Config::new(folder.path()) };
    let audit = Arc::new(Audit::open(folder.path()).unwrap());
    let collector = Collector::unchecked(storage.clone(), &config, audit, CancellationToken::new()).unwrap();
    for (dry_run, there) in [(true, true), (false, false)] {
        let report = collector.collect(dry_run).await.unwrap();
        assert_eq!((report.phase, report.error), (GcPhase::Done, None));
        assert_eq!((report.plan.links.count, report.plan.content.count), (3, 3));
        for digest in [&gone, &gone_manifest, &orphan] {
            assert_eq!(storage.content_size(digest).await.unwrap().is_some(), there, "{dry_run}");
            assert_eq!(storage.link("a/b", digest).await.unwrap().is_some(), there, "{dry_run}");
        }
    }
    assert_eq!(process.read(&kept, None).await, kept_bytes);
    assert!(storage.manifest("a/b", &kept_manifest).await.unwrap().is_some());
    assert!(storage.listed("gc/deleting").await.unwrap().is_empty());

    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let swept = storage.sweep(Duration::from_secs(3600), Duration::ZERO).await.unwrap();
    assert_eq!(swept.bytes, if bed.is_folder() { 0 } else { gone_bytes.len() as u64 });
    assert_eq!(process.read(&kept, None).await, kept_bytes);
}

/// Pushes an image with this layer; gives the layer's digest, the manifest's, and the layer.
async fn push(process: &Process, layer: Vec<u8>) -> (Digest, Digest, Vec<u8>) {
    let blob = Digest::of(&layer);
    let id = process.uploads.start("a/b", Algorithm::Sha256).await.unwrap();
    process.append(&id, &layer).await.unwrap();
    process.finish(&id, &blob).await.unwrap();
    let described = json!({ "mediaType": "a/b", "digest": blob, "size": layer.len() });
    let manifest = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described, "layers": [described]
    });
    let bytes = manifest.to_string().into_bytes();
    let manifest = references::read(Some(OCI_MANIFEST), &bytes).unwrap();
    let digest = Digest::of(&bytes);
    let new = NewManifest::of(manifest, bytes.into());
    assert!(process.storage.put_manifest("a/b", &digest, new).await.unwrap().is_empty());
    (blob, digest, layer)
}
