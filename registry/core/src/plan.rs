//! What a collection takes away, as a value: links of repositories that no manifest needs, then content that has
//! no link.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Most entries that a list names one by one; the totals count all.
pub const NAMED_MAX: usize = 1_000;

/// A list that counts everything and names the first of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed<T> {
    /// How many there are.
    pub count: u64,
    /// The first [`NAMED_MAX`].
    pub named: Vec<T>,
}

impl<T> Listed<T> {
    /// Adds one.
    pub fn push(&mut self, entry: T) {
        self.count += 1;
        if self.named.len() < NAMED_MAX {
            self.named.push(entry);
        }
    }
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Listed { count: 0, named: Vec::new() }
    }
}

/// Something that goes, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Going {
    /// Where, unless it is content of no repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    /// A tag or a digest.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// What a collection takes away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Tags that retention lets go, into the trash.
    pub tags: Listed<Going>,
    /// Manifests that retention lets go, into the trash.
    pub manifests: Listed<Going>,
    /// Links of a repository to content.
    pub links: Listed<Going>,
    /// Content.
    pub content: Listed<Going>,
    /// Bytes of that content.
    pub bytes: u64,
}

/// What a link is, as a collector sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkFacts {
    /// Milliseconds since it was put or renewed; none: it was put after the collection began.
    pub age_ms: Option<u64>,
    /// A manifest of its repository, one that is being put, or one in the trash needs it.
    pub needed: bool,
    /// A manifest of its repository can't be read, so nobody knows what is needed there.
    pub unclear: bool,
}

/// What becomes of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkFate {
    /// It goes.
    Goes,
    /// It stays: it is needed.
    Needed,
    /// It stays: an upload comes before the manifest that names it.
    Young,
    /// It stays: nobody knows whether it is needed.
    Unclear,
}

/// Decides about a link. Asked twice: to find candidates, and again behind the marker, when writers see that something
/// is going on; only the second answer counts.
pub fn judge_link(facts: LinkFacts, grace_ms: u64) -> LinkFate {
    match facts {
        LinkFacts { needed: true, .. } => LinkFate::Needed,
        LinkFacts { unclear: true, .. } => LinkFate::Unclear,
        LinkFacts { age_ms: Some(age_ms), .. } if age_ms >= grace_ms => LinkFate::Goes,
        LinkFacts { .. } => LinkFate::Young,
    }
}

impl fmt::Display for LinkFate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LinkFate::Goes => "no manifest of the repository needs it",
            LinkFate::Needed => "a manifest needs it",
            LinkFate::Young => "younger than the grace",
            LinkFate::Unclear => "a manifest of the repository can't be read",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_links_that_nobody_needs_go() {
        let facts = |age_ms, needed, unclear| LinkFacts { age_ms, needed, unclear };
        for (facts, expected) in [
            (facts(Some(10), false, false), LinkFate::Goes),
            (facts(Some(9), false, false), LinkFate::Young),
            (facts(None, false, false), LinkFate::Young),
            (facts(Some(10), true, false), LinkFate::Needed),
            (facts(Some(10), false, true), LinkFate::Unclear),
        ] {
            assert_eq!(judge_link(facts, 10), expected, "{facts:?}");
        }
        assert_eq!(judge_link(facts(None, false, false), 0), LinkFate::Young);
    }

    #[test]
    fn lists_count_what_they_do_not_name() {
        let mut list = Listed::default();
        (0..NAMED_MAX + 5).for_each(|i| list.push(i));
        assert_eq!((list.count, list.named.len()), (NAMED_MAX as u64 + 5, NAMED_MAX));
    }
}
