//! What can be wrong with a blob, its tables or the archive to be packed.

use crate::Digest;

/// An error of reading or writing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing failed.
    #[error("{what}")]
    Io {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Content is not what its digest says.
    #[error(
        "{what} has digest {found}, expected {expected}: the content was changed or damaged, fetch it again"
    )]
    Digest {
        /// Which content.
        what: String,
        /// Digest of what was read.
        found: Digest,
        /// Digest that was promised.
        expected: Digest,
    },
    /// Something is larger than the reader's limit.
    #[error("{what} is {found}, more than the limit of {limit}")]
    Limit {
        /// What was measured, with its unit.
        what: &'static str,
        /// The value.
        found: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// Content breaks a rule of its format.
    #[error("{what}: {why}")]
    Invalid {
        /// Which part.
        what: &'static str,
        /// Found and expected.
        why: String,
    },
}

impl Error {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    pub(crate) fn invalid(what: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { what, why: why.into() }
    }
}
