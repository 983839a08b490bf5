//! The client commands: each asks the API and prints the answer.

mod admin;
mod apply;
mod build;
mod capacity;
mod context;
mod describe;
mod events;
mod get;
mod image;
mod location;
mod logs;
mod prewarm;
mod push;
mod registry;
mod team;
mod token;
mod vip;
mod why;

use std::process::ExitCode;

use anyplace_api::{ClientError, ErrorCode};
use clap::CommandFactory as _;

use crate::{
    args::{Cli, ClientCommand, Connection, DeleteCommand, JobsCommand, RegistryCommand},
    context::Session,
    output, schema,
};

/// Runs a client command to its end.
pub(crate) fn run(connection: &Connection, command: ClientCommand) -> anyhow::Result<ExitCode> {
    let command = match command {
        // These need no platform, nor a valid context.
        ClientCommand::Schema { kind } => {
            return output::line(serde_json::to_string_pretty(&schema::document(kind)?)?).map(done);
        }
        ClientCommand::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "anyplace", &mut script);
            return output::bytes(&script).map(done);
        }
        ClientCommand::Version => {
            return output::line(concat!("anyplace ", env!("CARGO_PKG_VERSION"))).map(done);
        }
        ClientCommand::Context(command) => return context::run(connection, command).map(done),
        command => command,
    };
    anyplace_service::install_crypto_provider();
    let session = Session::new(connection)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(dispatch(&session, command)).map_err(|error| with_hint(error, &session));
    // Packing that was interrupted would go on to its end otherwise.
    runtime.shutdown_background();
    result
}

/// Runs a question to a registry to its end.
pub(crate) fn registry(connection: &Connection, command: RegistryCommand) -> anyhow::Result<ExitCode> {
    anyplace_service::install_crypto_provider();
    let session = Session::new(connection)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(registry::run(&session, command))
}

fn done((): ()) -> ExitCode {
    ExitCode::SUCCESS
}

async fn dispatch(session: &Session, command: ClientCommand) -> anyhow::Result<ExitCode> {
    match command {
        ClientCommand::Push(args) => return push::run(session, *args).await,
        ClientCommand::Build(args) => return build::run(session, args).await,
        ClientCommand::Image { of, command } => return image::run(session, &of, command).await,
        ClientCommand::Prewarm(command) => return prewarm::run(session, command).await,
        ClientCommand::Apply(args) => return apply::run(session, args).await,
        ClientCommand::Jobs(JobsCommand::Run(args)) => return apply::run_job(session, args).await,
        ClientCommand::Jobs(command) => jobs(session, command).await?,
        ClientCommand::Delete(command) => delete(session, command).await?,
        ClientCommand::Get(args) => get::run(session, args).await?,
        ClientCommand::Describe(command) => describe::run(session, command).await?,
        ClientCommand::Why { target, output } => why::run(session, &target, output.format).await?,
        ClientCommand::Logs { target, logs, instance } => {
            logs::run(session, &target, logs, instance).await?;
        }
        ClientCommand::Capacity { output } => capacity::run(session, output.format).await?,
        ClientCommand::Events { subject, output } => {
            events::run(session, subject.as_deref(), output.format).await?;
        }
        ClientCommand::Admin(command) => admin::run(session, command).await?,
        ClientCommand::Team(command) => team::run(session, command).await?,
        ClientCommand::Location(command) => location::run(session, command).await?,
        ClientCommand::Vip(command) => vip::run(session, command).await?,
        ClientCommand::Token(command) => token::run(session, command).await?,
        // Done without a platform, above.
        ClientCommand::Schema { .. }
        | ClientCommand::Completions { .. }
        | ClientCommand::Context(_)
        | ClientCommand::Version => {}
    }
    Ok(ExitCode::SUCCESS)
}

async fn jobs(session: &Session, command: JobsCommand) -> anyhow::Result<()> {
    match command {
        // Has exit codes of its own, above.
        JobsCommand::Run(_) => Ok(()),
        JobsCommand::Get { name: Some(name), indexes: true, output } => {
            get::job_indexes(session, &name, output.format).await
        }
        JobsCommand::Get { name, indexes: _, output } => {
            get::jobs(session, name.as_ref(), output.format).await
        }
        JobsCommand::Logs { name, logs } => logs::job(&session.api()?, &name, logs, None).await,
        JobsCommand::Cancel { name } => {
            let view = session.api()?.cancel_job(&name).await?;
            output::note(format_args!("job {name} is {}", output::word(&view.phase)));
            Ok(())
        }
        JobsCommand::Delete { name } => delete(session, DeleteCommand::Job { name }).await,
    }
}

async fn delete(session: &Session, command: DeleteCommand) -> anyhow::Result<()> {
    let client = session.api()?;
    match command {
        DeleteCommand::Deployment { name } => {
            client.delete_deployment(&name).await?;
            output::note(format_args!("deployment {name} deleted"));
        }
        DeleteCommand::Job { name } => {
            client.delete_job(&name).await?;
            output::note(format_args!("job {name} deleted"));
        }
    }
    Ok(())
}

/// What only this side knows about a refusal: which credentials were used, and where to get others.
fn with_hint(error: anyhow::Error, session: &Session) -> anyhow::Error {
    let Some(ClientError::Refused(problem)) = error.downcast_ref::<ClientError>() else { return error };
    let hint = match problem.code {
        ErrorCode::Unauthenticated if !session.has_token() => {
            "no token was sent: give --token-file, ANYPLACE_TOKEN, or a context with one"
        }
        ErrorCode::TokenExpired if problem.fix.is_none() => {
            "make another with `anyplace token create`, and give it by --token-file, ANYPLACE_TOKEN or the context"
        }
        _ => return error,
    };
    anyhow::anyhow!("{error}; {hint}")
}
