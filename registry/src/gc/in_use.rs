//! What runs somewhere, as whoever knows lists it: a JSON list of image references, from a URL or a file.
//!
//! The registry doesn't know its own names, so a reference's host is left aside: what is in use in one registry stays
//! in another with the same repository, too.

use std::time::Duration;

use anyhow::Context as _;
use anyplace_images::{Digest, Reference};
use anyplace_registry_core::retention::InUse;

use super::settings::RetentionConfig;

/// How long the list may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Longest list: a million references of ordinary length.
const LIST_MAX_BYTES: usize = 128 << 20;

/// The list, if the settings name one.
pub(super) async fn fetch(config: &RetentionConfig) -> anyhow::Result<InUse<Digest>> {
    let bytes = match (&config.in_use_url, &config.in_use_file) {
        (Some(url), _) => {
            let token = config.in_use_token_file.as_deref().map(anyplace_service::read_token).transpose()?;
            ask(url, token).await.with_context(|| format!("retention.in_use_url {url}"))?
        }
        (None, Some(file)) => tokio::fs::read(file)
            .await
            .with_context(|| format!("retention.in_use_file {} can't be read", file.display()))?,
        (None, None) => return Ok(InUse::default()),
    };
    read(&bytes)
}

async fn ask(url: &str, token: Option<String>) -> anyhow::Result<Vec<u8>> {
    anyplace_service::install_crypto_provider();
    let client = reqwest::Client::builder().timeout(TIMEOUT).build()?;
    let mut request = client.get(url);
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    let mut answer = request.send().await?.error_for_status()?;
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        bytes.extend_from_slice(&chunk);
        anyhow::ensure!(bytes.len() <= LIST_MAX_BYTES, "the list has more than {LIST_MAX_BYTES} bytes");
    }
    Ok(bytes)
}

fn read(bytes: &[u8]) -> anyhow::Result<InUse<Digest>> {
    let texts: Vec<String> = serde_json::from_slice(bytes)
        .context("the list of images in use isn't a JSON list of references, such as [\"hello:v1\"]")?;
    let mut in_use = InUse::default();
    for text in texts {
        let reference: Reference = text.parse().context("in the list of images in use")?;
        let tag = reference.tag_or_latest().to_owned();
        if reference.tag.is_some() || reference.digest.is_none() {
            in_use.tags.insert((reference.repository, tag));
        }
        in_use.digests.extend(reference.digest);
    }
    Ok(in_use)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_count_by_tag_and_digest_whatever_their_host() {
        let digest = Digest::of(b"x");
        let list = format!("[\"hello\", \"localhost:5000/a/b:v1\", \"c@{digest}\", \"d:v2@{digest}\"]");
        let in_use = read(list.as_bytes()).unwrap();
        let tags = [("a/b", "v1"), ("d", "v2"), ("hello", "latest")];
        assert_eq!(in_use.tags, tags.map(|(r, t)| (r.to_owned(), t.to_owned())).into());
        assert_eq!(in_use.digests, [digest].into());
        assert!(read(b"{}").is_err() && read(b"[\"not a reference\"]").is_err());
    }
}
