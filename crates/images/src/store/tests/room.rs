//! How much there is, is to come, and goes for it.

use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::Ordering;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};

use super::super::objects::{ObjectId, Objects};
use super::super::testing::{Bed, Format, Member, Seed, archive};
use super::*;
use crate::progress::{Item, Progress};

/// What the files below a folder take on the disk.
fn on_disk(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let bytes = entries.map(|entry| match entry.metadata().unwrap() {
        folder if folder.is_dir() => on_disk(&entry.path()),
        file => file.blocks() * 512,
    });
    bytes.sum()
}

#[test]
fn objects_are_counted_right_while_others_write_and_remove_them() {
    let mut seed = Seed::new();
    for _ in 0..5 {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (at, tmp) = (dir.path().join("objects"), dir.path().join("tmp"));
        std::fs::create_dir(&tmp).unwrap();
        let contents: Vec<Vec<u8>> = (0..4_000)
            .map(|_| {
                let len = 1 + seed.below(20_000);
                seed.bytes(len)
            })
            .collect();
        let ids: Vec<ObjectId> = contents.iter().map(|bytes| ObjectId::of(bytes)).collect();
        let before = Objects::open(&at, &tmp).unwrap();
        for (id, bytes) in ids.iter().zip(&contents).take(2_000) {
            before.put(id, bytes).unwrap();
        }
        drop(before);
        let objects = Objects::open(&at, &tmp).unwrap();
        let choices: Vec<(usize, usize)> =
            (0..8_000).map(|_| (seed.below(contents.len()), seed.below(4))).collect();
        std::thread::scope(|scope| {
            for choices in choices.chunks(2_000) {
                let (objects, ids, contents) = (&objects, &ids, &contents);
                scope.spawn(move || {
                    for (at, what) in choices {
                        let (id, bytes) = (&ids[*at], &contents[*at]);
                        match what {
                            0 => drop(objects.remove(id).unwrap()),
                            1 => {
                                let file = objects.temporary().unwrap();
                                std::fs::write(file.path(), bytes).unwrap();
                                objects.keep(id, bytes.len() as u64, file).unwrap();
                            }
                            _ => drop(objects.put(id, bytes).unwrap()),
                        }
                    }
                });
            }
            objects.disk_bytes().unwrap();
        });
        assert_eq!(objects.disk_bytes().unwrap(), on_disk(&at));
    }
}

#[test]
fn a_large_object_takes_the_place_of_one_that_was_cut_off() {
    let (dir, mut seed) = (tempfile::tempdir().unwrap(), Seed::new());
    let (at, tmp) = (dir.path().join("objects"), dir.path().join("tmp"));
    std::fs::create_dir(&tmp).unwrap();
    let (objects, bytes) = (Objects::open(&at, &tmp).unwrap(), seed.bytes(300_000));
    let id = ObjectId::of(&bytes);
    let keep = || {
        let file = objects.temporary().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        objects.keep(&id, bytes.len() as u64, file).unwrap()
    };
    assert!(keep());
    assert_eq!(objects.disk_bytes().unwrap(), on_disk(&at));
    assert!(!keep());
    std::fs::File::options().write(true).open(at.join(id.path())).unwrap().set_len(100_000).unwrap();
    let cut = objects.disk_bytes().unwrap() - on_disk(&at);
    assert!(keep());
    assert_eq!(std::fs::read(at.join(id.path())).unwrap(), bytes);
    assert_eq!(objects.disk_bytes().unwrap(), on_disk(&at) + cut, "that it was cut, nobody told");
    assert_eq!(std::fs::read_dir(&tmp).unwrap().count(), 0);
}

/// What was pulled, those that were used longest ago first; an instance has one of them.
fn pull_all(bed: &Bed, store: &Store) -> (Vec<String>, PulledImage) {
    let mut order: Vec<String> = Vec::new();
    for tag in (0..20).map(|at| format!("v{at}")).chain(["again", "v0", "v7"].map(str::to_owned)) {
        drop(bed.pull(store, &tag).unwrap());
        order.retain(|other| *other != tag);
        order.push(tag);
    }
    order.retain(|tag| tag != "v4");
    store.collect().unwrap();
    (order, store.find(&name("v4")).unwrap().unwrap())
}

fn name(tag: &str) -> Reference {
    format!("app:{tag}").parse().unwrap()
}

#[test]
fn images_that_go_for_one_pull_go_together_as_many_as_it_takes() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    // Each image shares a file with the one before, and one with all; one has two names.
    let contents: Vec<Vec<u8>> = (0..22).map(|_| seed.bytes(60_000)).collect();
    for at in 0..20 {
        let files = [at, at + 1, 21].map(|at| Member::file(&format!("file-{at}"), &contents[at]));
        let layer = archive(&files);
        bed.server.put_image(&format!("v{at}"), &[(layer.clone(), Format::Chunked)]);
        if at == 2 {
            bed.server.put_image("again", &[(layer, Format::Chunked)]);
        }
    }
    let large: Vec<Member> =
        (0..40).map(|at| Member::file(&format!("large-{at}"), &seed.bytes(49_152))).collect();
    let coming = 40 * 49_152;
    bed.server.put_image("large", &[(archive(&large), Format::Chunked)]);

    // Another store without a budget, from which they are removed one after the other.
    let by_hand = Store::open(&bed.dir.path().join("by-hand"), Options::default()).unwrap();
    let (order, held) = pull_all(&bed, &by_hand);
    let total = by_hand.inner.total().unwrap();
    let budget = total + coming - 900_000;
    let removed = order.iter().take_while(|tag| {
        let is_over = by_hand.inner.total().unwrap() + coming > budget;
        if is_over {
            by_hand.remove(&name(tag)).unwrap();
        }
        is_over
    });
    let least = removed.count();
    drop(held);

    let options = Options { budget_bytes: Some(budget), ..Options::default() };
    let store = Store::open(&bed.store_dir(), options).unwrap();
    let (_, held) = pull_all(&bed, &store);
    assert_eq!(store.inner.total().unwrap(), total);
    store.start_evicting();
    let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    // Both, since the kernel makes one of events that are the same.
    let seen = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_CLOSE_NOWRITE;
    watch.add_watch(&bed.store_dir().join("objects/00"), seen).unwrap();
    drop(bed.pull(&store, "large").unwrap());
    let mut walks = 0;
    while let Ok(events) = watch.read_events() {
        let opened =
            |event: &InotifyEvent| event.name.is_none() && event.mask.contains(AddWatchFlags::IN_OPEN);
        walks += events.iter().filter(|event| opened(event)).count();
    }
    let gone = order.iter().take_while(|tag| !store.has(&name(tag))).count();
    assert!(order[gone..].iter().all(|tag| store.has(&name(tag))), "{:?}", store.list().unwrap());
    // Tables stay until the pull has ended, and it brings some: another may go for these.
    assert!(least > 8 && (least..=least + 3).contains(&gone), "{gone} in place of {least}");
    assert!((2..=6).contains(&walks), "{walks} walks for {gone} images");
    assert!(store.inner.total().unwrap() <= budget);
    assert_eq!(store.verify().unwrap().damaged, Vec::<String>::new());
    drop(held);
}

/// Notes what the store expects whenever a layer begins.
struct Coming {
    store: Store,
    /// Where each of the layer's files will be, and its bytes there.
    files: Vec<(std::path::PathBuf, u64)>,
    /// Bytes that are expected, and those that aren't there yet.
    seen: Mutex<Vec<(u64, u64)>>,
}

impl Progress for Coming {
    fn started(&self, _: &Item, _: u64) {
        let lacking = self.files.iter().filter(|(path, _)| !path.exists()).map(|(_, bytes)| bytes).sum();
        lock(&self.seen).push((self.store.inner.coming.load(Ordering::SeqCst), lacking));
    }
    fn advanced(&self, _: &Item, _: u64) {}
    fn finished(&self, _: &Item) {}
    fn skipped(&self, _: &Item, _: u64) {}
}

#[test]
fn a_second_try_of_a_layer_expects_no_more_than_the_layer() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let store = bed.open();
    let mut first = seed.bytes(3 << 20);
    bed.server.put_image("v1", &[(archive(&[Member::file("first", &first)]), Format::Chunked)]);
    drop(bed.pull(&store, "v1").unwrap());
    let path = bed.store_dir().join("objects").join(ObjectId::of(&first).path());
    let mut damaged = std::fs::read(&path).unwrap();
    damaged[1_000] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    // A chunk of it is taken from there, before much else is fetched.
    first[2 << 20] ^= 1;
    let mut contents = vec![("first".to_owned(), first.clone())];
    contents.extend((0..300).map(|at| (format!("file-{at:03}"), seed.bytes(61_440))));
    let files: Vec<_> = contents.iter().map(|(at, bytes)| Member::file(at, bytes)).collect();
    bed.server.put_image("v2", &[(archive(&files), Format::Chunked)]);
    let at = |bytes: &[u8]| bed.store_dir().join("objects").join(ObjectId::of(bytes).path());
    let files = contents.iter().map(|(_, bytes)| (at(bytes), bytes.len() as u64)).collect();
    let coming = Arc::new(Coming { store: store.clone(), files, seen: Mutex::default() });
    let options = PullOptions { progress: coming.clone(), ..PullOptions::default() };
    let pulled = bed.runtime.block_on(async {
        let pulled = store.pull(&name("v2"), &bed.client, &options).await;
        store.settle().await.unwrap();
        pulled
    });
    assert_eq!(bed.mounted(&pulled.unwrap(), |at| std::fs::read(at.join("first")).unwrap()), first);
    let layer = (3 << 20) + 300 * 61_440;
    let seen = lock(&coming.seen).clone();
    assert!(seen.len() == 2 && seen[0] == (layer, layer), "{seen:?} of {layer}");
    // What the first try has written comes no more, and some of it may have been written since the second was planned.
    let (expected, lacking) = seen[1];
    assert!((lacking..=layer).contains(&expected), "{seen:?} of {layer}");
    assert_eq!(store.inner.coming.load(Ordering::SeqCst), 0);
}
