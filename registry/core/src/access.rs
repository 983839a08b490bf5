//! Who may do what: grants by repository pattern and action, the scopes that tokens are asked for, and rate limits.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::pattern::Pattern;

/// What can be done with a repository, or with the registry itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Read manifests, blobs and tags.
    Pull,
    /// Write them.
    Push,
    /// Remove them.
    Delete,
    /// Operate the registry: accounts, collection, scrubbing.
    Admin,
}

impl Action {
    /// The word that scopes and grants use.
    pub fn word(self) -> &'static str {
        match self {
            Action::Pull => "pull",
            Action::Push => "push",
            Action::Delete => "delete",
            Action::Admin => "admin",
        }
    }

    fn parse(word: &str) -> Option<Action> {
        [Action::Pull, Action::Push, Action::Delete, Action::Admin].into_iter().find(|it| it.word() == word)
    }
}

/// Text that isn't a grant or a scope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("found {what} `{found}`, expected {expected}")]
pub struct Invalid {
    what: &'static str,
    found: String,
    expected: &'static str,
}

/// What an account may do with some repositories; written `vision/**:pull,push`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    repositories: Pattern,
    actions: BTreeSet<Action>,
}

impl Grant {
    fn allows(&self, repository: &str, action: Action) -> bool {
        self.actions.contains(&action) && self.repositories.matches(repository)
    }
}

/// Whether any of the grants allows it.
pub fn allowed(grants: &[Grant], repository: &str, action: Action) -> bool {
    grants.iter().any(|grant| grant.allows(repository, action))
}

/// Whether any of the grants lets operate the registry: `admin` on all repositories.
pub fn may_operate(grants: &[Grant]) -> bool {
    grants
        .iter()
        .any(|grant| grant.repositories.to_string() == "**" && grant.actions.contains(&Action::Admin))
}

impl FromStr for Grant {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let expected =
            "REPOSITORIES:ACTIONS, such as `vision/**:pull,push`; actions are pull, push, delete, admin";
        let invalid = || Invalid { what: "grant", found: text.to_owned(), expected };
        let (repositories, actions) = text.rsplit_once(':').ok_or_else(invalid)?;
        let actions = actions.split(',').map(Action::parse).collect::<Option<_>>().ok_or_else(invalid)?;
        let repositories = Pattern::try_from(repositories.to_owned()).map_err(|_| invalid())?;
        Ok(Grant { repositories, actions })
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.repositories, words(&self.actions))
    }
}

fn words(actions: &BTreeSet<Action>) -> String {
    actions.iter().map(|action| action.word()).collect::<Vec<_>>().join(",")
}

/// What a token is asked for, or allows: one repository and some actions; written `repository:vision/app:pull,push`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// The repository.
    pub repository: String,
    /// The actions.
    pub actions: BTreeSet<Action>,
}

impl Scope {
    /// What of it the grants allow.
    pub fn within(&self, grants: &[Grant]) -> Scope {
        let allowed = |action: &&Action| allowed(grants, &self.repository, **action);
        Scope {
            repository: self.repository.clone(),
            actions: self.actions.iter().filter(allowed).copied().collect(),
        }
    }
}

impl FromStr for Scope {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let expected = "repository:NAME:ACTIONS, such as `repository:vision/app:pull,push`";
        let invalid = || Invalid { what: "scope", found: text.to_owned(), expected };
        let (kind, rest) = text.split_once(':').ok_or_else(invalid)?;
        let (name, actions) = rest.rsplit_once(':').ok_or_else(invalid)?;
        // Some clients write the kind with a class, `repository(plugin)`.
        if kind.split('(').next() != Some("repository") || name.is_empty() {
            return Err(invalid());
        }
        let mut known = BTreeSet::new();
        for word in actions.split(',').filter(|word| !word.is_empty()) {
            match word {
                "*" => known.extend([Action::Pull, Action::Push, Action::Delete]),
                // Words that this registry doesn't know allow nothing.
                word => known.extend(Action::parse(word)),
            }
        }
        Ok(Scope { repository: name.to_owned(), actions: known })
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "repository:{}:{}", self.repository, words(&self.actions))
    }
}

impl Serialize for Grant {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Grant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Requests that may come: so many a second on average, and as many as come in one second at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    per_s: u32,
    /// Thousandths of requests that may come now.
    level_milli: u64,
    /// When the level was right, in milliseconds.
    at_ms: u64,
}

impl Bucket {
    /// A full bucket. `per_s` of 0 lets nothing through.
    pub fn new(per_s: u32, now_ms: u64) -> Bucket {
        Bucket { per_s, level_milli: u64::from(per_s) * 1_000, at_ms: now_ms }
    }

    /// Takes a request; otherwise says after how many milliseconds to try again.
    pub fn take(&mut self, now_ms: u64) -> Result<(), u64> {
        let passed = now_ms.saturating_sub(self.at_ms);
        let full = u64::from(self.per_s) * 1_000;
        self.level_milli =
            full.min(self.level_milli.saturating_add(passed.saturating_mul(self.per_s.into())));
        self.at_ms = self.at_ms.max(now_ms);
        match self.level_milli.checked_sub(1_000) {
            Some(left) => {
                self.level_milli = left;
                Ok(())
            }
            None if self.per_s == 0 => Err(60_000),
            None => Err((1_000 - self.level_milli).div_ceil(self.per_s.into()).max(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_and_scopes_are_read_and_meet() {
        let grants: Vec<Grant> =
            ["vision/**:pull,push", "base/*:pull"].iter().map(|text| text.parse().unwrap()).collect();
        assert!(allowed(&grants, "vision/app", Action::Push));
        assert!(!allowed(&grants, "vision/app", Action::Delete));
        assert!(!allowed(&grants, "base/os", Action::Push));
        assert!(!may_operate(&grants));
        assert!(may_operate(&["**:admin".parse().unwrap()]));
        let scope: Scope = "repository:vision/app:pull,push,delete,fly".parse().unwrap();
        assert_eq!(scope.within(&grants).to_string(), "repository:vision/app:pull,push");
        assert_eq!(
            "repository(plugin):a:*".parse::<Scope>().unwrap().to_string(),
            "repository:a:pull,push,delete"
        );
        for text in ["", "repository:a", "registry:catalog:*", "repository::pull"] {
            assert!(text.parse::<Scope>().is_err(), "{text}");
        }
        for text in ["a", "a:", "a:fly", ":pull"] {
            assert!(text.parse::<Grant>().is_err(), "{text}");
        }
        assert_eq!("a/*:push,pull".parse::<Grant>().unwrap().to_string(), "a/*:pull,push");
    }

    #[test]
    fn a_bucket_lets_its_rate_through_and_says_when_to_come_again() {
        let mut bucket = Bucket::new(10, 0);
        let taken = (0..20).filter(|_| bucket.take(0).is_ok()).count();
        assert_eq!(taken, 10);
        assert_eq!(bucket.take(0), Err(100));
        assert_eq!(bucket.take(99), Err(1));
        assert_eq!(bucket.take(100), Ok(()));
        // Ten seconds are not kept: one second's requests at most.
        assert_eq!((0..20).filter(|_| bucket.take(10_100).is_ok()).count(), 10);
        // A clock that goes back gives nothing.
        assert!(bucket.take(5_000).is_err());
        assert_eq!(Bucket::new(0, 0).take(0), Err(60_000));
    }
}
