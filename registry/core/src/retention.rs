//! Retention: which tags and manifests of a repository rules let go, each with its reason.
//!
//! The first rule whose repositories and tags match decides about a tag; where none does, it stays. A rule keeps what
//! any of its limits keeps (the newest n, or younger than); one without limits keeps everything. Whatever the rules
//! say, this stays: what is in use, what was pushed within the grace, and what the trash can still bring back.
//!
//! A tag that goes takes its manifest along, and what only that one kept alive ([`crate::reach`]): the platforms of
//! an index, signatures. A manifest that never had a tag, or lost it to another push, goes only by a rule for
//! untagged ones: who pulled it by digest may still run it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::pattern::Pattern;
use crate::reach::{Graph, Node};

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Repositories that it is for.
    pub repositories: Vec<Pattern>,
    /// What of them.
    pub of: Of,
    /// Keeps so many of those that match, the newest.
    pub keep_last: Option<u32>,
    /// Keeps those that were pushed less than so many milliseconds ago.
    pub keep_younger_ms: Option<u64>,
}

/// What a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Of {
    /// Tags.
    Tags(Vec<Pattern>),
    /// Manifests that no tag leads to, also not through others.
    Untagged,
}

/// A repository as rules see it.
#[derive(Clone, Debug)]
pub struct Repository<D> {
    /// Its name.
    pub name: String,
    /// Its tags.
    pub tags: Vec<Tag<D>>,
    /// Its manifests.
    pub manifests: Vec<Manifest<D>>,
}

/// A tag.
#[derive(Clone, Debug)]
pub struct Tag<D> {
    /// Its name.
    pub name: String,
    /// What it leads to.
    pub digest: D,
    /// Milliseconds since it was last pushed.
    pub age_ms: u64,
}

/// A manifest.
#[derive(Clone, Debug)]
pub struct Manifest<D> {
    /// What it leads to.
    pub node: Node<D>,
    /// Milliseconds since it was last pushed.
    pub age_ms: u64,
    /// Stays whatever the rules say: an upstream's tag leads to it, or the trash has a tag that does.
    pub pinned: bool,
}

/// What runs somewhere.
#[derive(Clone, Debug)]
pub struct InUse<D> {
    /// Repository and tag.
    pub tags: BTreeSet<(String, String)>,
    /// Manifests, in whatever repository.
    pub digests: BTreeSet<D>,
}

impl<D> Default for InUse<D> {
    fn default() -> Self {
        InUse { tags: BTreeSet::new(), digests: BTreeSet::new() }
    }
}

/// Why something stays or goes. Rules are counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Stays: no rule is about it.
    NoRule,
    /// Stays: the rule keeps all that it matches.
    Unlimited {
        /// Which.
        rule: usize,
    },
    /// Stays: one of the newest.
    Newest {
        /// By which rule.
        rule: usize,
        /// Its place, from 1.
        place: usize,
    },
    /// Stays: young enough.
    Young {
        /// By which rule.
        rule: usize,
    },
    /// Stays: something that runs was made of it.
    InUse,
    /// Stays: pushed within the grace.
    Grace,
    /// Stays: an upstream's tag or the trash leads to it.
    Pinned,
    /// Stays: this tag leads to it.
    Tag(String),
    /// Stays or goes with this manifest, which leads to it.
    With(String),
    /// Goes: older and later than the rule keeps.
    Past {
        /// Which.
        rule: usize,
        /// Its place, from 1.
        place: usize,
    },
    /// Goes: this tag, the last one, goes.
    TagGoes(String),
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it stays.
    pub keep: bool,
    /// Why.
    pub reason: Reason,
}

/// What becomes of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision<D> {
    /// By tag.
    pub tags: BTreeMap<String, Verdict>,
    /// By manifest.
    pub manifests: BTreeMap<D, Verdict>,
}

/// Decides about a repository.
pub fn decide<D: Ord + Clone + fmt::Display>(
    rules: &[Rule],
    repository: &Repository<D>,
    in_use: &InUse<D>,
    grace_ms: u64,
) -> Decision<D> {
    let rules: Vec<(usize, &Rule)> = (1..)
        .zip(rules)
        .filter(|(_, rule)| rule.repositories.iter().any(|pattern| pattern.matches(&repository.name)))
        .collect();
    let tags = decide_tags(&rules, repository, in_use, grace_ms);
    let manifests = decide_manifests(&rules, repository, in_use, grace_ms, &tags);
    Decision { tags, manifests }
}

fn decide_tags<D: Ord>(
    rules: &[(usize, &Rule)],
    repository: &Repository<D>,
    in_use: &InUse<D>,
    grace_ms: u64,
) -> BTreeMap<String, Verdict> {
    let rule_of = |tag: &Tag<D>| {
        rules.iter().copied().find(|(_, rule)| match &rule.of {
            Of::Tags(patterns) => patterns.iter().any(|pattern| pattern.matches(&tag.name)),
            Of::Untagged => false,
        })
    };
    let mut sorted: Vec<&Tag<D>> = repository.tags.iter().collect();
    sorted.sort_by_key(|tag| (tag.age_ms, Reverse(&tag.name)));
    let mut places: BTreeMap<usize, usize> = BTreeMap::new();
    let decided = sorted.into_iter().map(|tag| {
        let Some((number, rule)) = rule_of(tag) else { return (tag.name.clone(), keep(Reason::NoRule)) };
        let place = places.entry(number).or_default();
        *place += 1;
        let in_use = in_use.digests.contains(&tag.digest)
            || in_use.tags.contains(&(repository.name.clone(), tag.name.clone()));
        let verdict = judge(number, rule, *place, tag.age_ms, in_use, grace_ms);
        (tag.name.clone(), verdict)
    });
    decided.collect()
}

fn decide_manifests<D: Ord + Clone + fmt::Display>(
    rules: &[(usize, &Rule)],
    repository: &Repository<D>,
    in_use: &InUse<D>,
    grace_ms: u64,
    tags: &BTreeMap<String, Verdict>,
) -> BTreeMap<D, Verdict> {
    let graph = Graph::new(repository.manifests.iter().map(|manifest| &manifest.node));
    let mut reasons: BTreeMap<&D, Reason> = BTreeMap::new();
    let mut alive: BTreeSet<&D> = BTreeSet::new();
    let mut roots: Vec<(&D, Reason)> = Vec::new();
    let mut going: Vec<(&D, Reason)> = Vec::new();
    for tag in &repository.tags {
        match tags.get(&tag.name) {
            Some(Verdict { keep: false, .. }) => going.push((&tag.digest, Reason::TagGoes(tag.name.clone()))),
            _ => roots.push((&tag.digest, Reason::Tag(tag.name.clone()))),
        }
    }
    for manifest in &repository.manifests {
        let digest = &manifest.node.digest;
        if in_use.digests.contains(digest) {
            roots.push((digest, Reason::InUse));
        } else if manifest.pinned {
            roots.push((digest, Reason::Pinned));
        } else if manifest.age_ms < grace_ms {
            roots.push((digest, Reason::Grace));
        }
    }
    let with = |from: &D| Reason::With(from.to_string());
    let mut keep_these = |alive: &mut BTreeSet<_>, roots: Vec<(_, Reason)>| {
        for (root, reason) in roots {
            reasons.entry(root).or_insert(reason);
            graph.close(alive, [root], |from, to| {
                reasons.entry(to).or_insert_with(|| with(from));
            });
        }
    };
    keep_these(&mut alive, roots);

    // What only the tags that go lead to.
    let mut gone: BTreeMap<&D, Reason> = BTreeMap::new();
    let mut lost: BTreeSet<&D> = alive.clone();
    for (root, reason) in going {
        if graph.knows(root) && !alive.contains(root) {
            gone.entry(root).or_insert(reason);
        }
        graph.close(&mut lost, [root], |from, to| {
            gone.entry(to).or_insert_with(|| with(from));
        });
    }

    // The rest never had a tag. Those that nothing leads to are decided about; in a circle, any of it.
    let by_age = {
        let mut sorted: Vec<&Manifest<D>> = repository.manifests.iter().collect();
        sorted.sort_by(|a, b| (a.age_ms, &a.node.digest).cmp(&(b.age_ms, &b.node.digest)));
        sorted
    };
    let rule = rules.iter().copied().find(|(_, rule)| rule.of == Of::Untagged);
    let undecided = |lost: &BTreeSet<&D>| {
        by_age.iter().map(|m| &m.node.digest).filter(|digest| !lost.contains(digest)).collect::<BTreeSet<_>>()
    };
    let mut place = 0;
    loop {
        let rest = undecided(&lost);
        if rest.is_empty() {
            break;
        }
        let mut tops = graph.tops(&rest);
        if tops.is_empty() {
            tops.extend(by_age.iter().map(|m| &m.node.digest).find(|digest| rest.contains(digest)));
        }
        for manifest in by_age.iter().filter(|manifest| tops.contains(&manifest.node.digest)) {
            place += 1;
            let digest = &manifest.node.digest;
            let verdict = match rule {
                Some((number, rule)) => judge(number, rule, place, manifest.age_ms, false, grace_ms),
                None => keep(Reason::NoRule),
            };
            if verdict.keep {
                keep_these(&mut alive, vec![(digest, verdict.reason)]);
            } else {
                gone.entry(digest).or_insert(verdict.reason);
            }
            graph.close(&mut lost, [digest], |from, to| {
                gone.entry(to).or_insert_with(|| with(from));
            });
        }
    }
    let verdict = |digest: &D| match (alive.contains(digest), reasons.get(digest), gone.get(digest)) {
        (true, Some(reason), _) => keep(reason.clone()),
        (false, _, Some(reason)) => Verdict { keep: false, reason: reason.clone() },
        _ => keep(Reason::NoRule),
    };
    let digests = repository.manifests.iter().map(|manifest| &manifest.node.digest);
    digests.map(|digest| (digest.clone(), verdict(digest))).collect()
}

fn judge(number: usize, rule: &Rule, place: usize, age_ms: u64, in_use: bool, grace_ms: u64) -> Verdict {
    if in_use {
        return keep(Reason::InUse);
    }
    if rule.keep_last.is_none() && rule.keep_younger_ms.is_none() {
        return keep(Reason::Unlimited { rule: number });
    }
    if rule.keep_last.is_some_and(|most| place <= most as usize) {
        return keep(Reason::Newest { rule: number, place });
    }
    if rule.keep_younger_ms.is_some_and(|limit| age_ms < limit) {
        return keep(Reason::Young { rule: number });
    }
    if age_ms < grace_ms {
        return keep(Reason::Grace);
    }
    Verdict { keep: false, reason: Reason::Past { rule: number, place } }
}

fn keep(reason: Reason) -> Verdict {
    Verdict { keep: true, reason }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NoRule => f.write_str("no rule is about it"),
            Reason::Unlimited { rule } => write!(f, "rule {rule} keeps all"),
            Reason::Newest { rule, place } => {
                write!(f, "rule {rule} keeps the newest, this is number {place}")
            }
            Reason::Young { rule } => write!(f, "rule {rule} keeps what is as young"),
            Reason::InUse => f.write_str("in use"),
            Reason::Grace => f.write_str("pushed within the grace"),
            Reason::Pinned => f.write_str("an upstream's tag or the trash leads to it"),
            Reason::Tag(tag) => write!(f, "the tag {tag} leads to it"),
            Reason::With(digest) => write!(f, "with {digest}"),
            Reason::Past { rule, place } => {
                write!(f, "rule {rule} keeps neither its age nor number {place}")
            }
            Reason::TagGoes(tag) => write!(f, "its last tag, {tag}, goes"),
        }
    }
}

#[cfg(test)]
mod tests;
