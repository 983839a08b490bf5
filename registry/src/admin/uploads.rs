//! Lists of unfinished uploads.

use jiff::Timestamp;

use super::views::UploadView;
use crate::uploads::Unfinished;

/// The longest untouched first.
pub(super) fn views(mut uploads: Vec<Unfinished>) -> Vec<UploadView> {
    uploads.sort_by(|a, b| (a.touched, &a.id).cmp(&(b.touched, &b.id)));
    let view = |upload: Unfinished| UploadView {
        repository: upload.repository,
        id: upload.id,
        bytes: upload.bytes,
        touched_at: Timestamp::try_from(upload.touched).unwrap_or(Timestamp::UNIX_EPOCH),
    };
    uploads.into_iter().map(view).collect()
}
