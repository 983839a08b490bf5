//! `describe`: everything about one thing, as sections of text.

use std::fmt::Display;

use anyplace_api::{CapacityView, DeploymentView, Event, JobView};
use anyplace_model::{
    Check, CheckKind, GpuRequest, InstanceStatus, LocationId, LocationRecord, PlacementConstraints, Resources,
};

use super::{capacity, events, get};
use crate::{
    args::DescribeCommand,
    context::Session,
    output::{self, Format, Table},
};

/// How many of the last events are shown.
const EVENTS: usize = 10;

pub(super) async fn run(session: &Session, command: DescribeCommand) -> anyhow::Result<()> {
    let client = session.api()?;
    match command {
        DescribeCommand::Deployment { name, output } => {
            let view = client.deployment(&name).await?;
            if output.format != Format::Table {
                return output::data(output.format, &view, String::new);
            }
            let events = client.events(Some(&format!("deployment/{name}"))).await?;
            output::line(deployment(&view, &events).trim_end())
        }
        DescribeCommand::Job { name, output } => {
            let view = client.job(&name).await?;
            if output.format != Format::Table {
                return output::data(output.format, &view, String::new);
            }
            let events = client.events(Some(&format!("job/{name}"))).await?;
            output::line(job(&view, &events).trim_end())
        }
        DescribeCommand::Location { name, output } => {
            let record = client.location(&name).await?;
            if output.format != Format::Table {
                return output::data(output.format, &record, String::new);
            }
            let capacity = client.capacity().await?;
            let capacity = capacity.iter().find(|view| view.location == name);
            let events = client.events(Some(&format!("location/{name}"))).await?;
            output::line(location(&record, capacity, &events).trim_end())
        }
    }
}

/// Lines of `Label:   value`, and sections below them.
#[derive(Default)]
struct Sections(String);

impl Sections {
    fn field(&mut self, label: &str, value: impl Display) {
        self.0 += &format!("{:14}{value}\n", format!("{label}:"));
    }

    fn optional(&mut self, label: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.field(label, value);
        }
    }

    /// A block below a title; nothing where it is empty.
    fn section(&mut self, title: &str, block: &str) {
        if !block.is_empty() {
            self.0 += &format!("\n{title}:\n");
            for line in block.lines() {
                self.0 += &format!("  {}\n", line.trim_start());
            }
        }
    }

    fn events(&mut self, events: &[Event]) {
        let last = &events[events.len().saturating_sub(EVENTS)..];
        if !last.is_empty() {
            self.section("Events", &events::table(last, false).to_string());
        }
    }
}

fn deployment(view: &DeploymentView, events: &[Event]) -> String {
    let spec = &view.spec;
    let mut text = Sections::default();
    text.field("Name", &view.name);
    text.field("Team", spec.team.as_str());
    text.field("Virtual IP", view.vip);
    text.optional("Virtual IPv6", view.vip6);
    let ports: Vec<String> = spec
        .ports
        .iter()
        .map(|port| format!("{}/{} -> {}", port.port, output::word(&port.protocol), port.container_port()))
        .collect();
    text.optional("Ports", some_text(ports.join(", ")));
    text.field(
        "Phase",
        format_args!(
            "{}, {} of {} ready, generation {}",
            output::word(&view.phase),
            view.ready,
            view.wanted,
            view.generation
        ),
    );
    text.field("Image", &spec.image);
    text.optional("Command", spec.command.as_ref().map(|command| command.join(" ")));
    text.field("Resources", resources(&spec.resources));
    text.field("Isolation", output::word(&spec.isolation));
    let max = spec.instances.max.map(|max| format!(" to {max}")).unwrap_or_default();
    text.field("Instances", format_args!("{}{max}", spec.instances.min));
    text.field("Placement", placement(&spec.placement));
    text.optional("Liveness", spec.health.liveness.as_ref().map(check));
    text.optional("Readiness", spec.health.readiness.as_ref().map(check));
    text.optional(
        "Load",
        spec.load.as_ref().map(|load| format!("{} of {}", load.target, output::word(&load.metric))),
    );
    text.field("Created", created(view.created_at));
    text.section("Reasons", &output::reasons(&view.reasons, ""));

    let mut shares = Table::new(&["NAME", "WANTED", "READY", "REASONS"]);
    for share in &view.locations {
        let reasons: Vec<String> = share
            .refusals
            .iter()
            .map(|refusal| format!("{} ({}): {}", refusal.reason, refusal.count, refusal.message))
            .collect();
        shares.row([
            share.location.to_string(),
            share.wanted.to_string(),
            share.ready.to_string(),
            reasons.join("; "),
        ]);
    }
    if !shares.is_empty() {
        text.section("Locations", &shares.to_string());
    }
    let instances = view
        .locations
        .iter()
        .flat_map(|share| share.instances.iter().map(|instance| (&share.location, instance)));
    text.section("Instances", &instance_table(instances));
    text.events(events);
    text.0
}

fn instance_table<'a>(instances: impl Iterator<Item = (&'a LocationId, &'a InstanceStatus)>) -> String {
    let mut table = Table::new(&[
        "NAME", "LOCATION", "MACHINE", "PHASE", "READY", "RESTARTS", "ADDRESS", "AGE", "REASON",
    ]);
    for (location, instance) in instances {
        let exit = instance.exit_code.map(|code| format!("exit code {code}"));
        let reason = instance
            .reason
            .as_ref()
            .map(|reason| format!("{}: {}", reason.reason, reason.message))
            .or(exit)
            .unwrap_or_default();
        table.row([
            instance.instance.to_string(),
            location.to_string(),
            instance.machine.to_string(),
            output::word(&instance.phase),
            output::yes_no(instance.ready),
            instance.restarts.to_string(),
            instance.address.to_string(),
            instance.started_at.map(output::age).unwrap_or_default(),
            reason,
        ]);
    }
    if table.is_empty() { String::new() } else { table.to_string() }
}

fn job(view: &JobView, events: &[Event]) -> String {
    let spec = &view.spec;
    let mut text = Sections::default();
    text.field("Name", &view.name);
    text.field("Team", spec.team.as_str());
    text.field("Phase", output::word(&view.phase));
    match view.array {
        Some(counts) => text.field("Indexes", counts),
        None => text.field("Attempt", format_args!("{} of {}", view.attempt, spec.max_attempts)),
    }
    text.optional(
        "Made way",
        Some(view.preemptions).filter(|count| *count > 0).map(|count| format!("{count} times")),
    );
    text.optional("Exit code", view.exit_code);
    text.optional("Location", view.location.as_ref());
    text.optional("Queue", view.queue_position.map(|position| format!("place {position}")));
    text.optional(
        "Starts",
        view.predicted_start.map(|at| format!("{} ({})", output::moment(at), output::until(at))),
    );
    text.field("Policy", output::word(&spec.scheduling_policy));
    text.field("Priority", spec.priority);
    text.optional(
        "Deadline",
        spec.deadline.map(|at| format!("{} ({})", output::moment(at), output::until(at))),
    );
    text.optional("Timeout", spec.timeout);
    text.field("Image", &spec.image);
    text.optional("Command", spec.command.as_ref().map(|command| command.join(" ")));
    text.field("Resources", resources(&spec.resources));
    text.field("Isolation", output::word(&spec.isolation));
    text.field("Placement", placement(&spec.placement));
    text.field("Created", created(view.created_at));
    text.section("Reasons", &output::reasons(&view.reasons, ""));
    if let (Some(location), Some(instance)) = (&view.location, &view.instance) {
        text.section("Instance", &instance_table([(location, instance)].into_iter()));
    }
    text.events(events);
    text.0
}

fn location(record: &LocationRecord, capacity: Option<&CapacityView>, events: &[Event]) -> String {
    let mut text = Sections::default();
    text.field("Name", &record.location);
    let settings = &record.settings;
    text.field("State", get::location_state(record.alive, settings.withdrawn, settings.draining));
    text.optional("Closed machines", super::location::machines(settings));
    text.optional("Last report", record.last_report_ms.map(|ms| format!("{ms} ms ago")));
    text.optional("Scheduler", record.advertise.as_ref());
    if let Some(advert) = &record.advert {
        text.field("Region", &advert.region);
        text.field("Country", &advert.country);
        text.field("Coordinates", format_args!("{}, {}", advert.latitude, advert.longitude));
        text.optional("Labels", some_text(pairs(&advert.labels)));
        text.field("Machines", advert.machines);
        let (cores, size) = (output::cores, output::size);
        text.field(
            "CPU",
            format_args!(
                "{} free of {}, at most {} in one machine",
                cores(advert.free_cpu),
                cores(advert.cpu),
                cores(advert.largest_free_cpu)
            ),
        );
        text.field(
            "Memory",
            format_args!(
                "{} free of {}, at most {} in one machine",
                size(advert.free_memory),
                size(advert.memory),
                size(advert.largest_free_memory)
            ),
        );
        text.field(
            "Disk",
            format_args!(
                "{} free, at most {} in one machine",
                size(advert.free_disk),
                size(advert.largest_free_disk)
            ),
        );
        text.optional("GPUs", some_text(capacity::gpus(advert)));
        let isolations: Vec<String> = advert.isolations.iter().map(output::word).collect();
        text.field("Isolations", isolations.join(", "));
        text.optional("Off-peak", some_text(capacity::window(advert)));
    }
    text.optional("Override", settings.off_peak.map(|window| format!("off-peak window {window}")));
    if let Some(capacity) = capacity {
        text.field("Off-peak now", output::yes_no(capacity.off_peak_now));
        text.field("Instances", capacity.instances);
    }
    let warm = record.advert.as_ref().map(|advert| advert.warm_images.join("\n")).unwrap_or_default();
    text.section("Warm images", &warm);
    text.events(events);
    text.0
}

fn created(at: jiff::Timestamp) -> String {
    format!("{} ({} ago)", output::moment(at), output::age(at))
}

fn some_text(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn pairs(map: &std::collections::BTreeMap<String, String>) -> String {
    map.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", ")
}

fn resources(resources: &Resources) -> String {
    let Resources { cpu, memory, disk, gpu } = resources;
    let gpu = gpu.as_ref().map(|gpu| format!(", {}", gpus(gpu))).unwrap_or_default();
    format!("cpu {cpu}, memory {memory}, disk {disk}{gpu}")
}

fn gpus(gpu: &GpuRequest) -> String {
    let memory = gpu.memory.map_or(" (whole)".into(), |memory| format!(" with {memory} each"));
    let models =
        if gpu.models.is_empty() { String::new() } else { format!(" of {}", gpu.models.join(" or ")) };
    format!("{} GPU{memory}{models}", gpu.count)
}

fn placement(placement: &PlacementConstraints) -> String {
    let mut parts = Vec::new();
    if !placement.regions.is_empty() {
        parts.push(format!("regions {}", placement.regions.join(", ")));
    }
    if !placement.countries.is_empty() {
        parts.push(format!("countries {}", placement.countries.join(", ")));
    }
    if !placement.labels.is_empty() {
        parts.push(format!("labels {}", pairs(&placement.labels)));
    }
    if parts.is_empty() { "anywhere".into() } else { parts.join("; ") }
}

fn check(check: &Check) -> String {
    let what = match check.kind() {
        Some(CheckKind::Http(http)) => format!("http :{}{}", http.port, http.path),
        Some(CheckKind::Tcp(tcp)) => format!("tcp :{}", tcp.port),
        Some(CheckKind::Exec(exec)) => format!("exec {}", exec.command.join(" ")),
        None => "none".into(),
    };
    format!("{what} every {}, {} failures", check.interval, check.failures)
}
