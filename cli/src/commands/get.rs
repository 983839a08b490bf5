//! `get` and `jobs get`: lists, one line each.

use std::time::Duration;

use anyhow::{Context as _, bail};
use anyplace_api::{DeploymentView, JobView};
use anyplace_model::{InstanceStatus, JobName, LocationId, LocationRecord, Workload};
use serde::{Deserialize, Serialize};

use super::events;
use crate::{
    args::{GetArgs, GetKind},
    context::Session,
    output::{self, Format, Table},
};

/// How long the list of instances may take; it is the longest.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An instance and the location that it is in.
#[derive(Serialize, Deserialize)]
struct Located {
    location: LocationId,
    #[serde(flatten)]
    instance: InstanceStatus,
}

pub(super) async fn run(session: &Session, args: GetArgs) -> anyhow::Result<()> {
    let format = args.output.format;
    let name = args.name;
    match args.kind {
        GetKind::Deployments => deployments(session, name, format).await,
        GetKind::Jobs => {
            let name = name.map(|name| name.parse::<JobName>()).transpose()?;
            jobs(session, name.as_ref(), format).await
        }
        GetKind::Instances => instances(session, name, format).await,
        GetKind::Locations => locations(session, name, format).await,
        GetKind::Events => events::run(session, name.as_deref(), format).await,
    }
}

async fn deployments(session: &Session, name: Option<String>, format: Format) -> anyhow::Result<()> {
    let client = session.api()?;
    match name {
        Some(name) => {
            let view = client.deployment(&name.parse()?).await?;
            output::data(format, &view, || deployment_table(std::slice::from_ref(&view)))
        }
        None => {
            let views = client.deployments().await?;
            output::data(format, &views, || deployment_table(&views))
        }
    }
}

fn deployment_table(views: &[DeploymentView]) -> String {
    let mut headings = vec!["NAME", "VIP", "READY", "WANTED", "PHASE", "LOCATIONS", "IMAGE", "AGE", "REASON"];
    // Without a pool of IPv6 addresses nobody has one.
    let dual = views.iter().any(|view| view.vip6.is_some());
    if dual {
        headings.insert(2, "VIP6");
    }
    let mut table = Table::new(&headings);
    for view in views {
        let locations: Vec<_> = view
            .locations
            .iter()
            .filter(|share| share.wanted > 0)
            .map(|share| share.location.as_str())
            .collect();
        let vip6 = view.vip6.map_or_else(|| "-".to_owned(), |vip6| vip6.to_string());
        let mut row = vec![
            view.name.to_string(),
            view.vip.to_string(),
            view.ready.to_string(),
            view.wanted.to_string(),
            output::word(&view.phase),
            locations.join(","),
            short_image(&view.spec.image),
            output::age(view.created_at),
            output::reason(&view.reasons),
        ];
        if dual {
            row.insert(2, vip6);
        }
        table.row(row);
    }
    or_none(&table, "no deployments; `anyplace apply -f FILE` makes one")
}

/// Without the digest, which `describe` shows: it would fill the line.
fn short_image(image: &str) -> String {
    match image.split_once('@') {
        Some((name, _)) if name.rsplit('/').next().is_some_and(|last| last.contains(':')) => name.to_owned(),
        Some((name, digest)) => format!("{name}@{}", digest.chars().take(19).collect::<String>()),
        None => image.to_owned(),
    }
}

fn or_none(table: &Table, hint: &str) -> String {
    if table.is_empty() {
        output::note(hint);
    }
    table.to_string()
}

pub(super) async fn jobs(session: &Session, name: Option<&JobName>, format: Format) -> anyhow::Result<()> {
    let client = session.api()?;
    match name {
        Some(name) => {
            let view = client.job(name).await?;
            output::data(format, &view, || job_table(std::slice::from_ref(&view)))
        }
        None => {
            let views = client.jobs().await?;
            output::data(format, &views, || job_table(&views))
        }
    }
}

pub(super) async fn job_indexes(session: &Session, array: &JobName, format: Format) -> anyhow::Result<()> {
    let views = session.api()?.job_indexes(array).await?;
    output::data(format, &views, || job_table(&views))
}

fn job_table(views: &[JobView]) -> String {
    let mut headings = vec![
        "NAME", "TEAM", "PHASE", "ATTEMPT", "LOCATION", "EXIT", "QUEUE", "STARTS", "IMAGE", "AGE", "REASON",
    ];
    let arrays = views.iter().any(|view| view.array.is_some());
    if arrays {
        headings.insert(3, "INDEXES");
    }
    let mut table = Table::new(&headings);
    for view in views {
        let attempt = format!("{}/{}", view.attempt, view.spec.max_attempts);
        let mut row = vec![
            view.name.to_string(),
            view.spec.team.to_string(),
            output::word(&view.phase),
            if view.array.is_some() { String::new() } else { attempt },
            view.location.as_ref().map(ToString::to_string).unwrap_or_default(),
            view.exit_code.map(|code| code.to_string()).unwrap_or_default(),
            view.queue_position.map(|position| position.to_string()).unwrap_or_default(),
            view.predicted_start.map(output::until).unwrap_or_default(),
            short_image(&view.spec.image),
            output::age(view.created_at),
            output::reason(&view.reasons),
        ];
        if arrays {
            row.insert(3, view.array.map(|counts| counts.to_string()).unwrap_or_default());
        }
        table.row(row);
    }
    or_none(&table, "no jobs; `anyplace jobs run -f FILE` submits one")
}

async fn instances(session: &Session, name: Option<String>, format: Format) -> anyhow::Result<()> {
    let client = session.api()?;
    let answer = async {
        client.open("/v1/instances", &()).await?.json::<Vec<Located>>().await.map_err(anyhow::Error::from)
    };
    let all = tokio::time::timeout(TIMEOUT, answer)
        .await
        .with_context(|| format!("{} fell silent; try again", client.base()))??;
    let wanted = |located: &Located| {
        name.as_deref().is_none_or(|name| {
            let owner = match &located.instance.workload {
                Workload::Deployment(owner) => owner.as_str(),
                Workload::Job(attempt) => attempt.job.as_str(),
            };
            located.instance.instance.as_str() == name || owner == name
        })
    };
    let list: Vec<Located> = all.into_iter().filter(wanted).collect();
    if let Some(name) = name.filter(|_| list.is_empty()) {
        bail!("no instance is called `{name}` or belongs to it; `anyplace get instances` lists all");
    }
    output::data(format, &list, || {
        let mut table = Table::new(&[
            "NAME", "OWNER", "LOCATION", "MACHINE", "PHASE", "READY", "RESTARTS", "ADDRESS", "AGE", "REASON",
        ]);
        for Located { location, instance } in &list {
            table.row([
                instance.instance.to_string(),
                instance.workload.to_string(),
                location.to_string(),
                instance.machine.to_string(),
                output::word(&instance.phase),
                output::yes_no(instance.ready),
                instance.restarts.to_string(),
                instance.address.to_string(),
                instance.started_at.map(output::age).unwrap_or_default(),
                instance.reason.as_ref().map(|reason| reason.reason.to_string()).unwrap_or_default(),
            ]);
        }
        or_none(&table, "no instances; `anyplace apply -f FILE` asks for some")
    })
}

async fn locations(session: &Session, name: Option<String>, format: Format) -> anyhow::Result<()> {
    let client = session.api()?;
    match name {
        Some(name) => {
            let record = client.location(&name.parse()?).await?;
            output::data(format, &record, || location_table(std::slice::from_ref(&record)))
        }
        None => {
            let records = client.locations().await?;
            output::data(format, &records, || location_table(&records))
        }
    }
}

fn location_table(records: &[LocationRecord]) -> String {
    let mut table = Table::new(&["NAME", "STATE", "REGION", "COUNTRY", "MACHINES", "LAST-REPORT", "LABELS"]);
    for record in records {
        let advert = record.advert.as_ref();
        let labels = advert.map(|advert| {
            advert.labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
        });
        table.row([
            record.location.to_string(),
            location_state(record.alive, record.settings.withdrawn, record.settings.draining),
            advert.map(|advert| advert.region.clone()).unwrap_or_default(),
            advert.map(|advert| advert.country.clone()).unwrap_or_default(),
            advert.map(|advert| advert.machines.to_string()).unwrap_or_default(),
            record.last_report_ms.map(|ms| format!("{:.1}s", ms as f64 / 1_000.0)).unwrap_or_default(),
            labels.unwrap_or_default(),
        ]);
    }
    or_none(&table, "no locations; start a location scheduler with a token of the role `location`")
}

/// The state of a location in words.
pub(super) fn location_state(alive: bool, withdrawn: bool, draining: bool) -> String {
    let mut state = vec![if alive { "alive" } else { "lost" }];
    state.extend(withdrawn.then_some("withdrawn"));
    state.extend(draining.then_some("draining"));
    state.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_shown_only_where_there_is_no_tag() {
        assert_eq!(short_image("hello:v1@sha256:0123456789abcdef"), "hello:v1");
        assert_eq!(short_image("localhost:5000/hello@sha256:0123456789abcdef"), {
            "localhost:5000/hello@sha256:0123456789ab"
        });
        assert_eq!(short_image("hello:v1"), "hello:v1");
    }
}
