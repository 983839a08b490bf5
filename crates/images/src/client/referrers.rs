//! The manifests that are about another one, such as signatures and SBOMs.

use reqwest::StatusCode;
use reqwest::header::LINK;
use serde::Deserialize;
use serde_json::Value;

use super::auth::Grant;
use super::{ANSWER_TIMEOUT, Client, Target, check, header};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;

/// Most bytes of a list of referrers, all of its pages together.
const LIST_MAX_BYTES: usize = 16 << 20;
/// Longest part of a digest in the tag that stands for a list.
const TAG_DIGEST_MAX: usize = 64;

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Option<Vec<Value>>,
}

impl Client {
    /// The descriptors of the manifests that are about `subject`. A registry that can't list them has an index of them
    /// instead, which clients keep under a tag.
    ///
    /// # Errors
    /// Also [`Error::SizeMismatch`]: the list has more than 16 MiB.
    pub async fn list_referrers(&self, reference: &Reference, subject: &Digest) -> Result<Vec<Value>> {
        let target = self.target(reference)?;
        let mut url = target.url(&format!("referrers/{subject}"))?;
        let (mut referrers, mut bytes) = (Vec::new(), 0);
        loop {
            let request = || Ok(self.inner.http.get(url.clone()).timeout(ANSWER_TIMEOUT));
            let response = self.send(&target, Grant::Pull, request).await?;
            if response.status() == StatusCode::NOT_FOUND {
                return self.tagged_referrers(reference, subject).await;
            }
            let response = check(&target, response).await?;
            let next = header(response.headers(), LINK.as_str())
                .and_then(|link| Some(link.split_once('<')?.1.split_once('>')?.0.to_owned()));
            let page = page(&target, response, &mut bytes).await?;
            referrers.extend(page.manifests.unwrap_or_default());
            match next.map(|next| url.join(&next)) {
                // Never follow a list to another host: the credentials would go there.
                Some(Ok(next)) if next.origin() == url.origin() => url = next,
                _ => return Ok(referrers),
            }
        }
    }

    async fn tagged_referrers(&self, reference: &Reference, subject: &Digest) -> Result<Vec<Value>> {
        let hex = &subject.hex()[..subject.hex().len().min(TAG_DIGEST_MAX)];
        let tag = Some(format!("{}-{hex}", subject.algorithm()));
        let reference = Reference { tag, digest: None, ..reference.clone() };
        match self.get_manifest(&reference).await {
            Ok(index) => match serde_json::from_slice::<Index>(&index.bytes) {
                Ok(index) => Ok(index.manifests.unwrap_or_default()),
                // Somebody's tag that is called so.
                Err(_) => Ok(Vec::new()),
            },
            Err(error) if error.is_not_found() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

async fn page(target: &Target, mut response: reqwest::Response, bytes: &mut usize) -> Result<Index> {
    let mut text = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| target.unreachable(e))? {
        *bytes += chunk.len();
        if *bytes > LIST_MAX_BYTES {
            let what = format!("the list of referrers at {}", target.name());
            let (expected, found) = (LIST_MAX_BYTES as u64, *bytes as u64);
            return Err(Error::SizeMismatch { what, expected, found });
        }
        text.extend_from_slice(&chunk);
    }
    serde_json::from_slice(&text).map_err(|e| Error::Registry {
        url: target.name(),
        status: 200,
        code: String::new(),
        message: format!("its list of referrers can't be read: {e}"),
    })
}
