//! Arguments of `team`.

use std::str::FromStr;

use anyplace_model::{Bytes, MilliCpu, Team};
use clap::{Args, Subcommand};

use super::OutputArg;

/// Weights and quotas of teams.
#[derive(Debug, Subcommand)]
pub(crate) enum TeamsCommand {
    /// List teams, or show one: what is set, what its jobs hold, how many wait
    #[command(alias = "get")]
    Ls {
        /// Only this one
        name: Option<Team>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Change what is given, and leave the rest
    Set(Box<TeamsSetArgs>),
    /// Go back to weight 1 without a quota
    Reset {
        /// The team
        name: Team,
    },
}

/// What to set for a team.
#[derive(Debug, Args)]
pub(crate) struct TeamsSetArgs {
    /// The team
    pub(crate) name: Team,
    #[command(flatten)]
    pub(crate) bounds: TeamBounds,
}

/// A team's weight and quota.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct TeamBounds {
    /// How much its jobs may hold before another team's turn, in proportion: 1 to 1000
    #[arg(long)]
    pub(crate) weight: Option<u32>,
    /// CPU that its jobs hold at once, such as `8` or `500m`, or `none`
    #[arg(long, value_name = "CPU")]
    pub(crate) max_cpu: Option<Bound<MilliCpu>>,
    /// Memory that its jobs hold at once, such as `64Gi`, or `none`
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_memory: Option<Bound<Bytes>>,
    /// GPUs that its jobs hold at once, or `none`
    #[arg(long, value_name = "COUNT")]
    pub(crate) max_gpus: Option<Bound<u32>>,
    /// Jobs that wait in the queue at once, or `none`
    #[arg(long, value_name = "COUNT")]
    pub(crate) max_queued: Option<Bound<u32>>,
}

/// A bound, or that there is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bound<T>(pub(crate) Option<T>);

impl<T: FromStr> FromStr for Bound<T> {
    type Err = T::Err;
    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|value| Self(Some(value))) }
    }
}
