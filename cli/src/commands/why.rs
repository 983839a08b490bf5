//! `why`: where something is, or which reasons keep it from being there.

use anyplace_model::Explanation;

use crate::{
    args::TargetArg,
    context::Session,
    output::{self, Format, Table},
    target::Target,
};

pub(super) async fn run(session: &Session, words: &TargetArg, format: Format) -> anyhow::Result<()> {
    let client = session.api()?;
    let explanation = match Target::find(words, &client).await? {
        Target::Deployment(name) => client.why_deployment(&name).await?,
        Target::Job(name) => client.why_job(&name).await?,
    };
    output::data(format, &explanation, || text(&explanation))
}

fn text(explanation: &Explanation) -> String {
    let mut text = format!(
        "{}: {}\nWanted {}, placed {}, ready {}\n",
        explanation.subject, explanation.summary, explanation.wanted, explanation.placed, explanation.ready
    );
    if !explanation.refusals.is_empty() {
        text += &format!("\nReasons:\n{}", output::reasons(&explanation.refusals, "  "));
    }
    if !explanation.locations.is_empty() {
        let mut table =
            Table::new(&["  LOCATION", "PLACED", "ROOM-FOR", "ENTERING/s", "NEARER-ms", "REASONS"]);
        for location in &explanation.locations {
            let reasons: Vec<String> = location
                .refusals
                .iter()
                .map(|refusal| format!("{} ({}): {}", refusal.reason, refusal.count, refusal.message))
                .collect();
            table.row([
                format!("  {}", location.location),
                location.placed.to_string(),
                location.room_for.to_string(),
                location.entering.map_or("-".into(), |rate| format!("{rate:.1}")),
                location.nearer_ms.map_or("-".into(), |ms| format!("{ms:.1}")),
                reasons.join("; "),
            ]);
        }
        text += &format!("\nLocations:\n{table}\n");
    }
    let moves: Vec<String> = explanation
        .locations
        .iter()
        .flat_map(|it| it.moves.iter().map(|step| format!("  {}: {}\n", it.location, step.message)))
        .collect();
    if !moves.is_empty() {
        text += &format!("\nMoves:\n{}", moves.concat());
    }
    if let Some(nearest) = &explanation.nearest_fit {
        text += &format!("\nNearest fit: {nearest}\n");
    }
    text
}
