//! For tests: a small registry that can be made to fail, and layers from a seed.

mod server;

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use tar::{EntryType, Header};

use super::{Options, PullOptions, PulledImage, Store};
use crate::client::Client;
use crate::error::Error;
pub(crate) use server::Server;

/// Random numbers from a seed that is printed, and set again with `ANYPLACE_SEED`.
pub(crate) struct Seed(u64);

impl Seed {
    pub(crate) fn new() -> Seed {
        let seed = match std::env::var("ANYPLACE_SEED") {
            Ok(seed) => seed.parse().expect("ANYPLACE_SEED is a number"),
            Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        };
        eprintln!("replay with ANYPLACE_SEED={seed}");
        Seed(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Bytes of which about half compress.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            let word = self.next();
            match word % 3 {
                0 => bytes.extend_from_slice(&[word as u8; 8]),
                _ => bytes.extend_from_slice(&word.to_le_bytes()),
            }
        }
        bytes.truncate(len);
        bytes
    }
}

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Plain,
    Gzip,
    Zstd,
    Chunked,
}

/// An entry of a layer: kind, name, link target, mode, contents, attribute.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) kind: EntryType,
    pub(crate) name: String,
    pub(crate) link: String,
    pub(crate) mode: u32,
    pub(crate) contents: Vec<u8>,
    pub(crate) xattr: Option<Vec<u8>>,
}

impl Member {
    pub(crate) fn new(kind: EntryType, name: &str, link: &str, contents: &[u8]) -> Member {
        let mode = if kind == EntryType::Directory { 0o755 } else { 0o644 };
        let (name, link) = (name.to_owned(), link.to_owned());
        Member { kind, name, link, mode, contents: contents.to_vec(), xattr: None }
    }

    pub(crate) fn file(name: &str, contents: &[u8]) -> Member {
        Member::new(EntryType::Regular, name, "", contents)
    }

    pub(crate) fn dir(name: &str) -> Member {
        Member::new(EntryType::Directory, name, "", b"")
    }
}

/// An archive with exactly these names, which the tar crate's own checks would refuse.
pub(crate) fn archive(members: &[Member]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (at, member) in members.iter().enumerate() {
        if let Some(value) = &member.xattr {
            builder.append_pax_extensions([("SCHILY.xattr.user.note", value.as_slice())]).unwrap();
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(member.kind);
        header.set_mode(member.mode);
        header.set_uid(at as u64 % 3);
        header.set_gid(0);
        header.set_mtime(1_000_000_000 + at as u64);
        header.set_size(member.contents.len() as u64);
        if matches!(member.kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        let ustar = header.as_ustar_mut().unwrap();
        ustar.name[..member.name.len()].copy_from_slice(member.name.as_bytes());
        ustar.linkname[..member.link.len()].copy_from_slice(member.link.as_bytes());
        header.set_cksum();
        builder.append(&header, member.contents.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Names of a layer's folders and files: few, so that layers meet.
const NAMES: [&str; 6] = ["a", "b", "c", "d.txt", "e", "f"];

/// A random layer, on top of layers that used the same names. Contents come from `pool`, or are new and join it.
pub(crate) fn random_layer(seed: &mut Seed, pool: &mut Vec<Vec<u8>>, is_first: bool) -> Vec<Member> {
    let mut members = vec![Member::dir("./")];
    // What this layer has: by path, whether it is a folder.
    let mut own: HashMap<String, bool> = HashMap::from([(String::new(), true)]);
    let mut files: Vec<String> = Vec::new();
    for _ in 0..4 + seed.below(24) {
        let mut path = String::new();
        for _ in 0..seed.below(3) {
            let next = format!("{path}{}{}", if path.is_empty() { "" } else { "/" }, NAMES[seed.below(6)]);
            match own.get(&next) {
                Some(true) => {}
                Some(false) => break,
                None => {
                    own.insert(next.clone(), true);
                    members
                        .push(Member { mode: [0o755, 0o700, 0o1777][seed.below(3)], ..Member::dir(&next) });
                }
            }
            path = next;
        }
        let name = format!("{path}{}{}", if path.is_empty() { "" } else { "/" }, NAMES[seed.below(6)]);
        if own.contains_key(&name) {
            continue;
        }
        let member = match seed.below(16) {
            0 => Member::new(
                EntryType::Symlink,
                &name,
                ["a", "/b/c", "../../e", "nowhere"][seed.below(4)],
                b"",
            ),
            1 if !files.is_empty() => {
                let target = files[seed.below(files.len())].clone();
                Member::new(EntryType::Link, &name, &target, b"")
            }
            2 => Member::new(EntryType::Char, &name, "", b""),
            3 => Member::new(EntryType::Fifo, &name, "", b""),
            4 | 5 if !is_first => {
                let at = name.rfind('/').map_or(0, |slash| slash + 1);
                Member::file(&format!("{}.wh.{}", &name[..at], &name[at..]), b"")
            }
            6 if !is_first && !path.is_empty() => Member::file(&format!("{path}/.wh..wh..opq"), b""),
            _ => {
                if pool.is_empty() || seed.below(3) > 0 {
                    let len = [0, 5, 1_000, 1_500, 20_000, 200_000][seed.below(6)];
                    let len = len + seed.below(100);
                    let mut bytes = seed.bytes(len);
                    if seed.below(4) == 0 {
                        bytes[len / 3..len - len / 4].fill(0);
                    }
                    pool.push(bytes);
                }
                files.push(name.clone());
                let mut file = Member::file(&name, &pool[seed.below(pool.len())]);
                file.mode = [0o644, 0o4755, 0o600][seed.below(3)];
                if seed.below(8) == 0 {
                    file.xattr = Some(vec![0, b'\n', 255]);
                }
                file
            }
        };
        if !member.name.contains(".wh.") {
            own.insert(name, false);
        } else if members.iter().any(|known| known.name == member.name) {
            continue;
        } else {
            // A name that is hidden is not made again: what the order means is the tree's matter.
            own.insert(name, false);
        }
        members.push(member);
    }
    members
}

/// Applies layers with GNU tar, whiteouts by hand: an independent view of what an image holds.
pub(crate) fn unpack_by_tar(layers: &[Vec<Member>], dest: &Path) {
    std::fs::create_dir(dest).unwrap();
    for layer in layers {
        for member in layer {
            let path = Path::new(&member.name);
            let (Some(name), Some(parent)) = (path.file_name().and_then(|n| n.to_str()), path.parent())
            else {
                continue;
            };
            let parent = dest.join(parent);
            // A folder of this layer may stand where a lower one has something else.
            let is_folder = std::fs::symlink_metadata(&parent).is_ok_and(|parent| parent.is_dir());
            if name == ".wh..wh..opq" && is_folder {
                super::recover::empty(&parent).unwrap();
            } else if let Some(hidden) = name.strip_prefix(".wh.").filter(|_| is_folder) {
                super::recover::remove(&parent.join(hidden)).unwrap();
            }
        }
        for member in layer {
            // What a folder replaces, or what replaces a folder; tar would refuse or merge.
            let path = dest.join(&member.name);
            let was_dir = std::fs::symlink_metadata(&path).map(|file| file.is_dir());
            if was_dir.is_ok_and(|was_dir| was_dir != (member.kind == EntryType::Directory)) {
                super::recover::remove(&path).unwrap();
            }
        }
        let mut tar = std::process::Command::new("tar")
            .args(["--extract", "--preserve-permissions", "--same-owner", "--numeric-owner"])
            .args(["--xattrs", "--xattrs-include=*", "--delay-directory-restore"])
            .arg("--directory")
            .arg(dest)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&archive(layer)).unwrap();
        assert!(tar.wait().unwrap().success());
        remove_markers(dest);
    }
}

/// Removes the whiteout files that tar wrote, and keeps their folders' times.
fn remove_markers(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let is_marker =
            path.file_name().and_then(|name| name.to_str()).is_some_and(|n| n.starts_with(".wh."));
        if is_marker {
            let time = std::fs::metadata(dir).unwrap().modified().unwrap();
            std::fs::remove_file(&path).unwrap();
            let times = std::fs::FileTimes::new().set_modified(time);
            std::fs::File::open(dir).unwrap().set_times(times).unwrap();
        } else if std::fs::symlink_metadata(&path).unwrap().is_dir() {
            remove_markers(&path);
        }
    }
}

/// A store and a registry.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) server: Server,
    pub(crate) runtime: tokio::runtime::Runtime,
    /// One for all pulls: making it reads the machine's certificates, which takes longer than a small pull.
    pub(crate) client: Client,
}

impl Bed {
    pub(crate) fn new() -> Bed {
        assert!(nix::unistd::geteuid().is_root(), "run the tests as root: images are mounted");
        // Mounts end with this test, whatever happens.
        crate::tree::testing::private_mounts();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let server = Server::start();
        let client = server.client();
        Bed { dir: tempfile::tempdir().unwrap(), server, runtime, client }
    }

    /// With a store on tmpfs, for what syncs thousands of times.
    pub(crate) fn in_memory() -> Bed {
        Bed { dir: tempfile::tempdir_in("/dev/shm").unwrap(), ..Bed::new() }
    }

    pub(crate) fn store_dir(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub(crate) fn open(&self) -> Store {
        Store::open(&self.store_dir(), Options::default()).unwrap()
    }

    pub(crate) fn pull(&self, store: &Store, tag: &str) -> Result<PulledImage, Error> {
        self.pull_with(store, tag, &self.client)
    }

    pub(crate) fn pull_with(&self, store: &Store, tag: &str, client: &Client) -> Result<PulledImage, Error> {
        let reference = format!("app:{tag}").parse().unwrap();
        self.runtime.block_on(async {
            let pulled = store.pull(&reference, client, &PullOptions::default()).await;
            store.settle().await.unwrap();
            pulled
        })
    }

    /// Mounts an image, and shows the folder to `look`.
    pub(crate) fn mounted<T>(&self, image: &PulledImage, look: impl FnOnce(&Path) -> T) -> T {
        let dir = tempfile::tempdir_in(self.dir.path()).unwrap();
        let at = |name: &str| dir.path().join(name);
        for made in ["upper", "work", "merged"] {
            std::fs::create_dir(at(made)).unwrap();
        }
        image.mount(&at("upper"), &at("work"), &at("merged")).unwrap();
        let seen = look(&at("merged"));
        crate::tree::testing::umount(&at("merged"));
        seen
    }

    /// Nothing is in the store but what its images need.
    pub(crate) fn assert_tidy(&self, store: &Store) {
        assert_eq!(store.collect().unwrap(), 0, "the store has leftovers");
        assert_eq!(std::fs::read_dir(self.store_dir().join("tmp")).unwrap().count(), 0);
        assert!(!self.store_dir().join("dirty").exists());
    }
}
