//! For tests: random trees, and what a folder or mount holds, in one form.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;

/// A tree and the contents of its objects.
pub(crate) type Image = (Tree, BTreeMap<Digest, Vec<u8>>);

/// All that is compared of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Kind, and contents, target or device number.
    pub(crate) what: String,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, u32),
    /// Not of folders, where file systems differ.
    pub(crate) nlink: u64,
    /// The first name of the same file.
    pub(crate) first: Vec<u8>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

pub(crate) type View = BTreeMap<Vec<u8>, Seen>;

/// A runner whose seed is printed, and set again with `ANYPLACE_SEED`.
pub(crate) fn runner(cases: u32) -> TestRunner {
    let seed: u64 = match std::env::var("ANYPLACE_SEED") {
        Ok(seed) => seed.parse().expect("ANYPLACE_SEED is a number"),
        Err(_) => std::time::UNIX_EPOCH.elapsed().expect("the clock is after 1970").as_nanos() as u64,
    };
    eprintln!("replay with ANYPLACE_SEED={seed}");
    let bytes = [seed.to_le_bytes(); 4].concat();
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// Makes mounts of this test's own thread, so that they end with it, whatever happens.
pub(crate) fn private_mounts() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("run the tests as root");
    let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
}

pub(crate) fn umount(target: &Path) {
    nix::mount::umount(target).unwrap();
}

/// Writes objects as the store does.
pub(crate) fn write_objects(objects: &BTreeMap<Digest, Vec<u8>>, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    for (digest, bytes) in objects {
        let folder = dir.join(&digest.hex()[..2]);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(&digest.hex()[2..]), bytes).unwrap();
    }
}

#[derive(Clone, Debug)]
enum Op {
    File(Vec<u8>),
    Object(Vec<u8>),
    Dir,
    Link(Vec<u8>),
    Hard(prop::sample::Index),
    Device(bool, u32, u32),
    Fifo,
}

/// Trees of some dozens of nodes that a file system of Linux can hold as well.
pub(crate) fn images() -> impl Strategy<Value = Image> {
    let kind = prop_oneof![
        2 => prop::collection::vec(any::<u8>(), 0..100).prop_map(Op::File),
        3 => (any::<u8>(), 0usize..20_000).prop_map(|(byte, len)| Op::Object(vec![byte; len])),
        4 => Just(Op::Dir),
        1 => prop::collection::vec(1u8.., 1..300).prop_map(Op::Link),
        2 => any::<prop::sample::Index>().prop_map(Op::Hard),
        1 => (any::<bool>(), 1u32..4096, 0u32..1 << 20).prop_map(|(block, major, minor)| {
            Op::Device(block, major, minor)
        }),
        1 => Just(Op::Fifo),
    ];
    let op = (any::<prop::sample::Index>(), names(), kind, metas());
    (metas(), prop::collection::vec(op, 0..60)).prop_map(|(root, ops)| image(root, ops))
}

fn names() -> impl Strategy<Value = Vec<u8>> {
    let any_name = prop::collection::vec(1u8.., 1..256).prop_map(|mut name| {
        name.iter_mut().filter(|b| **b == b'/').for_each(|b| *b = b'!');
        name
    });
    let common = prop::sample::select(vec!["a", "b", "!", "...", ".x", "-", "a!", "\u{ff}"]);
    prop_oneof![3 => common.prop_map(Vec::from), 1 => any_name]
        .prop_filter("no name", |name: &Vec<u8>| !matches!(&name[..], b"." | b".."))
}

fn metas() -> impl Strategy<Value = Meta> {
    let id = || prop_oneof![4 => Just(0u32), 1 => 1u32..u32::MAX];
    let time = prop_oneof![3 => Just((1_700_000_000, 0)), 1 => (-2_000_000_000i64..8_000_000_000, 0u32..1_000_000_000)];
    (0u32..=0o7777, id(), id(), time, any::<u8>()).prop_map(
        |(mode, uid, gid, (mtime_s, mtime_ns), attributes)| {
            let mut meta = Meta { mode, uid, gid, mtime_s, mtime_ns, xattrs: BTreeMap::new() };
            let mut put = |bit: u8, name: &str, value: &[u8]| {
                if attributes & bit != 0 {
                    meta.xattrs.insert(name.into(), value.into());
                }
            };
            put(1, "trusted.common", b"the same on many");
            put(2, "trusted.own", &[mode as u8; 33]);
            put(4, "trusted.overlay.opaque", b"y");
            put(8, "trusted.overlay.redirect", b"/etc/shadow");
            put(16, "user.text", &[0, 1, 2]);
            put(32, "user.empty", b"");
            put(64, "security.capability", &capability());
            put(128, "system.posix_acl_access", &acl());
            put(64, "system.posix_acl_default", &acl());
            meta
        },
    )
}

/// CAP_NET_RAW, as the kernel keeps it.
fn capability() -> Vec<u8> {
    [0x0200_0001u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Mode 0640, and user 5 may read: tag, permissions and owner of each entry.
fn acl() -> Vec<u8> {
    let entries = [(1u16, 6u16, u32::MAX), (2, 4, 5), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    acl
}

fn image(root: Meta, ops: Vec<(prop::sample::Index, Vec<u8>, Op, Meta)>) -> Image {
    let mut tree = Tree::default();
    let mut objects = BTreeMap::new();
    let mut dirs = vec![Vec::new()];
    let mut files = Vec::new();
    tree.insert(b"", allowed(Node { meta: root, kind: Kind::Directory(BTreeMap::new()) })).unwrap();
    for (dir, name, op, meta) in ops {
        let path = [dir.get(&dirs), &b"/"[..], &name].concat();
        if path.len() > 4000 || tree.lookup(&path).is_some() {
            continue;
        }
        let kind = match op {
            Op::Hard(_) if files.is_empty() => continue,
            Op::Hard(target) => {
                tree.link(&path, *target.get(&files)).unwrap();
                continue;
            }
            Op::File(bytes) => Kind::File(Content::Inline(bytes)),
            Op::Object(bytes) => {
                let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
                objects.insert(digest.clone(), bytes);
                Kind::File(Content::Object { digest, size })
            }
            Op::Dir => Kind::Directory(BTreeMap::new()),
            Op::Link(target) => Kind::Symlink(target),
            Op::Device(true, major, minor) => Kind::BlockDevice { major, minor },
            Op::Device(false, major, minor) => Kind::CharDevice { major, minor },
            Op::Fifo => Kind::Fifo,
        };
        let is_dir = matches!(kind, Kind::Directory(_));
        let id = tree.insert(&path, allowed(Node { meta, kind })).unwrap();
        if is_dir {
            dirs.push(path);
        } else {
            files.push(id);
        }
    }
    (tree, objects)
}

/// Without the attributes that Linux doesn't let such a node have.
fn allowed(mut node: Node) -> Node {
    let (is_file, is_dir) = (matches!(node.kind, Kind::File(_)), node.names().is_some());
    node.meta.xattrs.retain(|name, _| match &name[..] {
        b"security.capability" => is_file,
        b"system.posix_acl_default" => is_dir,
        name if name.starts_with(b"user.") || name.starts_with(b"system.") => is_file || is_dir,
        _ => true,
    });
    if node.meta.xattrs.contains_key(&b"system.posix_acl_access"[..]) {
        node.meta.mode = node.meta.mode & 0o7000 | 0o640;
    }
    if matches!(node.kind, Kind::Symlink(_)) {
        node.meta.mode = 0o777;
    }
    node
}

/// What a mount of the image must show.
pub(crate) fn expected((tree, objects): &Image) -> View {
    let nlink = tree.nlink();
    let mut firsts: HashMap<NodeId, Vec<u8>> = HashMap::new();
    let mut view = View::new();
    // By name, so that "the first" is the same as when a folder is read.
    for (path, id) in tree.walk().collect::<BTreeMap<_, _>>() {
        let node = tree.node(id);
        let device = |kind: &str, major: u32, minor: u32| format!("{kind} {major}:{minor}");
        let what = match &node.kind {
            Kind::Directory(_) => "folder".to_owned(),
            Kind::File(Content::Inline(bytes)) => file(bytes),
            Kind::File(Content::Object { digest, .. }) => file(&objects[digest]),
            Kind::Symlink(target) => format!("link {target:?}"),
            Kind::CharDevice { major, minor } => device("char", *major, *minor),
            Kind::BlockDevice { major, minor } => device("block", *major, *minor),
            Kind::Fifo => "fifo".to_owned(),
        };
        let meta = &node.meta;
        let seen = Seen {
            what,
            mode: meta.mode,
            owner: (meta.uid, meta.gid),
            mtime: (meta.mtime_s, meta.mtime_ns),
            nlink: if node.names().is_some() { 0 } else { nlink[id.0].into() },
            first: firsts.entry(id).or_insert_with(|| path.clone()).clone(),
            xattrs: meta.xattrs.clone(),
        };
        view.insert(path, seen);
    }
    view
}

fn file(bytes: &[u8]) -> String {
    format!("file {} {}", bytes.len(), Digest::of(bytes))
}

/// What is in a folder.
pub(crate) fn seen(root: &Path) -> View {
    let mut paths = vec![Vec::new()];
    let mut at = 0;
    while at < paths.len() {
        let dir = root.join(OsStr::from_bytes(&paths[at]));
        if dir.symlink_metadata().unwrap().is_dir() {
            for entry in std::fs::read_dir(&dir).unwrap() {
                let slash: &[u8] = if paths[at].is_empty() { b"" } else { b"/" };
                paths.push([&paths[at], slash, entry.unwrap().file_name().as_bytes()].concat());
            }
        }
        at += 1;
    }
    paths.sort();
    let mut firsts: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut view = View::new();
    for path in paths {
        let at = root.join(OsStr::from_bytes(&path));
        let meta = at.symlink_metadata().unwrap();
        let kind = meta.file_type();
        let device = |kind: &str| {
            let (major, minor) = (nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
            format!("{kind} {major}:{minor}")
        };
        let what = if kind.is_dir() {
            "folder".to_owned()
        } else if kind.is_file() {
            file(&std::fs::read(&at).unwrap())
        } else if kind.is_symlink() {
            format!("link {:?}", std::fs::read_link(&at).unwrap().as_os_str().as_bytes())
        } else if kind.is_char_device() {
            device("char")
        } else if kind.is_block_device() {
            device("block")
        } else {
            "fifo".to_owned()
        };
        let names = xattr::list(&at).unwrap();
        let value = |name: &OsStr| xattr::get(&at, name).unwrap().unwrap();
        let seen = Seen {
            what,
            mode: meta.mode() & 0o7777,
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec() as u32),
            nlink: if kind.is_dir() { 0 } else { meta.nlink() },
            first: firsts.entry((meta.dev(), meta.ino())).or_insert_with(|| path.clone()).clone(),
            xattrs: names.map(|name| (name.as_bytes().to_vec(), value(&name))).collect(),
        };
        view.insert(path, seen);
    }
    view
}
