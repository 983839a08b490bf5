//! How the long operations tell what they are doing, so that a terminal can draw bars.

use std::sync::Arc;

/// What is being done to an item.
///
/// A total of 0 bytes means that it isn't known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// A builder makes an image.
    Build,
    /// Another program hands over an image that it holds.
    Export,
    /// A directory, or a layer that was packed otherwise, becomes a layer.
    Pack,
    /// A blob goes to a registry.
    Send,
    /// A layer comes from a registry and is unpacked as it arrives.
    Fetch,
}

/// One bar: a layer or another blob in one stage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Item {
    /// What is being done.
    pub stage: Stage,
    /// Short name for people, such as a digest's first digits.
    pub name: String,
}

/// Receives what happens. Calls come from several threads; each should return at once.
pub trait Progress: Send + Sync {
    /// Work on an item begins, or begins anew; `total_bytes` is how much there is to do.
    fn started(&self, item: &Item, total_bytes: u64);
    /// `bytes` more were done.
    fn advanced(&self, item: &Item, bytes: u64);
    /// `done_bytes` of the item are done, more or less than was told so far: an upload goes on where the registry
    /// says, not where it broke off.
    fn moved(&self, _item: &Item, _done_bytes: u64) {}
    /// Another program that works on the item wrote this line.
    fn said(&self, _item: &Item, _line: &str) {}
    /// The item is done.
    fn finished(&self, item: &Item);
    /// The item needs no work, because it is there already.
    fn skipped(&self, item: &Item, total_bytes: u64);
}

/// A progress receiver that background work can hold on to.
pub type SharedProgress = Arc<dyn Progress>;

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl NoProgress {
    /// A shared receiver that shows nothing.
    pub fn shared() -> SharedProgress {
        Arc::new(NoProgress)
    }
}

impl Progress for NoProgress {
    fn started(&self, _: &Item, _: u64) {}
    fn advanced(&self, _: &Item, _: u64) {}
    fn finished(&self, _: &Item) {}
    fn skipped(&self, _: &Item, _: u64) {}
}
