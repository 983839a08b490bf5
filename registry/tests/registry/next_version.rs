//! Our client pushes the next version of an image: what the repository has of it is copied there, and what arrives is what
//! was packed, byte for byte.

use std::path::PathBuf;
use std::time::Duration;

use anyplace_images::{
    Client, Credentials, ImageSpec, NoProgress, PackedImage, Patience, PushSummary, Reference, Source, pack,
    push,
};
use anyplace_registry::Config;
use anyplace_seed::Seed;
use reqwest::Method;
use serde_json::{Value, json};

use crate::interop::{DockerRegistry, can_run};
use crate::killable::Killable;
use crate::stores;
use crate::support::{LOOPBACK, OCI_MANIFEST, Registry, cache_config, noise};

/// The large file: some 40 chunks.
const LARGE_BYTES: usize = 24 << 20;
const SMALL: usize = 300;

/// A tree whose versions differ in a run of a large file, and in one small file of a hundred.
struct Tree {
    dir: tempfile::TempDir,
    large: Vec<u8>,
}

impl Tree {
    fn new() -> Tree {
        let tree = Tree { dir: tempfile::tempdir().unwrap(), large: noise(77, LARGE_BYTES) };
        std::fs::create_dir_all(tree.root().join("lib/deep")).unwrap();
        std::fs::write(tree.root().join("large"), &tree.large).unwrap();
        (0..SMALL).for_each(|number| tree.small(number, 0));
        tree
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn small(&self, number: usize, version: u64) {
        // One in ten is the same as others, as licences are.
        let (seed, len) = match number.is_multiple_of(10) {
            true => (7, 700),
            false => (number as u64 * 1_000 + version, 500 + number * 31),
        };
        std::fs::write(self.root().join(format!("lib/deep/{number:03}")), noise(seed, len)).unwrap();
    }

    /// Makes it the next version.
    fn change(&mut self, version: u64) {
        let at = 1_000_000 + version as usize * 2_345_678 % (LARGE_BYTES - 1_100_000);
        self.large[at..at + 5_000].copy_from_slice(&noise(version, 5_000));
        std::fs::write(self.root().join("large"), &self.large).unwrap();
        for number in (version as usize % 100 + 1..SMALL).step_by(100) {
            self.small(number, version);
        }
    }

    async fn pack(&self) -> PackedImage {
        let source = Source::Directory { root: self.root(), spec: ImageSpec::default() };
        pack(&source, &self.dir.path().join("work"), &NoProgress::shared()).await.unwrap()
    }
}

async fn pushed(image: &PackedImage, name: &str, client: &Client) -> PushSummary {
    push(image, &name.parse().unwrap(), client, &NoProgress::shared()).await.unwrap()
}

/// The registry's blobs are the files that were packed.
async fn verify(image: &PackedImage, name: &str, client: &Client) {
    let reference: Reference = name.parse().unwrap();
    assert_eq!(client.head_manifest(&reference).await.unwrap().digest.as_ref(), image.digest());
    for blob in &image.blobs {
        let expected = file(blob);
        let got = client.get_blob(&reference, &blob.digest, None).await.unwrap();
        assert!(got.read(expected.len()).await.unwrap() == expected);
    }
}

fn file(blob: &anyplace_images::BlobFile) -> Vec<u8> {
    let bytes = std::fs::read(&blob.path).unwrap();
    bytes[blob.offset as usize..(blob.offset + blob.size) as usize].to_vec()
}

/// Under 5 % goes out, and the summary says all.
fn assert_saved(image: &PackedImage, summary: &PushSummary) {
    assert!(summary.bytes_sent * 20 < image.bytes_packed, "{summary:?}");
    // What was sent, beside the lines that say what to copy.
    let accounted = summary.bytes_sent + summary.bytes_deduplicated;
    let lines = accounted.checked_sub(image.bytes_packed).unwrap();
    assert!(lines < 100_000, "{summary:?}");
    assert_eq!((summary.skipped, summary.retries), (0, 0), "{summary:?}");
}

async fn versions(registry: &Registry) {
    let (mut tree, client) = (Tree::new(), registry.client());
    let first = tree.pack().await;
    let summary = pushed(&first, "team/app:v9", &client).await;
    assert!(summary.bytes_sent == first.bytes_packed && summary.bytes_deduplicated == 0, "{summary:?}");
    // Under a tag of its own, beside tags that have nothing to do with it; then over the same tag; then after both.
    for tag in ["a", "v1"] {
        registry.put_image("team/app", tag, tag).await;
    }
    for (version, tag) in [(1, "v10"), (2, "v10"), (3, "v11")] {
        tree.change(version);
        let (image, name) = (tree.pack().await, format!("team/app:{tag}"));
        let summary = pushed(&image, &name, &client).await;
        assert_saved(&image, &summary);
        verify(&image, &name, &client).await;
        // Again, nothing is sent.
        let again = pushed(&image, &name, &client).await;
        assert_eq!((again.bytes_sent, again.bytes_deduplicated), (0, image.bytes_packed));
    }
    // Another repository's blobs are not looked at.
    tree.change(4);
    let image = tree.pack().await;
    let summary = pushed(&image, "other/app:v1", &client).await;
    assert_eq!((summary.bytes_sent, summary.bytes_deduplicated), (image.bytes_packed, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_is_new_is_sent_to_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    versions(&registry).await;
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_is_new_is_sent_to_a_bucket() {
    let (dir, store) = (tempfile::tempdir().unwrap(), stores::s3s().await);
    let storage = toml::from_str(&store.settings(store.address, "r")).unwrap();
    let config = Config { storage, listen: LOOPBACK, ..Config::new(dir.path()) };
    let registry = Registry::start_with(config).await;
    versions(&registry).await;
    registry.stop().await;
}

/// A layer whose table of contents says what its bytes are not: what is copied from it is wrong, which the registry finds
/// in the end, and the layer is sent as any other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_lies_costs_time_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, mut tree) = (Registry::start(dir.path()).await, Tree::new());
    let client = registry.client();
    let first = tree.pack().await;
    let manifest: Value = serde_json::from_slice(&first.manifests[0].bytes).unwrap();
    let mut lie = file(&first.blobs[0]);
    // In the middle of the large file's chunks, which are noise; the tables are at the end.
    let at = lie.len() / 2;
    lie[at..at + 100].fill(0);
    let mut layer = manifest["layers"][0].clone();
    layer["digest"] = json!(registry.put_blob("team/app", &lie).await);
    layer["annotations"].as_object_mut().unwrap().remove("io.anyplace.pieces").unwrap();
    let config = registry.put_blob("team/app", &file(&first.blobs[1])).await;
    assert_eq!(json!(config), manifest["config"]["digest"]);
    let mut lying = manifest.clone();
    lying["layers"] = json!([layer]);
    let put = registry.request(Method::PUT, "/v2/team/app/manifests/v1").header("content-type", OCI_MANIFEST);
    assert_eq!(put.body(lying.to_string()).send().await.unwrap().status(), 201);

    tree.change(1);
    let image = tree.pack().await;
    let summary = pushed(&image, "team/app:v2", &client).await;
    assert!(summary.bytes_sent >= image.bytes_packed - 10_000, "{summary:?}");
    assert!(summary.bytes_deduplicated < 10_000, "{summary:?}");
    verify(&image, "team/app:v2", &client).await;
    registry.stop().await;
}

/// A layer that the disk spoilt gives a wrong digest in the end; one that was deleted is not copied from.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_gone_or_damaged_is_sent_instead() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, mut tree) = (Registry::start(dir.path()).await, Tree::new());
    let client = registry.client();
    let first = tree.pack().await;
    pushed(&first, "team/app:v1", &client).await;
    let layer = &first.blobs[0];
    let path = registry.blob_file(&layer.digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1_000..2_000].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    tree.change(1);
    let image = tree.pack().await;
    let summary = pushed(&image, "team/app:v2", &client).await;
    assert!(summary.bytes_sent >= image.bytes_packed - 10_000, "{summary:?}");
    verify(&image, "team/app:v2", &client).await;
    // A blob that the manifest names, and the repository has no more.
    let delete = registry.request(Method::DELETE, &format!("/v2/team/app/blobs/{}", layer.digest));
    assert_eq!(delete.send().await.unwrap().status(), 202);
    tree.change(2);
    let image = tree.pack().await;
    let summary = pushed(&image, "team/app:v1", &client).await;
    assert_saved(&image, &summary);
    verify(&image, "team/app:v1", &client).await;
    registry.stop().await;
}

/// What an upstream has isn't the cache's own: it is sent the first time, and copied from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_copies_from_what_was_pushed_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (origin, mut tree) = (Registry::start(&at("origin")).await, Tree::new());
    pushed(&tree.pack().await, "team/app:v1", &origin.client()).await;
    let cache = Registry::start_with(cache_config(&at("cache"), &[(&origin.url(), &origin.dir)])).await;
    let client = cache.client();
    for (version, saves) in [(2, false), (3, true)] {
        tree.change(version);
        let (image, name) = (tree.pack().await, format!("team/app:v{version}"));
        let summary = pushed(&image, &name, &client).await;
        if saves {
            assert_saved(&image, &summary);
        } else {
            assert!(
                summary.bytes_sent >= image.bytes_packed && summary.bytes_deduplicated == 0,
                "{summary:?}"
            );
        }
        verify(&image, &name, &client).await;
    }
    cache.stop().await;
    origin.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_registry_gets_ordinary_uploads() {
    if !can_run(&["docker-registry"]) {
        return;
    }
    let (dir, mut tree) = (tempfile::tempdir().unwrap(), Tree::new());
    let theirs = DockerRegistry::start(dir.path()).await;
    anyplace_service::install_crypto_provider();
    let client = Client::new(&theirs.1, None).unwrap();
    for version in 1..3 {
        tree.change(version);
        let (image, name) = (tree.pack().await, format!("team/app:v{version}"));
        let summary = pushed(&image, &name, &client).await;
        assert_eq!((summary.bytes_sent, summary.bytes_deduplicated), (image.bytes_packed, 0));
        verify(&image, &name, &client).await;
    }
}

/// Kills the registry again and again while the next version is pushed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_that_copies_survives_kills_of_the_registry() {
    kills(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_that_copies_survives_kills_of_the_registry_on_a_bucket() {
    kills(Some(stores::s3s().await)).await;
}

async fn kills(bucket: Option<stores::Store>) {
    anyplace_service::install_crypto_provider();
    let (mut seed, mut tree, dir) = (Seed::from_env(), Tree::new(), tempfile::tempdir().unwrap());
    let storage = bucket.map(|store| (store.settings(store.address, "r"), store));
    let settings = storage.as_ref().map_or(String::new(), |(text, _)| format!("[storage]\n{text}"));
    let mut child = Killable::start(dir.path(), &settings).await;
    let address = child.address.clone();
    let credentials = Credentials::from_file(&dir.path().join("credentials")).unwrap();
    let client = Client::new(&child.url, Some(credentials)).unwrap().with_patience(Patience { retries: 100 });
    pushed(&tree.pack().await, "team/app:v0", &client).await;
    let (mut copied, mut retries) = (0, 0);
    for version in 1..7 {
        tree.change(version);
        let (image, name) = (tree.pack().await, format!("team/app:v{version}"));
        let pushing = pushed(&image, &name, &client);
        let killing = async {
            for _ in 0..2 {
                tokio::time::sleep(Duration::from_millis(seed.below(150))).await;
                child.kill();
                child = Killable::start_at(dir.path(), &address, &settings).await;
            }
        };
        let (summary, ()) = tokio::join!(pushing, killing);
        (copied, retries) = (copied + summary.bytes_deduplicated, retries + summary.retries);
        verify(&image, &name, &client).await;
    }
    eprintln!("{copied} bytes copied, {retries} requests repeated");
    assert!(copied > LARGE_BYTES as u64, "hardly any push copied");
}
