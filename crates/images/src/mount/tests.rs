use std::path::PathBuf;

use proptest::test_runner::TestCaseError;

use super::*;
use crate::tree::testing::{
    Image, View, expected, images, private_mounts, runner, seen, umount, write_objects,
};

/// Random images that are mounted, each in three ways.
const IMAGES: u32 = 40;

/// An image's files and folders to mount it with.
struct Bed {
    dir: tempfile::TempDir,
}

impl Bed {
    fn new((tree, objects): &Image) -> Bed {
        let bed = Bed { dir: tempfile::tempdir().unwrap() };
        for folder in ["objects", "upper", "work", "target", "folders"] {
            std::fs::create_dir(bed.at(folder)).unwrap();
        }
        write_objects(objects, &bed.at("objects"));
        crate::erofs::write(tree, &mut File::create(bed.at("image")).unwrap()).unwrap();
        bed
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mount(&self) -> PathBuf {
        let (upper, work) = (self.at("upper"), self.at("work"));
        mount_image(&self.at("image"), &self.at("objects"), &upper, &work, &self.at("target")).unwrap();
        self.at("target")
    }
}

/// The first file that differs, for a message that can be read.
fn same(found: &View, expected: &View) -> Result<(), TestCaseError> {
    for path in expected.keys().chain(found.keys()) {
        let (found, expected) = (found.get(path), expected.get(path));
        if found != expected {
            let path = String::from_utf8_lossy(path).into_owned();
            return Err(TestCaseError::fail(format!("`{path}`:\n{found:#?}\nexpected:\n{expected:#?}")));
        }
    }
    Ok(())
}

#[test]
fn mounts_show_the_tree_by_erofs_and_by_folders() {
    private_mounts();
    let check = |image: Image| {
        let bed = Bed::new(&image);
        let mut expected = expected(&image);
        let target = bed.at("target");
        mount_read_only(&bed.at("image"), &bed.at("objects"), &target).unwrap();
        let found = seen(&target);
        umount(&target);
        same(&found, &expected)?;

        // Overlayfs shows the upper folder's own time and attributes as the root's.
        let root = expected.get_mut(&b""[..]).unwrap();
        root.xattrs.clear();
        let upper_root = |mut found: View| {
            found.get_mut(&b""[..]).unwrap().mtime = expected[&b""[..]].mtime;
            found
        };
        let found = upper_root(seen(&bed.mount()));
        umount(&target);
        same(&found, &expected)?;

        let (folders, upper, work) = (bed.at("folders"), bed.at("upper2"), bed.at("work2"));
        crate::tree::write_folders(&image.0, &bed.at("objects"), &folders).unwrap();
        std::fs::create_dir(&upper).unwrap();
        std::fs::create_dir(&work).unwrap();
        mount_tree(&folders, &upper, &work, &target).unwrap();
        let found = upper_root(seen(&target));
        umount(&target);
        same(&found, &expected)
    };
    runner(IMAGES).run(&images(), check).unwrap();
}

/// A folder of root's, mode 0755, an object in it, and the object's bytes.
fn one_object(contents: &[u8]) -> Image {
    let digest = Digest::of(contents);
    let mut tree = Tree::default();
    let meta = Meta { mode: 0o644, ..Meta::default() };
    let kind = Kind::File(Content::Object { digest: digest.clone(), size: contents.len() as u64 });
    let node = Node { meta: meta.clone(), kind };
    let id = tree.insert(b"dir/file", node.clone()).unwrap();
    tree.insert(b"dir/other", node).unwrap();
    tree.link(b"dir/linked", id).unwrap();
    tree.insert(b"small", Node { meta, kind: Kind::File(Content::Inline(b"small".to_vec())) }).unwrap();
    (tree, [(digest, contents.to_vec())].into())
}

/// Whatever this test's thread has mounted by these kinds of file systems, apart from what was there before.
fn mounts() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let is_ours = |line: &&str| line.contains(" - erofs ") || line.contains(" - overlay ");
    table.lines().filter(is_ours).map(str::to_owned).collect()
}

#[test]
fn a_mount_is_written_to_in_its_upper_folder_only() {
    private_mounts();
    let before = mounts();
    let bed = Bed::new(&one_object(&[b'x'; 10_000]));
    let (image, objects) = (std::fs::read(bed.at("image")).unwrap(), seen(&bed.at("objects")));
    let target = bed.mount();
    assert_eq!(mounts().len(), before.len() + 1, "only overlayfs shows");

    // A change of mode copies no contents.
    std::fs::set_permissions(target.join("dir/file"), Permissions::from_mode(0o600)).unwrap();
    assert_eq!(std::fs::metadata(bed.at("upper/dir/file")).unwrap().blocks(), 0);
    assert_eq!(std::fs::read(target.join("dir/file")).unwrap(), [b'x'; 10_000]);
    let append = |name: &str, bytes: &[u8]| {
        File::options().append(true).open(target.join(name)).unwrap().write_all(bytes).unwrap();
    };
    append("dir/other", b"yz");
    append("small", b"er");
    std::fs::write(target.join("new"), "new").unwrap();
    std::fs::rename(target.join("dir"), target.join("moved")).unwrap();
    std::fs::remove_file(target.join("moved/linked")).unwrap();

    let check = || {
        let other = [&[b'x'; 10_000][..], b"yz"].concat();
        assert_eq!(std::fs::read(target.join("moved/other")).unwrap(), other);
        assert_eq!(std::fs::read(target.join("moved/file")).unwrap(), [b'x'; 10_000]);
        assert_eq!(std::fs::metadata(target.join("moved/file")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_to_string(target.join("small")).unwrap(), "smaller");
        assert_eq!(std::fs::read_to_string(target.join("new")).unwrap(), "new");
        assert!(!target.join("moved/linked").exists() && !target.join("dir").exists());
    };
    check();
    umount(&target);
    assert_eq!(mounts(), before, "one umount ends all");
    bed.mount();
    check();
    umount(&target);
    assert_eq!(std::fs::read(bed.at("image")).unwrap(), image);
    assert_eq!(seen(&bed.at("objects")), objects);
}

#[test]
fn images_share_the_page_cache_of_an_object() {
    private_mounts();
    let image = one_object(&vec![b'a'; 1 << 20]);
    let (one, two) = (Bed::new(&image), Bed::new(&image));
    let objects = one.at("objects");
    for bed in [&one, &two] {
        let (upper, work) = (bed.at("upper"), bed.at("work"));
        mount_image(&bed.at("image"), &objects, &upper, &work, &bed.at("target")).unwrap();
        assert_eq!(std::fs::read(bed.at("target/dir/file")).unwrap(), vec![b'a'; 1 << 20]);
    }
    // Contents that are cached for each mount would stay; nothing was synced or dropped here.
    let digest = image.1.keys().next().unwrap();
    let object = objects.join(&digest.hex()[..2]).join(&digest.hex()[2..]);
    File::options().write(true).open(object).unwrap().write_all(b"changed").unwrap();
    for bed in [&one, &two] {
        assert_eq!(&std::fs::read(bed.at("target/dir/file")).unwrap()[..8], b"changeda");
        umount(&bed.at("target"));
    }
}

#[test]
fn the_probe_finds_this_kernels_way_and_leaves_nothing() {
    private_mounts();
    let before = mounts();
    let dir = tempfile::tempdir().unwrap();
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let version: Vec<u32> = release.split(['.', '-']).take(2).map(|part| part.parse().unwrap()).collect();
    let found = Mounter::probe(dir.path()).unwrap();
    match &found {
        // A kernel may have been built without EROFS; then the reason says so.
        Mounter::Folders { reason } => assert!(version < vec![6, 15] || reason.contains("erofs"), "{reason}"),
        Mounter::Erofs => assert!(version >= vec![6, 15]),
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(mounts(), before);
}

#[test]
fn failures_say_what_failed() {
    private_mounts();
    let bed = Bed::new(&one_object(b"x"));
    let (image, objects, target) = (bed.at("image"), bed.at("objects"), bed.at("target"));
    std::fs::write(bed.at("none"), [0; 8192]).unwrap();
    let error = mount_read_only(&bed.at("none"), &objects, &target).unwrap_err();
    assert!(matches!(error, Error::Mount { .. }) && error.to_string().contains("none"), "{error}");
    for error in [
        mount_read_only(&bed.at("missing"), &objects, &target),
        mount_read_only(&image, &bed.at("missing"), &target),
        mount_read_only(&image, &objects, &bed.at("missing")),
        mount_image(&image, &objects, &bed.at("missing"), &bed.at("work"), &target),
        mount_tree(&bed.at("missing"), &bed.at("upper"), &bed.at("work"), &target),
    ] {
        assert!(error.unwrap_err().to_string().contains("missing"));
    }
    // An object that is gone is an error for its readers, and for the writer of folders.
    std::fs::remove_dir_all(&objects).unwrap();
    std::fs::create_dir(&objects).unwrap();
    let target = bed.mount();
    assert!(std::fs::read(target.join("dir/file")).is_err());
    assert_eq!(std::fs::read(target.join("small")).unwrap(), b"small");
    umount(&target);
    let (tree, _) = one_object(b"x");
    assert!(crate::tree::write_folders(&tree, &objects, &bed.at("folders")).is_err());
}
