//! Arguments of `registry account|team|audit`: who may do what in a registry, and who did what.

use std::path::PathBuf;

use anyplace_model::{Bytes, DurationMs};
use anyplace_registry::{Grant, Pattern, check_account_name};
use clap::{Args, Subcommand, ValueHint};
use jiff::Timestamp;

use super::OutputArg;

/// Accounts: people and machines that are no operators.
#[derive(Debug, Subcommand)]
pub(crate) enum AccountCommand {
    /// List accounts
    Ls {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Make an account, or give one other grants
    ///
    /// A new account's secret is shown only once. One that is set again keeps its secret, unless --new-secret asks for
    /// another. What isn't said here (team, end) the account doesn't have afterwards.
    Set(AccountSetArgs),
    /// Remove an account
    Rm {
        /// The account
        #[arg(value_parser = name)]
        name: String,
    },
}

/// What an account should be.
#[derive(Debug, Args)]
pub(crate) struct AccountSetArgs {
    /// The account, such as `ana` or `ams-1`
    #[arg(value_parser = name)]
    pub(crate) name: String,
    /// What it may do, `REPOSITORIES:ACTIONS`, such as `vision/**:pull,push`; can be repeated
    ///
    /// In repositories, `*` is any run of characters up to the next slash, `**` any run at all. Actions are pull,
    /// push, delete, and with `**` admin. A machine needs `**:pull`.
    #[arg(long = "grant", value_name = "GRANT", required = true)]
    pub(crate) grants: Vec<Grant>,
    /// Its team
    #[arg(long, value_parser = name)]
    pub(crate) team: Option<String>,
    /// How long it is good; for ever without
    #[arg(long, value_name = "DURATION")]
    pub(crate) ttl: Option<DurationMs>,
    /// Make another secret for an account that is there; the old one ends at once
    #[arg(long)]
    pub(crate) new_secret: bool,
    /// Write `NAME:SECRET` to this file (mode 0600) and not the secret to standard output
    ///
    /// It is what `--registry-credentials-file` and the settings of the same kind read.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// Teams: repositories with a quota, and accounts with a rate.
#[derive(Debug, Subcommand)]
pub(crate) enum TeamCommand {
    /// List teams, with what they use
    Ls {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Make a team, or change one
    ///
    /// What isn't said here the team doesn't have afterwards.
    Set(TeamSetArgs),
    /// Remove a team that has no accounts
    Rm {
        /// The team
        #[arg(value_parser = name)]
        name: String,
    },
}

/// What a team should be.
#[derive(Debug, Args)]
pub(crate) struct TeamSetArgs {
    /// The team
    #[arg(value_parser = name)]
    pub(crate) name: String,
    /// Its repositories, such as `vision/**`; pushes to them count against the quota; can be repeated
    #[arg(long = "repository", value_name = "PATTERN", value_parser = pattern)]
    pub(crate) repositories: Vec<Pattern>,
    /// Bytes that its repositories may hold, such as 100Gi
    #[arg(long, value_name = "SIZE", requires = "repositories")]
    pub(crate) quota: Option<Bytes>,
    /// Requests a second by its accounts
    #[arg(long, value_name = "REQUESTS_PER_S", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// Which events to show.
#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    /// From when: so long ago, such as 24h, or a moment, such as 2026-11-24T08:00:00Z
    #[arg(long, value_name = "DURATION|TIME", value_parser = since)]
    pub(crate) since: Option<Timestamp>,
    /// Only what was done in these repositories, such as `vision/**`
    #[arg(long, value_name = "PATTERN", value_parser = pattern)]
    pub(crate) repository: Option<Pattern>,
    /// How many events at most, the newest
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = tail)]
    pub(crate) tail: usize,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

fn name(text: &str) -> Result<String, String> {
    check_account_name(text).map(|()| text.to_owned())
}

fn pattern(text: &str) -> Result<Pattern, String> {
    Pattern::try_from(text.to_owned()).map_err(|error| error.to_string())
}

fn tail(text: &str) -> Result<usize, String> {
    let max = anyplace_registry::AUDIT_TAIL_MAX;
    let count = text.parse().ok().filter(|count| (1..=max).contains(count));
    count.ok_or_else(|| format!("expected 1 to {max}"))
}

fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(at) = text.parse() {
        return Ok(at);
    }
    let wrong = || {
        "expected a duration such as 30m, 24h or 7d, or a time with its zone such as 2026-11-24T08:00:00Z"
            .to_owned()
    };
    let DurationMs(ago) = text.parse().map_err(|_| wrong())?;
    let ago = std::time::Duration::from_millis(ago);
    Timestamp::now().checked_sub(ago).map_err(|_| wrong())
}
