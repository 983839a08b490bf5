//! Where everything lies; the layout is described in `storage`.

use anyplace_images::Digest;
use object_store::path::Path;

/// Ends the repository's name in a link's key.
const LINK_END: &str = "_link";

pub(super) fn content(digest: &Digest) -> Path {
    let hex = digest.hex();
    Path::from(format!("blobs/{}/{}/{hex}", digest.algorithm(), &hex[..2]))
}

/// The digest of a content's key.
pub(super) fn parse_content(key: &Path) -> Option<Digest> {
    let mut parts = key.as_ref().strip_prefix("blobs/")?.split('/');
    format!("{}:{}", parts.next()?, parts.nth(1)?).parse().ok()
}

pub(super) fn links_of(digest: &Digest) -> Path {
    Path::from(format!("links/{}/{}", digest.algorithm(), digest.hex()))
}

pub(super) fn link(repository: &str, digest: &Digest) -> Path {
    Path::from(format!("links/{}/{}/{repository}/{LINK_END}", digest.algorithm(), digest.hex()))
}

/// Digest and repository of a link's key.
pub(super) fn parse_link(key: &Path) -> Option<(Digest, String)> {
    let mut rest = key.as_ref().strip_prefix("links/")?.splitn(3, '/');
    let digest = format!("{}:{}", rest.next()?, rest.next()?).parse().ok()?;
    let repository = rest.next()?.strip_suffix(LINK_END)?.strip_suffix('/')?;
    Some((digest, repository.to_owned()))
}

pub(super) fn manifests(repository: &str) -> Path {
    Path::from(format!("repositories/{repository}/_manifests"))
}

pub(super) fn manifest(repository: &str, digest: &Digest) -> Path {
    of_digest(&manifests(repository), digest)
}

pub(super) fn pending(repository: &str) -> Path {
    Path::from(format!("repositories/{repository}/_pending"))
}

pub(super) fn pending_put(repository: &str, digest: &Digest, id: &str) -> Path {
    of_digest(&pending(repository), digest).join(id)
}

pub(super) fn referrers(repository: &str, subject: &Digest) -> Path {
    of_digest(&Path::from(format!("repositories/{repository}/_referrers")), subject)
}

pub(super) fn referrer(repository: &str, subject: &Digest, digest: &Digest) -> Path {
    of_digest(&referrers(repository, subject), digest)
}

pub(super) fn tags(repository: &str) -> Path {
    Path::from(format!("repositories/{repository}/_tags"))
}

pub(super) fn tag(repository: &str, tag: &str) -> Path {
    tags(repository).join(tag)
}

pub(super) fn markers_of(digest: &Digest) -> Path {
    of_digest(&Path::from("gc/deleting"), digest)
}

/// `<prefix>/<algorithm>/<digest>`.
fn of_digest(prefix: &Path, digest: &Digest) -> Path {
    prefix.clone().join(digest.algorithm()).join(digest.hex())
}

/// The digest in `<prefix>/<algorithm>/<digest>`, and what comes after it.
pub(super) fn digest_in<'a>(key: &'a Path, prefix: &Path) -> Option<(Digest, &'a str)> {
    let rest = key.as_ref().strip_prefix(prefix.as_ref())?.strip_prefix('/')?;
    let (algorithm, rest) = rest.split_once('/')?;
    let (hex, rest) = rest.split_once('/').unwrap_or((rest, ""));
    Some((format!("{algorithm}:{hex}").parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_read_back_as_what_they_were_made_of() {
        let digest = Digest::of(b"x");
        assert_eq!(parse_link(&link("a/b_c", &digest)), Some((digest.clone(), "a/b_c".to_owned())));
        assert_eq!(parse_link(&manifest("a", &digest)), None);
        assert_eq!(parse_content(&content(&digest)), Some(digest.clone()));
        let key = manifest("a", &digest);
        assert_eq!(digest_in(&key, &manifests("a")), Some((digest.clone(), "")));
        let key = pending_put("a", &digest, "1f");
        assert_eq!(digest_in(&key, &pending("a")), Some((digest, "1f")));
    }
}
