//! What stays and what goes: budget, use, removal, a full disk.

use nix::mount::{MsFlags, mount};

use super::super::testing::{Bed, Format, Member, Seed, archive};
use super::*;

fn image(bed: &Bed, seed: &mut Seed, tag: &str, shared: &[u8]) {
    let layer = [Member::file("own", &seed.bytes(300_000)), Member::file("shared", shared)];
    bed.server.put_image(tag, &[(archive(&layer), Format::Chunked)]);
}

#[test]
fn the_budget_takes_what_was_used_longest_ago_and_never_what_is_in_use() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let options = Options { budget_bytes: Some(1_200_000), ..Options::default() };
    let shared = seed.bytes(100_000);
    let store = Store::open(&bed.store_dir(), options).unwrap();
    for tag in ["a", "b", "c", "d"] {
        image(&bed, &mut seed, tag, &shared);
    }
    let has = |store: &Store| -> Vec<&str> {
        ["a", "b", "c", "d"]
            .into_iter()
            .filter(|tag| store.has(&format!("app:{tag}").parse().unwrap()))
            .collect()
    };
    let a = bed.pull(&store, "a").unwrap();
    for tag in ["b", "c"] {
        drop(bed.pull(&store, tag).unwrap());
    }
    assert_eq!(has(&store), ["a", "b", "c"], "nothing goes before instances are known");
    store.start_evicting();
    drop(bed.pull(&store, "b").unwrap());
    drop(bed.pull(&store, "d").unwrap());
    // `a` is the oldest, but in use.
    assert_eq!(has(&store), ["a", "b", "d"]);
    let usage = store.du().unwrap();
    assert!(usage[0].in_use && !usage[1].in_use);
    for line in &usage {
        assert!(line.unique_bytes >= 300_000 && line.shared_bytes >= 100_000, "{line:?}");
        assert_eq!(line.bytes, line.unique_bytes + line.shared_bytes);
    }
    assert_eq!(store.verify().unwrap().damaged, Vec::<String>::new());
    // An agent that starts again holds what its instances use by its manifest, also where the name is gone.
    let manifest = a.manifest.clone();
    drop((a, store));
    let store = Store::open(&bed.store_dir(), options).unwrap();
    let held = store.hold(&manifest).unwrap().unwrap();
    store.start_evicting();
    for tag in ["c", "b", "d"] {
        drop(bed.pull(&store, tag).unwrap());
    }
    assert!(store.has(&"app:a".parse().unwrap()));
    assert!(matches!(store.remove(&"app:a".parse().unwrap()), Err(Error::ImageInUse { .. })));
    // The name moves on: what is held stays, unlisted.
    image(&bed, &mut seed, "a", &shared);
    drop(bed.pull(&store, "a").unwrap());
    assert_eq!(bed.mounted(&held, |at| std::fs::read(at.join("shared")).unwrap()), shared);
    store.collect().unwrap();
    assert_eq!(bed.mounted(&held, |at| std::fs::read(at.join("shared")).unwrap()), shared);
    drop(held);
    assert!(store.collect().unwrap() > 300_000);
    assert!(store.hold(&manifest).unwrap().is_none());
}

#[test]
fn a_removed_image_takes_only_what_is_its_own() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let store = bed.open();
    let shared = seed.bytes(100_000);
    for tag in ["a", "b"] {
        image(&bed, &mut seed, tag, &shared);
        bed.pull(&store, tag).unwrap();
    }
    let freed = store.remove(&"app:a".parse().unwrap()).unwrap();
    assert!((300_000..400_000).contains(&freed), "{freed}");
    assert!(matches!(store.remove(&"app:a".parse().unwrap()), Err(Error::NotInStore { .. })));
    let b = store.find(&"app:b".parse().unwrap()).unwrap().unwrap();
    assert_eq!(bed.mounted(&b, |at| std::fs::read(at.join("shared")).unwrap()), shared);
    drop(b);
    let inspected = store.inspect(&"app:b".parse().unwrap()).unwrap();
    assert_eq!((inspected.files, inspected.bytes, inspected.layers.len()), (2, 400_000, 1));
    bed.assert_tidy(&store);
    store.remove(&"app:b".parse().unwrap()).unwrap();
    assert_eq!(store.inner.total().unwrap(), 0);
}

/// Puts a tmpfs of this size where the store is to be, or changes its size.
fn tmpfs(bed: &Bed, options: &str, flags: MsFlags) {
    std::fs::create_dir_all(bed.store_dir()).unwrap();
    mount(Some("tmpfs"), &bed.store_dir(), Some("tmpfs"), flags, Some(options)).unwrap();
}

fn names(store: &Store) -> Vec<String> {
    store.list().unwrap().into_iter().map(|image| image.reference.to_string()).collect()
}

#[test]
fn idle_images_go_before_a_pull_that_needs_their_room_and_when_the_disk_is_full() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    // On a tmpfs no EROFS is mounted: each image takes twice the size of its files.
    tmpfs(&bed, "size=32m", MsFlags::empty());
    let one = |seed: &mut Seed, tag: &str, mib: usize, format| {
        let files: Vec<Member> =
            (0..mib).map(|at| Member::file(&format!("{tag}-{at}"), &seed.bytes(1 << 20))).collect();
        bed.server.put_image(tag, &[(archive(&files), format)]);
    };
    for (tag, mib) in [("old", 2), ("a", 10), ("small", 2)] {
        one(&mut seed, tag, mib, Format::Chunked);
    }
    for format in [Format::Plain, Format::Gzip, Format::Zstd, Format::Chunked] {
        one(&mut seed, &format!("{format:?}").to_lowercase(), 9, format);
    }
    // One file, which lies in the store only once it is whole.
    let large = Member::file("large", &seed.bytes(9 << 20));
    bed.server.put_image("large", &[(archive(&[large]), Format::Chunked)]);
    // What it takes shows only while it is unpacked.
    let dense: Vec<Member> =
        (1..=9).map(|at| Member::file(&format!("dense-{at}"), &vec![at; 1 << 20])).collect();
    bed.server.put_image("dense", &[(archive(&dense), Format::Gzip)]);
    // Once the budget says so, and once it is larger than the disk, which only the disk knows.
    for budget in [30 << 20, 1 << 30] {
        let options = Options { budget_bytes: Some(budget), ..Options::default() };
        for tag in ["plain", "gzip", "zstd", "chunked", "large", "dense"] {
            let store = Store::open(&bed.store_dir(), options).unwrap();
            store.start_evicting();
            drop(bed.pull(&store, "a").unwrap());
            let small = bed.pull(&store, "small").unwrap();
            assert_eq!(names(&store), ["app:a", "app:small"]);
            bed.pull(&store, tag).unwrap_or_else(|error| panic!("{tag} of {budget}: {error:?}"));
            // What is in use stays, and what is still idle has room.
            let mut expected = ["app:small".to_owned(), format!("app:{tag}")];
            expected.sort();
            assert_eq!(names(&store), expected);
            assert!(store.inner.total().unwrap() <= budget);
            // What went while a pull was writing left its tables and documents.
            store.collect().unwrap();
            bed.assert_tidy(&store);
            drop(small);
            store.remove(&format!("app:{tag}").parse().unwrap()).unwrap();
        }
        // No more goes than has to: the oldest.
        let store = Store::open(&bed.store_dir(), options).unwrap();
        store.start_evicting();
        for tag in ["chunked", "old", "small"] {
            drop(bed.pull(&store, tag).unwrap());
        }
        assert_eq!(names(&store), ["app:chunked", "app:old", "app:small"]);
        drop(bed.pull(&store, "a").unwrap());
        assert_eq!(names(&store), ["app:a", "app:old", "app:small"]);
        // All of it in use: then it is said.
        let held = bed.pull(&store, "a").unwrap();
        let error = bed.pull(&store, "chunked").unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error:?}");
        drop(held);
        for name in names(&store) {
            store.remove(&name.parse().unwrap()).unwrap();
        }
    }
    nix::mount::umount(&bed.store_dir()).unwrap();
}

/// Pulls an image as prewarming does.
fn prewarm(bed: &Bed, store: &Store, tag: &str) -> Result<PulledImage> {
    let options = PullOptions { class: PullClass::Prewarm, ..PullOptions::default() };
    let reference = format!("app:{tag}").parse().unwrap();
    bed.runtime.block_on(async {
        let pulled = store.pull(&reference, &bed.client, &options).await;
        store.settle().await.unwrap();
        pulled
    })
}

#[test]
fn warm_images_go_last_and_only_for_what_something_waits_for() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let options = Options { budget_bytes: Some(1_200_000), ..Options::default() };
    let store = Store::open(&bed.store_dir(), options).unwrap();
    store.start_evicting();
    let shared = seed.bytes(100_000);
    for tag in ["a", "b", "c", "d", "e"] {
        image(&bed, &mut seed, tag, &shared);
    }
    let a = store.keep_warm(prewarm(&bed, &store, "a").unwrap());
    let b = store.keep_warm(prewarm(&bed, &store, "b").unwrap());
    drop(bed.pull(&store, "c").unwrap());
    // What is idle goes for a wish. What is kept warm doesn't: there is no room for a third beside one in use.
    let d = bed.pull(&store, "d").unwrap();
    assert_eq!(names(&store), ["app:a", "app:b", "app:d"]);
    // What went while a pull was writing left its tables.
    store.collect().unwrap();
    let (total, sent) = (store.inner.total().unwrap(), bed.server.sent());
    let refused = |tag: &str| match prewarm(&bed, &store, tag) {
        Err(Error::NoRoom { lacking_bytes, budget_bytes: Some(1_200_000) }) => lacking_bytes,
        other => panic!("{tag}: {other:?}"),
    };
    let lacking = refused("e");
    assert!((100_000..310_000).contains(&lacking), "{lacking}");
    assert_eq!((names(&store).len(), store.inner.total().unwrap()), (3, total));
    assert!(bed.server.sent() - sent < 20_000, "its table said so");
    // A layer without a table is found out in the end, leaves nothing, and isn't fetched again for that.
    let dense: Vec<Member> =
        (1..=9).map(|at| Member::file(&format!("dense-{at}"), &vec![at; 100_000])).collect();
    bed.server.put_image("dense", &[(archive(&dense), Format::Gzip)]);
    refused("dense");
    assert_eq!((names(&store).len(), store.inner.total().unwrap()), (3, total));
    let requests = bed.server.requests();
    refused("dense");
    assert_eq!(bed.server.requests(), requests, "only its manifest is asked for");
    // Something waits for it: the warm one goes that was used longest ago, and its keeper learns that.
    bed.runtime.block_on(async {
        for warm in [&a, &b] {
            assert!(tokio::time::timeout(std::time::Duration::ZERO, warm.gone()).await.is_err());
        }
    });
    let e = bed.pull(&store, "e").unwrap();
    assert_eq!(names(&store), ["app:b", "app:d", "app:e"]);
    bed.runtime.block_on(a.gone());
    assert!(store.inner.total().unwrap() < 1_200_000);
    // Idle again, these make room for the wish.
    assert!(matches!(prewarm(&bed, &store, "a"), Err(Error::NoRoom { .. })));
    drop(d);
    let again = store.keep_warm(prewarm(&bed, &store, "a").unwrap());
    assert_eq!(names(&store), ["app:a", "app:b", "app:e"]);
    // A wish that is withdrawn leaves an image as any other.
    drop((a, again));
    drop(bed.pull(&store, "d").unwrap());
    assert_eq!(names(&store), ["app:b", "app:d", "app:e"]);
    drop((b, e));
    store.collect().unwrap();
    bed.assert_tidy(&store);
}

/// What `du` says that a folder takes, without the folders themselves.
fn du(at: &std::path::Path) -> u64 {
    let files =
        format!("find {} -type f -links 1 -print0 | du --files0-from=- -c -B1 | tail -1", at.display());
    let output = std::process::Command::new("sh").args(["-c", &files]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn what_counts_is_what_lies_on_the_disk_however_images_are_mounted() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    // Most of it is a hole: 64 MiB of which one takes blocks.
    let mut sparse = vec![0; 64 << 20];
    sparse[30 << 20..31 << 20].copy_from_slice(&seed.bytes(1 << 20));
    let mut files = vec![Member::file("sparse", &sparse)];
    files.extend((0..20).map(|at| Member::file(&format!("file-{at}"), &seed.bytes(100_000))));
    drop(sparse);
    bed.server.put_image("sparse", &[(archive(&files[..1]), Format::Chunked)]);
    bed.server.put_image("files", &[(archive(&files[1..]), Format::Chunked)]);
    drop(files);
    for folders in [false, true] {
        let store = bed.open();
        if folders {
            let reason = "this test says so".to_owned();
            store.inner.mounter.set(Mounter::Folders { reason }).unwrap();
        }
        for tag in ["sparse", "files"] {
            if tag == "sparse" && folders {
                continue;
            }
            let held = bed.pull(&store, tag).unwrap();
            let on_disk: u64 = ["objects", "layers", "mounts", "blobs"]
                .map(|sub| du(&bed.store_dir().join(sub)))
                .iter()
                .sum();
            let total = store.inner.total().unwrap();
            // Folders take a little that `du` was not asked for.
            assert!((on_disk..on_disk + 100_000).contains(&total), "{folders}: {total}, {on_disk} by du");
            let usage = store.du().unwrap().pop().unwrap();
            assert!(usage.bytes <= total, "{folders}: {total}, {usage:?}");
            assert!(usage.bytes + 100_000 > total, "{folders}: {total}, {usage:?}");
            match (tag, folders) {
                ("sparse", _) => assert!((1 << 20..3 << 20).contains(&usage.bytes), "{usage:?}"),
                (_, false) => assert!((2_000_000..2_300_000).contains(&usage.bytes), "{usage:?}"),
                // Its folder is another copy.
                (_, true) => assert!((4_000_000..4_600_000).contains(&usage.bytes), "{usage:?}"),
            }
            drop(held);
            // What is freed is what was counted.
            let freed = store.remove(&format!("app:{tag}").parse().unwrap()).unwrap();
            assert_eq!((freed, store.inner.total().unwrap()), (total, 0), "{folders}");
        }
    }
    // The budget counts both copies.
    let options = Options { budget_bytes: Some(6_000_000), ..Options::default() };
    let store = Store::open(&bed.store_dir(), options).unwrap();
    store.inner.mounter.set(Mounter::Folders { reason: "this test says so".to_owned() }).unwrap();
    store.start_evicting();
    drop(bed.pull(&store, "files").unwrap());
    let another: Vec<Member> =
        (0..20).map(|at| Member::file(&format!("file-{at}"), &seed.bytes(100_000))).collect();
    bed.server.put_image("more", &[(archive(&another), Format::Chunked)]);
    drop(bed.pull(&store, "more").unwrap());
    assert_eq!(names(&store), ["app:more"]);
    assert!(store.inner.total().unwrap() < 6_000_000);
}

#[test]
fn a_full_disk_is_said_and_leaves_what_was_there() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    tmpfs(&bed, "size=4m", MsFlags::empty());
    let store = bed.open();
    let shared = seed.bytes(100_000);
    image(&bed, &mut seed, "small", &shared);
    bed.pull(&store, "small").unwrap();
    for format in [Format::Plain, Format::Gzip, Format::Chunked] {
        for large in [6 << 20, 12 << 20] {
            let layer = [Member::file("large", &seed.bytes(large)), Member::file("x", &seed.bytes(2_000))];
            bed.server.put_image("large", &[(archive(&layer), format)]);
            let error = bed.pull(&store, "large").unwrap_err();
            assert!(matches!(error, Error::DiskFull { .. }), "{format:?}: {error:?}");
            assert!(error.to_string().contains("no space left"), "{error}");
            store.collect().unwrap();
            assert_eq!(store.list().unwrap().len(), 1);
            assert_eq!(store.verify().unwrap().damaged, Vec::<String>::new());
            bed.assert_tidy(&store);
        }
    }
    tmpfs(&bed, "size=64m", MsFlags::MS_REMOUNT);
    bed.pull(&store, "large").unwrap();
    drop(store);
    nix::mount::umount(&bed.store_dir()).unwrap();
}
