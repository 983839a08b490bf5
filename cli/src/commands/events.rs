//! `events` and `get events`: what happened, oldest first.

use anyplace_api::Event;

use crate::{
    context::Session,
    output::{self, Format, Table},
};

/// `subject` may be `deployment/hello`, or just `hello` for whatever has that name.
pub(super) async fn run(session: &Session, subject: Option<&str>, format: Format) -> anyhow::Result<()> {
    let client = session.api()?;
    let events = match subject {
        Some(name) if !name.contains('/') => {
            let mut events = client.events(None).await?;
            events.retain(|event| event.subject.split('/').nth(1) == Some(name));
            events
        }
        subject => client.events(subject).await?,
    };
    output::data(format, &events, || {
        if events.is_empty() {
            output::note("no events");
        }
        table(&events, true).to_string()
    })
}

/// Events as a table; without their subject where all have the same.
pub(super) fn table(events: &[Event], with_subject: bool) -> Table {
    let header = ["AGE", "SEVERITY", "SUBJECT", "MESSAGE"];
    let keep = |index: usize| with_subject || index != 2;
    let kept = |cells: [String; 4]| {
        cells
            .into_iter()
            .enumerate()
            .filter(|(index, _)| keep(*index))
            .map(|(_, cell)| cell)
            .collect::<Vec<_>>()
    };
    let names = kept(header.map(str::to_owned));
    let mut table = Table::new(&names.iter().map(String::as_str).collect::<Vec<_>>());
    for event in events {
        table.row(kept([
            output::age(event.at),
            output::word(&event.severity),
            event.subject.clone(),
            event.message.clone(),
        ]));
    }
    table
}
