//! Clients of a registry, as its endpoints serve them: by the same calls of storage and trash.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyplace_images::Digest;
use anyplace_images::manifest::{OCI_INDEX, OCI_MANIFEST};
use bytes::Bytes;
use tokio::time::Instant;

use super::super::Named;
use super::model::{Model, Open};
use super::stepped::Dice;
use super::{GRACE, WINDOW};
use crate::references;
use crate::storage::{Linked, NewManifest, Storage};

pub(super) const REPOSITORIES: [&str; 2] = ["a", "b/c"];
/// Those with `t` are let go by rules where there are rules.
pub(super) const TAGS: [&str; 4] = ["v1", "v2", "t1", "t2"];
const BLOBS: usize = 5;
pub(super) const MANIFESTS: usize = 7;

/// A manifest that clients push.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) digest: Digest,
    pub(super) bytes: Bytes,
    pub(super) blobs: Vec<usize>,
    pub(super) children: Vec<usize>,
}

/// The content of a blob.
pub(super) fn blob(index: usize) -> Bytes {
    Bytes::from(format!("{{\"blob\":{index}}}"))
}

/// All manifests: four images that share blobs, two indexes, and a signature of the first.
pub(super) fn images() -> Vec<Image> {
    let pointer = |kind: &str, digest: &Digest, size: usize| {
        format!("{{\"mediaType\":\"{kind}\",\"digest\":\"{digest}\",\"size\":{size}}}")
    };
    let of_blob = |index: &usize| pointer("a/b", &Digest::of(&blob(*index)), blob(*index).len());
    let mut images: Vec<Image> = Vec::new();
    let mut add = |blobs: &[usize], children: &[usize], subject: Option<usize>| {
        let of_image = |index: &usize| {
            let image: &Image = &images[*index];
            pointer(OCI_MANIFEST, &image.digest, image.bytes.len())
        };
        let subject = subject.map(|index| format!(",\"subject\":{}", of_image(&index))).unwrap_or_default();
        let text = if children.is_empty() {
            let layers: Vec<_> = blobs[1..].iter().map(of_blob).collect();
            let (config, layers) = (of_blob(&blobs[0]), layers.join(","));
            format!(
                "{{\"schemaVersion\":2,\"mediaType\":\"{OCI_MANIFEST}\",\"config\":{config},\"layers\":[{layers}]{subject}}}"
            )
        } else {
            let manifests: Vec<_> = children.iter().map(of_image).collect();
            let manifests = manifests.join(",");
            format!(
                "{{\"schemaVersion\":2,\"mediaType\":\"{OCI_INDEX}\",\"manifests\":[{manifests}]{subject}}}"
            )
        };
        let bytes = Bytes::from(text);
        let (digest, blobs, children) = (Digest::of(&bytes), blobs.to_vec(), children.to_vec());
        images.push(Image { digest, bytes, blobs, children });
    };
    add(&[0, 1], &[], None);
    add(&[0, 2, 3], &[], None);
    add(&[3, 4], &[], None);
    add(&[4], &[], None);
    add(&[], &[0, 1], None);
    add(&[], &[1, 2], None);
    add(&[2], &[], Some(0));
    images
}

/// A client, and the process that it talks to.
pub(super) struct Client {
    pub(super) id: usize,
    pub(super) storage: Storage,
    pub(super) model: Rc<RefCell<Model>>,
    pub(super) turns: Rc<RefCell<u64>>,
    pub(super) began: Instant,
    pub(super) dice: Dice,
    pub(super) images: Rc<Vec<Image>>,
}

impl Client {
    /// Leaves something behind, for the time when it is old.
    pub(super) async fn prepare(&self) {
        let repository = REPOSITORIES[self.dice.below(REPOSITORIES.len())];
        match self.dice.below(3) {
            0 => drop(self.ensure_blob(repository, self.dice.below(BLOBS)).await),
            1 => drop(self.push(repository, self.dice.below(MANIFESTS), None).await),
            _ => self.delete_manifest(repository, self.dice.below(MANIFESTS)).await,
        }
    }

    /// Does something.
    pub(super) async fn act(&self) {
        let repository = REPOSITORIES[self.dice.below(REPOSITORIES.len())];
        let image = self.dice.below(MANIFESTS);
        let tag = TAGS[self.dice.below(TAGS.len())];
        match self.dice.below(16) {
            0..=7 => drop(self.push(repository, image, (!self.dice.one_in(4)).then_some(tag)).await),
            8 => drop(self.ensure_blob(repository, self.dice.below(BLOBS)).await),
            9 | 10 => self.delete_manifest(repository, image).await,
            11 => self.delete_tag(repository, tag).await,
            12 => self.delete_blob(repository, self.dice.below(BLOBS)).await,
            13 => self.undelete(repository, image).await,
            14 => self.undelete_tag(repository, tag).await,
            _ => tokio::time::sleep(Duration::from_millis(40)).await,
        }
    }

    /// Pushes an image as docker does: what is there is skipped, then the manifest by digest or tag. Says whether it is
    /// there.
    pub(super) async fn push(
        &self,
        repository: &'static str,
        index: usize,
        tag: Option<&'static str>,
    ) -> bool {
        let image = self.images[index].clone();
        for child in &image.children {
            if !Box::pin(self.push(repository, *child, None)).await {
                return false;
            }
        }
        let began = self.now_ms();
        let sure_from = self.turn();
        // Some know from before that it is there, and don't ask.
        let asks = !self.dice.one_in(3);
        for blob in image.blobs.iter().filter(|_| asks) {
            if !self.ensure_blob(repository, *blob).await {
                return false;
            }
        }
        let manifest = references::read(None, &image.bytes).unwrap();
        let new = NewManifest::of(manifest, image.bytes.clone());
        self.begin(Open::PutManifest((repository, image.digest.clone()), 0), None);
        if let Some(tag) = tag {
            self.begin(Open::PutTag((repository, tag), 0), Some(image.digest.clone()));
        }
        let put = self.storage.put_tagged_manifest(repository, &image.digest, new, tag.as_slice()).await;
        let there = matches!(&put, Ok(missing) if missing.is_empty());
        self.end(there);
        if let Ok(missing) = put {
            let in_time = asks && self.now_ms() - began < GRACE.as_millis() as u64 / 2;
            for digest in missing.into_iter().filter(|_| in_time) {
                let history = self.model.borrow().blobs.get(&(repository, digest.clone())).cloned();
                let deleted = history.is_some_and(|history| history.deleted_since(sure_from));
                assert!(
                    deleted,
                    "{digest} of {repository} was there for the client, and is gone for its manifest"
                );
            }
        }
        there
    }

    /// Asks for a blob, mounts it, or uploads it; says whether it is there.
    async fn ensure_blob(&self, repository: &'static str, index: usize) -> bool {
        let bytes = blob(index);
        let digest = Digest::of(&bytes);
        self.begin(Open::PutBlob((repository, digest.clone()), 0), None);
        let there = self.try_blob(repository, &digest, bytes).await;
        self.end(there);
        there
    }

    async fn try_blob(&self, repository: &str, digest: &Digest, bytes: Bytes) -> bool {
        if !self.dice.one_in(4) {
            match self.storage.blob_size_renewed(repository, digest).await {
                Ok(Some(size)) => {
                    assert_eq!(size, bytes.len() as u64);
                    return true;
                }
                Ok(None) => {}
                Err(_) => return false,
            }
        }
        if self.dice.one_in(3) {
            let from = REPOSITORIES[self.dice.below(REPOSITORIES.len())];
            let there = match self.dice.one_in(2) {
                true => self.storage.link(from, digest).await.map(|link| link.is_some()),
                false => self.storage.has_content(digest).await,
            };
            match there {
                Ok(true) => match self.storage.put_link(repository, digest).await {
                    Ok(Linked::Yes(_)) => return true,
                    Ok(Linked::Gone) => {}
                    Err(_) => return false,
                },
                Ok(false) => {}
                Err(_) => return false,
            }
        }
        // As an upload ends. What comes before touches no key that a collector does, and hashes on other threads.
        match self.storage.put_link(repository, digest).await {
            Ok(Linked::Yes(_)) => true,
            Ok(Linked::Gone) => self.storage.put_content(digest, bytes).await.is_ok(),
            Err(_) => false,
        }
    }

    async fn delete_manifest(&self, repository: &'static str, index: usize) {
        let digest = self.images[index].digest.clone();
        self.begin(Open::DeleteManifest((repository, digest.clone()), 0), None);
        // Its tags go too, whichever they are.
        for tag in TAGS {
            self.begin(Open::DeleteTag((repository, tag), 0), None);
        }
        let deleted = super::super::delete_manifest(&self.storage, repository, &digest, WINDOW).await;
        self.end(deleted.is_ok());
    }

    async fn delete_tag(&self, repository: &'static str, tag: &'static str) {
        self.begin(Open::DeleteTag((repository, tag), 0), None);
        let deleted = super::super::delete_tag(&self.storage, repository, tag, WINDOW).await;
        self.end(deleted.is_ok());
    }

    async fn delete_blob(&self, repository: &'static str, index: usize) {
        let digest = Digest::of(&blob(index));
        self.begin(Open::DeleteBlob((repository, digest.clone()), 0), None);
        let deleted = self.storage.remove_link(repository, &digest).await;
        self.end(deleted.is_ok());
    }

    pub(super) async fn undelete(&self, repository: &'static str, index: usize) {
        let digest = self.images[index].digest.clone();
        self.begin(Open::PutManifest((repository, digest.clone()), 0), None);
        let undeleted = super::super::undelete(&self.storage, repository, Named::Manifest(&digest)).await;
        self.end(undeleted.is_ok());
    }

    async fn undelete_tag(&self, repository: &'static str, tag: &'static str) {
        // Which digest it gets shows only in the end, so nothing is certain about the tag while this goes on.
        self.begin(Open::DeleteTag((repository, tag), 0), None);
        let undeleted = super::super::undelete(&self.storage, repository, Named::Tag(tag)).await;
        self.end(false);
        if let Ok(digest) = undeleted {
            assert!(self.images.iter().any(|image| image.digest == digest));
        }
    }

    fn begin(&self, what: Open, value: Option<Digest>) {
        let turn = self.turn();
        tracing::debug!(client = self.id, turn, ?what, ?value, "begins");
        self.model.borrow_mut().begin(self.id, what, turn, self.now_ms(), value);
    }

    fn end(&self, acknowledged: bool) {
        let (turn, now) = (self.turn(), self.now_ms());
        tracing::debug!(client = self.id, turn, now, acknowledged, "ends");
        self.model.borrow_mut().end(self.id, acknowledged, turn);
    }

    fn turn(&self) -> u64 {
        let mut turns = self.turns.borrow_mut();
        *turns += 1;
        *turns
    }

    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }
}
