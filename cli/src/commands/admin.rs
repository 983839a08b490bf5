//! `admin export` and `admin import`: the schedulers' stores as files.

use std::path::Path;

use anyhow::Context as _;

use crate::{
    args::{AdminCommand, ExportArgs, ImportArgs, StoreOf},
    context::Session,
    output,
};

pub(super) async fn run(session: &Session, command: AdminCommand) -> anyhow::Result<()> {
    match command {
        AdminCommand::Export(args) => export(session, args).await,
        AdminCommand::Import(args) => import(args).await,
    }
}

async fn export(session: &Session, args: ExportArgs) -> anyhow::Result<()> {
    let file = match (&args.config, args.role) {
        (None, _) => session.api()?.export().await?.to_vec(),
        (Some(config), StoreOf::GlobalScheduler) => {
            anyplace_global_scheduler::export(&anyplace_service::load_config(config)?).await?
        }
        (Some(config), StoreOf::LocationScheduler) => {
            anyplace_location_scheduler::export(&anyplace_service::load_config(config)?).await?
        }
    };
    anyplace_service::write_atomically(&args.out, &file, 0o600)
        .with_context(|| format!("`{}` can't be written; choose another --out", args.out.display()))?;
    // Besides the first line and the last.
    let entries = file.iter().filter(|byte| **byte == b'\n').count().saturating_sub(2);
    tell(&args.out, entries, "exported to", args.output.format)
}

async fn import(args: ImportArgs) -> anyhow::Result<()> {
    let file = std::fs::read(&args.file).with_context(|| {
        format!("`{}` can't be read; it is what `anyplace admin export` wrote", args.file.display())
    })?;
    let entries = match args.role {
        StoreOf::GlobalScheduler => {
            anyplace_global_scheduler::import(&anyplace_service::load_config(&args.config)?, &file).await
        }
        StoreOf::LocationScheduler => {
            anyplace_location_scheduler::import(&anyplace_service::load_config(&args.config)?, &file).await
        }
    }
    .with_context(|| format!("`{}` is not imported", args.file.display()))?;
    tell(&args.file, entries, "imported from", args.output.format)
}

fn tell(file: &Path, entries: usize, done: &str, format: output::Format) -> anyhow::Result<()> {
    let view = serde_json::json!({ "file": file, "entries": entries });
    output::data(format, &view, || format!("{entries} entries {done} {}", file.display()))
}
