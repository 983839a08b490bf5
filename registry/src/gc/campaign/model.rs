//! What clients were told, and what has to be true because of it: kept apart from the code that it judges.
//!
//! Everything is an interval of turns, since clients overlap. Something is certain when the last acknowledged put began
//! after every deletion of it had ended.

use std::collections::BTreeMap;

use anyplace_images::Digest;

/// Turns from the beginning to the end of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) begin: u64,
    /// Not yet ended: the largest number.
    pub(super) end: u64,
}

/// A put, and whether it was acknowledged.
#[derive(Clone, Debug)]
pub(super) struct Put<T> {
    pub(super) span: Span,
    pub(super) acknowledged: bool,
    /// When it began, by the clock: the answer may be on its way for hours.
    pub(super) at_ms: u64,
    pub(super) value: T,
}

/// What happened to one thing.
#[derive(Clone, Debug)]
pub(super) struct History<T> {
    pub(super) puts: Vec<Put<T>>,
    pub(super) deletes: Vec<(Span, bool)>,
}

impl<T> Default for History<T> {
    fn default() -> Self {
        History { puts: Vec::new(), deletes: Vec::new() }
    }
}

impl<T: Clone + PartialEq> History<T> {
    /// The last acknowledged put, if nothing undid it. With others beside it, any of them may be it.
    pub(super) fn certain(&self) -> Option<&Put<T>> {
        let last = self.puts.iter().filter(|put| put.acknowledged).max_by_key(|put| put.span.begin)?;
        let undone = self.deletes.iter().any(|(span, _)| span.end >= last.span.begin);
        let contested =
            self.puts.iter().any(|put| put.value != last.value && put.span.end >= last.span.begin);
        (!undone && !contested).then_some(last)
    }

    /// Whether a deletion was going on at that turn, or later.
    pub(super) fn deleted_since(&self, turn: u64) -> bool {
        self.deletes.iter().any(|(span, _)| span.end >= turn)
    }

    /// Whether the last thing that happened was a deletion that was acknowledged, with nothing beside it.
    pub(super) fn cleanly_deleted(&self) -> bool {
        let Some((last, true)) = self.deletes.iter().max_by_key(|(span, _)| span.begin) else { return false };
        let first = !self.puts.is_empty() && self.puts.iter().all(|put| put.span.end < last.begin);
        first && self.deletes.len() == 1 && self.puts.iter().any(|put| put.acknowledged)
    }
}

/// Names of content in a repository.
pub(super) type At = (&'static str, Digest);

/// What clients know.
#[derive(Default)]
pub(super) struct Model {
    pub(super) blobs: BTreeMap<At, History<()>>,
    pub(super) manifests: BTreeMap<At, History<()>>,
    pub(super) tags: BTreeMap<(&'static str, &'static str), History<Digest>>,
    /// Requests that some client is in: ended for it when it crashes.
    pub(super) open: BTreeMap<usize, Vec<Open>>,
}

/// A request that goes on.
#[derive(Clone, Debug)]
pub(super) enum Open {
    PutBlob(At, usize),
    PutManifest(At, usize),
    PutTag((&'static str, &'static str), usize),
    DeleteBlob(At, usize),
    DeleteManifest(At, usize),
    DeleteTag((&'static str, &'static str), usize),
}

impl Model {
    /// A request begins.
    pub(super) fn begin(&mut self, client: usize, what: Open, turn: u64, at_ms: u64, value: Option<Digest>) {
        let span = Span { begin: turn, end: u64::MAX };
        fn put<T>(history: &mut History<T>, span: Span, at_ms: u64, value: T) -> usize {
            history.puts.push(Put { span, acknowledged: false, at_ms, value });
            history.puts.len() - 1
        }
        fn delete<T>(history: &mut History<T>, span: Span) -> usize {
            history.deletes.push((span, false));
            history.deletes.len() - 1
        }
        let open = match what {
            Open::PutBlob(at, _) => {
                Open::PutBlob(at.clone(), put(self.blobs.entry(at).or_default(), span, at_ms, ()))
            }
            Open::PutManifest(at, _) => {
                Open::PutManifest(at.clone(), put(self.manifests.entry(at).or_default(), span, at_ms, ()))
            }
            Open::PutTag(at, _) => {
                let value = value.expect("a tag's put has a digest");
                Open::PutTag(at, put(self.tags.entry(at).or_default(), span, at_ms, value))
            }
            Open::DeleteBlob(at, _) => {
                Open::DeleteBlob(at.clone(), delete(self.blobs.entry(at).or_default(), span))
            }
            Open::DeleteManifest(at, _) => {
                Open::DeleteManifest(at.clone(), delete(self.manifests.entry(at).or_default(), span))
            }
            Open::DeleteTag(at, _) => Open::DeleteTag(at, delete(self.tags.entry(at).or_default(), span)),
        };
        self.open.entry(client).or_default().push(open);
    }

    /// All requests of a client end.
    pub(super) fn end(&mut self, client: usize, acknowledged: bool, turn: u64) {
        fn put<T>(history: &mut History<T>, index: usize, acknowledged: bool, turn: u64) {
            let put = &mut history.puts[index];
            (put.span.end, put.acknowledged) = (turn, acknowledged);
        }
        for open in self.open.remove(&client).unwrap_or_default() {
            match open {
                Open::PutBlob(at, i) => put(self.blobs.entry(at).or_default(), i, acknowledged, turn),
                Open::PutManifest(at, i) => put(self.manifests.entry(at).or_default(), i, acknowledged, turn),
                Open::PutTag(at, i) => put(self.tags.entry(at).or_default(), i, acknowledged, turn),
                Open::DeleteBlob(at, i) => {
                    let delete = &mut self.blobs.entry(at).or_default().deletes[i];
                    (delete.0.end, delete.1) = (turn, acknowledged);
                }
                Open::DeleteManifest(at, i) => {
                    let delete = &mut self.manifests.entry(at).or_default().deletes[i];
                    (delete.0.end, delete.1) = (turn, acknowledged);
                }
                Open::DeleteTag(at, i) => {
                    let delete = &mut self.tags.entry(at).or_default().deletes[i];
                    (delete.0.end, delete.1) = (turn, acknowledged);
                }
            }
        }
    }
}
