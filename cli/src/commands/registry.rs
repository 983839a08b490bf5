//! `registry ...`: what operators ask a registry.

mod access;
mod admin;
mod print;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::bail;
use anyplace_registry::{
    Emptied, GcPhase, GcReport, GcRequest, GcStatus, RepositoryPage, ScrubPhase, ScrubReport, ScrubStatus,
    TagView, TrashView, Undelete, Undeleted, UploadView, UsageView,
};

use self::admin::Admin;
use crate::{
    args::{RegistryCommand, RunArgs},
    context::Session,
    output,
    wait::Shown,
};

/// How often the state is asked for while waiting.
const POLL: Duration = Duration::from_millis(200);
/// How long after its end a collection's report may take to be there.
const REPORT_WITHIN: Duration = Duration::from_secs(10);

pub(super) async fn run(session: &Session, command: RegistryCommand) -> anyhow::Result<ExitCode> {
    let admin = Admin::new(session)?;
    match command {
        RegistryCommand::Gc { dry_run, run } => return gc(&admin, dry_run, run).await,
        RegistryCommand::Scrub { run } => return scrub(&admin, run).await,
        RegistryCommand::Account(command) => return access::account(&admin, command).await,
        RegistryCommand::Team(command) => return access::team(&admin, command).await,
        RegistryCommand::Audit(args) => return access::audit(&admin, args).await,
        RegistryCommand::Du { repository, output } => {
            let usage: UsageView = admin.get("/v1/du", &about(repository)).await?;
            output::data(output.format, &usage, || print::usage(&usage))?;
        }
        RegistryCommand::Ls { output } => {
            let repositories = repositories(&admin).await?;
            output::data(output.format, &repositories, || print::repositories(&repositories))?;
        }
        RegistryCommand::Tags { repository, output } => {
            let tags: Vec<TagView> = admin.get("/v1/tags", &about(Some(repository))).await?;
            output::data(output.format, &tags, || print::tags(&tags))?;
        }
        RegistryCommand::Undelete { reference, output } => {
            let tag = reference.digest.is_none().then(|| reference.tag_or_latest().to_owned());
            let (repository, digest) = (reference.repository, reference.digest);
            let undeleted: Undeleted =
                admin.post("/v1/undelete", &Undelete { repository, tag, digest }).await?;
            output::data(output.format, &undeleted, || {
                let tag = undeleted.tag.as_deref().map(|tag| format!(":{tag}")).unwrap_or_default();
                format!("{}{tag}@{}", undeleted.repository, undeleted.digest)
            })?;
        }
        RegistryCommand::Trash { repository, empty: true, yes, output } => {
            let about = about(repository);
            if !yes {
                let trash: Vec<TrashView> = admin.get("/v1/trash", &about).await?;
                bail!("{} deletions could not be undone any more; add --yes to empty the trash", trash.len());
            }
            let emptied: Emptied = admin.delete_and_tell("/v1/trash", &about).await?;
            output::data(output.format, &emptied, || print::emptied(emptied))?;
        }
        RegistryCommand::Trash { repository, output, .. } => {
            let trash: Vec<TrashView> = admin.get("/v1/trash", &about(repository)).await?;
            output::data(output.format, &trash, || print::trash(&trash))?;
        }
        RegistryCommand::Uploads { repository, drop, idle, output } => {
            let mut query = about(repository);
            let uploads: Vec<UploadView> = if drop {
                query.push(("idle_s", idle.0.div_ceil(1_000).to_string()));
                admin.delete_and_tell("/v1/uploads", &query).await?
            } else {
                admin.get("/v1/uploads", &query).await?
            };
            output::data(output.format, &uploads, || print::uploads(&uploads, drop))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// All repositories, a page after the other.
async fn repositories(admin: &Admin) -> anyhow::Result<Vec<anyplace_registry::RepositoryView>> {
    let (mut all, mut last) = (Vec::new(), None);
    loop {
        let query: Vec<(&str, String)> = last.into_iter().map(|last| ("last", last)).collect();
        let page: RepositoryPage = admin.get("/v1/repositories", &query).await?;
        all.extend(page.repositories);
        last = page.next;
        if last.is_none() {
            return Ok(all);
        }
    }
}

fn about(repository: Option<String>) -> Vec<(&'static str, String)> {
    repository.into_iter().map(|repository| ("repository", repository)).collect()
}

async fn gc(admin: &Admin, dry_run: bool, run: RunArgs) -> anyhow::Result<ExitCode> {
    if run.status {
        let status: GcStatus = admin.get("/v1/gc", &[]).await?;
        output::data(run.output.format, &status, || print::gc_status(&status))?;
        return Ok(ExitCode::SUCCESS);
    }
    let begun: GcReport = admin.post("/v1/gc", &GcRequest { dry_run }).await?;
    let report = if run.no_wait { begun } else { gc_end(admin, begun).await? };
    output::data(run.output.format, &report, || print::gc(&report))?;
    let bad = matches!(report.phase, GcPhase::Failed | GcPhase::Stopped);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn gc_end(admin: &Admin, begun: GcReport) -> anyhow::Result<GcReport> {
    let (mut shown, mut gone) = (Shown::new(), None);
    loop {
        let status: GcStatus = admin.get("/v1/gc", &[]).await?;
        let of_this = |report: &GcReport| report.run == begun.run;
        if let Some(running) = status.running.filter(of_this) {
            shown.state(print::gc_progress(&running));
            gone = None;
        } else {
            let ended = if begun.dry_run { status.last_dry_run } else { status.last };
            match ended {
                Some(report) if of_this(&report) => return Ok(report),
                // Between its end and its report, or begun by another process since.
                Some(report) if report.started > begun.started => {
                    bail!(
                        "the collection has ended, and another one since; see `anyplace registry gc --status`"
                    )
                }
                _ => {}
            }
            let gone: &mut Instant = gone.get_or_insert_with(Instant::now);
            if gone.elapsed() > REPORT_WITHIN {
                bail!(
                    "the collection ended without a report: the registry was started again, or its store failed; its log \
                     says which, and the next collection does the rest"
                )
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn scrub(admin: &Admin, run: RunArgs) -> anyhow::Result<ExitCode> {
    if run.status {
        let status: ScrubStatus = admin.get("/v1/scrub", &[]).await?;
        output::data(run.output.format, &status, || print::scrub_status(&status))?;
        return Ok(ExitCode::SUCCESS);
    }
    let begun: ScrubReport = admin.post("/v1/scrub", &serde_json::json!({})).await?;
    let report = if run.no_wait { begun } else { scrub_end(admin, begun).await? };
    output::data(run.output.format, &report, || print::scrub(&report))?;
    let stopped = report.phase == ScrubPhase::Stopped && !run.no_wait;
    let bad = report.wrong.count > 0 || !report.problems.is_empty() || stopped;
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn scrub_end(admin: &Admin, begun: ScrubReport) -> anyhow::Result<ScrubReport> {
    let mut shown = Shown::new();
    loop {
        let status: ScrubStatus = admin.get("/v1/scrub", &[]).await?;
        match (status.running, status.last) {
            (Some(running), _) => shown.state(print::scrub_progress(&running)),
            // One that is stopped goes on later, and keeps the time at which it began.
            (None, Some(report)) if report.started == begun.started => return Ok(report),
            (None, Some(report)) if report.started > begun.started => {
                bail!("the scrub has ended, and another one since; see `anyplace registry scrub --status`")
            }
            (None, _) => bail!(
                "the scrub stopped before its end; the registry's log says why, and `anyplace registry scrub` goes on \
                 from there"
            ),
        }
        tokio::time::sleep(POLL).await;
    }
}
