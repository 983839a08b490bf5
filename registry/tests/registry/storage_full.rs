//! A disk that is full, and then isn't: clear refusals, and nothing torn.

use anyplace_images::Digest;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use reqwest::Method;

use crate::support::{OCI_MANIFEST, Registry, code, header, is_root, manifest, noise};

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
    let fill = disk.0.path().join("fill");
    let filled = std::fs::write(&fill, vec![1; 16_000_000]);
    assert!(filled.is_err(), "the disk isn't full");
    let put = async || {
        let put = registry.request(Method::PUT, "/v2/a/manifests/v1").header("content-type", OCI_MANIFEST);
        put.body(manifest(&kept, 500_000, &[])).send().await.unwrap()
    };
    assert_eq!(code(put().await).await, (507, "DENIED".into()));
    let get = registry.request(Method::GET, "/v2/a/manifests/v1").send().await.unwrap();
    assert_eq!(get.status(), 404);
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
