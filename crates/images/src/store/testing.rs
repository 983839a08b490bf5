//! For tests: a small registry that can be made to fail, and layers from a seed.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tar::{EntryType, Header};

use super::objects::lock;
use super::{Options, PullOptions, PulledImage, Store};
use crate::client::{Client, Patience};
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::{Descriptor, ImageConfig, Manifest, OCI_CONFIG, OCI_MANIFEST, Platform, RootFs};

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

/// What the registry does to a body before it sends it: path, whether a range was asked for, the body.
type Mangle = Box<dyn Fn(&str, &mut Vec<u8>) + Send>;

/// A registry in this process.
pub(crate) struct Server {
    shared: Arc<Shared>,
    url: String,
}

#[derive(Default)]
struct Shared {
    contents: Mutex<HashMap<String, (String, Vec<u8>)>>,
    mangle: Mutex<Option<Mangle>>,
    /// Bytes of blobs that were sent.
    sent: AtomicU64,
    requests: AtomicU64,
    no_ranges: AtomicBool,
    stopped: AtomicBool,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
    }
}

impl Server {
    pub(crate) fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        listener.set_nonblocking(true).unwrap();
        let shared = Arc::new(Shared::default());
        let of = shared.clone();
        std::thread::spawn(move || {
            while !of.stopped.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let of = of.clone();
                        std::thread::spawn(move || {
                            let _ = serve(&of, &stream);
                        });
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Server { shared, url }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A client that doesn't wait long for a registry that fails on purpose.
    pub(crate) fn client(&self) -> Client {
        Client::new(&self.url, None).unwrap().with_patience(Patience::NONE)
    }

    pub(crate) fn set_ranges(&self, known: bool) {
        self.shared.no_ranges.store(!known, Ordering::SeqCst);
    }

    pub(crate) fn set_mangle(&self, mangle: impl Fn(&str, &mut Vec<u8>) + Send + 'static) {
        *lock(&self.shared.mangle) = Some(Box::new(mangle));
    }

    pub(crate) fn stop_mangling(&self) {
        *lock(&self.shared.mangle) = None;
    }

    pub(crate) fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn put(&self, path: &str, media_type: &str, bytes: Vec<u8>) {
        lock(&self.shared.contents).insert(path.to_owned(), (media_type.to_owned(), bytes));
    }

    pub(crate) fn get(&self, path: &str) -> Vec<u8> {
        lock(&self.shared.contents)[path].1.clone()
    }

    /// Stores an image `app:TAG`; returns the layers' descriptors.
    pub(crate) fn put_image(&self, tag: &str, layers: &[(Vec<u8>, Format)]) -> Vec<Descriptor> {
        let described: Vec<Descriptor> =
            layers.iter().map(|(tar, format)| self.put_layer(tar, *format)).collect();
        let diff_ids = layers.iter().map(|(tar, _)| Digest::of(tar)).collect();
        self.put_manifest(tag, described.clone(), diff_ids);
        described
    }

    pub(crate) fn put_manifest(&self, tag: &str, layers: Vec<Descriptor>, diff_ids: Vec<Digest>) {
        let platform = Platform::host();
        let config = ImageConfig {
            architecture: platform.architecture,
            os: platform.os,
            config: None,
            rootfs: RootFs { kind: "layers".to_owned(), diff_ids },
        };
        let config = self.put_blob(OCI_CONFIG, serde_json::to_vec(&config).unwrap());
        let media_type = Some(OCI_MANIFEST.to_owned());
        let manifest = Manifest { schema_version: 2, media_type, config, layers };
        let bytes = serde_json::to_vec(&manifest).unwrap();
        self.put(&format!("/v2/app/manifests/{}", Digest::of(&bytes)), OCI_MANIFEST, bytes.clone());
        self.put(&format!("/v2/app/manifests/{tag}"), OCI_MANIFEST, bytes);
    }

    pub(crate) fn put_layer(&self, tar: &[u8], format: Format) -> Descriptor {
        let mut annotations = None;
        let (media_type, blob) = match format {
            Format::Plain => ("application/vnd.oci.image.layer.v1.tar", tar.to_vec()),
            Format::Gzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(tar).unwrap();
                ("application/vnd.oci.image.layer.v1.tar+gzip", gzip.finish().unwrap())
            }
            Format::Zstd => {
                ("application/vnd.oci.image.layer.v1.tar+zstd", zstd::bulk::compress(tar, 1).unwrap())
            }
            Format::Chunked => {
                let mut blob = Vec::new();
                let options = zstd_chunked::Options { level: 1, threads: 1 };
                let packed = zstd_chunked::pack(tar, &mut blob, &options).unwrap();
                annotations = packed.annotations.map(|annotations| annotations.to_map());
                ("application/vnd.oci.image.layer.v1.tar+zstd", blob)
            }
        };
        Descriptor { annotations, ..self.put_blob(media_type, blob) }
    }

    pub(crate) fn put_blob(&self, media_type: &str, bytes: Vec<u8>) -> Descriptor {
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        self.put(&format!("/v2/app/blobs/{digest}"), "application/octet-stream", bytes);
        Descriptor { media_type: media_type.to_owned(), digest, size, platform: None, annotations: None }
    }
}

fn serve(shared: &Shared, stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut reader = BufReader::new(stream);
    loop {
        let (mut path, mut range, mut line) = (None, None, String::new());
        loop {
            line.clear();
            if reader.by_ref().take(8192).read_line(&mut line)? == 0 || shared.stopped.load(Ordering::SeqCst)
            {
                return Ok(());
            }
            let text = line.trim_end();
            if path.is_none() {
                path = text.split(' ').nth(1).map(str::to_owned);
            } else if text.is_empty() {
                break;
            } else if let Some(bytes) = text.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (first, last) = bytes.split_once('-').unwrap_or((bytes, ""));
                range = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().ok()));
            }
        }
        let path = path.unwrap_or_default();
        let found = lock(&shared.contents).get(&path).cloned();
        let mut stream = stream;
        let Some((media_type, mut body)) = found else {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")?;
            continue;
        };
        if let Some(mangle) = &*lock(&shared.mangle) {
            mangle(&path, &mut body);
        }
        let total = body.len();
        let range = range.filter(|_| !shared.no_ranges.load(Ordering::SeqCst));
        let (status, extra) = match range {
            Some((first, last)) => {
                let last = last.unwrap_or(total - 1).min(total.saturating_sub(1));
                body = body.get(first..=last).unwrap_or_default().to_vec();
                ("206 Partial Content", format!("content-range: bytes {first}-{last}/{total}\r\n"))
            }
            None => ("200 OK", String::new()),
        };
        if path.contains("/blobs/") {
            shared.sent.fetch_add(body.len() as u64, Ordering::SeqCst);
            shared.requests.fetch_add(1, Ordering::SeqCst);
        }
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: {media_type}\r\ncontent-length: {length}\r\n{extra}\r\n"
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(&body)?;
    }
}

/// A store and a registry.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) server: Server,
    pub(crate) runtime: tokio::runtime::Runtime,
}

impl Bed {
    pub(crate) fn new() -> Bed {
        assert!(nix::unistd::geteuid().is_root(), "run the tests as root: images are mounted");
        // Mounts end with this test, whatever happens.
        crate::tree::testing::private_mounts();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Bed { dir: tempfile::tempdir().unwrap(), server: Server::start(), runtime }
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
        let (reference, client) = (format!("app:{tag}").parse().unwrap(), self.server.client());
        self.runtime.block_on(async {
            let pulled = store.pull(&reference, &client, &PullOptions::default()).await;
            store.settle().await;
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
