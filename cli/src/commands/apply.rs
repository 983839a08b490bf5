//! `apply` and `jobs run`: from a spec file to a deployment with its virtual IP, or to a job.

use std::{io::Read as _, path::Path, process::ExitCode};

use anyhow::{Context as _, bail};
use anyplace_api::{ApplyOutcome, Client};
use anyplace_model::{DeploymentSpec, Format as SpecFormat, JobPhase, JobSpec, Spec, parse_spec};

use crate::{
    args::{ApplyArgs, OutputArg, WaitArgs},
    context::Session,
    output::{self, Format},
    reference, wait,
};

/// The largest spec that is read: a bound against a wrong file, far above any spec.
const MAX_SPEC_BYTES: u64 = 4 << 20;

pub(super) async fn run(session: &Session, args: ApplyArgs) -> anyhow::Result<ExitCode> {
    match read(&args.file.file)? {
        Spec::Deployment(spec) => deployment(session, *spec, args.wait, args.output).await,
        Spec::Job(spec) => job(session, *spec, args.wait, args.output).await,
    }
}

pub(super) async fn run_job(session: &Session, args: ApplyArgs) -> anyhow::Result<ExitCode> {
    match read(&args.file.file)? {
        Spec::Job(spec) => job(session, *spec, args.wait, args.output).await,
        Spec::Deployment(spec) => {
            let file = args.file.file.display();
            bail!("{file}: `{}` is a deployment, not a job; run `anyplace apply -f {file}`", spec.name)
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Spec> {
    let (name, text) = if path == Path::new("-") {
        ("<stdin>".to_owned(), read_text(std::io::stdin()).context("standard input can't be read")?)
    } else {
        let name = path.display().to_string();
        let file = std::fs::File::open(path)
            .with_context(|| format!("the spec `{name}` can't be read; check -f"))
            .and_then(|file| read_text(file).with_context(|| format!("the spec `{name}` can't be read")))?;
        (name, file)
    };
    Ok(parse_spec(&text, SpecFormat::of_file(&name), &name)?)
}

fn read_text(from: impl std::io::Read) -> anyhow::Result<String> {
    let mut text = String::new();
    from.take(MAX_SPEC_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_SPEC_BYTES {
        bail!("it is larger than {MAX_SPEC_BYTES} bytes, and no spec");
    }
    Ok(text)
}

async fn deployment(
    session: &Session,
    mut spec: DeploymentSpec,
    waiting: WaitArgs,
    OutputArg { format }: OutputArg,
) -> anyhow::Result<ExitCode> {
    spec.image = reference::pin(&spec.image, session).await?;
    let client = session.api()?;
    let ApplyOutcome { created, changed, deployment: mut view } = client.apply_deployment(&spec).await?;
    let what = match (created, changed) {
        (true, _) => "created",
        (false, true) => "changed",
        (false, false) => "unchanged",
    };
    output::note(format_args!("deployment {} {what}", view.name));
    if format == Format::Table {
        // At once: the address is good for the deployment's life, ready or not.
        let vip6 = view.vip6.map(|vip6| format!(" {vip6}")).unwrap_or_default();
        output::line(format_args!("{} {}{vip6}", view.name, view.vip))?;
    }
    let mut code = ExitCode::SUCCESS;
    if waiting.wait {
        match wait::deployment(&client, &view, waiting.timeout.to_std()).await? {
            wait::Outcome::Done(done) => {
                view = *done;
                output::note(format_args!(
                    "deployment {} is ready: {} of {} instances",
                    view.name, view.ready, view.wanted
                ));
            }
            wait::Outcome::Pending(last) => {
                view = last.map_or(view, |last| *last);
                let explanation = client.why_deployment(&view.name).await;
                pending(&format!("deployment {}", view.name), waiting, explanation.ok().as_ref());
                code = ExitCode::from(wait::PENDING);
            }
        }
    }
    if format != Format::Table {
        output::data(format, &view, String::new)?;
    }
    Ok(code)
}

async fn job(
    session: &Session,
    mut spec: JobSpec,
    waiting: WaitArgs,
    OutputArg { format }: OutputArg,
) -> anyhow::Result<ExitCode> {
    spec.image = reference::pin(&spec.image, session).await?;
    let client = session.api()?;
    let mut view = client.submit_job_once(&spec, &anyplace_service::generate_token()).await?;
    output::note(format_args!("job {} submitted", view.name));
    if format == Format::Table {
        output::line(&view.name)?;
    }
    let mut code = ExitCode::SUCCESS;
    if waiting.wait {
        match wait::job(&client, &view, waiting.timeout.to_std()).await? {
            wait::Outcome::Done(done) => {
                view = *done;
                code = ended(&view);
            }
            wait::Outcome::Pending(last) => {
                view = last.map_or(view, |last| *last);
                code = pending_job(&client, &view, waiting).await;
            }
        }
    }
    if format != Format::Table {
        output::data(format, &view, String::new)?;
    }
    Ok(code)
}

fn ended(view: &anyplace_api::JobView) -> ExitCode {
    let exit = view.exit_code.map(|code| format!(" with exit code {code}")).unwrap_or_default();
    let place = view.location.as_ref().map(|location| format!(" in {location}")).unwrap_or_default();
    let what = format!("job {} {}{exit}{place}", view.name, output::word(&view.phase));
    if view.phase == JobPhase::Succeeded {
        output::note(what);
        return ExitCode::SUCCESS;
    }
    output::note(format_args!("error: {what}; run `anyplace logs job {}`", view.name));
    output::note(output::reasons(&view.reasons, "  ").trim_end());
    ExitCode::FAILURE
}

async fn pending_job(client: &Client, view: &anyplace_api::JobView, waiting: WaitArgs) -> ExitCode {
    let explanation = client.why_job(&view.name).await;
    pending(&format!("job {}", view.name), waiting, explanation.ok().as_ref());
    ExitCode::from(wait::PENDING)
}

fn pending(what: &str, waiting: WaitArgs, explanation: Option<&anyplace_model::Explanation>) {
    let summary = explanation.map(|explanation| format!(": {}", explanation.summary)).unwrap_or_default();
    output::note(format_args!("{what} is still pending after {}{summary}", waiting.timeout));
    if let Some(explanation) = explanation {
        let reasons = output::reasons(&explanation.refusals, "  ");
        if !reasons.is_empty() {
            output::note(reasons.trim_end());
        }
    }
    output::note(format_args!("it goes on by itself; `anyplace why {what}` says more"));
}
