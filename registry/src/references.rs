//! What a manifest names: read leniently, since any JSON object with a media type is a manifest to the
//! specification, and strictly where the type says what has to be there.

use std::collections::BTreeMap;

use anyplace_images::Digest;
use anyplace_images::manifest::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use serde::Deserialize;

/// Most blobs and manifests that one manifest may name. Docker's own limit on layers is 127; indexes and artifacts
/// have more.
pub(crate) const REFERENCES_MAX: usize = 8_192;
/// Longest media type: 127 characters on each side of the slash, by RFC 6838.
const MEDIA_TYPE_MAX: usize = 255;
/// Layers that may not be distributed lie elsewhere, also where no address says so.
const NOT_DISTRIBUTED: [&str; 2] = ["nondistributable", "rootfs.foreign"];

/// A manifest, as far as the registry has to know it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) media_type: String,
    /// What kind of artifact it is, for lists of referrers.
    pub(crate) artifact_type: Option<String>,
    /// Blobs that have to be in the repository.
    pub(crate) blobs: Vec<Digest>,
    /// Manifests that an index names; they may be missing.
    pub(crate) manifests: Vec<Digest>,
    /// What this manifest is about; it may be missing too.
    pub(crate) subject: Option<Digest>,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// What a stored manifest names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) blobs: Vec<Digest>,
    pub(crate) manifests: Vec<Digest>,
    pub(crate) subject: Option<Digest>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u32>,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<Pointer>,
    layers: Option<Vec<Pointer>>,
    /// Of the artifact manifest that the image specification had for a while.
    blobs: Option<Vec<Pointer>>,
    manifests: Option<Vec<Pointer>>,
    subject: Option<Pointer>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pointer {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    urls: Option<Vec<String>>,
}

/// Whether a blob of this type has to be in its manifest's repository, and doesn't lie at these addresses.
pub(crate) fn is_here(media_type: &str, urls: Option<&[String]>) -> bool {
    urls.is_none_or(<[String]>::is_empty) && !NOT_DISTRIBUTED.iter().any(|part| media_type.contains(part))
}

impl Pointer {
    fn is_here(&self) -> bool {
        is_here(&self.media_type, self.urls.as_deref())
    }
}

/// Reads a manifest that came with this `Content-Type`, or says what is wrong with it.
pub(crate) fn read(sent_type: Option<&str>, bytes: &[u8]) -> Result<Manifest, String> {
    // What isn't known is passed over, and JSON is UTF-8 there too.
    let text = std::str::from_utf8(bytes).map_err(|e| format!("the manifest isn't UTF-8: {e}"))?;
    let document: Document =
        serde_json::from_str(text).map_err(|e| format!("the manifest can't be understood: {e}"))?;
    let sent =
        sent_type.and_then(|text| text.split(';').next()).map(str::trim).filter(|text| !text.is_empty());
    let own = document.media_type.as_deref().filter(|text| !text.is_empty());
    if let (Some(sent), Some(own)) = (sent, own)
        && sent != own
    {
        return Err(format!("Content-Type is `{sent}`, but the manifest's mediaType is `{own}`"));
    }
    let media_type = own.or(sent).unwrap_or(match document.manifests {
        Some(_) => OCI_INDEX,
        None => OCI_MANIFEST,
    });
    if media_type.len() > MEDIA_TYPE_MAX || !media_type.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!("`{media_type}` is no media type"));
    }
    let missing = match media_type {
        OCI_MANIFEST | DOCKER_MANIFEST if document.config.is_none() || document.layers.is_none() => {
            Some("config and layers")
        }
        OCI_INDEX | DOCKER_LIST if document.manifests.is_none() => Some("manifests"),
        _ => None,
    };
    let known = [OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST].contains(&media_type);
    let version = document.schema_version;
    if missing.is_some() || (known && version != Some(2)) || version.is_some_and(|version| version < 2) {
        let parts = missing.map(|missing| format!(" and {missing}")).unwrap_or_default();
        return Err(format!("a `{media_type}` needs schemaVersion 2{parts}"));
    }
    let of = |pointers: &Option<Vec<Pointer>>| pointers.as_ref().map_or(0, Vec::len);
    let count = of(&document.layers) + of(&document.blobs) + of(&document.manifests);
    if count > REFERENCES_MAX {
        return Err(format!("it names {count} blobs and manifests, at most {REFERENCES_MAX} are taken"));
    }
    let artifact_type = document.artifact_type.filter(|text| !text.is_empty());
    let config_type = document.config.as_ref().map(|config| config.media_type.clone());
    let blobs =
        document.config.iter().chain(document.layers.iter().flatten()).chain(document.blobs.iter().flatten());
    Ok(Manifest {
        media_type: media_type.to_owned(),
        artifact_type: artifact_type.or(config_type).filter(|text| !text.is_empty()),
        blobs: blobs.filter(|blob| blob.is_here()).map(|blob| blob.digest.clone()).collect(),
        manifests: document.manifests.into_iter().flatten().map(|manifest| manifest.digest).collect(),
        subject: document.subject.map(|subject| subject.digest),
        annotations: document.annotations.unwrap_or_default(),
    })
}

/// All that a stored manifest names, of whatever type it is, also what may lie elsewhere but was pushed anyway.
pub(crate) fn names(bytes: &[u8]) -> Result<Names, String> {
    let document: Document = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let digests =
        |pointers: Option<Vec<Pointer>>| pointers.into_iter().flatten().map(|pointer| pointer.digest);
    let blobs = document.config.into_iter().map(|pointer| pointer.digest);
    Ok(Names {
        blobs: blobs.chain(digests(document.layers)).chain(digests(document.blobs)).collect(),
        manifests: digests(document.manifests).collect(),
        subject: document.subject.map(|subject| subject.digest),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn pointer(media_type: &str, rest: &str) -> String {
        format!("{{\"mediaType\":\"{media_type}\",\"digest\":\"{DIGEST}\",\"size\":1{rest}}}")
    }

    #[test]
    fn types_come_from_the_manifest_the_header_or_its_parts() {
        let image = format!("\"schemaVersion\":2,\"config\":{},\"layers\":[]", pointer("a/config", ""));
        let index = "\"schemaVersion\":2,\"manifests\":[]".to_owned();
        for (sent, fields, expected) in [
            (None, image.clone(), OCI_MANIFEST),
            (None, index.clone(), OCI_INDEX),
            (Some(DOCKER_MANIFEST), image.clone(), DOCKER_MANIFEST),
            (Some("application/json; charset=utf-8"), "\"a\":1".to_owned(), "application/json"),
            (None, format!("\"mediaType\":\"x/y\",{index}"), "x/y"),
            (Some(" "), index, OCI_INDEX),
        ] {
            let read = read(sent, format!("{{{fields}}}").as_bytes()).unwrap();
            assert_eq!(read.media_type, expected, "{fields}");
        }
        for (sent, fields) in [
            (Some("x/y"), format!("\"mediaType\":\"x/z\",{image}")),
            (Some(OCI_INDEX), image.clone()),
            (Some(OCI_MANIFEST), "\"schemaVersion\":2".to_owned()),
            (Some("x/y"), "\"schemaVersion\":1".to_owned()),
            (Some("x/y z"), image.clone()),
            (None, format!("\"mediaType\":\"x/\\n\",{image}")),
            (None, image.replace(":2,", ":3,")),
            (None, image.replace("sha256:e3", "md5:e3")),
        ] {
            assert!(read(sent, format!("{{{fields}}}").as_bytes()).is_err(), "{fields}");
        }
        assert!(read(None, b"[]").is_err());
        assert!(read(Some("a/b"), b"{\"x\":\"\xff\"}").is_err_and(|error| error.contains("UTF-8")));
    }

    #[test]
    fn what_lies_elsewhere_is_not_asked_for() {
        let layers = [
            pointer("application/vnd.oci.image.layer.v1.tar", ""),
            pointer("application/vnd.oci.image.layer.v1.tar", ",\"urls\":[\"https://example.com\"]"),
            pointer("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", ""),
            pointer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", ",\"urls\":null"),
        ];
        let text = format!(
            "{{\"schemaVersion\":2,\"config\":{},\"layers\":[{}],\"subject\":{}}}",
            pointer("a/config", ""),
            layers.join(","),
            pointer(OCI_MANIFEST, "")
        );
        let read = read(None, text.as_bytes()).unwrap();
        assert_eq!((read.blobs.len(), read.artifact_type.as_deref()), (2, Some("a/config")));
        assert_eq!(read.subject.unwrap().as_str(), DIGEST);
    }
}
