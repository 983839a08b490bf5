//! Pulls from a small registry into a store, mounted and compared with what GNU tar makes of the layers.

mod flips;
mod hostile;
mod keep;
mod kills;
mod other_tools;
mod reuse;
mod room;

use super::testing::{Bed, Format, Member, Seed, archive, random_layer, unpack_by_tar};
use super::*;
use crate::client::Client;
use crate::tree::testing::seen;

/// Random images; each is pulled three ways.
const IMAGES: usize = 24;

fn assert_same(found: &crate::tree::testing::View, expected: &crate::tree::testing::View) {
    // The root is the upper folder, with its own time.
    for (path, seen) in expected.iter().filter(|(path, _)| !path.is_empty()) {
        assert_eq!(found.get(path), Some(seen), "{}", String::from_utf8_lossy(path));
    }
    for path in found.keys() {
        assert!(expected.contains_key(path), "{} is too much", String::from_utf8_lossy(path));
    }
}

#[test]
fn random_images_mount_as_tar_unpacks_them() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let store = bed.open();
    let mut pool = Vec::new();
    for round in 0..IMAGES {
        let layers: Vec<Vec<Member>> =
            (0..1 + seed.below(4)).map(|at| random_layer(&mut seed, &mut pool, at == 0)).collect();
        let oracle = bed.dir.path().join(format!("oracle-{round}"));
        unpack_by_tar(&layers, &oracle);
        let expected = seen(&oracle);
        let formats = [Format::Plain, Format::Gzip, Format::Zstd, Format::Chunked];
        let packed: Vec<_> = layers
            .iter()
            .map(|layer| {
                let format = if seed.below(2) == 0 { Format::Chunked } else { formats[seed.below(4)] };
                (archive(layer), format)
            })
            .collect();
        bed.server.set_ranges(seed.below(4) > 0);
        bed.server.put_image(&format!("v{round}"), &packed);
        let image = bed.pull(&store, &format!("v{round}")).unwrap();
        assert_same(&bed.mounted(&image, seen), &expected);
    }
    bed.assert_tidy(&store);
    assert_eq!(store.list().unwrap().len(), IMAGES);
    drop(store);
    let store = bed.open();
    assert_eq!(store.list().unwrap().len(), IMAGES);
    bed.assert_tidy(&store);
}

#[test]
fn a_store_belongs_to_one_process_and_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Store::open(dir.path(), Options::default());
    let store = open().unwrap();
    assert!(matches!(open(), Err(Error::StoreInUse { .. })));
    std::fs::create_dir(dir.path().join("tmp/layer-x")).unwrap();
    std::fs::write(dir.path().join("tmp/layer-x/y"), "").unwrap();
    drop(store);
    let store = open().unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    assert_eq!(std::fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(store.list().unwrap(), []);
    assert!(!store.has(&"app:v1".parse().unwrap()));
}
