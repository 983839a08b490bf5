//! One suite for every back end, and faults on top.

mod cases;
mod faults;
mod faulty;
mod garbage;
mod reads;
#[path = "../../tests/registry/stores.rs"]
#[allow(dead_code, reason = "the tests of the whole registry use all of it")]
mod stores;
mod upload_cases;

use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyplace_images::Digest;
use futures_util::stream;
use object_store::memory::InMemory;

use super::{Place, Storage};
use crate::config::Config;
use crate::uploads::{Sizes, Uploads};
use faulty::Faulty;
use stores::Store;

/// Parts as small as moto and Amazon take them.
const PART_BYTES: usize = 5 << 20;
/// Objects of an upload: more than any case makes.
const OBJECTS_MAX: usize = 1_000;
const RENEW_AFTER: Duration = Duration::from_secs(6 * 3600);

/// Opens the same store again and again, as one process after another would, or several at once.
pub(super) struct Bed {
    opener: Opener,
    part_bytes: usize,
    /// s3s-fs names a file by each key in base64, so keys end at some 160 characters. Real stores take 1,024.
    long_keys: bool,
    /// What has to go away after the test.
    _held: Vec<Box<dyn std::any::Any + Send>>,
}

enum Opener {
    Config(Box<Config>),
    Memory(Arc<Faulty>),
}

/// What one process has.
pub(super) struct Process {
    pub(super) storage: Storage,
    pub(super) uploads: Uploads,
}

impl Bed {
    fn folder() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let config = Box::new(Config::new(dir.path()));
        Bed {
            opener: Opener::Config(config),
            part_bytes: PART_BYTES,
            long_keys: true,
            _held: vec![Box::new(dir)],
        }
    }

    fn memory(conditional: bool) -> Bed {
        Bed::faulty(Arc::new(Faulty::new(InMemory::new(), conditional)))
    }

    fn faulty(store: Arc<Faulty>) -> Bed {
        Bed { opener: Opener::Memory(store), part_bytes: 100_000, long_keys: true, _held: Vec::new() }
    }

    /// A folder of its own in a bucket of this store.
    fn bucket(store: &Arc<Store>, prefix: &str, long_keys: bool) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let storage = toml::from_str(&store.settings(store.address, prefix)).unwrap();
        let config = Box::new(Config { storage, ..Config::new(dir.path()) });
        let held: Vec<Box<dyn std::any::Any + Send>> = vec![Box::new(store.clone()), Box::new(dir)];
        Bed { opener: Opener::Config(config), part_bytes: PART_BYTES, long_keys, _held: held }
    }

    async fn s3s() -> Bed {
        Bed::bucket(&Arc::new(stores::s3s().await), "r", false)
    }

    pub(super) async fn open(&self) -> Process {
        self.try_open().await.unwrap()
    }

    pub(super) async fn try_open(&self) -> anyhow::Result<Process> {
        self.open_for(OBJECTS_MAX).await
    }

    /// With so many objects in an upload at most.
    pub(super) async fn open_for(&self, objects_max: usize) -> anyhow::Result<Process> {
        let storage = match &self.opener {
            Opener::Config(config) => Storage::open(config).await?,
            Opener::Memory(store) => {
                Storage::assemble(
                    store.clone(),
                    store.clone(),
                    Place::Bucket(store.clone()),
                    "memory".to_owned(),
                    RENEW_AFTER,
                )
                .await?
            }
        };
        let sizes = Sizes { part_bytes: self.part_bytes, parts_max: 3, objects_max };
        let uploads = Uploads::with_sizes(storage.clone(), sizes)?;
        Ok(Process { storage, uploads })
    }

    /// A size of content that takes several parts, and several objects.
    pub(super) fn large(&self) -> usize {
        self.part_bytes * 4 + 12_345
    }

    pub(super) fn is_folder(&self) -> bool {
        matches!(&self.opener, Opener::Config(config) if matches!(config.storage, super::StorageConfig::Local))
    }
}

impl Process {
    /// Appends as a request would, and gives the new offset.
    pub(super) async fn append(&self, id: &str, bytes: &[u8]) -> crate::errors::Answer<u64> {
        let session = self.uploads.resume("a/b", id).await?;
        let body = stream::iter(bytes.chunks(70_000).map(|chunk| Ok::<_, String>(chunk.to_vec().into())));
        Ok(self.uploads.append(session, body, Some(bytes.len() as u64)).await?.size())
    }

    pub(super) async fn finish(&self, id: &str, digest: &Digest) -> crate::errors::Answer<()> {
        let session = self.uploads.resume("a/b", id).await?;
        self.uploads.finish(session, "a/b", digest).await
    }

    pub(super) async fn read(&self, digest: &Digest, range: Option<std::ops::Range<u64>>) -> Vec<u8> {
        let object = self.storage.open_content(digest, range).await.unwrap();
        object.bytes().await.unwrap().to_vec()
    }
}

/// Bytes that don't repeat, the same for the same seed.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The case's future, once for each back end.
macro_rules! contract {
    ($($case:ident in $module:ident),* $(,)?) => { $(
        mod $case {
            use super::*;
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn in_a_folder() { $module::$case(&Bed::folder()).await; }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn in_memory() { $module::$case(&Bed::memory(true)).await; }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn in_memory_without_conditions() { $module::$case(&Bed::memory(false)).await; }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn in_s3s() { $module::$case(&Bed::s3s().await).await; }
        }
    )* };
}

contract! {
    content_and_links in cases,
    manifests in cases,
    tags_trash_and_ages in cases,
    writers_wait_for_collectors in cases,
    chunks_in_turn_of_two_processes in upload_cases,
    small_uploads in upload_cases,
    more_objects_than_content_may_have in upload_cases,
    wrong_and_cancelled_uploads in upload_cases,
    one_of_two_writers_wins in upload_cases,
    clients_that_go_away in upload_cases,
    sweeps_take_only_what_is_nobodys in upload_cases,
    collections_take_what_nothing_needs in garbage,
}

/// The same suite on a store that starts slowly: on one, each case in a folder of its own.
async fn everything_in(store: Store) {
    let store = Arc::new(store);
    let bed = |case: &str| Bed::bucket(&store, case, true);
    cases::content_and_links(&bed("links")).await;
    cases::manifests(&bed("manifests")).await;
    cases::tags_trash_and_ages(&bed("tags")).await;
    cases::writers_wait_for_collectors(&bed("collectors")).await;
    upload_cases::chunks_in_turn_of_two_processes(&bed("chunks")).await;
    upload_cases::small_uploads(&bed("small")).await;
    upload_cases::more_objects_than_content_may_have(&bed("many")).await;
    upload_cases::wrong_and_cancelled_uploads(&bed("wrong")).await;
    upload_cases::one_of_two_writers_wins(&bed("writers")).await;
    upload_cases::clients_that_go_away(&bed("clients")).await;
    upload_cases::sweeps_take_only_what_is_nobodys(&bed("sweeps")).await;
    garbage::collections_take_what_nothing_needs(&bed("garbage")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_in_moto() {
    let Some(store) = stores::moto().await else { return };
    everything_in(store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_in_azurite() {
    let Some(store) = stores::azurite().await else { return };
    everything_in(store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_in_garage() {
    let Some(stores::garage::Garage { store, nodes }) = stores::garage::start().await else { return };
    everything_in(store).await;
    drop(nodes);
}

/// A store that answers 500, 503 and 429 now and then: nobody notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_of_a_store_that_pass_are_not_seen() {
    let failures = Arc::new(AtomicU64::new(0));
    let store = Arc::new(stores::s3s_that_fails(4, failures.clone()).await);
    let bed = Bed::bucket(&store, "r", false);
    cases::manifests(&bed).await;
    upload_cases::wrong_and_cancelled_uploads(&bed).await;
    upload_cases::clients_that_go_away(&bed).await;
    assert!(failures.load(Ordering::SeqCst) > 20);
}

#[tokio::test]
async fn other_layouts_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = async |dir: &FilePath| {
        format!("{:#}", Storage::open(&Config::new(dir)).await.err().expect("it must be refused"))
    };
    std::fs::create_dir_all(dir.path().join("repositories/a/_blobs/sha256")).unwrap();
    assert!(error(dir.path()).await.contains("push the images again"));
    std::fs::write(dir.path().join("format"), "3\n").unwrap();
    assert!(error(dir.path()).await.contains("has layout 3, and this version reads layout 2"));
    std::fs::write(dir.path().join("format"), "x").unwrap();
    assert!(error(dir.path()).await.contains("is it a registry's storage?"));
}

#[tokio::test]
async fn stores_that_cannot_be_used_say_once_what_to_check() {
    let (dir, store) = (tempfile::tempdir().unwrap(), stores::s3s().await);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let storage = toml::from_str(&store.settings(nobody, "r")).unwrap();
    // Nothing listens there; the retries are object_store's, so this takes as long as one gives up.
    let config = Config { storage, ..Config::new(dir.path()) };
    let opened = tokio::time::timeout(Duration::from_secs(60), Storage::open(&config)).await;
    // As a command ends with it: the error and what it came from.
    let error = format!("{:#}", opened.unwrap().err().unwrap());
    assert!(error.contains("check that the endpoint in [storage] is right"), "{error}");
    for part in error.split(": ").map(str::trim).filter(|part| part.len() > 8) {
        assert_eq!(error.matches(part).count(), 1, "`{part}` is said more than once: {error}");
    }
}
