use std::path::PathBuf;

use proptest::test_runner::TestCaseError;

use super::*;
use crate::tree::testing::{
    Image, View, expected, images, private_mounts, runner, seen, umount, write_objects,
};

/// Random images that are mounted, each in three ways.
const IMAGES: u32 = 100;

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
