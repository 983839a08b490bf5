//! One upstream: which repositories it answers for, and whether it can be asked at the moment.
//!
//! After it was out of reach, it is left alone for a moment, so that not every request waits for it. Where nothing
//! listens, that goes for all questions; where one wasn't answered in time, for those of its kind.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use anyplace_images::{Client, Credentials, Error, Patience, Reference, check_repository};

use super::failure::Failure;
use crate::cache::counters::CacheCounters;
use crate::config::Upstream;

/// How long an upstream is left alone after it was out of reach.
const LEFT_ALONE: Duration = Duration::from_secs(3);
/// How often a request is repeated before the next upstream's turn: about half a second.
const PATIENCE: Patience = Patience { retries: 2 };

/// What a question is about: that one kind isn't answered in time says nothing about the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What a tag means, where there is an earlier answer to fall back on.
    Tag,
    /// Tags, or referrers.
    List,
    Manifest,
    /// Whether there is a blob.
    Blob,
    /// Bytes of a blob.
    Piece,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::Tag, Kind::List, Kind::Manifest, Kind::Blob, Kind::Piece];
}

/// An upstream registry.
pub(crate) struct Remote {
    pub(crate) client: Client,
    name: String,
    namespace: Option<String>,
    /// Put before repositories' names; empty or with a `/` at its end.
    prefix: String,
    /// By kind of question.
    left_alone_until: Mutex<[Option<Instant>; Kind::ALL.len()]>,
    /// It was seen to send whole blobs where ranges were asked for.
    no_ranges: AtomicBool,
    counters: Arc<CacheCounters>,
}

impl Remote {
    pub(crate) fn new(config: &Upstream, counters: Arc<CacheCounters>) -> anyhow::Result<Remote> {
        let what = || format!("upstreams: `{}`", config.url);
        let url = config.url.trim_end_matches('/');
        let scheme = url.find("://").map_or(0, |at| at + 3);
        let (base, prefix) = match url[scheme..].find('/') {
            Some(at) => (&url[..scheme + at], &url[scheme + at + 1..]),
            None => (url, ""),
        };
        for name in config.namespace.iter().map(String::as_str).chain(Some(prefix)).filter(|n| !n.is_empty())
        {
            check_repository(name).map_err(anyhow::Error::msg).with_context(what)?;
        }
        let credentials = config.credentials_file.as_deref().map(Credentials::from_file).transpose();
        let client = Client::new(base, credentials.with_context(what)?).with_context(what)?;
        Ok(Remote {
            client: client.with_patience(PATIENCE),
            name: url.to_owned(),
            namespace: config.namespace.clone(),
            prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
            left_alone_until: Mutex::default(),
            no_ranges: AtomicBool::new(false),
            counters,
        })
    }

    pub(crate) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What it calls this repository, if it answers for it.
    pub(crate) fn reference(&self, repository: &str) -> Option<Reference> {
        let own = match &self.namespace {
            Some(namespace) => repository.strip_prefix(namespace.as_str())?.strip_prefix('/')?,
            None => repository,
        };
        let repository = format!("{}{own}", self.prefix);
        Some(Reference { registry: None, repository, tag: None, digest: None })
    }

    pub(crate) fn has_ranges(&self) -> bool {
        !self.no_ranges.load(Ordering::Relaxed)
    }

    pub(crate) fn without_ranges(&self) -> Failure {
        self.no_ranges.store(true, Ordering::Relaxed);
        Failure::NoRanges(format!("{} sends whole blobs only", self.name))
    }

    /// Asks, within a time limit, unless the upstream is being left alone.
    pub(crate) async fn ask<T>(
        &self,
        kind: Kind,
        limit: Duration,
        question: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Failure> {
        let url = &self.name;
        if self.left_alone_until(kind).is_some() {
            return Err(Failure::LeftAlone(format!("{url} didn't answer a moment ago")));
        }
        let failure = match tokio::time::timeout(limit, question).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => {
                match &error {
                    Error::RegistryUnreachable { source, .. } if source.is_connect() => {
                        self.leave_alone(&Kind::ALL);
                    }
                    Error::RegistryUnreachable { source, .. } if source.is_timeout() => {
                        self.leave_alone(&[kind]);
                    }
                    // One that answers with an error may be well for the next question.
                    _ => {}
                }
                Failure::of(url, error)
            }
            Err(_) => {
                self.leave_alone(&[kind]);
                Failure::Unreachable(format!("no answer from {url} within {} s", limit.as_secs()))
            }
        };
        self.note(&failure);
        Err(failure)
    }

    /// What an error in the middle of an answer comes to.
    pub(crate) fn failed(&self, error: Error) -> Failure {
        let failure = Failure::of(&self.name, error);
        self.note(&failure);
        failure
    }

    /// Counts a failure, and tells the log.
    pub(crate) fn note(&self, failure: &Failure) {
        match failure {
            Failure::Absent | Failure::LeftAlone(_) => return,
            Failure::Corrupt(_) => CacheCounters::one(&self.counters.upstream_corrupt),
            _ => CacheCounters::one(&self.counters.upstream_failures),
        }
        tracing::warn!(upstream = self.name, reason = %failure, "an upstream didn't give what was asked for");
    }

    fn leave_alone(&self, kinds: &[Kind]) {
        let until = Instant::now() + LEFT_ALONE;
        let mut left_alone = self.left_alone_until.lock().unwrap_or_else(PoisonError::into_inner);
        kinds.iter().for_each(|kind| left_alone[*kind as usize] = Some(until));
    }

    /// When questions of this kind may be asked again, if they may not now.
    pub(crate) fn left_alone_until(&self, kind: Kind) -> Option<Instant> {
        let left_alone = self.left_alone_until.lock().unwrap_or_else(PoisonError::into_inner);
        left_alone[kind as usize].filter(|until| Instant::now() < *until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(url: &str, namespace: Option<&str>) -> anyhow::Result<Remote> {
        let config =
            Upstream { url: url.to_owned(), credentials_file: None, namespace: namespace.map(str::to_owned) };
        Remote::new(&config, Arc::default())
    }

    #[test]
    fn names_are_mapped() {
        let asked = |remote: &Remote, name: &str| remote.reference(name).map(|asked| asked.repository);
        let plain = remote("http://10.1.0.10:5000/", None).unwrap();
        assert_eq!(asked(&plain, "team/app").unwrap(), "team/app");
        let hub = remote("https://registry-1.docker.io", Some("docker.io")).unwrap();
        assert_eq!(asked(&hub, "docker.io/library/busybox").unwrap(), "library/busybox");
        assert_eq!(asked(&hub, "docker.iot/app"), None);
        assert_eq!(asked(&hub, "app"), None);
        let region = remote("http://10.2.0.10:5000/docker.io", Some("docker.io")).unwrap();
        assert_eq!(asked(&region, "docker.io/library/busybox").unwrap(), "docker.io/library/busybox");
        assert_eq!(region.client.registry().as_str(), "http://10.2.0.10:5000/");
        assert!(remote("http://10.2.0.10:5000/Bad", None).is_err());
        assert!(remote("http://10.2.0.10:5000", Some("a:b")).is_err());
        assert!(remote("10.2.0.10:5000", None).is_err());
    }
}
