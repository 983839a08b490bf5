//! What a pull fetches where the store has a part of it already. Bytes are counted, not time.

use super::super::testing::{Bed, Format, Member, Seed, archive};
use super::*;
use crate::tree::testing::seen;

/// Most of a layer's bytes that a next version may cost, in percent.
const NEXT_MAX_PERCENT: u64 = 5;

fn files(seed: &mut Seed, count: usize) -> Vec<Member> {
    (0..count).map(|at| Member::file(&format!("file-{at:04}"), &seed.bytes(60_000))).collect()
}

#[test]
fn a_next_version_with_one_file_in_a_hundred_changed_costs_little() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let store = bed.open();
    let mut layer = files(&mut seed, 200);
    layer.extend((0..100).map(|at| Member::file(&format!("small-{at}"), &seed.bytes(500))));
    bed.server.put_image("v1", &[(archive(&layer), Format::Chunked)]);
    let image = bed.pull(&store, "v1").unwrap();
    assert!(image.stats.bytes_fetched <= image.stats.layer_bytes, "{:?}", image.stats);
    assert!(image.stats.bytes_fetched > image.stats.layer_bytes * 8 / 10, "{:?}", image.stats);
    for _ in 0..3 {
        let at = seed.below(layer.len());
        layer[at].contents = seed.bytes(40_000);
    }
    bed.server.put_image("v2", &[(archive(&layer), Format::Chunked)]);
    let before = bed.server.sent();
    let image = bed.pull(&store, "v2").unwrap();
    let stats = image.stats;
    assert!(bed.server.sent() - before < stats.bytes_fetched + 2_000, "the configuration and no more");
    assert!(stats.bytes_fetched * 100 <= stats.layer_bytes * NEXT_MAX_PERCENT, "{stats:?}");
    assert_eq!(store.verify().unwrap().damaged, Vec::<String>::new());
    let diff = store.diff(&"app:v1".parse().unwrap(), &"app:v2".parse().unwrap()).unwrap();
    assert!((1..=3).contains(&diff.changed.len()), "{:?}", diff.changed);
    assert!(diff.added.is_empty() && diff.removed.is_empty());
    assert!(diff.shared_bytes > 180 * 60_000);
}

#[test]
fn a_large_file_costs_the_chunks_that_changed() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let store = bed.open();
    let mut large = seed.bytes(24 << 20);
    large[5 << 20..12 << 20].fill(0);
    let layer = |large: &[u8]| archive(&[Member::file("large", large), Member::file("small", b"s")]);
    bed.server.put_image("v1", &[(layer(&large), Format::Chunked)]);
    let image = bed.pull(&store, "v1").unwrap();
    let object = Digest::of(&large);
    let path = bed.store_dir().join("objects").join(&object.hex()[..2]).join(&object.hex()[2..]);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
    assert!(blocks * 512 < 18 << 20, "the zeros are a hole: {blocks} blocks");
    drop(image);
    // A few bytes changed, and some inserted, which moves all that follows.
    large[20_000_000] ^= 1;
    large.splice(1_000_000..1_000_000, [1, 2, 3]);
    let changed = layer(&large);
    bed.server.put_image("v2", &[(changed.clone(), Format::Chunked)]);
    let stats = bed.pull(&store, "v2").unwrap().stats;
    // Each change costs a chunk or two, of a few 100 KB at times.
    assert!(stats.bytes_fetched <= stats.layer_bytes / 8, "{stats:?}");
    // The same from an ordinary layer, in the objects already.
    bed.server.put_image("v3", &[(changed, Format::Gzip)]);
    let image = bed.pull(&store, "v3").unwrap();
    assert_eq!((image.stats.layers_reused, image.stats.bytes_fetched), (1, 0));
    assert_eq!(bed.mounted(&image, |at| std::fs::read(at.join("large")).unwrap()), large);
    assert_eq!(store.verify().unwrap().damaged, Vec::<String>::new());
}

#[test]
fn what_is_damaged_here_is_fetched_in_place_of_being_reused() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let store = bed.open();
    let mut layer = files(&mut seed, 20);
    layer.push(Member::file("large", &seed.bytes(3 << 20)));
    bed.server.put_image("v1", &[(archive(&layer), Format::Chunked)]);
    bed.pull(&store, "v1").unwrap();
    let flip = |contents: &[u8]| {
        let hex = Digest::of(contents).hex().to_owned();
        let path = bed.store_dir().join("objects").join(&hex[..2]).join(&hex[2..]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[1_000] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    };
    // A whole file that the next version has too, and a chunk of one that it has changed elsewhere.
    flip(&layer[3].contents);
    flip(&layer[20].contents);
    layer[20].contents[2 << 20] ^= 1;
    bed.server.put_image("v2", &[(archive(&layer), Format::Chunked)]);
    let image = bed.pull(&store, "v2").unwrap();
    for member in &layer {
        let found = bed.mounted(&image, |at| std::fs::read(at.join(&member.name)).unwrap());
        assert_eq!(found, member.contents, "{}", member.name);
    }
    // The old large file is gone, and with it the image that had it.
    let report = store.verify().unwrap();
    assert_eq!(report.dropped.len(), 1, "{report:?}");
    bed.pull(&store, "v1").unwrap();
    assert_eq!(store.verify().unwrap().dropped, []);
    bed.assert_tidy(&store);
}

#[test]
fn pulls_of_one_image_and_of_one_layer_are_joined() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let store = bed.open();
    let shared = archive(&files(&mut seed, 40));
    let mut layer_bytes = 0;
    for tag in ["a", "b"] {
        let own = archive(&files(&mut seed, 2));
        let described = bed.server.put_image(tag, &[(shared.clone(), Format::Chunked), (own, Format::Gzip)]);
        layer_bytes = described[0].size;
    }
    let client = bed.client.clone();
    bed.runtime.block_on(async {
        let pulls: Vec<_> = (0..8)
            .map(|at| {
                let (store, client) = (store.clone(), client.clone());
                let reference = if at % 2 == 0 { "app:a" } else { "app:b" }.parse().unwrap();
                tokio::spawn(async move { store.pull(&reference, &client, &PullOptions::default()).await })
            })
            .collect();
        // One that is given up takes none of the others with it.
        pulls[0].abort();
        for pull in pulls.into_iter().skip(1) {
            pull.await.unwrap().unwrap();
        }
        store.settle().await.unwrap();
    });
    assert!(bed.server.sent() < layer_bytes * 2, "{} of {layer_bytes}", bed.server.sent());
    bed.assert_tidy(&store);
}

#[test]
fn a_live_pull_hurries_the_prewarming_that_it_joins() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    // At this rate prewarming alone would take hours.
    let options = Options { prewarm_bytes_per_s: Some(100), ..Options::default() };
    let store = Store::open(&bed.store_dir(), options).unwrap();
    let layer = files(&mut seed, 10);
    bed.server.put_image("v1", &[(archive(&layer), Format::Chunked)]);
    let client = bed.client.clone();
    let reference: Reference = "app:v1".parse().unwrap();
    let image = bed.runtime.block_on(async {
        let prewarm = PullOptions { class: PullClass::Prewarm, ..PullOptions::default() };
        let (of, with, name) = (store.clone(), client.clone(), reference.clone());
        let warming = tokio::spawn(async move { of.pull(&name, &with, &prewarm).await });
        while bed.server.requests() < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let image = store.pull(&reference, &client, &PullOptions::default()).await.unwrap();
        warming.await.unwrap().unwrap();
        store.settle().await.unwrap();
        image
    });
    assert_eq!(bed.mounted(&image, seen).len(), 11);
}
