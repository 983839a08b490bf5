//! Patterns of names: `*` is any run of characters but `/`, `**` any run at all, `?` one character but `/`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest pattern: as long as the longest name of a repository.
const LEN_MAX: usize = 255;

/// A pattern of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(String);

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Nothing would match it.
    #[error("the pattern is empty; `*` matches every tag, `**` every repository")]
    Empty,
    /// Nothing could match it.
    #[error("the pattern has {0} characters; names have at most {LEN_MAX}")]
    TooLong(usize),
}

impl Pattern {
    /// `**`, which every name matches.
    pub fn everything() -> Pattern {
        Pattern("**".to_owned())
    }

    /// Whether the whole name is of this pattern. Takes time in proportion to the product of their lengths.
    pub fn matches(&self, name: &str) -> bool {
        let name = name.as_bytes();
        // `reached[i]`: the pattern so far matches the first `i` bytes of the name.
        let mut reached = vec![false; name.len() + 1];
        reached[0] = true;
        let mut rest = self.0.as_bytes();
        while let Some((&first, after)) = rest.split_first() {
            let (many, any, after) = match (first, after.first()) {
                (b'*', Some(b'*')) => (true, true, &after[1..]),
                (b'*', _) => (true, false, after),
                _ => (false, false, after),
            };
            rest = after;
            let mut next = vec![false; name.len() + 1];
            if many {
                next[0] = reached[0];
                for (at, &byte) in name.iter().enumerate() {
                    next[at + 1] = reached[at + 1] || (next[at] && (any || byte != b'/'));
                }
            } else {
                for (at, &byte) in name.iter().enumerate() {
                    next[at + 1] = reached[at] && (byte == first || (first == b'?' && byte != b'/'));
                }
            }
            reached = next;
        }
        reached[name.len()]
    }
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Pattern, PatternError> {
        match text.len() {
            0 => Err(PatternError::Empty),
            1..=LEN_MAX => Ok(Pattern(text)),
            len => Err(PatternError::TooLong(len)),
        }
    }
}

impl std::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Pattern, PatternError> {
        text.to_owned().try_into()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.0
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stop_at_slashes_unless_there_are_two() {
        for (pattern, name, expected) in [
            ("*", "v1", true),
            ("*", "a/b", false),
            ("**", "a/b", true),
            ("team/*", "team/app", true),
            ("team/*", "team/app/x", false),
            ("team/**", "team/app/x", true),
            ("team/**", "team", false),
            ("pr-*", "pr-17", true),
            ("pr-*", "pr", false),
            ("*-rc?", "v1-rc1", true),
            ("*-rc?", "v1-rc", false),
            ("v?.*.*", "v1.22.3", true),
            ("**b**", "a/b/c", true),
            ("latest", "latest", true),
            ("latest", "latest2", false),
        ] {
            let matched = pattern.parse::<Pattern>().unwrap().matches(name);
            assert_eq!(matched, expected, "{pattern} {name}");
        }
        assert_eq!("".parse::<Pattern>(), Err(PatternError::Empty));
        let hostile: Pattern = "*a".repeat(127).parse().unwrap();
        assert!(!hostile.matches(&"a".repeat(126)));
    }
}
