//! `[gc]` and `[retention]` of the registry's settings.
//!
//! ```toml
//! [gc]
//! every = "24h"            # "0s": only when asked for
//! grace = "24h"            # what was pushed within it stays
//! undelete_window = "7d"   # deletions can be undone for so long; "0s": never
//!
//! [retention]
//! in_use_url = "http://10.0.0.10:7600/v1/images/in-use"
//! in_use_token_file = "/etc/anyplace/registry.token"
//!
//! [[retention.rules]]      # the first rule that matches decides
//! repositories = ["team/*"]
//! tags = ["pr-*"]
//! keep_last = 10
//! keep_younger_than = "30d"
//!
//! [[retention.rules]]
//! untagged = true
//! keep_younger_than = "14d"
//! ```

use std::path::PathBuf;

use anyplace_model::DurationMs;
use anyplace_registry_core::pattern::Pattern;
use anyplace_registry_core::retention::{Of, Rule};
use serde::Deserialize;

/// The shortest grace: longer than a request may take, and than the time from a client's question whether a blob is
/// there to its manifest.
const GRACE_MIN: DurationMs = DurationMs(10 * 60_000);

/// Collection of what nothing needs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GcConfig {
    /// How often it runs by itself; 0 for never.
    pub every: DurationMs,
    /// What was pushed, mounted or asked for within it stays, needed or not.
    pub grace: DurationMs,
    /// How long deletions of tags and manifests can be undone.
    pub undelete_window: DurationMs,
}

impl Default for GcConfig {
    fn default() -> Self {
        let day = 24 * 3_600_000;
        GcConfig { every: DurationMs(day), grace: DurationMs(day), undelete_window: DurationMs(7 * day) }
    }
}

impl GcConfig {
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.grace >= GRACE_MIN,
            "gc.grace is {}, expected at least {GRACE_MIN}: uploads come before the manifest that names them",
            self.grace
        );
        Ok(())
    }
}

/// What is let go although it could be pulled.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Rules; the first that matches decides.
    pub rules: Vec<RuleConfig>,
    /// Where the images in use are listed: a URL that answers a JSON list of references.
    pub in_use_url: Option<String>,
    /// A file with a bearer token for it.
    pub in_use_token_file: Option<PathBuf>,
    /// Or a file with such a list.
    pub in_use_file: Option<PathBuf>,
}

/// One rule; without `keep_last` and `keep_younger_than` it keeps everything that it matches.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// Patterns of repositories.
    #[serde(default = "every_repository")]
    pub repositories: Vec<Pattern>,
    /// Patterns of tags; all without.
    #[serde(default)]
    pub tags: Option<Vec<Pattern>>,
    /// About manifests that no tag leads to, and not about tags.
    #[serde(default)]
    pub untagged: bool,
    /// Keeps so many, the newest.
    #[serde(default)]
    pub keep_last: Option<u32>,
    /// Keeps those that are younger.
    #[serde(default)]
    pub keep_younger_than: Option<DurationMs>,
}

impl RetentionConfig {
    pub(crate) fn rules(&self) -> anyhow::Result<Vec<Rule>> {
        anyhow::ensure!(
            self.in_use_url.is_none() || self.in_use_file.is_none(),
            "retention.in_use_url and retention.in_use_file: expected at most one of them"
        );
        (1..).zip(&self.rules).map(|(number, rule)| rule.read(number)).collect()
    }
}

impl RuleConfig {
    fn read(&self, number: usize) -> anyhow::Result<Rule> {
        let of = match (&self.tags, self.untagged) {
            (Some(_), true) => anyhow::bail!(
                "retention rule {number} has both `tags` and `untagged`; expected one of them, write two rules"
            ),
            (Some(tags), false) => Of::Tags(tags.clone()),
            (None, false) => Of::Tags(vec![every_tag()]),
            (None, true) => Of::Untagged,
        };
        let keep_younger_ms = self.keep_younger_than.map(|duration| duration.0);
        Ok(Rule { repositories: self.repositories.clone(), of, keep_last: self.keep_last, keep_younger_ms })
    }
}

fn every_repository() -> Vec<Pattern> {
    vec![Pattern::everything()]
}

fn every_tag() -> Pattern {
    Pattern::everything()
}
