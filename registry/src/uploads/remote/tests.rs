//! How large uploads to a bucket can get.

use super::*;
use crate::storage::LIST_MAX_BYTES;
use crate::uploads::CHUNK_MAX_BYTES;

/// What stores allow, by their documentation: parts of 5 MiB to 5 GiB, all but the last of one size (R2), 10,000 of
/// them in an object (S3, GCS; Azure 50,000), and objects of 5 TiB.
#[test]
fn layers_of_terabytes_keep_to_what_stores_allow() {
    let Sizes { part_bytes, parts_max, objects_max } = Sizes::default();
    let part_bytes = part_bytes as u64;
    assert!((5 << 20..=5 << 30).contains(&part_bytes));
    assert!(parts_max < 10_000, "one more is sent at the end");
    let object_bytes = part_bytes * (parts_max as u64 + 1);
    assert!((101_000_000_000..=5 << 40).contains(&object_bytes), "{object_bytes}");
    // Clients send parts of any length between these, each at least one object; or all at once.
    let shortest = objects_max as u64 * part_bytes;
    let longest = objects_max as u64 * CHUNK_MAX_BYTES;
    assert!(shortest >= 1 << 40 && longest >= 10_000_000_000_000, "{shortest} {longest}");
    // The list of such content can be read again: also that of one request more, which may add several objects.
    let key = format!("data/{}/{}", "f".repeat(48), "f".repeat(16));
    let segments = vec![Segment { key, len: object_bytes }; objects_max + 1_000];
    assert!(serde_json::to_vec(&segments).unwrap().len() as u64 + 17 <= LIST_MAX_BYTES);
}
