//! `team ...`: an operator's weights and quotas of teams.

use anyplace_api::TeamView;
use anyplace_model::TeamSettings;

use crate::{
    args::{TeamsCommand, TeamsSetArgs},
    context::Session,
    output::{self, Table},
};

pub(super) async fn run(session: &Session, command: TeamsCommand) -> anyhow::Result<()> {
    let client = session.api()?;
    let view = match command {
        TeamsCommand::Ls { name: None, output } => {
            let views = client.teams().await?;
            return output::data(output.format, &views, || table(&views));
        }
        TeamsCommand::Ls { name: Some(name), output } => {
            let view = client.team(&name).await?;
            return output::data(output.format, &view, || table(std::slice::from_ref(&view)));
        }
        TeamsCommand::Set(args) => {
            let settings = changed(client.team(&args.name).await?.settings, &args);
            client.set_team(&args.name, &settings).await?
        }
        TeamsCommand::Reset { name } => client.set_team(&name, &TeamSettings::default()).await?,
    };
    let settings = &view.settings;
    output::note(format_args!(
        "team {}: weight {}, cpu {}, memory {}, gpus {}, queued {}",
        view.team,
        settings.weight,
        bound(settings.max_cpu),
        bound(settings.max_memory),
        bound(settings.max_gpus),
        bound(settings.max_queued),
    ));
    Ok(())
}

fn changed(mut settings: TeamSettings, args: &TeamsSetArgs) -> TeamSettings {
    let bounds = &args.bounds;
    settings.weight = bounds.weight.unwrap_or(settings.weight);
    settings.max_cpu = bounds.max_cpu.map_or(settings.max_cpu, |bound| bound.0);
    settings.max_memory = bounds.max_memory.map_or(settings.max_memory, |bound| bound.0);
    settings.max_gpus = bounds.max_gpus.map_or(settings.max_gpus, |bound| bound.0);
    settings.max_queued = bounds.max_queued.map_or(settings.max_queued, |bound| bound.0);
    settings
}

fn bound<T: ToString>(value: Option<T>) -> String {
    value.map_or("unbounded".into(), |value| value.to_string())
}

fn table(views: &[TeamView]) -> String {
    let mut table = Table::new(&["NAME", "WEIGHT", "SHARE", "PLACED", "QUEUED", "CPU", "MEMORY", "GPUS"]);
    let of = |held: String, max: Option<String>| max.map_or(held.clone(), |max| format!("{held}/{max}"));
    for view in views {
        let (held, settings) = (&view.held, &view.settings);
        table.row([
            view.team.to_string(),
            settings.weight.to_string(),
            format!("{}.{}%", view.share_permille / 10, view.share_permille % 10),
            view.placed.to_string(),
            of(view.queued.to_string(), settings.max_queued.map(|max| max.to_string())),
            of(output::cores(held.cpu), settings.max_cpu.map(output::cores)),
            of(output::size(held.memory), settings.max_memory.map(output::size)),
            of(held.gpus.to_string(), settings.max_gpus.map(|max| max.to_string())),
        ]);
    }
    if table.is_empty() {
        output::note("no team has jobs, and nothing is set for any; `anyplace team set NAME` sets something");
    }
    table.to_string()
}
