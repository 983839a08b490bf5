//! What the admin API takes and gives.

use anyplace_images::Digest;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::upstream::{CacheUsage, Cached};

/// Asks for a collection.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Only says what it would do.
    #[serde(default)]
    pub dry_run: bool,
}

/// Repositories, sorted by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryPage {
    /// A part of them.
    pub repositories: Vec<RepositoryView>,
    /// Where there are more: what to give as `last` for them.
    pub next: Option<String>,
}

/// A repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryView {
    /// Its name.
    pub name: String,
    /// Tags that were pushed.
    pub tags: u64,
    /// Manifests.
    pub manifests: u64,
    /// When anything was last pushed.
    pub pushed_at: Option<Timestamp>,
    /// What a cache keeps of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached: Option<Cached>,
}

/// A tag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagView {
    /// Its name.
    pub tag: String,
    /// What it leads to.
    pub digest: Digest,
    /// Of what it leads to.
    pub media_type: String,
    /// Bytes of all that the manifest names, and of itself; of an index, of the manifests that are here.
    pub size_bytes: u64,
    /// When it was last pushed; none where it wasn't, but is cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pushed_at: Option<Timestamp>,
    /// What a cache keeps of it, where it wasn't pushed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached: Option<CachedTag>,
}

/// What a cache keeps of a tag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedTag {
    /// The upstream that it came from, such as `https://registry.example.org`.
    pub from: String,
    /// Bytes that are on disk of all that the manifest names, and of itself.
    pub disk_bytes: u64,
}

/// What was pushed, and is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageView {
    /// Bytes of all content, each counted once.
    pub total_bytes: u64,
    /// Contents.
    pub contents: u64,
    /// Bytes of content that no repository has: the next collection deletes it.
    pub unneeded_bytes: u64,
    /// By repository, the largest first.
    pub repositories: Vec<RepositoryUsage>,
    /// What is kept of upstreams' content beside that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheUsage>,
}

/// What a repository has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryUsage {
    /// Its name.
    pub repository: String,
    /// Contents.
    pub contents: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that no other repository has.
    pub own_bytes: u64,
}

/// A deletion that can be undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrashView {
    /// Where.
    pub repository: String,
    /// The tag, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// The manifest, or what the tag led to.
    pub digest: Digest,
    /// When it was deleted.
    pub deleted_at: Timestamp,
    /// Until when it can be undone.
    pub until: Timestamp,
}

/// What became of the trash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Emptied {
    /// Deletions that can't be undone any more.
    pub deletions: u64,
}

/// An upload that can be gone on with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadView {
    /// Where.
    pub repository: String,
    /// Its id, the end of its location.
    pub id: String,
    /// Bytes that were acknowledged.
    pub bytes: u64,
    /// When anything was last written of it.
    pub touched_at: Timestamp,
}

/// Asks for a deletion to be undone: of a tag, or of a manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Undelete {
    /// Where.
    pub repository: String,
    /// The tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Or the manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undeleted {
    /// Where.
    pub repository: String,
    /// The tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// The manifest.
    pub digest: Digest,
}
