//! What a cache keeps: pieces of blobs in memory and on disk, manifests and tags.
//!
//! All of it may vanish at any time (the upstream has it), so nothing here is synced to disk, and nothing that was
//! pushed lies here. In place of that, everything is verified whenever it is read: a piece by its own sha256, every
//! small file by a seal over its content. What a crash, a full disk or a flipped bit left behind is a miss.
//!
//! In the cache's folder:
//! - `data/<algorithm>/<2 digits>/<digest>`: a blob's pieces, in a sparse file of the blob's size
//! - `incoming/`: blobs that are being fetched and can't be verified yet; emptied at the start
//! - `lock`: locked by the process that uses the folder
//! - `records/`: small sealed files, see [`records`]
//!
//! From the bottom up: [`records`] and [`pieces`] on disk, [`memory`] above them, [`outgoing`] towards clients. `upstream`
//! fills them.

pub(crate) mod counters;
pub(crate) mod layout;
pub(crate) mod memory;
pub(crate) mod outgoing;
pub(crate) mod pieces;
pub(crate) mod records;
