//! What a source holds, before anything is packed: manifests, and where the blobs lie.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};

use crate::client::{RawManifest, RemoteBlob};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::MANIFEST_MAX_BYTES;
use crate::pack::BlobFile;

/// An image as its source has it.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Children before the index that lists them, the image itself last.
    pub(super) manifests: Vec<RawManifest>,
    /// Each once.
    pub(super) blobs: Vec<Blob>,
}

/// Where a blob lies.
#[derive(Clone, Debug)]
pub(super) enum Blob {
    File(BlobFile),
    Remote(RemoteBlob),
}

impl Found {
    pub(super) fn blob(&self, digest: &Digest) -> Option<&Blob> {
        self.blobs.iter().find(|blob| blob.digest() == digest)
    }
}

impl Blob {
    pub(super) fn digest(&self) -> &Digest {
        match self {
            Blob::File(file) => &file.digest,
            Blob::Remote(remote) => &remote.digest,
        }
    }

    pub(super) fn size(&self) -> u64 {
        match self {
            Blob::File(file) => file.size,
            Blob::Remote(remote) => remote.size,
        }
    }

    /// All of a small blob, verified.
    pub(super) async fn read(&self) -> Result<Vec<u8>> {
        match self {
            Blob::Remote(remote) => {
                let blob =
                    remote.client.get_blob(&remote.reference, &remote.digest, Some(remote.size)).await?;
                blob.read(MANIFEST_MAX_BYTES).await
            }
            Blob::File(file) => {
                if file.size > MANIFEST_MAX_BYTES as u64 {
                    let what = format!("blob {}", file.digest);
                    return Err(Error::SizeMismatch {
                        what,
                        expected: MANIFEST_MAX_BYTES as u64,
                        found: file.size,
                    });
                }
                let mut bytes = Vec::new();
                file.open()?
                    .take(file.size)
                    .read_to_end(&mut bytes)
                    .map_err(Error::io("reading", &file.path))?;
                let found = file.digest.same_of(&bytes);
                if found != file.digest {
                    let what = format!("blob {} in {}", file.digest, file.path.display());
                    return Err(Error::DigestMismatch { what, expected: file.digest.clone(), found });
                }
                Ok(bytes)
            }
        }
    }
}

impl BlobFile {
    /// The file, at where the blob starts.
    pub(super) fn open(&self) -> Result<File> {
        let mut file = File::open(&self.path).map_err(Error::io("reading", &self.path))?;
        file.seek(SeekFrom::Start(self.offset)).map_err(Error::io("reading", &self.path))?;
        Ok(file)
    }
}
