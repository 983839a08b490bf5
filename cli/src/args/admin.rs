//! What operators of the control plane do.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

use super::OutputArg;

/// `anyplace admin`.
#[derive(Debug, Subcommand)]
pub(crate) enum AdminCommand {
    /// Write everything that a scheduler has stored to a file: a backup, or to move it to another store
    ///
    /// Without `--config`, the global scheduler that runs is asked. With it, the store itself is read: of a scheduler that
    /// doesn't run, or over etcd. The file has what is secret in specs.
    Export(ExportArgs),
    /// Fill an empty store with what was exported
    ///
    /// The scheduler must not run. If it breaks off, repeat it: until then no scheduler takes the store.
    Import(ImportArgs),
}

/// Whose store it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StoreOf {
    /// Of the global scheduler
    GlobalScheduler,
    /// Of a location scheduler
    LocationScheduler,
}

/// `anyplace admin export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The file, made readable for its owner only
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) out: PathBuf,
    /// Configuration of the scheduler whose store is read
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
    /// Whose configuration it is
    #[arg(long, value_name = "ROLE", default_value = "global-scheduler", requires = "config")]
    pub(crate) role: StoreOf,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// `anyplace admin import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// What was exported
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Configuration of the scheduler whose store is filled
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: PathBuf,
    /// Whose configuration it is
    #[arg(long, value_name = "ROLE", default_value = "global-scheduler")]
    pub(crate) role: StoreOf,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}
