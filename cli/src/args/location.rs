//! Arguments of `location`.

use anyplace_model::{LocationId, MachineId, OffPeakWindow};
use clap::{Args, Subcommand};

use super::OutputArg;

/// Operating a location.
#[derive(Debug, Subcommand)]
pub(crate) enum LocationCommand {
    /// Announce no virtual IP there, so that traffic goes elsewhere
    Withdraw {
        /// The location
        name: LocationId,
    },
    /// Announce virtual IPs there again
    Announce {
        /// The location
        name: LocationId,
    },
    /// Place nothing new there, and let instances of deployments leave once others are ready elsewhere
    Drain {
        /// The location
        name: LocationId,
        /// Only this machine of it
        #[arg(long)]
        machine: Option<MachineId>,
    },
    /// Place nothing new on a machine; what it has stays
    Cordon {
        /// The location
        name: LocationId,
        /// The machine
        #[arg(long)]
        machine: MachineId,
    },
    /// Place there again
    Undrain {
        /// The location
        name: LocationId,
        /// Only this machine of it, drained or cordoned
        #[arg(long)]
        machine: Option<MachineId>,
    },
    /// Show how far locations are from each other: round trips as routers measured them, or estimated by distance
    Latency {
        /// Only from this location
        from: Option<LocationId>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Change settings
    Set(LocationSetArgs),
}

/// Settings of a location.
#[derive(Debug, Args)]
pub(crate) struct LocationSetArgs {
    /// The location
    pub(crate) name: LocationId,
    #[command(flatten)]
    pub(crate) off_peak: OffPeakArg,
}

/// What to do about the off-peak window.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct OffPeakArg {
    /// Replace the off-peak window of the location's own configuration, such as `22:00-06:00`
    #[arg(long = "off-peak", value_name = "WINDOW")]
    pub(crate) window: Option<OffPeakWindow>,
    /// Go back to the window of the location's own configuration
    #[arg(long)]
    pub(crate) no_off_peak: bool,
}
