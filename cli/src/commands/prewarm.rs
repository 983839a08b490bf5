//! `prewarm ...`: images that machines should have before anything asks for them.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::bail;
use anyplace_api::{Client, PrewarmView};
use anyplace_model::{Bytes, DurationMs, ImageState, Prewarm};

use crate::{
    args::{PrewarmCommand, PrewarmSetArgs},
    context::Session,
    output::{self, Format, Table},
    reference, wait,
};

/// How often the state is asked for while waiting.
const POLL: Duration = Duration::from_millis(200);

pub(super) async fn run(session: &Session, command: PrewarmCommand) -> anyhow::Result<ExitCode> {
    match command {
        PrewarmCommand::Set(args) => return set(session, args).await,
        PrewarmCommand::Ls { output } => list(session, output.format).await?,
        PrewarmCommand::Rm { image } => remove(session, &image).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn set(session: &Session, args: PrewarmSetArgs) -> anyhow::Result<ExitCode> {
    let client = session.api()?;
    let wish = Prewarm {
        // As `apply` pins it, so that what is applied finds it warm.
        image: reference::pin(&args.image, session).await?,
        locations: args.location,
        machines: args.machines,
        priority: args.priority,
    };
    let view = client.set_prewarm(&wish).await?;
    output::note(format_args!("{} will be kept warm", wish.image));
    let (view, code) = match args.wait.wait {
        true => wait_until_warm(&client, view, args.wait.timeout).await?,
        false => (view, ExitCode::SUCCESS),
    };
    output::data(args.output.format, &view, || progress(&view))?;
    Ok(code)
}

async fn wait_until_warm(
    client: &Client,
    mut view: PrewarmView,
    limit: DurationMs,
) -> anyhow::Result<(PrewarmView, ExitCode)> {
    let deadline = Instant::now() + limit.to_std();
    let mut shown = wait::Shown::new();
    loop {
        shown.state(progress(&view));
        if view.machines > 0 && view.warm == view.machines {
            return Ok((view, ExitCode::SUCCESS));
        }
        if Instant::now() >= deadline {
            drop(shown);
            output::note(format_args!(
                "not warm everywhere after {limit}; it goes on by itself, and `anyplace prewarm ls` says how far it is"
            ));
            return Ok((view, ExitCode::from(wait::PENDING)));
        }
        tokio::time::sleep(POLL).await;
        let Some(now) = client.prewarms().await?.into_iter().find(|it| it.spec.image == view.spec.image)
        else {
            bail!("{} was taken back by someone else meanwhile; set it again", view.spec.image);
        };
        view = now;
    }
}

/// Takes back the wish for an image, named as `ls` lists it or without its digest.
async fn remove(session: &Session, image: &str) -> anyhow::Result<()> {
    let client = session.api()?;
    let all = client.prewarms().await?;
    let named = |wish: &&PrewarmView| {
        let full = &wish.spec.image;
        full == image || full.split_once('@').is_some_and(|(tagged, _)| tagged == image)
    };
    let found: Vec<&String> = all.iter().filter(named).map(|wish| &wish.spec.image).collect();
    if found.is_empty() {
        bail!("nobody wishes `{image}` to be warm; see `anyplace prewarm ls`");
    }
    for image in found {
        client.delete_prewarm(image).await?;
        output::note(format_args!(
            "{image} is no longer kept warm; machines drop it when they need the room"
        ));
    }
    Ok(())
}

/// Such as `warm on 3 of 4 machines, 62 % in all`.
fn progress(view: &PrewarmView) -> String {
    let states = || view.locations.iter().flat_map(|share| share.machines.values());
    let sum: f64 = states().map(share).sum();
    let percent = 100.0 * sum / f64::from(view.machines.max(1));
    format!("warm on {} of {} machines, {percent:.0} % in all", view.warm, view.machines)
}

/// How much of it is there, 0 to 1.
fn share(state: &ImageState) -> f64 {
    match state {
        ImageState::Warm => 1.0,
        ImageState::Pulling { done, total } if *total > 0 => *done as f64 / *total as f64,
        _ => 0.0,
    }
}

async fn list(session: &Session, format: Format) -> anyhow::Result<()> {
    let views = session.api()?.prewarms().await?;
    output::data(format, &views, || {
        let mut table = Table::new(&["IMAGE", "PRIORITY", "LOCATION", "MACHINE", "STATE"]);
        for view in &views {
            let row = |location: String, machine: String, state: String| {
                [view.spec.image.clone(), view.spec.priority.to_string(), location, machine, state]
            };
            if view.machines == 0 {
                table.row(row(String::new(), String::new(), "no machine yet".into()));
            }
            for share in &view.locations {
                for (machine, state) in &share.machines {
                    table.row(row(share.location.to_string(), machine.to_string(), word(state)));
                }
            }
        }
        if table.is_empty() {
            output::note("no image is kept warm; `anyplace prewarm set IMAGE` asks for one");
        }
        table.to_string()
    })
}

/// `cold`, `62 %`, `warm`, or why not.
fn word(state: &ImageState) -> String {
    match state {
        ImageState::Cold => "cold".into(),
        ImageState::Pulling { total: 0, .. } => "0 %".into(),
        ImageState::Pulling { done, total } => {
            format!("{:.0} % of {}", 100.0 * share(state), output::size(Bytes((*total).max(*done))))
        }
        ImageState::Warm => "warm".into(),
        ImageState::Failed(condition) => format!("failed: {} ({})", condition.message, condition.reason),
    }
}
