//! `location ...`: an operator's settings of a location, and the latency between locations.

use anyplace_api::LatencyView;
use anyplace_model::{LocationSettings, MachineId, MachineMode};

use crate::{
    args::LocationCommand,
    context::Session,
    output::{self, Table},
};

/// What becomes of the settings.
type Change = Box<dyn FnOnce(&mut LocationSettings)>;

pub(super) async fn run(session: &Session, command: LocationCommand) -> anyhow::Result<()> {
    let client = session.api()?;
    if let LocationCommand::Latency { from, output } = command {
        let views = client.latency(from.as_ref()).await?;
        return output::data(output.format, &views, || latency_text(&views));
    }
    let (name, change): (_, Change) = match command {
        LocationCommand::Withdraw { name } => (name, Box::new(|settings| settings.withdrawn = true)),
        LocationCommand::Announce { name } => (name, Box::new(|settings| settings.withdrawn = false)),
        LocationCommand::Drain { name, machine: None } => {
            (name, Box::new(|settings| settings.draining = true))
        }
        LocationCommand::Undrain { name, machine: None } => {
            (name, Box::new(|settings| settings.draining = false))
        }
        LocationCommand::Drain { name, machine: Some(machine) } => {
            (name, machine_becomes(machine, Some(MachineMode::Draining)))
        }
        LocationCommand::Cordon { name, machine } => {
            (name, machine_becomes(machine, Some(MachineMode::Cordoned)))
        }
        LocationCommand::Undrain { name, machine: Some(machine) } => (name, machine_becomes(machine, None)),
        // Shown above.
        LocationCommand::Latency { .. } => return Ok(()),
        LocationCommand::Set(args) => {
            // None with `--no-off-peak`.
            let window = args.off_peak.window;
            (args.name, Box::new(move |settings| settings.off_peak = window))
        }
    };
    let mut settings = client.location(&name).await?.settings;
    change(&mut settings);
    let settings = client.set_location(&name, &settings).await?.settings;
    let off_peak = settings.off_peak.map_or("its own".into(), |window| window.to_string());
    output::note(format_args!(
        "location {name}: withdrawn {}, draining {}, off-peak window {off_peak}{}",
        output::yes_no(settings.withdrawn),
        output::yes_no(settings.draining),
        machines(&settings).map_or(String::new(), |machines| format!(", machines {machines}")),
    ));
    Ok(())
}

fn machine_becomes(machine: MachineId, mode: Option<MachineMode>) -> Change {
    Box::new(move |settings| {
        settings.machines.remove(&machine);
        settings.machines.extend(mode.map(|mode| (machine, mode)));
    })
}

/// The machines that take nothing new.
pub(super) fn machines(settings: &LocationSettings) -> Option<String> {
    let mode = |mode: &MachineMode| match mode {
        MachineMode::Cordoned => "cordoned",
        MachineMode::Draining => "draining",
    };
    let machines: Vec<String> =
        settings.machines.iter().map(|(name, it)| format!("{name} {}", mode(it))).collect();
    (!machines.is_empty()).then(|| machines.join(", "))
}

fn latency_text(views: &[LatencyView]) -> String {
    let mut table = Table::new(&["FROM", "TO", "LATENCY", "BY", "DISTANCE"]);
    for view in views {
        table.row([
            view.from.to_string(),
            view.to.to_string(),
            format!("{:.1} ms", view.latency_ms),
            if view.measured { "measured" } else { "distance" }.into(),
            format!("{:.0} km", view.distance_km),
        ]);
    }
    if table.is_empty() {
        output::note("fewer than two locations have reported; see `anyplace get locations`");
    }
    table.to_string()
}
