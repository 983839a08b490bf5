use std::process::Command;

use crate::digest::Digest;
use crate::tree::{Content, Kind, Meta, Node, Tree};

#[test]
fn fsck_finds_nothing_wrong_with_one_of_each() {
    let mut tree = Tree::default();
    let meta =
        Meta { mode: 0o644, uid: 70_000, gid: 2, mtime_s: -5, mtime_ns: 7, xattrs: Default::default() };
    let mut put = |path: &str, kind| tree.insert(path.as_bytes(), Node { meta: meta.clone(), kind }).unwrap();
    put("a/small", Kind::File(Content::Inline(b"hello".to_vec())));
    put("a/empty", Kind::File(Content::Inline(Vec::new())));
    put("a/object", Kind::File(Content::Object { digest: Digest::of(b"x"), size: 1 << 40 }));
    put("a/huge", Kind::File(Content::Object { digest: Digest::of(b"x"), size: i64::MAX as u64 }));
    put("a/link", Kind::Symlink(vec![b'x'; 4095]));
    put("a/null", Kind::CharDevice { major: 1, minor: 3 });
    put("a/pipe", Kind::Fifo);
    for n in 0..1000 {
        put(&format!("many/{n}"), Kind::Fifo);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    super::write(&tree, &mut std::fs::File::create(&path).unwrap()).unwrap();
    let fsck = Command::new("fsck.erofs").arg(&path).output().expect("fsck.erofs of erofs-utils");
    assert!(fsck.status.success(), "{fsck:?}");
}
