use super::*;
use crate::cache::layout::hash;

const PIECE: u64 = 1 << 20;

fn open(dir: &Path, budget: u64) -> Arc<Pieces> {
    Pieces::open(dir, budget, Arc::default()).unwrap()
}

fn content(seed: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ seed).collect()
}

fn layout(bytes: &[u8]) -> Layout {
    let hashes = bytes.chunks(PIECE as usize).map(hash).collect();
    Layout::proven(bytes.len() as u64, PIECE, hashes).unwrap()
}

fn part(bytes: &[u8], index: u32) -> &[u8] {
    let start = index as usize * PIECE as usize;
    &bytes[start..bytes.len().min(start + PIECE as usize)]
}

#[test]
fn pieces_survive_a_restart_and_damage_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(1, 3 * PIECE + 5);
    let digest = Digest::of(&bytes);
    let pieces = open(dir.path(), 1 << 30);
    let blob = pieces.learn(&digest, layout(&bytes));
    for index in [0, 2, 3] {
        pieces.write(&blob, index, part(&bytes, index));
    }
    drop((pieces, blob));
    let pieces = open(dir.path(), 1 << 30);
    let blob = pieces.blob(&digest).unwrap();
    assert_eq!((0..4).map(|index| blob.has(index)).collect::<Vec<_>>(), [true, false, true, true]);
    assert_eq!(pieces.used(), 2 * PIECE + 5);
    for index in [0, 2, 3] {
        assert_eq!(pieces.read(&blob, index, Vec::new()).unwrap(), part(&bytes, index));
    }
    assert!(pieces.read(&blob, 1, Vec::new()).is_none());
    let file = OpenOptions::new().write(true).open(pieces.path(&digest)).unwrap();
    file.write_all_at(&[part(&bytes, 2)[9] ^ 1], 2 * PIECE + 9).unwrap();
    assert!(pieces.read(&blob, 2, Vec::new()).is_none());
    assert!(!blob.has(2) && blob.has(0));
    assert_eq!(pieces.counters.disk_corrupt.load(Ordering::Relaxed), 1);
    pieces.write(&blob, 2, part(&bytes, 2));
    assert_eq!(pieces.read(&blob, 2, Vec::new()).unwrap(), part(&bytes, 2));
    file.set_len(10).unwrap();
    assert!(pieces.read(&blob, 0, Vec::new()).is_none());
    pieces.write(&blob, 0, part(&bytes, 0));
    assert_eq!(pieces.read(&blob, 0, Vec::new()).unwrap(), part(&bytes, 0));
    pieces.forget(&digest);
    assert_eq!(pieces.used(), PIECE - PIECE);
    assert!(!pieces.path(&digest).exists() && pieces.records.keys("").is_empty());
}

#[test]
fn the_budget_holds_and_what_is_read_stays_longer() {
    let dir = tempfile::tempdir().unwrap();
    // 7 of 8 parts are for pieces.
    let pieces = open(dir.path(), 8 * PIECE / 7 * 4 + 8);
    let bytes = content(2, 8 * PIECE);
    let blob = pieces.learn(&Digest::of(&bytes), layout(&bytes));
    for index in 0..4 {
        pieces.write(&blob, index, part(&bytes, index));
    }
    pieces.read(&blob, 0, Vec::new()).unwrap();
    for index in 4..6 {
        pieces.write(&blob, index, part(&bytes, index));
    }
    let here: Vec<u32> = (0..8).filter(|index| blob.has(*index)).collect();
    assert_eq!(here, [0, 3, 4, 5]);
    assert_eq!(pieces.used(), 4 * PIECE);
    assert_eq!(std::fs::metadata(pieces.path(&blob.digest)).map(|m| blocks(&m)).unwrap(), 4 * PIECE);
    // A blob that is fetched whole takes its room at once, and gives it back when it comes to nothing.
    let Ok(incoming) = pieces.begin(3 * PIECE).unwrap() else { panic!() };
    assert_eq!((0..8).filter(|index| blob.has(*index)).count(), 1);
    assert!(pieces.begin(2 * PIECE).unwrap().is_err());
    drop(incoming);
    assert_eq!(std::fs::read_dir(dir.path().join("incoming")).unwrap().count(), 0);
    assert!(pieces.begin(5 * PIECE).unwrap().is_err());
    let other = content(3, 2 * PIECE + 1);
    let Ok(incoming) = pieces.begin(other.len() as u64).unwrap() else { panic!() };
    incoming.write_at(&other, 0).unwrap();
    let hashes = other.chunks(PIECE as usize).map(hash).collect();
    let whole = incoming.commit(&Digest::of(&other), PIECE, hashes).unwrap();
    assert_eq!(pieces.read(&whole, 2, Vec::new()).unwrap(), part(&other, 2));
    assert_eq!(pieces.used(), other.len() as u64 + PIECE);
    drop(pieces);
    assert_eq!(open(dir.path(), 0).used(), 0);
}

fn blocks(meta: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(meta) * 512
}
