//! What can go wrong with images, each with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on images failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is no image reference.
    #[error("`{text}` is no image reference: {reason}; expected [host[:port]/]repository[:tag][@digest]")]
    InvalidReference {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The text is no digest.
    #[error("`{text}` is no digest: {reason}")]
    InvalidDigest {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The registry's URL or credentials can't be used.
    #[error("{what}: {reason}")]
    InvalidRegistry {
        /// Which setting.
        what: String,
        /// What is wrong, and what was expected.
        reason: String,
    },

    /// No answer from the registry.
    #[error(
        "no answer from the registry at {url}; check that the registry at {url} runs and is reachable from here"
    )]
    RegistryUnreachable {
        /// Its address.
        url: String,
        /// The cause.
        source: reqwest::Error,
    },

    /// The registry doesn't accept the credentials.
    #[error("the registry at {url} refused access to `{repository}` ({status}): {reason}")]
    Unauthorized {
        /// Its address.
        url: String,
        /// What was asked for.
        repository: String,
        /// HTTP status, 401 or 403.
        status: u16,
        /// The registry's words where it knows who asks; else what to check.
        reason: String,
    },

    /// The registry has no such image.
    #[error(
        "no image `{reference}` in the registry at {url}; run `anyplace push DIRECTORY {reference}` or check its name \
         and tag"
    )]
    RepositoryOrTagNotFound {
        /// What was asked for.
        reference: String,
        /// The registry's address.
        url: String,
    },

    /// The registry has the image's manifest, but not one of its blobs.
    #[error("the registry at {url} has no blob {digest} in `{repository}`; push the image again")]
    BlobNotFound {
        /// Repository that was asked.
        repository: String,
        /// What is missing.
        digest: Digest,
        /// The registry's address.
        url: String,
    },

    /// Content is not what its digest says. Nothing of it was kept.
    #[error("{what} has the wrong content: expected {expected}, found {found}; push the image again")]
    DigestMismatch {
        /// Which content.
        what: String,
        /// The digest that it should have.
        expected: Digest,
        /// The digest that it has.
        found: Digest,
    },

    /// Content is shorter or longer than its descriptor says. Nothing of it was kept.
    #[error("{what} has the wrong size: expected {expected} bytes, found {found}; push the image again")]
    SizeMismatch {
        /// Which content.
        what: String,
        /// The size that it should have.
        expected: u64,
        /// The size that it has (or more).
        found: u64,
    },

    /// The image or source uses something that isn't supported.
    #[error("{what} is not supported; {help}")]
    Unsupported {
        /// What was found.
        what: String,
        /// What to use in its place.
        help: String,
    },

    /// The image has no variant for this machine.
    #[error("`{reference}` has no image for {wanted}, only for {found}; push one built for {wanted}")]
    NoPlatform {
        /// The image.
        reference: String,
        /// This machine's platform.
        wanted: String,
        /// What the index lists.
        found: String,
    },

    /// The registry answered with an error.
    #[error("the registry at {url} answered {status} {code}: {message}")]
    Registry {
        /// Its address.
        url: String,
        /// HTTP status.
        status: u16,
        /// Code of the specification, such as `NAME_INVALID`, or empty.
        code: String,
        /// The registry's words.
        message: String,
    },

    /// A manifest, index or configuration can't be understood.
    #[error("{what} can't be understood: {reason}")]
    InvalidManifest {
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A layer's archive or compression is damaged. Nothing of the layer was kept.
    #[error("a layer can't be read: {reason}; push the image again")]
    InvalidLayer {
        /// What is wrong with it.
        reason: String,
    },

    /// A layer's table of contents is refused. Nothing of the layer was kept.
    #[error("a layer's table of contents is refused; push the image again")]
    Table(#[source] zstd_chunked::Error),

    /// The store's own copy of something is damaged.
    #[error("{what} is damaged; run `anyplace image verify` to remove what is, and pull again")]
    Damaged {
        /// Which part of the store.
        what: String,
    },

    /// A layer holds more than is accepted. Nothing of it was kept.
    #[error(
        "a layer has {found} {what}, and at most {limit} are accepted; split it, or leave out what isn't needed"
    )]
    LayerLimit {
        /// What was counted.
        what: &'static str,
        /// How many there are (or more).
        found: u64,
        /// How many are accepted.
        limit: u64,
    },

    /// The disk is full.
    #[error(
        "no space left on the disk while {doing} `{path}`; free some: a smaller `image_budget` does on a machine, and \
         TMPDIR names another folder for what a command packs"
    )]
    DiskFull {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
    },

    /// An image that nothing waits for has no room.
    #[error(
        "no room for an image that nothing uses yet: what is in use or kept warm leaves {lacking_bytes} bytes too few{}, \
         or let another image go with `anyplace prewarm rm`",
        .budget_bytes.map_or_else(
            || " on the disk; free some of it".to_owned(),
            |bytes| format!(" of the `image_budget` of {bytes}; raise `image_budget`"),
        )
    )]
    NoRoom {
        /// How many bytes more there would have to be.
        lacking_bytes: u64,
        /// Bytes that all images may take, if that is what lacks; none where it is room on the disk.
        budget_bytes: Option<u64>,
    },

    /// The image is not in the store.
    #[error("no image `{reference}` in the store; run `anyplace image ls` to see what is there")]
    NotInStore {
        /// What was asked for.
        reference: String,
    },

    /// The image is in use.
    #[error(
        "the image `{reference}` is in use; stop its instances first, or let it go with `anyplace prewarm rm`"
    )]
    ImageInUse {
        /// Which image.
        reference: String,
    },

    /// A layer's archive has an entry that must not be unpacked. Nothing of the layer was kept.
    #[error("the layer is refused because of its entry `{entry}`: {reason}")]
    UnsafeEntry {
        /// Path inside the archive.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A source file or folder can't be packed.
    #[error("`{path}` can't be packed: {reason}")]
    InvalidSource {
        /// Which one.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },

    /// A program that an image comes from failed, or isn't there.
    #[error("`{program}` failed: {reason}; {help}")]
    Program {
        /// Which one, and what it was to do.
        program: String,
        /// What went wrong, in its own words.
        reason: String,
        /// What to check.
        help: String,
    },

    /// The store belongs to another process.
    #[error("the image store {path} is in use by another process; stop it first")]
    StoreInUse {
        /// The store's folder.
        path: PathBuf,
    },

    /// Reading or writing a local file failed.
    #[error("{doing} `{path}` failed")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },

    /// The kernel refused to mount an image.
    #[error("mounting {what} failed ({said}); see `dmesg`, and check that this runs as root")]
    Mount {
        /// The image.
        what: String,
        /// At which step, and what the kernel said.
        said: String,
        /// The cause.
        source: io::Error,
    },

    /// The operation was given up because its caller went away.
    #[error("the operation was cancelled")]
    Cancelled,
}

impl Error {
    /// For `map_err`: an I/O error with what was being done, and to what.
    pub(crate) fn io(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull { doing, path },
            _ => Error::Io { doing, path, source },
        }
    }

    /// Whether the registry could not be reached at all, so that a local copy may stand in.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Error::RegistryUnreachable { .. })
            || matches!(self, Error::Registry { status, .. } if *status >= 500)
    }

    /// Whether the registry answered that it doesn't have what was asked for.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::RepositoryOrTagNotFound { .. } | Error::BlobNotFound { .. })
    }
}
