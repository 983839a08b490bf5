//! What every store has to do, uploads apart.

use std::time::Duration;

use anyplace_images::{Algorithm, Digest};
use bytes::Bytes;
use futures_util::TryStreamExt as _;

use super::super::{Error, Linked, ManifestEntry, Marked, NewManifest, Trashed};
use super::{Bed, noise};

fn manifest(bytes: &[u8], blobs: &[&Digest], subject: Option<&Digest>) -> (Digest, NewManifest) {
    let entry = ManifestEntry {
        media_type: "a/b".to_owned(),
        size: bytes.len() as u64,
        subject: subject.cloned(),
        artifact_type: Some("signature".to_owned()),
        annotations: [("key".to_owned(), "value".to_owned())].into(),
    };
    let blobs = blobs.iter().copied().cloned().collect();
    (
        Digest::of(bytes),
        NewManifest { entry, bytes: Bytes::copy_from_slice(bytes), blobs, manifests: Vec::new() },
    )
}

pub(super) async fn content_and_links(bed: &Bed) {
    let storage = bed.open().await.storage;
    let long = match bed.long_keys {
        true => "l".repeat(200) + "/" + &"m".repeat(54),
        false => "l/m".to_owned(),
    };
    for (algorithm, size) in [
        (Algorithm::Sha256, 0),
        (Algorithm::Sha256, 10),
        (Algorithm::Sha512, 10),
        (Algorithm::Sha256, 300_000),
    ] {
        let bytes = noise(1, size);
        let digest = algorithm.digest(&bytes);
        assert_eq!(storage.content_size(&digest).await.unwrap(), None);
        assert!(matches!(storage.open_content(&digest, None).await, Err(Error::Store { .. })));
        assert_eq!(storage.put_link("a/b", &digest).await.unwrap(), Linked::Gone);
        storage.put_content(&digest, bytes.clone().into()).await.unwrap();
        for repository in ["a/b", "a", &long] {
            assert_eq!(storage.blob_size(repository, &digest).await.unwrap().is_some(), repository == "a/b");
            assert_eq!(storage.put_link(repository, &digest).await.unwrap(), Linked::Yes(size as u64));
            assert_eq!(storage.blob_size_renewed(repository, &digest).await.unwrap(), Some(size as u64));
        }
        assert_eq!(storage.read_content(&digest).await.unwrap().unwrap(), bytes);
        for range in [0..1, 3..7, 9..10, 100_000..200_000, 299_999..300_000] {
            if range.end <= size {
                let object =
                    storage.open_content(&digest, Some(range.start as u64..range.end as u64)).await.unwrap();
                assert_eq!(object.bytes().await.unwrap(), bytes[range]);
            }
        }
        let mut links = storage.links_of(&digest).await.unwrap();
        links.sort_by(|a, b| a.repository.cmp(&b.repository));
        let names: Vec<_> = links.iter().map(|link| link.repository.as_str()).collect();
        assert_eq!(names, ["a", "a/b", &long]);
        assert!(links.iter().all(|link| link.digest == digest));
        assert!(storage.remove_link("a", &digest).await.unwrap());
        assert!(!storage.remove_link("a", &digest).await.unwrap());
        assert_eq!(storage.links_of(&digest).await.unwrap().len(), 2);
    }
    // Another process sees all of it.
    let storage = bed.open().await.storage;
    let mut contents: Vec<_> = storage.contents().try_collect().await.unwrap();
    contents.sort_by_key(|content| content.size);
    assert_eq!(contents.iter().map(|content| content.size).collect::<Vec<_>>(), [0, 10, 10, 300_000]);
    assert_eq!(storage.links().try_collect::<Vec<_>>().await.unwrap().len(), 8);
    let now = storage.now().await.unwrap();
    for content in &contents {
        let age = now.duration_since(content.stored).unwrap_or_default();
        assert!(age < Duration::from_secs(3600), "{age:?}");
        assert!(storage.delete_content(&content.digest).await.unwrap());
        assert!(!storage.delete_content(&content.digest).await.unwrap());
        assert_eq!(storage.put_link("a/b", &content.digest).await.unwrap(), Linked::Gone);
    }
}

pub(super) async fn manifests(bed: &Bed) {
    let storage = bed.open().await.storage;
    let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
    for (digest, bytes) in [(&one, "one"), (&two, "two")] {
        storage.put_content(digest, Bytes::from(bytes)).await.unwrap();
    }
    storage.put_link("a/b", &one).await.unwrap();
    let (digest, new) = manifest(b"{} ", &[&one, &two], None);
    // The other's content is there, but not in this repository.
    assert_eq!(storage.put_manifest("a/b", &digest, new.clone()).await.unwrap(), std::slice::from_ref(&two));
    assert_eq!(storage.manifest("a/b", &digest).await.unwrap(), None);
    assert!(storage.manifests("a/b").await.unwrap().is_empty());
    assert!(!storage.has_repository("a/b").await.unwrap() || bed.is_folder());
    storage.put_link("a/b", &two).await.unwrap();
    assert!(storage.put_manifest("a/b", &digest, new.clone()).await.unwrap().is_empty());
    let (entry, bytes) = storage.manifest("a/b", &digest).await.unwrap().unwrap();
    assert_eq!((entry, &bytes[..]), (new.entry, &b"{} "[..]));
    assert_eq!(storage.manifest("a", &digest).await.unwrap(), None);
    assert_eq!(storage.links_of(&digest).await.unwrap().len(), 1);

    if !bed.long_keys {
        return;
    }
    let (about, new) = manifest(b"about", &[], Some(&digest));
    assert!(storage.put_manifest("a/b", &about, new.clone()).await.unwrap().is_empty());
    assert_eq!(storage.referrers("a/b", &digest).await.unwrap(), std::slice::from_ref(&about));
    assert!(storage.referrers("a", &digest).await.unwrap().is_empty());
    storage.put_manifest("a", &about, new).await.unwrap();
    let infos = storage.manifests("a/b").await.unwrap();
    assert!(infos.iter().all(|info| info.pending.is_none()));
    let mut digests: Vec<_> = infos.into_iter().map(|info| info.digest).collect();
    digests.sort();
    let mut expected = [digest.clone(), about.clone()];
    expected.sort();
    assert_eq!(digests, expected);
    let mut repositories = storage.repositories().await.unwrap();
    repositories.sort();
    assert_eq!(repositories, ["a", "a/b"]);
    assert!(storage.delete_manifest("a/b", &about).await.unwrap());
    assert!(!storage.delete_manifest("a/b", &about).await.unwrap());
    assert!(storage.referrers("a/b", &digest).await.unwrap().is_empty());
    assert_eq!(storage.referrers("a", &digest).await.unwrap(), [about]);
}

pub(super) async fn tags_trash_and_ages(bed: &Bed) {
    let storage = bed.open().await.storage;
    let before = storage.now().await.unwrap();
    let (digest, new) = manifest(b"m", &[], None);
    storage.put_manifest("a/b", &digest, new.clone()).await.unwrap();
    for tag in ["v1", "v2", "V1"] {
        storage.put_tag("a/b", tag, &digest).await.unwrap();
    }
    assert_eq!(storage.tag("a/b", "v1").await.unwrap(), Some(digest.clone()));
    assert_eq!(storage.tag("a/b", "v3").await.unwrap(), None);
    let mut tags = storage.tags("a/b").await.unwrap();
    tags.sort();
    assert_eq!(tags, ["V1", "v1", "v2"]);
    for info in storage.tag_infos("a/b").await.unwrap() {
        // Some stores count in seconds.
        assert!(info.put + Duration::from_secs(1) >= before);
    }
    assert!(storage.delete_tag("a/b", "v1").await.unwrap());
    assert!(!storage.delete_tag("a/b", "v1").await.unwrap());

    let entry = storage.manifest_entry("a/b", &digest).await.unwrap().unwrap();
    let trashed = [
        Trashed::Tag { tag: "v1".to_owned(), digest: digest.clone() },
        Trashed::Manifest { digest: digest.clone(), entry },
    ];
    for what in &trashed {
        storage.put_trash("a/b", what).await.unwrap();
    }
    let items = bed.open().await.storage.trash("a/b").await.unwrap();
    assert_eq!(items.len(), 2);
    assert!(trashed.iter().all(|what| items.iter().any(|item| item.what == *what)));
    assert!(storage.trash("a").await.unwrap().is_empty());
    for item in &items {
        assert!(storage.remove_trash("a/b", &item.id).await.unwrap());
        assert!(!storage.remove_trash("a/b", &item.id).await.unwrap());
    }
}

fn marked(digest: &Digest) -> Marked {
    Marked::Digest(digest.clone())
}

pub(super) async fn writers_wait_for_collectors(bed: &Bed) {
    let (storage, collector) = (bed.open().await.storage, bed.open().await.storage);
    let (blob, about) = (Digest::of(b"blob"), Digest::of(b"another"));
    storage.put_content(&blob, Bytes::from_static(b"blob")).await.unwrap();
    collector.put_marker(&marked(&blob), "run-1").await.unwrap();
    collector.put_marker(&marked(&about), "run-1").await.unwrap();
    let markers = storage.markers().await.unwrap();
    assert_eq!(markers.len(), 2);
    let writer = tokio::spawn({
        let (storage, blob) = (storage.clone(), blob.clone());
        async move { storage.put_link("a/b", &blob).await }
    });
    // The collector sees the link that the writer puts before it waits.
    while collector.links_of(&blob).await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!writer.is_finished());
    // One that looked for links just before: it deletes, and the writer is told.
    assert!(collector.delete_content(&blob).await.unwrap());
    assert!(collector.remove_marker(&marked(&blob), "run-1").await.unwrap());
    assert_eq!(writer.await.unwrap().unwrap(), Linked::Gone);
    storage.put_content(&blob, Bytes::from_static(b"blob")).await.unwrap();

    // A manifest waits for the marker of what it names, and its pending entry can be seen meanwhile.
    collector.put_marker(&marked(&blob), "run-2").await.unwrap();
    let (digest, new) = manifest(b"{}", &[&blob], None);
    let writer = tokio::spawn({
        let (storage, digest) = (storage.clone(), digest.clone());
        async move { storage.put_manifest("a/b", &digest, new).await }
    });
    let pending = loop {
        if let Some(info) = collector.manifests("a/b").await.unwrap().pop() {
            break info;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(pending.digest, digest);
    assert!(pending.pending.is_some());
    assert_eq!(storage.manifest("a/b", &digest).await.unwrap(), None);
    collector.remove_link("a/b", &blob).await.unwrap();
    collector.remove_marker(&marked(&blob), "run-2").await.unwrap();
    assert_eq!(writer.await.unwrap().unwrap(), [blob]);
    assert!(collector.manifests("a/b").await.unwrap().is_empty());
    let left = storage.markers().await.unwrap();
    assert_eq!(left.len(), 1);
    assert!(storage.remove_stale_marker(&left[0]).await.unwrap());
    assert!(storage.markers().await.unwrap().is_empty());
}
