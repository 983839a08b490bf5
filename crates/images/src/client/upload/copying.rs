//! Parts that the registry puts together from blobs that it has and from what is sent.

use std::ops::Range;

use bytes::Bytes;
use reqwest::{Response, StatusCode};
use serde_json::json;

use super::Content;
use super::session::SMALL_MAX_BYTES;
use crate::digest::Digest;
use crate::error::Result;
use crate::push::recipe::{Recipe, Step};
use crate::push::reuse::Reuse;

/// The answer's header that says that such parts are taken, and how many steps at most.
pub(super) const STEPS_MAX_HEADER: &str = "anyplace-upload-steps-max";
/// Their content type.
pub(super) const MEDIA_TYPE: &str = "application/vnd.anyplace.upload.steps.v1";
/// Failures of such parts in a row after which ordinary ones are sent: the registry may be unable to read what it has.
const FAILURES_MAX: u32 = 2;
/// Most steps of a part, whatever the registry takes: its line of JSON stays below half a MiB.
const STEPS_MAX: usize = 10_000;

/// What of a blob is copied, and how that went.
pub(super) struct Copying<'a> {
    /// None: nobody knows what is there.
    reuse: Option<&'a Reuse<'a>>,
    recipe: Option<Recipe>,
    failures: u32,
    /// Bytes of the session that were copied.
    pub(super) copied: u64,
}

impl<'a> Copying<'a> {
    pub(super) fn new(reuse: Option<&'a Reuse<'a>>) -> Copying<'a> {
        Copying { reuse, recipe: None, failures: 0, copied: 0 }
    }

    /// Finds out what can be copied, once.
    pub(super) async fn prepare(&mut self, content: Content<'_>) {
        if let (Some(reuse), Content::File(file)) = (self.reuse.take(), content)
            && file.size > SMALL_MAX_BYTES
        {
            self.recipe = reuse.recipe(file).await;
        }
    }

    /// The next part from a range of the blob; none where nothing is copied at all. It may be one step that sends.
    pub(super) fn part(&self, range: Range<u64>, steps_max: usize) -> Option<Vec<Step>> {
        let steps = self.recipe.as_ref()?.part(range, steps_max.min(STEPS_MAX));
        (!steps.is_empty()).then_some(steps)
    }

    /// How a part by steps went: what was refused once will be again.
    pub(super) fn tried(&mut self, outcome: &Result<Response>) {
        match outcome.as_ref().map(Response::status) {
            Ok(status) if status.is_success() => self.failures = 0,
            // They say something about the upload, or about all requests.
            Ok(StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::TOO_MANY_REQUESTS) => {
            }
            Ok(status) if status.is_client_error() => self.failures = FAILURES_MAX,
            Ok(_) | Err(_) => self.failures += 1,
        }
    }

    /// Takes into account what was acknowledged of a part by steps. After too many failures it was the last one.
    pub(super) fn acknowledged(&mut self, range: Range<u64>) {
        if let Some(recipe) = &self.recipe {
            self.copied += recipe.copied_bytes(range);
        }
        if self.failures >= FAILURES_MAX {
            tracing::debug!("parts by steps fail: sending ordinary ones");
            self.recipe = None;
        }
    }

    /// The session is gone, and what it had.
    pub(super) fn forget(&mut self) {
        self.copied = 0;
    }

    /// What was put together is wrong: all will be sent.
    pub(super) fn give_up(&mut self) {
        self.recipe = None;
    }

    /// What a part's body begins with, and the ranges of the blob, from `at`, that follow it.
    pub(super) fn body(&self, at: u64, steps: &[Step]) -> (Bytes, Vec<Range<u64>>) {
        let all = self.recipe.as_ref().map(Recipe::blobs).unwrap_or_default();
        let (mut blobs, mut listed, mut sends, mut at) = (Vec::<&Digest>::new(), Vec::new(), Vec::new(), at);
        for step in steps {
            match step {
                Step::Send(len) => {
                    sends.push(at..at + len);
                    listed.push(vec![*len]);
                }
                Step::Copy { blob, offset, len } => {
                    let known = blobs.iter().position(|known| *known == &all[*blob]);
                    let number = known.unwrap_or_else(|| {
                        blobs.push(&all[*blob]);
                        blobs.len() - 1
                    });
                    listed.push(vec![number as u64, *offset, *len]);
                }
            }
            at += step.bytes();
        }
        let mut line = json!({ "blobs": blobs, "steps": listed }).to_string();
        line.push('\n');
        (line.into(), sends)
    }
}
