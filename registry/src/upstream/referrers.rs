//! The manifests that are about another one, as the upstreams list them.
//!
//! All upstreams are asked, since one that doesn't know the repository has an empty list as well. What they said last
//! stands in while one of them can't be asked.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyplace_images::Digest;
use serde_json::Value;

use super::remote::Kind;
use super::{Cache, Failure, Inner, ONLY_ANSWER_TIMEOUT};

/// Descriptors by digest.
type Referrers = BTreeMap<Digest, Value>;

/// What came of asking.
#[derive(Clone)]
pub(crate) struct Asked {
    pub(crate) referrers: Arc<Referrers>,
    /// Why there may be more than those.
    pub(crate) failure: Option<Failure>,
}

impl Cache {
    /// The manifests upstream whose subject this is.
    pub(crate) async fn referrers(&self, repository: &str, subject: &Digest) -> Result<Asked, Failure> {
        let asking = ask(self.inner.clone(), repository.to_owned(), subject.clone());
        self.inner.referrer_flights.join(format!("{repository} {subject}"), asking).await
    }
}

async fn ask(inner: Arc<Inner>, repository: String, subject: Digest) -> Result<Asked, Failure> {
    let (mut referrers, mut failure) = (Referrers::new(), None);
    for remote in &inner.remotes {
        let one = std::slice::from_ref(remote);
        let asked = inner.ask_any(Kind::List, one, &repository, |remote, reference| {
            let subject = subject.clone();
            async move {
                let question = remote.client.list_referrers(&reference, &subject);
                remote.ask(Kind::List, ONLY_ANSWER_TIMEOUT, question).await
            }
        });
        match asked.await {
            Ok(listed) => referrers.extend(by_digest(listed)),
            Err(Failure::Absent) => {}
            Err(worse) => failure = failure.max(Some(worse)),
        }
    }
    let key = format!("repositories/{repository}/_referrers/{}/{}", subject.algorithm(), subject.hex());
    let keeping = tokio::task::spawn_blocking(move || {
        let before = inner.pieces.records.get(&key);
        let before = before.and_then(|content| serde_json::from_slice::<Vec<Value>>(&content).ok());
        let before = by_digest(before.unwrap_or_default());
        if failure.is_some() {
            for (digest, descriptor) in before {
                referrers.entry(digest).or_insert(descriptor);
            }
        } else if referrers.is_empty() {
            inner.pieces.records.remove(&key);
        } else if referrers != before
            && let Ok(content) = serde_json::to_vec(&referrers.values().collect::<Vec<_>>())
        {
            inner.pieces.put_record(&key, &content);
        }
        Asked { referrers: Arc::new(referrers), failure }
    });
    keeping.await.map_err(|e| Failure::here("keeping a list of referrers", e))
}

/// Those that have a digest.
fn by_digest(descriptors: Vec<Value>) -> Referrers {
    let digest = |descriptor: &Value| descriptor["digest"].as_str()?.parse().ok();
    descriptors.into_iter().filter_map(|descriptor| Some((digest(&descriptor)?, descriptor))).collect()
}
