//! A disk that is full, and then isn't: clear refusals, nothing torn, and ways out.

use std::io::Write as _;

use anyplace_images::Digest;
use anyplace_model::Bytes;
use anyplace_registry::TrashView;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use reqwest::Method;

use crate::gc::{HOUR, age, collect, get};
use crate::support::{OCI_MANIFEST, Registry, cache_config, code, header, is_root, manifest, noise};

/// A file system in memory of a fixed size, gone with the test.
struct Small(tempfile::TempDir);

impl Small {
    fn new(megabytes: u32) -> Small {
        let small = Small(tempfile::tempdir().unwrap());
        small.mount(megabytes, MsFlags::empty());
        small
    }

    fn grow(&self, megabytes: u32) {
        self.mount(megabytes, MsFlags::MS_REMOUNT);
    }

    /// Leaves no byte free.
    fn fill(&self) -> std::path::PathBuf {
        let fill = self.0.path().join("fill");
        assert!(std::fs::write(&fill, vec![1; 64_000_000]).is_err(), "the disk isn't full");
        assert_eq!(nix::sys::statvfs::statvfs(self.0.path()).unwrap().blocks_available(), 0);
        fill
    }

    fn mount(&self, megabytes: u32, flags: MsFlags) {
        let size = format!("size={megabytes}m");
        mount(Some("tmpfs"), self.0.path(), Some("tmpfs"), flags, Some(size.as_str())).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_tears_nothing() {
    if !is_root() {
        return;
    }
    let disk = Small::new(8);
    let registry = Registry::start(disk.0.path()).await;
    let bytes = noise(21, 12_000_000);
    let kept = registry.put_blob("a", &bytes[..500_000]).await;
    let post = registry.request(Method::POST, "/v2/a/blobs/uploads/").send().await.unwrap();
    let location = header(&post, "location");
    let patch = async |part: std::ops::Range<usize>| {
        let range = format!("{}-{}", part.start, part.end - 1);
        let request = registry.request(Method::PATCH, &location).header("content-range", range);
        request.body(bytes[part].to_vec()).send().await.unwrap()
    };
    assert_eq!(patch(0..2_000_000).await.status(), 202);
    for _ in 0..2 {
        let refused = patch(2_000_000..12_000_000).await;
        assert_eq!(code(refused).await, (507, "DENIED".into()));
        let status = registry.request(Method::GET, &location).send().await.unwrap();
        assert_eq!((status.status().as_u16(), header(&status, "range")), (204, "0-1999999".into()));
    }
    let whole =
        registry.request(Method::POST, &format!("/v2/a/blobs/uploads/?digest={}", Digest::of(&bytes)));
    assert_eq!(code(whole.body(bytes.clone()).send().await.unwrap()).await, (507, "DENIED".into()));
    // What was refused takes no room: a small push fits.
    let small = registry.put_blob("a", &bytes[..1_000_000]).await;
    let get = registry.request(Method::GET, &format!("/v2/a/blobs/{small}")).send().await.unwrap();
    assert_eq!(get.bytes().await.unwrap(), bytes[..1_000_000]);
    // Full to the last byte: a manifest is refused too, and what was there is there.
    let fill = disk.fill();
    let put = async || {
        let put = registry.request(Method::PUT, "/v2/a/manifests/v1").header("content-type", OCI_MANIFEST);
        put.body(manifest(&kept, 500_000, &[])).send().await.unwrap()
    };
    assert_eq!(code(put().await).await, (507, "DENIED".into()));
    let get = registry.request(Method::GET, "/v2/a/manifests/v1").send().await.unwrap();
    assert_eq!(get.status(), 404);
    let begin = registry.request(Method::POST, "/v2/a/blobs/uploads/").send().await.unwrap();
    assert_eq!(code(begin).await, (507, "DENIED".into()));
    let uploads = std::fs::read_dir(disk.0.path().join("uploads")).unwrap();
    assert_eq!(uploads.count(), 2, "only the one that was begun before, and its state");
    let get = registry.request(Method::GET, &format!("/v2/a/blobs/{kept}")).send().await.unwrap();
    assert_eq!(get.bytes().await.unwrap(), bytes[..500_000]);
    std::fs::remove_file(&fill).unwrap();
    // There is room again, and all goes on.
    disk.grow(64);
    assert_eq!(put().await.status(), 201);
    assert_eq!(patch(2_000_000..12_000_000).await.status(), 202);
    let digest = Digest::of(&bytes);
    let put = registry.request(Method::PUT, &format!("{location}?digest={digest}")).send().await.unwrap();
    assert_eq!(put.status(), 201);
    let get = registry.request(Method::GET, &format!("/v2/a/blobs/{digest}")).send().await.unwrap();
    assert_eq!(get.bytes().await.unwrap(), bytes);
    registry.stop().await;
}

/// What is kept for deletions.
const RESERVE_BYTES: u64 = 4 << 20;

/// A registry without a byte of room, with an image and something that nothing needs.
async fn filled(disk: &Small) -> Registry {
    let registry = Registry::start(disk.0.path()).await;
    registry.put_image("a", "v1", "one").await;
    registry.put_image("a", "v2", "two").await;
    registry.put_blob("a", &noise(31, 10_000_000)).await;
    age(disk.0.path(), 48 * HOUR);
    disk.fill();
    registry
}

#[tokio::test]
async fn a_full_registry_deletes_starts_again_and_collects() {
    if !is_root() {
        return;
    }
    let disk = Small::new(24);
    let registry = filled(&disk).await;
    let remove = async |registry: &Registry, key: &str| {
        let path = format!("/v2/a/manifests/{key}");
        registry.request(Method::DELETE, &path).send().await.unwrap().status().as_u16()
    };
    let v2 = registry.request(Method::HEAD, "/v2/a/manifests/v2").send().await.unwrap();
    assert_eq!(remove(&registry, "v1").await, 202);
    // Something else takes a part of what that freed. Pushes don't take the rest, however often they are tried.
    let mut fill = std::fs::File::options().append(true).open(disk.0.path().join("fill")).unwrap();
    fill.write_all(&[1; 100_000]).unwrap();
    let small = format!("/v2/a/blobs/uploads/?digest={}", Digest::of(b"small"));
    for _ in 0..50 {
        let push = registry.request(Method::POST, &small).body("small").send().await.unwrap();
        let text = push.text().await.unwrap();
        assert!(text.contains("gc.undelete_window"), "{text}");
    }
    registry.stop().await;

    let registry = Registry::start(disk.0.path()).await;
    assert_eq!(remove(&registry, &header(&v2, "docker-content-digest")).await, 202);
    let trash: Vec<TrashView> = get(&registry, "/v1/trash").await;
    assert_eq!(trash.len(), 3, "{trash:?}");
    let audit: Vec<serde_json::Value> = get(&registry, "/v1/audit?tail=2").await;
    assert!(audit.iter().all(|event| event["action"] == "delete-manifest"), "{audit:?}");
    let report = collect(&registry, false).await;
    assert_eq!((report.plan.content.count, report.plan.bytes), (1, 10_000_000), "{report:?}");
    let push = registry.request(Method::POST, &small).body("small").send().await.unwrap();
    assert_eq!(push.status(), 201);
    assert_eq!(std::fs::metadata(disk.0.path().join("reserve")).unwrap().len(), RESERVE_BYTES);
    registry.stop().await;
}

/// As an earlier version left it, or after more deletions than there was room for.
#[tokio::test]
async fn a_full_registry_without_a_reserve_starts_and_collects() {
    if !is_root() {
        return;
    }
    let disk = Small::new(24);
    let registry = filled(&disk).await;
    registry.stop().await;
    std::fs::write(disk.0.path().join("reserve"), "").unwrap();
    std::fs::remove_file(disk.0.path().join("fill")).unwrap();
    disk.fill();
    let registry = Registry::start(disk.0.path()).await;
    let refused = registry.request(Method::DELETE, "/v2/a/manifests/v1").send().await.unwrap();
    assert_eq!(code(refused).await, (507, "DENIED".into()));
    let report = collect(&registry, false).await;
    assert_eq!(report.plan.bytes, 10_000_000, "{report:?}");
    let deleted = registry.request(Method::DELETE, "/v2/a/manifests/v1").send().await.unwrap();
    assert_eq!(deleted.status(), 202);
    registry.stop().await;
}

#[tokio::test]
async fn what_is_cached_makes_room_for_what_is_pushed() {
    if !is_root() {
        return;
    }
    let (origin_dir, disk) = (tempfile::tempdir().unwrap(), Small::new(64));
    let origin = Registry::start(origin_dir.path()).await;
    let mut config = cache_config(disk.0.path(), &[(&origin.url(), origin_dir.path())]);
    config.cache.disk_budget = Some(Bytes(60 << 20));
    let cache = Registry::start_with(config).await;
    let pull = async |bytes: &[u8]| {
        let path = format!("/v2/app/blobs/{}", Digest::of(bytes));
        let got = cache.request(Method::GET, &path).send().await.unwrap();
        assert!(got.bytes().await.unwrap() == bytes);
    };
    // Other blobs each time: those from before may be in memory.
    let fill_cache = async |seeds: std::ops::Range<u64>| {
        for bytes in seeds.map(|seed| noise(seed, 10_000_000)) {
            origin.put_blob("app", &bytes).await;
            pull(&bytes).await;
        }
    };
    fill_cache(40..45).await;
    // In one request.
    let ours = noise(50, 20_000_000);
    let digest = cache.put_blob("mine", &ours).await;
    // And in parts, onto a disk that is full to the last byte.
    fill_cache(60..64).await;
    let fill = disk.fill();
    let post = cache.request(Method::POST, "/v2/mine/blobs/uploads/").send().await.unwrap();
    let (location, more) = (header(&post, "location"), noise(51, 4_000_000));
    assert_eq!(post.status(), 202);
    let patch = cache.request(Method::PATCH, &location).body(more.clone()).send().await.unwrap();
    assert_eq!(patch.status(), 202);
    let other = Digest::of(&more);
    let put = cache.request(Method::PUT, &format!("{location}?digest={other}")).send().await.unwrap();
    assert_eq!(put.status(), 201);
    for (digest, bytes) in [(&digest, &ours), (&other, &more)] {
        let got = cache.request(Method::GET, &format!("/v2/mine/blobs/{digest}")).send().await.unwrap();
        assert!(got.bytes().await.unwrap() == *bytes);
    }
    std::fs::remove_file(fill).unwrap();
    fill_cache(70..71).await;
    cache.stop().await;
    origin.stop().await;
}
