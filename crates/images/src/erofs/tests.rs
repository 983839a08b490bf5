use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::tree::testing::{Image, images, private_mounts, runner, umount};
use crate::tree::{Content, INLINE_MAX_BYTES, Kind, Meta, Node, NodeId, Tree};

/// Random images that the kernel and fsck look at.
const IMAGES: u32 = 100;
/// Random lists of nodes, most of which are no trees.
const HOSTILE: u32 = 5_000;

fn fsck(image: &Path) {
    let fsck = Command::new("fsck.erofs").arg(image).output();
    let fsck = fsck.expect("fsck.erofs is needed: `apt-get install erofs-utils`");
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stderr));
}

fn written(tree: &Tree) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    super::write(tree, &mut bytes).map(|()| bytes)
}

fn node(kind: Kind) -> Node {
    Node { meta: Meta { mode: 0o644, ..Meta::default() }, kind }
}

fn object(size: u64) -> Node {
    node(Kind::File(Content::Object { digest: Digest::of(b"x"), size }))
}

fn inline(len: usize) -> Node {
    node(Kind::File(Content::Inline(vec![7; len])))
}

fn tree_of(nodes: impl IntoIterator<Item = (String, Node)>) -> Tree {
    let mut tree = Tree::default();
    for (path, node) in nodes {
        tree.insert(path.as_bytes(), node).unwrap();
    }
    tree
}

/// Mounts the metadata alone, and has it looked at.
fn mounted(tree: &Tree, look: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let (image, target) = (dir.path().join("image"), dir.path().join("target"));
    std::fs::create_dir(&target).unwrap();
    super::write(tree, &mut File::create(&image).unwrap()).unwrap();
    fsck(&image);
    crate::mount::mount_metadata(&image, &target).unwrap();
    look(&target);
    umount(&target);
}

#[test]
fn fsck_and_the_kernel_read_what_was_written() {
    private_mounts();
    let check = |(tree, _): Image| {
        mounted(&tree, |target| {
            let nlink = tree.nlink();
            for (path, id) in tree.walk() {
                let at = target.join(OsStr::from_bytes(&path));
                let (node, found) = (tree.node(id), at.symlink_metadata().unwrap());
                assert_eq!(found.nlink(), u64::from(nlink[id.0]), "{}", at.display());
                let names: Vec<_> = xattr::list(&at).unwrap().collect();
                let is_object = match &node.kind {
                    Kind::File(Content::Object { digest, size }) if *size > 0 => {
                        assert_eq!(found.len(), *size);
                        let place = format!("/{}/{}", &digest.hex()[..2], &digest.hex()[2..]);
                        let redirect = xattr::get(&at, "trusted.overlay.redirect").unwrap();
                        assert_eq!(redirect.as_deref(), Some(place.as_bytes()));
                        assert_eq!(
                            xattr::get(&at, "trusted.overlay.metacopy").unwrap().as_deref(),
                            Some(&b""[..])
                        );
                        true
                    }
                    _ => false,
                };
                assert_eq!(names.len(), node.meta.xattrs.len() + if is_object { 2 } else { 0 });
                let of_overlayfs = names.iter().filter(|name| {
                    let rest = name.as_bytes().strip_prefix(b"trusted.overlay.");
                    rest.is_some_and(|rest| !rest.starts_with(b"overlay."))
                });
                assert_eq!(
                    of_overlayfs.count(),
                    if is_object { 2 } else { 0 },
                    "the image's own are escaped"
                );
            }
        });
        Ok(())
    };
    runner(IMAGES).run(&images(), check).unwrap();
}

#[test]
fn folders_of_any_size_are_read_and_searched() {
    private_mounts();
    for count in [0, 1, 2, 1000, 50_000] {
        // Lengths vary, so that blocks end at all places; names before and after `.` and `..`.
        let name = |n: usize| format!("{}{n}{}", ["!", "", "a", ".", "~"][n % 5], "x".repeat(n * 7 % 200));
        let tree = tree_of((0..count).map(|n| (format!("dir/{}", name(n)), node(Kind::Fifo))));
        let tree = if count == 0 { tree_of([("dir".into(), Node::implied_dir())]) } else { tree };
        mounted(&tree, |target| {
            let dir = target.join("dir");
            let found = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
            let mut found: Vec<_> = found.map(|name| name.into_string().unwrap()).collect();
            let mut expected: Vec<_> = (0..count).map(name).collect();
            found.sort();
            expected.sort();
            assert!(found == expected, "{count}: {} names", found.len());
            for n in 0..count {
                assert!(dir.join(name(n)).symlink_metadata().is_ok(), "{}", name(n));
                assert!(!dir.join(format!("{}?", name(n))).exists());
            }
            assert_eq!(dir.join("..").metadata().unwrap().ino(), target.metadata().unwrap().ino());
            assert_eq!(dir.join(".").metadata().unwrap().ino(), dir.metadata().unwrap().ino());
        });
    }
}

#[test]
fn sizes_at_all_boundaries() {
    private_mounts();
    let sizes =
        [1, 4095, 4096, 4097, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 43, (1 << 43) + 1, i64::MAX as u64];
    let objects = sizes.map(|size| (format!("object-{size}"), object(size)));
    let inlines = (0..=INLINE_MAX_BYTES).step_by(13).chain(4000..=INLINE_MAX_BYTES);
    let inlines: BTreeMap<_, _> = inlines.map(|len| (format!("inline-{len}"), inline(len))).collect();
    let links = [1, 2, 4000, 4031, 4032, 4033, 4064, 4065, 4095];
    let links = links.map(|len| (format!("link-{len}"), node(Kind::Symlink(vec![b'x'; len]))));
    let mut long = node(Kind::Symlink(vec![b'x'; 4064]));
    long.meta.xattrs = (0..400).map(|n| (format!("trusted.{n}").into(), vec![1; 200])).collect();
    let long = [("long".to_owned(), long.clone()), ("long2".to_owned(), long)];
    let tree = tree_of(objects.into_iter().chain(inlines).chain(links).chain(long));
    mounted(&tree, |target| {
        for size in sizes {
            assert_eq!(target.join(format!("object-{size}")).metadata().unwrap().len(), size);
        }
        for (path, id) in tree.walk() {
            let at = target.join(OsStr::from_bytes(&path));
            match &tree.node(id).kind {
                Kind::File(Content::Inline(bytes)) => assert!(std::fs::read(&at).unwrap() == *bytes),
                Kind::Symlink(to) => assert!(std::fs::read_link(&at).unwrap().as_os_str().as_bytes() == *to),
                _ => {}
            }
        }
        assert_eq!(xattr::list(target.join("long2")).unwrap().count(), 400);
        assert_eq!(xattr::get(target.join("long"), "trusted.399").unwrap().unwrap(), [1; 200]);
    });
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let check = |(tree, _): Image| {
        let bytes = written(&tree).unwrap();
        // The order that nodes were made in doesn't matter: reversed but for the root, and with one that has no name.
        let last = tree.nodes.len();
        let turn = |id: NodeId| if id.0 == 0 { id } else { NodeId(last - id.0) };
        let mut nodes = vec![tree.nodes[0].clone()];
        nodes.extend(tree.nodes[1..].iter().rev().cloned());
        nodes.push(inline(5));
        for node in &mut nodes {
            if let Kind::Directory(names) = &mut node.kind {
                names.values_mut().for_each(|id| *id = turn(*id));
            }
        }
        let again = written(&Tree { nodes }).unwrap();
        prop_assert!(again == bytes);
        Ok(())
    };
    runner(IMAGES).run(&images(), check).unwrap();
}

#[test]
fn what_is_no_tree_is_refused() {
    let dir = |names: &[(&[u8], usize)]| {
        node(Kind::Directory(names.iter().map(|(name, id)| (name.to_vec(), NodeId(*id))).collect()))
    };
    let with = |change: fn(&mut Meta)| {
        let mut node = inline(1);
        change(&mut node.meta);
        node
    };
    let in_root = |node: Node| vec![dir(&[(b"x", 1)]), node];
    let cases: Vec<(&str, Vec<Node>)> = vec![
        ("no root", vec![]),
        ("a file as root", vec![inline(1)]),
        ("a missing node", vec![dir(&[(b"x", 7)])]),
        ("a loop at the root", vec![dir(&[(b"x", 0)])]),
        ("a loop", vec![dir(&[(b"x", 1)]), dir(&[(b"y", 1)])]),
        ("a folder with two names", vec![dir(&[(b"x", 1), (b"y", 1)]), dir(&[])]),
        ("no name", vec![dir(&[(b"", 1)]), inline(1)]),
        ("dot", vec![dir(&[(b".", 1)]), inline(1)]),
        ("dots", vec![dir(&[(b"..", 1)]), inline(1)]),
        ("a slash", vec![dir(&[(b"a/b", 1)]), inline(1)]),
        ("a zero byte", vec![dir(&[(b"a\0", 1)]), inline(1)]),
        ("a long name", vec![dir(&[(&[b'x'; 256], 1)]), inline(1)]),
        ("a large file in the tree", in_root(inline(INLINE_MAX_BYTES + 1))),
        ("a larger file than Linux has", in_root(object(1 << 63))),
        ("an empty target", in_root(node(Kind::Symlink(vec![])))),
        ("a long target", in_root(node(Kind::Symlink(vec![b'x'; 4096])))),
        ("a whiteout", in_root(node(Kind::CharDevice { major: 0, minor: 0 }))),
        ("a major number", in_root(node(Kind::BlockDevice { major: 4096, minor: 0 }))),
        ("a minor number", in_root(node(Kind::CharDevice { major: 1, minor: 1 << 20 }))),
        ("a mode", in_root(with(|meta| meta.mode = 0o10000))),
        ("nobody", in_root(with(|meta| meta.uid = u32::MAX))),
        ("nanoseconds", in_root(with(|meta| meta.mtime_ns = 1_000_000_000))),
        (
            "an attribute's name",
            in_root(with(|meta| drop(meta.xattrs.insert(b"com.apple.x".to_vec(), vec![])))),
        ),
        ("an empty attribute", in_root(with(|meta| drop(meta.xattrs.insert(b"user.".to_vec(), vec![]))))),
        (
            "a long attribute",
            in_root(with(|meta| drop(meta.xattrs.insert(b"user.x".to_vec(), vec![0; 65_536])))),
        ),
        (
            "many attributes",
            in_root(with(|meta| {
                meta.xattrs = (0..30_000).map(|n| (format!("user.{n}").into(), vec![0])).collect()
            })),
        ),
    ];
    for (what, nodes) in cases {
        let error = written(&Tree { nodes }).expect_err(what);
        assert!(matches!(error, Error::UnsafeEntry { .. } | Error::Unsupported { .. }), "{what}: {error}");
    }
    // A million of the largest maps would be terabytes.
    let huge = tree_of((0..1100).map(|n| (n.to_string(), object(i64::MAX as u64))));
    assert!(matches!(written(&huge).unwrap_err(), Error::Unsupported { .. }));
}

#[test]
fn no_list_of_nodes_makes_it_panic() {
    let kind = prop_oneof![
        4 => prop::collection::btree_map(prop::collection::vec(any::<u8>(), 0..3), (0usize..12).prop_map(NodeId), 0..6)
            .prop_map(Kind::Directory),
        1 => (any::<bool>(), any::<u64>()).prop_map(|(max, size)| {
            Kind::File(Content::Object { digest: Digest::of(b""), size: if max { size } else { size >> 24 } })
        }),
        1 => (0usize..5000).prop_map(|len| Kind::File(Content::Inline(vec![1; len]))),
        1 => prop::collection::vec(any::<u8>(), 0..9).prop_map(Kind::Symlink),
        1 => (any::<u16>(), any::<u32>()).prop_map(|(major, minor)| {
            Kind::CharDevice { major: major.into(), minor: minor >> 8 }
        }),
        1 => Just(Kind::Fifo),
    ];
    let meta = (0u32..0o10010, any::<u32>(), any::<i64>(), 0u32..1_000_000_010, any::<bool>());
    let node = (kind, meta).prop_map(|(kind, (mode, uid, mtime_s, mtime_ns, own))| {
        let xattrs = if own { [(b"user.x".to_vec(), vec![9; 9])].into() } else { BTreeMap::new() };
        Node { meta: Meta { mode, uid, gid: 0, mtime_s, mtime_ns, xattrs }, kind }
    });
    let sound = std::cell::Cell::new(0);
    let check = |nodes: Vec<Node>| {
        if let Ok(bytes) = written(&Tree { nodes }) {
            prop_assert_eq!(bytes.len() % 4096, 0);
            sound.set(sound.get() + 1);
        }
        Ok(())
    };
    runner(HOSTILE).run(&prop::collection::vec(node, 0..12), check).unwrap();
    assert!(sound.get() > 0, "some are trees");
}
