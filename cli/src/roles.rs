//! The roles: each a process that runs until SIGTERM or SIGINT.

use std::{future::Future, path::Path, time::Duration};

use anyhow::Context as _;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::args::{ConfigArg, RoleCommand};

/// How long blocking work may go on after a role has ended in order.
const LAST_WORK: Duration = Duration::from_secs(2);

/// Runs a role to its end.
pub(crate) fn run(role: RoleCommand) -> anyhow::Result<()> {
    match role {
        RoleCommand::GlobalScheduler(args) => serve(&args, anyplace_global_scheduler::run),
        RoleCommand::LocationScheduler(args) => serve(&args, anyplace_location_scheduler::run),
        RoleCommand::Registry(args) => {
            // Without a command, which `main` has taken out, it is required.
            let config = args.config.context("--config: expected the registry's configuration")?;
            serve(&ConfigArg { config }, anyplace_registry::run)
        }
        RoleCommand::MachineAgent(args) => serve(&args, anyplace_machine_agent::run),
        RoleCommand::StateRouter(args) => serve(&args, anyplace_state_router::run),
    }
}

/// Holds one container. No runtime and no other thread: it forks.
pub(crate) fn shim(state: &Path) -> anyhow::Result<()> {
    anyplace_machine_agent::shim::run(state)
}

fn serve<C, R>(args: &ConfigArg, role: impl FnOnce(C, CancellationToken) -> R) -> anyhow::Result<()>
where
    C: DeserializeOwned,
    R: Future<Output = anyhow::Result<()>>,
{
    anyplace_service::init_logging();
    anyplace_service::install_crypto_provider();
    let config = anyplace_service::load_config(&args.config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let shutdown = anyplace_service::shutdown_signal()?;
        role(config, shutdown).await
    });
    // Blocking work that a role left behind must not keep the process.
    runtime.shutdown_timeout(LAST_WORK);
    result
}
