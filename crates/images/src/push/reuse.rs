//! What the repository that is pushed to has already of an image's new layers, in layers of other images.
//!
//! Candidates are the layers of what the pushed tag means now, then of tags whose names are close to it: most often the
//! version before. Their tables of contents, fetched by range, say which ranges they share with the new layers. Nothing
//! here must be right, or succeed: a table that lies gives a wrong blob, which the registry refuses by its digest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::Instant;
use zstd_chunked::{Annotations, Limits, Section, Span, read_tar_split, read_toc};

use super::recipe::{Found, Known, Recipe};
use crate::client::Client;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, Index, Manifest, Platform};
use crate::pack::{BlobFile, PackedImage};
use crate::reference::Reference;

/// Tables may have so much of the new layers' bytes: an eighth is read to save the rest.
const TABLES_PART: u64 = 8;
/// Most tables that are read; each costs a round trip.
const TABLES_MAX: usize = 32;
/// Images of an index that are looked at.
const PLATFORMS_MAX: usize = 4;
/// Tags before and after the pushed one that are looked at.
const TAGS_MAX: (usize, usize) = (5, 3);
/// When the search ends with what it has.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Looks for what an image's layers share with what the repository has; once, when the first of them asks.
pub(crate) struct Reuse<'a> {
    client: Client,
    reference: &'a Reference,
    layers: BTreeMap<Digest, Layer>,
    known: OnceCell<Arc<Known>>,
}

/// A new layer, on this machine's disk.
#[derive(Clone)]
struct Layer {
    file: BlobFile,
    annotations: Annotations,
}

/// The search, as far as it came.
struct Search {
    known: Known,
    deadline: Instant,
    /// Bytes and number of the tables that may still be read.
    bytes: u64,
    tables: usize,
    /// Layers that were looked at.
    seen: BTreeSet<Digest>,
}

impl<'a> Reuse<'a> {
    /// For the layers of `image`, as they go to `reference`'s repository.
    pub(crate) fn new(image: &PackedImage, reference: &'a Reference, client: &Client) -> Reuse<'a> {
        let mut layers = BTreeMap::new();
        for raw in image.manifests.iter().filter(|raw| !manifest::is_index(&raw.media_type)) {
            // What is no image has no layers.
            let Ok(parsed) = manifest::parse::<Manifest>("the manifest", &raw.bytes) else { continue };
            for layer in parsed.layers {
                let file = image.blobs.iter().find(|file| file.digest == layer.digest);
                if let (Some(file), Some(annotations)) = (file, chunked(&layer)) {
                    layers.insert(layer.digest, Layer { file: file.clone(), annotations });
                }
            }
        }
        Reuse { client: client.clone(), reference, layers, known: OnceCell::new() }
    }

    /// What of a new layer can be copied.
    pub(crate) async fn recipe(&self, blob: &BlobFile) -> Option<Recipe> {
        let layer = self.layers.get(&blob.digest)?.clone();
        let known = self.known.get_or_init(|| self.find()).await.clone();
        let made = blocking(move || {
            let mut recipe = known.recipe();
            layer.spans(|span| recipe.add(&span))?;
            Ok(recipe.finish())
        });
        made.await.unwrap_or_else(|error| {
            tracing::debug!(digest = %blob.digest, %error, "can't read a layer's own table");
            None
        })
    }

    async fn find(&self) -> Arc<Known> {
        let bytes: u64 = self.layers.values().map(|layer| layer.file.size).sum();
        let mut search = Search {
            known: Known::default(),
            deadline: Instant::now() + TIME_MAX,
            bytes: bytes / TABLES_PART,
            tables: TABLES_MAX,
            seen: BTreeSet::new(),
        };
        if let Err(error) = self.search(&mut search).await {
            tracing::debug!(%error, "can't look for what is there");
        }
        Arc::new(search.known)
    }

    async fn search(&self, search: &mut Search) -> Result<()> {
        let tag = self.reference.tag.as_deref().or(self.reference.digest.is_none().then_some("latest"));
        let now = match tag {
            Some(tag) => self.layers_of(tag).await.unwrap_or_default(),
            None => Vec::new(),
        };
        let there: BTreeSet<&Digest> = now.iter().map(|layer| &layer.digest).collect();
        let new: Vec<Layer> =
            self.layers.values().filter(|layer| !there.contains(&layer.file.digest)).cloned().collect();
        search.known = blocking(move || {
            let mut known = Known::default();
            new.iter().try_for_each(|layer| layer.spans(|span| known.want(&span)))?;
            Ok(known)
        })
        .await?;
        self.read(now, search).await?;
        if search.is_over() {
            return Ok(());
        }
        let tags = self.client.first_tags(self.reference).await?;
        for tag in nearest(&tags, tag) {
            // It may be gone by now.
            let Ok(layers) = self.layers_of(&tag).await else { continue };
            self.read(layers, search).await?;
            if search.is_over() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The chunked layers of a tag's image or images.
    async fn layers_of(&self, tag: &str) -> Result<Vec<Descriptor>> {
        let named = Reference { tag: Some(tag.to_owned()), digest: None, ..self.reference.clone() };
        let top = self.client.get_manifest(&named).await?;
        let mut images = vec![top];
        if manifest::is_index(&images[0].media_type) {
            let mut index: Index = manifest::parse("the index", &images[0].bytes)?;
            let host = Platform::host();
            // Attestations have an unknown platform, and no layers.
            index.manifests.retain(|child| child.platform.as_ref().is_none_or(|at| at.os != "unknown"));
            index.manifests.sort_by_key(|child| child.platform.as_ref() != Some(&host));
            images.clear();
            for child in index.manifests.iter().take(PLATFORMS_MAX) {
                images.push(self.client.get_manifest(&self.reference.at(&child.digest)).await?);
            }
        }
        let mut layers = Vec::new();
        for image in images {
            let parsed: Manifest = manifest::parse("the manifest", &image.bytes)?;
            layers.extend(parsed.layers.into_iter().filter(|layer| chunked(layer).is_some()));
        }
        // First those that the new image doesn't have: it has others in their place.
        layers.sort_by_key(|layer| self.layers.contains_key(&layer.digest));
        Ok(layers)
    }

    /// Reads the tables of layers that weren't looked at yet.
    async fn read(&self, layers: Vec<Descriptor>, search: &mut Search) -> Result<()> {
        for layer in layers {
            if search.is_over() {
                return Ok(());
            }
            let Some(annotations) = chunked(&layer) else { continue };
            let range = annotations.positions.range();
            let bytes = range.end - range.start;
            if range.end > layer.size || bytes > search.bytes || !search.seen.insert(layer.digest.clone()) {
                continue;
            }
            (search.bytes, search.tables) = (search.bytes - bytes, search.tables - 1);
            let fetched = self.client.get_blob_range(self.reference, &layer.digest, range).await;
            let tables = match fetched {
                Ok(blob) if blob.ignores_range() => continue,
                Ok(blob) => blob.read(usize::try_from(bytes).unwrap_or(usize::MAX)).await,
                Err(error) => Err(error),
            };
            let tables = match tables {
                Ok(tables) => tables,
                Err(error) => {
                    tracing::debug!(layer = %layer.digest, %error, "can't read a layer's table");
                    continue;
                }
            };
            let known = std::mem::take(&mut search.known);
            search.known = blocking(move || {
                let (mut known, mut found) = (known, Found::default());
                match spans(&tables, &annotations, |span| found.look(&known, span)) {
                    Ok(()) => known.add(&layer.digest, found),
                    Err(error) => tracing::debug!(layer = %layer.digest, %error, "a layer's table is wrong"),
                }
                Ok(known)
            })
            .await?;
        }
        Ok(())
    }
}

impl Search {
    fn is_over(&self) -> bool {
        self.known.is_enough() || self.tables == 0 || Instant::now() >= self.deadline
    }
}

impl Layer {
    /// Blocking: reads the layer's own tables.
    fn spans(&self, each: impl FnMut(Span)) -> Result<()> {
        use std::os::unix::fs::FileExt as _;
        let BlobFile { path, offset, size, .. } = &self.file;
        let range = self.annotations.positions.range();
        if range.end > *size {
            let reason = format!("its table ends at {}, and the layer at {size}", range.end);
            return Err(Error::InvalidLayer { reason });
        }
        let file = std::fs::File::open(path).map_err(Error::io("reading", path))?;
        let mut tables = vec![0; usize::try_from(range.end - range.start).map_err(|_| Error::Cancelled)?];
        file.read_exact_at(&mut tables, offset + range.start).map_err(Error::io("reading", path))?;
        spans(&tables, &self.annotations, each)
    }
}

/// The annotations of a zstd:chunked layer, with positions that can be.
fn chunked(layer: &Descriptor) -> Option<Annotations> {
    let annotations = Annotations::from_map(layer.annotations.as_ref()?).ok()??;
    annotations.positions.check(&Limits::default()).ok()?;
    layer.media_type.ends_with("zstd").then_some(annotations)
}

/// Blocking: the spans of the layer whose tables these are.
fn spans(tables: &[u8], annotations: &Annotations, each: impl FnMut(Span)) -> Result<()> {
    let (limits, positions) = (Limits::default(), &annotations.positions);
    let start = positions.range().start;
    let section = |section: Section| {
        let at = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
        tables.get(at(section.range().start)..at(section.range().end)).unwrap_or_default()
    };
    let toc = read_toc(section(positions.toc), annotations, &limits).map_err(Error::Table)?;
    let tar_split = section(positions.tar_split).to_vec();
    let tar_split = read_tar_split(tar_split, &toc, annotations, &limits).map_err(Error::Table)?;
    tar_split.spans(&toc, positions.data_end(), each).map_err(Error::Table)
}

/// The tags that are closest to one by their names, numbers in them by their value: the ones before, `latest`, the ones
/// after.
fn nearest(tags: &[String], tag: Option<&str>) -> Vec<String> {
    let mut tags: Vec<&str> = tags.iter().map(String::as_str).filter(|other| Some(*other) != tag).collect();
    tags.sort_by_cached_key(|&tag| natural(tag));
    let place = tag.map_or(tags.len(), |tag| {
        let tag = natural(tag);
        tags.partition_point(|other| natural(other) < tag)
    });
    let (before, after) = tags.split_at(place);
    let mut nearest: Vec<&str> = before.iter().rev().take(TAGS_MAX.0).copied().collect();
    nearest.extend(tags.contains(&"latest").then_some("latest").filter(|tag| !nearest.contains(tag)));
    let after: Vec<&str> =
        after.iter().take(TAGS_MAX.1).filter(|tag| !nearest.contains(tag)).copied().collect();
    nearest.extend(after);
    nearest.into_iter().map(str::to_owned).collect()
}

/// Compares text as text, and numbers by their length first, without leading zeros.
fn natural(tag: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let mut rest = tag;
    while !rest.is_empty() {
        let digits = rest.starts_with(|c: char| c.is_ascii_digit());
        let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        let number = part.trim_start_matches('0');
        parts.push(if digits { (1 + number.len(), number) } else { (0, part) });
        rest = after;
    }
    parts
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Cancelled)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_that_are_close_come_first() {
        let tags = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let all = tags("1.10.0 1.2.0 1.9.0 1.9.1 2.0.0 3.0.0 4.0.0 5.0.0 latest 1.1.0 1.0.0 0.1.0");
        assert_eq!(
            nearest(&all, Some("1.9.2")),
            tags("1.9.1 1.9.0 1.2.0 1.1.0 1.0.0 latest 1.10.0 2.0.0 3.0.0")
        );
        assert_eq!(nearest(&tags("v09 v8 v10"), Some("v11")), tags("v10 v09 v8"));
        assert_eq!(nearest(&tags("a latest z"), Some("latest")), tags("a z"));
        assert_eq!(nearest(&tags("a b latest"), None), tags("latest b a"));
        assert_eq!(nearest(&[], Some("v1")), Vec::<String>::new());
    }
}
