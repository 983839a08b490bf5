//! Image references: `[host[:port]/]repository[:tag][@digest]`.
//!
//! The rules are those of the OCI distribution specification. The first component is a host when it has a dot or
//! a colon or is `localhost`; a reference without a host belongs to whatever registry the client talks to.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::Error;

/// Longest repository name that other registries take.
const REPOSITORY_MAX_LEN: usize = 255;
/// Longest tag in the specification.
const TAG_MAX_LEN: usize = 128;

/// Names an image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    /// Host and optional port of the registry; none means the client's own registry.
    pub registry: Option<String>,
    /// Repository name, with slashes.
    pub repository: String,
    /// Tag, if one was given.
    pub tag: Option<String>,
    /// Digest, if one was given; it wins over the tag.
    pub digest: Option<Digest>,
}

impl Reference {
    /// The tag, or `latest`.
    pub fn tag_or_latest(&self) -> &str {
        self.tag.as_deref().unwrap_or("latest")
    }

    /// What goes at the end of `/v2/<repository>/manifests/`: the digest if there is one, else the tag.
    pub fn manifest_key(&self) -> &str {
        self.digest.as_ref().map_or(self.tag_or_latest(), Digest::as_str)
    }

    /// The same repository, by this digest only.
    pub fn at(&self, digest: &Digest) -> Reference {
        Reference { tag: None, digest: Some(digest.clone()), ..self.clone() }
    }

    /// One spelling for each image: `latest` is written out where there is neither tag nor digest.
    pub fn canonical(&self) -> Reference {
        let mut canonical = self.clone();
        if canonical.digest.is_none() {
            canonical.tag = Some(self.tag_or_latest().to_owned());
        }
        canonical
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Reference, Error> {
        let invalid = |reason: String| Error::InvalidReference { text: text.to_owned(), reason };
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(invalid(format!("leave out `{scheme}://`; the registry's URL is set elsewhere")));
        }
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                (name, Some(digest.parse::<Digest>().map_err(|e| invalid(e.to_string()))?))
            }
            None => (text, None),
        };
        let (registry, rest) = match name.split_once('/') {
            Some((first, rest)) if first == "localhost" || first.contains(['.', ':']) => (Some(first), rest),
            _ => (None, name),
        };
        let (repository, tag) = match rest.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (rest, None),
        };
        if let Some(host) = registry {
            check_host(host).map_err(invalid)?;
        }
        check_repository(repository).map_err(invalid)?;
        if let Some(tag) = tag {
            check_tag(tag).map_err(invalid)?;
        }
        Ok(Reference {
            registry: registry.map(str::to_owned),
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

impl TryFrom<String> for Reference {
    type Error = Error;

    fn try_from(text: String) -> Result<Reference, Error> {
        text.parse()
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> String {
        reference.to_string()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(registry) = &self.registry {
            write!(f, "{registry}/")?;
        }
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Says what is wrong with a repository name, by the distribution specification.
pub fn check_repository(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("the repository name is empty".to_owned());
    }
    if name.len() > REPOSITORY_MAX_LEN {
        return Err(format!("the repository name is longer than {REPOSITORY_MAX_LEN} characters"));
    }
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(format!("repository names are lower case: try `{}`", name.to_ascii_lowercase()));
    }
    match name.split('/').find(|component| !is_component(component)) {
        None => Ok(()),
        Some(bad) => Err(format!(
            "`{bad}` is no part of a repository name: expected letters and digits, separated by one `.`, \
             one or two `_`, or any number of `-`"
        )),
    }
}

/// Says what is wrong with a tag, by the distribution specification.
pub fn check_tag(tag: &str) -> Result<(), String> {
    let mut bytes = tag.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    if first && tag.len() <= TAG_MAX_LEN && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
        return Ok(());
    }
    Err(format!(
        "`{tag}` is no tag: expected 1 to {TAG_MAX_LEN} letters, digits, `_`, `.` or `-`, \
         the first a letter, digit or `_`"
    ))
}

fn check_host(host: &str) -> Result<(), String> {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (host, None),
    };
    if port.is_some_and(|port| digits(port).is_none_or(|port| port > u16::MAX.into())) {
        return Err(format!("`{host}` has no valid port after the `:`"));
    }
    let is_label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if !name.split('.').all(is_label) {
        return Err(format!("`{host}` is no host name or IPv4 address"));
    }
    Ok(())
}

/// A number of digits only: no sign, unlike in Rust.
pub(crate) fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(component: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends_well =
        component.bytes().next().is_some_and(is_word) && component.bytes().last().is_some_and(is_word);
    ends_well
        && component
            .split(|c: char| c.is_ascii() && is_word(c as u8))
            .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_round_trip() {
        let digest = Digest::of(b"x");
        for text in [
            "hello",
            "hello:v1",
            "team/app/web:1.0-rc_2",
            "localhost/app",
            "10.1.0.10:5000/a/b:c",
            "registry.example:5000/app",
            "a__b/c.d/e---f",
            &format!("app@{digest}"),
            &format!("docker.io/library/busybox:1@{digest}"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), text);
        }
    }

    #[test]
    fn parts_are_told_apart() {
        let r: Reference = "localhost:5000/app".parse().unwrap();
        assert_eq!(
            (r.registry.as_deref(), r.repository.as_str(), r.tag),
            (Some("localhost:5000"), "app", None)
        );
        let r: Reference = "app:5000".parse().unwrap();
        assert_eq!((r.registry, r.repository.as_str(), r.tag.as_deref()), (None, "app", Some("5000")));
        let r: Reference = "team/app".parse().unwrap();
        assert_eq!(
            (r.registry.as_deref(), r.repository.as_str(), r.tag_or_latest()),
            (None, "team/app", "latest")
        );
        assert_eq!(r.canonical().to_string(), "team/app:latest");
    }

    #[test]
    fn errors_say_what_to_do() {
        for (text, expected) in [
            ("", "empty"),
            ("Hello", "try `hello`"),
            ("http://x/y", "leave out `http://`"),
            ("a//b", "`` is no part"),
            ("a._b", "`a._b` is no part"),
            ("-a", "`-a` is no part"),
            ("../etc", "no host name"),
            ("a/../b", "`..` is no part"),
            ("a:", "`` is no tag"),
            ("a:b c", "`b c` is no tag"),
            ("x:99999/a", "no valid port"),
            ("a@sha256:12", "64 lower-case"),
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(format!("a:{}", "t".repeat(129)).parse::<Reference>().is_err());
        assert!("a".repeat(256).parse::<Reference>().is_err());
    }
}
