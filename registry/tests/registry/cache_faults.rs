//! Upstreams that are gone, wrong, slow or refuse; several of them; a disk without room.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyplace_images::Digest;
use axum::body::Bytes;
use reqwest::Method;

use crate::fake::{Fake, Fault};
use crate::support::{LOOPBACK, Registry, cache_config, code, header, is_root, noise};

const MIB: usize = 1 << 20;

async fn get(cache: &Registry, path: &str) -> reqwest::Response {
    cache.request(Method::GET, path).send().await.unwrap()
}

fn blob(digest: &Digest) -> String {
    format!("/v2/app/blobs/{digest}")
}

/// Sizes of a small blob (one piece), and of one that is fetched whole.
const SIZES: [usize; 2] = [100_000, 9 * MIB];

#[tokio::test]
async fn what_an_upstream_sends_wrong_is_neither_served_nor_kept_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    let always = [
        (Fault::Flip(4_000_037), 502),
        (Fault::Short, 502),
        (Fault::WrongTotal, 502),
        (Fault::Broken, 503),
        (Fault::Status(500), 503),
        (Fault::Status(429), 503),
        (Fault::Status(403), 503),
    ];
    for (seed, (fault, status)) in (100..).zip(always) {
        for size in SIZES {
            let bytes = noise(seed * 10 + size as u64, size);
            let digest = fake.put_blob(bytes.clone());
            fake.always(fault);
            let answer = get(&cache, &blob(&digest)).await;
            let found = answer.status();
            let text = answer.text().await.unwrap();
            assert_eq!(found, status, "{fault:?} {size}: {text}");
            assert!(text.contains(&fake.url), "{fault:?} {size}: {text}");
            fake.always(Fault::None);
            let answer = get(&cache, &blob(&digest)).await;
            assert!(answer.bytes().await.unwrap() == bytes, "{fault:?} {size}");
        }
    }
    // One that goes wrong now and then is asked again.
    for (seed, fault) in (200..).zip([Fault::Flip(77), Fault::Short, Fault::Broken, Fault::Status(503)]) {
        for size in SIZES {
            let bytes = noise(seed * 10 + size as u64, size);
            let digest = fake.put_blob(bytes.clone());
            fake.next([fault]);
            assert!(get(&cache, &blob(&digest)).await.bytes().await.unwrap() == bytes, "{fault:?} {size}");
        }
    }
    let counters = cache.counters.clone().unwrap();
    assert!(counters.upstream_corrupt.load(Ordering::Relaxed) >= 10);
    cache.stop().await;
}

#[tokio::test]
async fn manifests_that_arrive_wrong_are_refused_by_tag_and_by_digest() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    let digest = fake.put_image("v1", &[Bytes::from_static(b"layer")], None);
    fake.always(Fault::Flip(333));
    for key in ["v1".to_owned(), digest.to_string()] {
        let answer = get(&cache, &format!("/v2/app/manifests/{key}")).await;
        assert_eq!(code(answer).await, (502, "DIGEST_INVALID".into()), "{key}");
    }
    fake.always(Fault::None);
    let answer = get(&cache, "/v2/app/manifests/v1").await;
    assert_eq!(Digest::of(&answer.bytes().await.unwrap()), digest);
    cache.stop().await;
}

#[tokio::test]
async fn the_next_upstream_has_what_the_first_lacks_or_spoils() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Fake::start().await, Fake::start().await);
    let gone = "http://127.0.0.1:9";
    let order = [(gone, dir.path()), (first.url.as_str(), dir.path()), (second.url.as_str(), dir.path())];
    let cache = Registry::start_with(cache_config(dir.path(), &order)).await;
    let faults =
        [Fault::None, Fault::Flip(9), Fault::Short, Fault::Broken, Fault::Status(500), Fault::Status(401)];
    for (seed, fault) in (300..).zip(faults) {
        for size in SIZES {
            let bytes = noise(seed * 10 + size as u64, size);
            let digest = second.put_blob(bytes.clone());
            if fault != Fault::None {
                first.put_blob(bytes.clone());
            }
            first.always(fault);
            assert!(get(&cache, &blob(&digest)).await.bytes().await.unwrap() == bytes, "{fault:?} {size}");
        }
    }
    // One that takes the question and says nothing costs a while.
    let bytes = noise(390, 1_000);
    let digest = second.put_blob(bytes.clone());
    first.put_blob(bytes.clone());
    first.always(Fault::Silent);
    assert!(get(&cache, &blob(&digest)).await.bytes().await.unwrap() == bytes);
    // Tags too; where both have one, the first's counts, unless it is still being left alone.
    first.always(Fault::None);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let theirs = second.put_image("only-second", &[Bytes::from_static(b"2")], None);
    second.put_image("both", &[Bytes::from_static(b"3")], None);
    let ours = first.put_image("both", &[Bytes::from_static(b"4")], None);
    for (tag, expected) in [("only-second", theirs), ("both", ours)] {
        let answer = get(&cache, &format!("/v2/app/manifests/{tag}")).await;
        assert_eq!(header(&answer, "docker-content-digest"), expected.to_string());
    }
    cache.stop().await;
}

#[tokio::test]
async fn a_tag_stays_its_own_upstreams_while_that_one_cannot_be_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Fake::start().await, Fake::start().await);
    let order = [(first.url.as_str(), dir.path()), (second.url.as_str(), dir.path())];
    let mut config = cache_config(dir.path(), &order);
    config.cache.tag_ttl_ms = 0;
    let cache = Registry::start_with(config).await;
    let ours = first.put_image("both", &[Bytes::from_static(b"1")], None);
    second.put_image("both", &[Bytes::from_static(b"2")], None);
    let theirs = second.put_image("only-second", &[Bytes::from_static(b"3")], None);
    let tag = async |tag: &str| {
        let answer = get(&cache, &format!("/v2/app/manifests/{tag}")).await;
        (header(&answer, "docker-content-digest"), !header(&answer, "warning").is_empty())
    };
    assert_eq!(tag("both").await, (ours.to_string(), false));
    assert_eq!(tag("only-second").await, (theirs.to_string(), false));
    drop(first);
    assert_eq!(tag("both").await, (ours.to_string(), true));
    // What was the second's goes on changing there.
    let newer = second.put_image("only-second", &[Bytes::from_static(b"4")], None);
    assert_eq!(tag("only-second").await, (newer.to_string(), false));
    cache.stop().await;
}

#[tokio::test]
async fn a_tag_that_is_not_answered_keeps_nothing_else_from_coming() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    let layer = Bytes::from(noise(85, 12 * MIB));
    fake.put_image("v1", std::slice::from_ref(&layer), Some(MIB));
    let slow = fake.put_image("slow", &[Bytes::from_static(b"slow")], None);
    for tag in ["v1", "slow"] {
        assert_eq!(get(&cache, &format!("/v2/app/manifests/{tag}")).await.status(), 200);
    }
    let path = blob(&Digest::of(&layer));
    let begun = cache.request(Method::GET, &path).header("range", "bytes=0-9").send().await.unwrap();
    assert_eq!(begun.bytes().await.unwrap(), layer[..10]);
    fake.silence_head("slow");
    let stale = get(&cache, "/v2/app/manifests/slow").await;
    assert_eq!(header(&stale, "docker-content-digest"), slow.to_string());
    assert!(header(&stale, "warning").contains("upstream"));
    // All of what was not here yet, at once.
    let whole = get(&cache, &path).await;
    assert_eq!(whole.status(), 200);
    assert!(whole.bytes().await.unwrap() == layer);
    let other = fake.put_image("new", &[Bytes::from_static(b"new")], None);
    let new = get(&cache, "/v2/app/manifests/new").await;
    assert_eq!(header(&new, "docker-content-digest"), other.to_string());
    let small = get(&cache, &blob(&Digest::of(b"new"))).await;
    assert_eq!(small.bytes().await.unwrap(), "new");
    cache.stop().await;
}

#[tokio::test]
async fn a_piece_is_asked_for_again_when_an_upstream_is_back_in_a_moment() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    let layer = Bytes::from(noise(86, 12 * MIB));
    fake.put_image("v1", std::slice::from_ref(&layer), Some(MIB));
    get(&cache, "/v2/app/manifests/v1").await;
    let range = |first: usize, last: usize| {
        let request = cache.request(Method::GET, &blob(&Digest::of(&layer)));
        request.header("range", format!("bytes={first}-{last}")).send()
    };
    assert_eq!(range(0, 9).await.unwrap().bytes().await.unwrap(), layer[..10]);
    let (address, content) =
        (fake.url.strip_prefix("http://").unwrap().parse().unwrap(), fake.content.clone());
    drop(fake);
    // A task ends when its turn comes.
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    let asked = tokio::spawn(range(2 * MIB, 2 * MIB + 9));
    let counters = cache.counters.clone().unwrap();
    while counters.upstream_failures.load(Ordering::Relaxed) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let _back = Fake::start_at(address, content).await;
    let answer = asked.await.unwrap().unwrap();
    assert_eq!(answer.status(), 206);
    assert_eq!(answer.bytes().await.unwrap(), layer[2 * MIB..2 * MIB + 10]);
    cache.stop().await;
}

#[tokio::test]
async fn upstreams_that_know_no_ranges_are_read_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    fake.always(Fault::NoRanges);
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    let plain = Bytes::from(noise(81, 13 * MIB));
    let listed = Bytes::from(noise(82, 13 * MIB));
    fake.put_image("v1", std::slice::from_ref(&listed), Some(4 * MIB));
    fake.put_blob(plain.clone());
    get(&cache, "/v2/app/manifests/v1").await;
    for bytes in [&plain, &listed] {
        let request = cache.request(Method::GET, &blob(&Digest::of(bytes)));
        let answer = request.header("range", "bytes=9000000-9000099").send().await.unwrap();
        assert_eq!(answer.bytes().await.unwrap(), bytes[9_000_000..9_000_100]);
        assert!(get(&cache, &blob(&Digest::of(bytes))).await.bytes().await.unwrap() == *bytes);
    }
    cache.stop().await;
}

#[tokio::test]
async fn what_is_here_is_served_without_the_upstream_and_the_rest_is_a_clear_503() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start().await;
    let layer = Bytes::from(noise(91, 9 * MIB));
    fake.put_image("v1", std::slice::from_ref(&layer), Some(MIB));
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    let manifest = get(&cache, "/v2/app/manifests/v1").await.bytes().await.unwrap();
    let range = |first: usize, last: usize| {
        let request = cache.request(Method::GET, &blob(&Digest::of(&layer)));
        request.header("range", format!("bytes={first}-{last}")).send()
    };
    assert_eq!(range(MIB, 2 * MIB - 1).await.unwrap().status(), 206);
    let (url, content) = (fake.url.clone(), fake.content.clone());
    drop(fake);
    let again = get(&cache, "/v2/app/manifests/v1").await;
    assert!(header(&again, "warning").contains("upstream"));
    assert_eq!(again.bytes().await.unwrap(), manifest);
    assert_eq!(
        range(MIB + 5, 2 * MIB - 7).await.unwrap().bytes().await.unwrap(),
        layer[MIB + 5..2 * MIB - 6]
    );
    let never = Digest::of(b"never");
    for answer in [
        range(0, 10).await.unwrap(),
        get(&cache, "/v2/app/manifests/v2").await,
        get(&cache, &format!("/v2/app/manifests/{never}")).await,
        get(&cache, &blob(&never)).await,
        get(&cache, &format!("/v2/app/referrers/{never}")).await,
    ] {
        assert_eq!((answer.status().as_u16(), header(&answer, "retry-after").as_str()), (503, "1"));
        let text = answer.text().await.unwrap();
        assert!(text.contains("can't be asked") && text.contains(&url), "{text}");
        assert!(text.contains("\"UNAVAILABLE\""), "{text}");
    }
    // Pushes go on, and what is pushed is pulled.
    let (own, _) = cache.put_image("app", "own", "seed").await;
    let answer = get(&cache, "/v2/app/manifests/own").await;
    assert_eq!(header(&answer, "docker-content-digest"), own.to_string());
    let tags: serde_json::Value = get(&cache, "/v2/app/tags/list").await.json().await.unwrap();
    assert_eq!(tags["tags"], serde_json::json!(["own", "v1"]));
    // When it is back, so is the rest.
    let _back = Fake::start_at(url.strip_prefix("http://").unwrap().parse().unwrap(), content).await;
    let mut tries = 0;
    loop {
        let answer = range(0, 10).await.unwrap();
        if answer.status() == 206 {
            assert_eq!(answer.bytes().await.unwrap(), layer[..11]);
            break;
        }
        tries += 1;
        assert!(tries < 300, "{}", answer.text().await.unwrap());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cache.stop().await;
}

#[tokio::test]
async fn mirrors_are_asked_by_namespace() {
    let dir = tempfile::tempdir().unwrap();
    let (hub, plain) = (Fake::start().await, Fake::start().await);
    let mut settings = cache_config(dir.path(), &[(&hub.url, dir.path()), (&plain.url, dir.path())]);
    settings.upstreams[0].namespace = Some("docker.io".to_owned());
    let cache = Registry::start_with(settings).await;
    let theirs = hub.put_image("v1", &[Bytes::from_static(b"hub")], None);
    let ours = plain.put_image("v1", &[Bytes::from_static(b"ours")], None);
    for (path, expected) in [
        ("/v2/docker.io/library/busybox/manifests/v1", &theirs),
        ("/v2/library/busybox/manifests/v1?ns=docker.io", &theirs),
        ("/v2/library/busybox/manifests/v1?ns=other.io", &ours),
        ("/v2/library/busybox/manifests/v1", &ours),
    ] {
        let answer = get(&cache, path).await;
        assert_eq!(header(&answer, "docker-content-digest"), expected.to_string(), "{path}");
    }
    let request = cache.request(Method::GET, "/v2/library/busybox/manifests/v1");
    let answer = request.header("OCI-Namespace", "docker.io").send().await.unwrap();
    assert_eq!(header(&answer, "docker-content-digest"), theirs.to_string());
    cache.stop().await;
}

#[tokio::test]
async fn a_full_disk_is_told_and_pieces_are_served_all_the_same() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount(&dir.path().join("cache"), 24);
    let fake = Fake::start().await;
    let layers: Vec<_> = (0..5).map(|seed| Bytes::from(noise(400 + seed, 8 * MIB + 1))).collect();
    fake.put_image("v1", &layers, Some(MIB));
    // The budget is larger than the disk.
    let cache = Registry::start_with(cache_config(dir.path(), &[(&fake.url, dir.path())])).await;
    get(&cache, "/v2/app/manifests/v1").await;
    for layer in layers.iter().chain(&layers) {
        assert!(get(&cache, &blob(&Digest::of(layer))).await.bytes().await.unwrap() == *layer);
    }
    let counters = cache.counters.clone().unwrap();
    assert!(counters.disk_full.load(Ordering::Relaxed) > 0);
    assert!(counters.evicted_pieces.load(Ordering::Relaxed) > 0);
    // What has to be whole says what is wrong, and leaves nothing.
    let large = fake.put_blob(noise(410, 30 * MIB));
    let answer = get(&cache, &blob(&large)).await;
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert!(status == 503 && text.contains("No space left"), "{status} {text}");
    assert_eq!(std::fs::read_dir(dir.path().join("cache/incoming")).unwrap().count(), 0);
    assert!(get(&cache, &blob(&Digest::of(&layers[0]))).await.bytes().await.unwrap() == layers[0]);
    cache.stop().await;
    drop(disk);
}

struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn mount(folder: &std::path::Path, mib: usize) -> Tmpfs {
        std::fs::create_dir_all(folder).unwrap();
        let options = format!("size={mib}m");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), folder, Some("tmpfs"), flags, Some(options.as_str())).unwrap();
        Tmpfs(folder.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Debian's docker-registry on loopback; ended when it is dropped.
pub(crate) struct DockerRegistry {
    pub(crate) url: String,
    http: reqwest::Client,
    child: std::process::Child,
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl DockerRegistry {
    pub(crate) async fn start(dir: &std::path::Path) -> DockerRegistry {
        use std::process::{Command, Stdio};
        let program = "docker-registry";
        if Command::new(program).arg("--version").stdout(Stdio::null()).status().is_err() {
            panic!("this test needs {program}; run `cargo xtask setup`");
        }
        let port = std::net::TcpListener::bind(LOOPBACK).unwrap().local_addr().unwrap().port();
        let settings = dir.join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:{port}'}}\n",
            dir.join("theirs").display()
        );
        std::fs::write(&settings, text).unwrap();
        let mut command = Command::new(program);
        command.arg("serve").arg(&settings).stdout(Stdio::null()).stderr(Stdio::null());
        anyplace_service::install_crypto_provider();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let url = format!("http://127.0.0.1:{port}");
        let mut registry = DockerRegistry { url, http, child: command.spawn().unwrap() };
        for attempt in 0.. {
            if registry.http.get(format!("{}/v2/", registry.url)).send().await.is_ok() {
                break;
            }
            assert!(attempt < 300 && registry.child.try_wait().unwrap().is_none(), "{program} didn't start");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        registry
    }

    pub(crate) async fn put_blob(&self, repository: &str, bytes: &Bytes) -> Digest {
        let digest = Digest::of(bytes);
        let start = self.http.post(format!("{}/v2/{repository}/blobs/uploads/", self.url));
        let location = header(&start.send().await.unwrap(), "location");
        let and = if location.contains('?') { '&' } else { '?' };
        let put = self.http.put(format!("{location}{and}digest={digest}")).body(bytes.clone());
        assert_eq!(put.send().await.unwrap().status(), 201);
        digest
    }

    /// Gives the digest of a manifest that was taken.
    pub(crate) async fn put_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: &str,
        bytes: impl Into<Bytes>,
    ) -> Result<Digest, reqwest::StatusCode> {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        let put = self.http.put(format!("{}/v2/{repository}/manifests/{tag}", self.url)).body(bytes);
        let status = put.header("content-type", media_type).send().await.unwrap().status();
        if status == 201 { Ok(digest) } else { Err(status) }
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        self.http.get(format!("{}{path}", self.url)).send().await.unwrap()
    }
}

#[tokio::test]
async fn debians_docker_registry_can_be_the_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = DockerRegistry::start(dir.path()).await;
    let layer = Bytes::from(noise(500, 20 * MIB));
    let config = Bytes::from_static(b"{}");
    for bytes in [&layer, &config] {
        upstream.put_blob("team/app", bytes).await;
    }
    let manifest =
        crate::support::manifest(&Digest::of(&config), config.len(), &[(&Digest::of(&layer), layer.len())]);
    upstream.put_manifest("team/app", "v1", crate::support::OCI_MANIFEST, manifest.clone()).await.unwrap();
    let cache_dir = dir.path().join("ours");
    let cache = Registry::start_with(cache_config(&cache_dir, &[(&upstream.url, dir.path())])).await;
    assert_eq!(get(&cache, "/v2/team/app/manifests/v1").await.bytes().await.unwrap(), manifest);
    let path = format!("/v2/team/app/blobs/{}", Digest::of(&layer));
    let part =
        cache.request(Method::GET, &path).header("range", "bytes=9999999-12345678").send().await.unwrap();
    assert_eq!(part.bytes().await.unwrap(), layer[9_999_999..12_345_679]);
    assert!(get(&cache, &path).await.bytes().await.unwrap() == layer);
    let counters = cache.counters.clone().unwrap();
    assert_eq!(counters.upstream_bytes.load(Ordering::Relaxed), (layer.len() + manifest.len()) as u64);
    let tags: serde_json::Value = get(&cache, "/v2/team/app/tags/list").await.json().await.unwrap();
    assert_eq!(tags["tags"], serde_json::json!(["v1"]));
    drop(upstream);
    assert!(get(&cache, &path).await.bytes().await.unwrap() == layer);
    cache.stop().await;
}
