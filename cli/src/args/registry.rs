//! Arguments of `registry ...`: the role, and what operators ask one.

use std::path::PathBuf;

use anyplace_images::Reference;
use anyplace_model::DurationMs;
use clap::{Args, Subcommand, ValueHint};

use super::{AccountCommand, AuditArgs, OutputArg, TeamCommand};

/// The role, or a question to a registry that runs.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct RegistryArgs {
    /// Configuration (TOML)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, required = true)]
    pub(crate) config: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Option<RegistryCommand>,
}

/// What operators ask a registry.
#[derive(Debug, Subcommand)]
pub(crate) enum RegistryCommand {
    /// Collect what nothing needs, and let go what the rules don't keep
    Gc {
        /// Only say what would go
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        run: RunArgs,
    },
    /// Re-hash everything that is stored, and move aside what is damaged
    ///
    /// Goes on by itself when this command is stopped, and where it was when the registry is.
    Scrub {
        #[command(flatten)]
        run: RunArgs,
    },
    /// Show how much is stored, by repository
    Du {
        /// Only this one
        repository: Option<String>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List repositories
    Ls {
        #[command(flatten)]
        output: OutputArg,
    },
    /// List the tags of a repository
    Tags {
        /// The repository
        repository: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Bring back a deleted tag or manifest
    Undelete {
        /// `REPOSITORY:TAG` or `REPOSITORY@DIGEST`; the tag `latest` without either
        reference: Reference,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List the deletions that can be undone
    Trash {
        /// Only of this repository
        repository: Option<String>,
        /// Forget them: none can be undone any more, and the next collection takes what only they kept
        #[arg(long)]
        empty: bool,
        /// With --empty: really
        #[arg(long, requires = "empty")]
        yes: bool,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List uploads that were begun and not finished
    Uploads {
        /// Only into this repository
        repository: Option<String>,
        /// Drop those that nobody went on with lately: whoever sends them begins again
        #[arg(long)]
        drop: bool,
        /// With --drop: how long nobody may have gone on with them
        #[arg(long, value_name = "DURATION", default_value = "1h", requires = "drop")]
        idle: DurationMs,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Accounts of people and machines: what they may do
    #[command(subcommand)]
    Account(AccountCommand),
    /// Teams: their repositories, quotas and rates
    #[command(subcommand)]
    Team(TeamCommand),
    /// Show who pushed, deleted and set what
    Audit(AuditArgs),
}

/// Beginning something long, and following it.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct RunArgs {
    /// Begin nothing; show what runs, and what the last one did
    #[arg(long)]
    pub(crate) status: bool,
    /// Begin it, and don't wait for its end
    #[arg(long, conflicts_with = "status")]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}
