//! `vip`: who serves a virtual IP from where, and which instance a connection gets. Both are read off the tables that
//! the routers build from the locations' routes.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, bail};
use anyplace_api::{Client, DeploymentView, LocationRoutes, RoutesView};
use anyplace_model::{DeploymentName, LocationId, Port, Protocol, Route, Traffic, vips};
use anyplace_state_router::{Backend, BackendState, Flow, Hop, Owner, Shares, Step, Trace, shares, trace};
use serde::Serialize;

use crate::{
    args::{VipCommand, VipPort, VipTarget, VipTraceArgs},
    context::Session,
    output::{self, Table},
};

/// Who serves a deployment's virtual IPs.
#[derive(Serialize)]
struct Description {
    deployment: DeploymentName,
    vips: Vec<Vip>,
}

#[derive(Serialize)]
struct Vip {
    vip: IpAddr,
    ports: Vec<Port>,
    locations: Vec<Entered>,
}

/// What enters one location.
#[derive(Serialize)]
struct Entered {
    location: LocationId,
    /// Withdrawn by an operator: no packet of a client enters there.
    withdrawn: bool,
    /// Why its table isn't known.
    problem: Option<String>,
    /// What it says of new connections, where the deployment says how many an instance should have.
    traffic: Option<Traffic>,
    #[serde(flatten)]
    shares: Option<Shares>,
}

/// What becomes of a flow.
#[derive(Serialize)]
struct Traced {
    deployment: DeploymentName,
    client: SocketAddr,
    vip: IpAddr,
    port: u16,
    protocol: Protocol,
    /// By the location that it enters.
    locations: Vec<TracedFrom>,
}

#[derive(Serialize)]
struct TracedFrom {
    withdrawn: bool,
    #[serde(flatten)]
    trace: Trace,
}

pub(super) async fn run(session: &Session, command: VipCommand) -> anyhow::Result<()> {
    let client = session.api()?;
    match command {
        VipCommand::Describe { target, location, output } => {
            let (deployment, routes) = find(&client, &target).await?;
            let description = description(&deployment, &routes, &target, location.as_ref())?;
            output::data(output.format, &description, || describe_text(&deployment, &description))
        }
        VipCommand::Trace(args) => {
            let (deployment, routes) = find(&client, &args.target).await?;
            let traced = traced(&deployment, &routes, &args)?;
            output::data(args.output.format, &traced, || trace_text(&traced))
        }
    }
}

/// The deployment that is meant, and its routes in all locations.
async fn find(client: &Client, target: &VipTarget) -> anyhow::Result<(DeploymentView, RoutesView)> {
    let view = match target {
        VipTarget::Deployment(name) => client.deployment(name).await?,
        VipTarget::Address(address) => {
            let views = client.deployments().await?;
            let found = views.into_iter().find(|view| vips(view.vip, view.vip6).any(|vip| vip == *address));
            found.with_context(|| {
                format!("no deployment has the virtual IP {address}; `anyplace get deployments` lists them")
            })?
        }
    };
    let routes = client.routes(&view.name).await?;
    Ok((view, routes))
}

/// Those of a deployment's virtual IPs that are meant.
fn meant(routes: &RoutesView, target: &VipTarget) -> Vec<IpAddr> {
    let all = routes.vips.iter().copied();
    match target {
        VipTarget::Deployment(_) => all.collect(),
        VipTarget::Address(address) => all.filter(|vip| vip == address).collect(),
    }
}

fn check_location(routes: &RoutesView, location: Option<&LocationId>) -> anyhow::Result<()> {
    match location.filter(|id| !routes.locations.iter().any(|it| it.location == **id)) {
        None => Ok(()),
        Some(location) => {
            bail!("no location {location} has joined; `anyplace get locations` lists those that have")
        }
    }
}

/// A virtual IP's route in each location that knows it.
fn by_location(routes: &RoutesView, vip: IpAddr) -> BTreeMap<LocationId, Route> {
    let known = routes.locations.iter().filter_map(|it| {
        let route = it.routes.iter().find(|route| route.vip == vip)?;
        Some((it.location.clone(), route.clone()))
    });
    known.collect()
}

fn description(
    deployment: &DeploymentView,
    routes: &RoutesView,
    target: &VipTarget,
    location: Option<&LocationId>,
) -> anyhow::Result<Description> {
    check_location(routes, location)?;
    let describe = |vip: IpAddr| {
        let known = by_location(routes, vip);
        let there = routes.locations.iter().filter(|it| location.is_none_or(|id| *id == it.location));
        let entered = there.map(|it| {
            let shares = known.get(&it.location).map(|route| {
                let mut shares = shares(route);
                shares.backends.iter_mut().for_each(|backend| say_more(backend, deployment, it));
                shares
            });
            let problem = it.problem.clone().or_else(|| {
                shares.is_none().then(|| "it has not been told of this virtual IP yet".to_owned())
            });
            let (location, traffic) = (it.location.clone(), it.traffic.clone());
            Entered { location, withdrawn: it.withdrawn, problem, traffic, shares }
        });
        Vip { vip, ports: deployment.spec.ports.clone(), locations: entered.collect() }
    };
    let vips = meant(routes, target).into_iter().map(describe).collect();
    Ok(Description { deployment: deployment.name.clone(), vips })
}

/// What the instance's machine says about it, where it takes no connections; how far another location is, and what it
/// grants.
fn say_more(backend: &mut Backend, deployment: &DeploymentView, entered: &LocationRoutes) {
    let instance = match &mut backend.owner {
        Owner::Instance { instance, .. } => instance,
        Owner::Location { location, latency_ms, .. } => {
            *latency_ms = entered.latency_ms.get(location).copied();
            if let Some(quota) =
                entered.traffic.as_ref().and_then(|traffic| traffic.grant.quotas.get(location))
            {
                backend.why += &format!("; grants {quota:.1} new connections a second");
            }
            return;
        }
    };
    // Status and route are of two moments; where the route has it ready, the status is the older.
    if backend.state == BackendState::Ready {
        return;
    }
    let mut statuses = deployment.locations.iter().flat_map(|share| &share.instances);
    let status = statuses.find(|status| status.instance == *instance && !status.ready);
    if let Some(status) = status {
        backend.why += &format!(" ({}", output::word(&status.phase));
        if let Some(reason) = &status.reason {
            backend.why += &format!(", {}: {}", reason.reason, reason.message);
        }
        backend.why += ")";
    }
}

fn describe_text(deployment: &DeploymentView, description: &Description) -> String {
    let mut text = String::new();
    for vip in &description.vips {
        let ports: Vec<String> = vip.ports.iter().map(port_text).collect();
        text += &format!(
            "{} of deployment {}, {}: {} of {} instances ready\n",
            vip.vip,
            description.deployment,
            ports.join(", "),
            deployment.ready,
            deployment.wanted
        );
        for entered in &vip.locations {
            let withdrawn = if entered.withdrawn { " (withdrawn: no client's packet does)" } else { "" };
            text += &format!("\nEntering at {}{withdrawn}:", entered.location);
            match (&entered.shares, &entered.problem) {
                (Some(shares), _) => {
                    let traffic = entered.traffic.as_ref().map(traffic_text).unwrap_or_default();
                    text += &format!(" {} buckets\n{traffic}{}\n", shares.buckets, table(shares));
                }
                (None, problem) => {
                    text += &format!(" not known: {}\n", problem.as_deref().unwrap_or_default());
                }
            }
        }
        text += "\n";
    }
    text.trim_end().into()
}

fn table(shares: &Shares) -> String {
    let mut table =
        Table::new(&["  SHARE", "BUCKETS", "BEFORE", "SERVED-BY", "AT", "STATE", "WEIGHT", "WHY"]);
    for backend in &shares.backends {
        let (name, at) = match &backend.owner {
            Owner::Instance { instance, machine, .. } => (instance.to_string(), machine.to_string()),
            Owner::Location { location, distance_km, latency_ms, ready } => {
                let measured = latency_ms.map(|ms| format!("{ms:.1} ms, ")).unwrap_or_default();
                (format!("location {location}"), format!("{measured}{distance_km:.0} km, {ready} ready"))
            }
        };
        table.row([
            format!("  {:.1}%", backend.percent),
            backend.buckets.to_string(),
            backend.buckets_before.to_string(),
            name,
            at,
            output::word(&backend.state),
            backend.weight.map(|weight| weight.to_string()).unwrap_or_default(),
            backend.why.clone(),
        ]);
    }
    if table.is_empty() { "  nobody serves it".into() } else { table.to_string() }
}

/// What enters, and why some of it may go elsewhere.
fn traffic_text(traffic: &Traffic) -> String {
    let Traffic { entering, asked, capacity, grant, .. } = traffic;
    let rule = if grant.quotas.is_empty() {
        "all may stay".into()
    } else {
        let quotas = grant.quotas.iter().map(|(location, quota)| format!("{location} {quota:.1}"));
        format!("granted are {}", quotas.collect::<Vec<_>>().join(", "))
    };
    format!(
        "  New connections a second: {entering:.1} enter, {asked:.1} are asked for, instances here can serve {capacity:.1}; \
         {rule}\n"
    )
}

fn port_text(port: &Port) -> String {
    format!("{}/{}", port.port, output::word(&port.protocol))
}

fn traced(deployment: &DeploymentView, routes: &RoutesView, args: &VipTraceArgs) -> anyhow::Result<Traced> {
    check_location(routes, args.location.as_ref())?;
    let client = args.client.0;
    let vips = meant(routes, &args.target);
    let Some(vip) = vips.iter().copied().find(|vip| vip.is_ipv4() == client.is_ipv4()) else {
        let family = if client.is_ipv4() { "IPv4" } else { "IPv6" };
        let vips: Vec<String> = vips.iter().map(ToString::to_string).collect();
        bail!(
            "the client's address is {family}, the virtual IP is {}; give both of one family",
            vips.join(", ")
        )
    };
    let port = which_port(&deployment.spec.ports, args.to, vip)?;
    let flow = Flow { client, vip, port: port.port.get(), protocol: port.protocol };
    let known = by_location(routes, vip);
    let there =
        routes.locations.iter().filter(|it| args.location.as_ref().is_none_or(|id| *id == it.location));
    let traces = there.map(|it| {
        let mut trace = trace(&it.location, &known, &flow);
        if let Some(problem) = it.problem.as_ref().filter(|_| trace.step.is_none()) {
            trace.why_not = Some(format!("its table is not known: {problem}"));
        }
        TracedFrom { withdrawn: it.withdrawn, trace }
    });
    Ok(Traced {
        deployment: deployment.name.clone(),
        client,
        vip,
        port: flow.port,
        protocol: flow.protocol,
        locations: traces.collect(),
    })
}

/// The port that is meant; the only one, if none is named.
fn which_port(ports: &[Port], named: Option<VipPort>, vip: IpAddr) -> anyhow::Result<&Port> {
    let wanted = |port: &&Port| {
        named.is_none_or(|named| {
            named.port == port.port && named.protocol.is_none_or(|protocol| protocol == port.protocol)
        })
    };
    let list = |ports: Vec<&Port>| ports.into_iter().map(port_text).collect::<Vec<_>>().join(", ");
    match ports.iter().filter(wanted).collect::<Vec<_>>().as_slice() {
        [port] => Ok(port),
        [] if ports.is_empty() => bail!("{vip} serves no port; add `ports` to the deployment's spec"),
        [] => {
            bail!("{vip} does not serve that port; choose one of {} with --to", list(ports.iter().collect()))
        }
        several => bail!("several ports may be meant; choose one of {} with --to", list(several.to_vec())),
    }
}

fn trace_text(traced: &Traced) -> String {
    let Traced { deployment, client, vip, port, protocol, locations } = traced;
    let to = SocketAddr::new(*vip, *port);
    let mut table = Table::new(&["ENTERS-AT", "BUCKET", "NOW", "BEFORE", "NEW-CONNECTION"]);
    for TracedFrom { withdrawn, trace } in locations {
        let withdrawn = if *withdrawn { " (withdrawn)" } else { "" };
        let step = trace.step.as_ref();
        let served = trace
            .instance
            .as_ref()
            .map(|it| format!("{} on {}, {}, at {}", it.instance, it.machine, it.location, it.address));
        let why_not = || trace.why_not.as_ref().map(|why| format!("nobody: {why}"));
        table.row([
            format!("{}{withdrawn}", trace.location),
            step.map(bucket_text).unwrap_or_default(),
            step.map(|step| hop_text(&step.now)).unwrap_or_default(),
            step.and_then(|step| step.before.as_ref()).map(hop_text).unwrap_or_default(),
            served.or_else(why_not).unwrap_or_default(),
        ]);
    }
    format!(
        "{client} to {to}/{} of deployment {deployment}\n\n{table}\n\nA new connection goes to the owner NOW; one that is \
         older than the bucket's last change stays at the owner BEFORE.",
        output::word(protocol)
    )
}

fn bucket_text(step: &Step) -> String {
    format!("{} of {}", step.bucket, step.buckets)
}

fn hop_text(hop: &Hop) -> String {
    match &hop.owner {
        Owner::Instance { instance, machine, .. } => format!("{instance} on {machine}"),
        Owner::Location { location, .. } => {
            let there = hop.there.as_ref().map(|step| {
                let before = step.before.as_ref().map(|hop| format!(", before {}", hop_text(hop)));
                format!(
                    ", bucket {}: {}{}",
                    bucket_text(step),
                    hop_text(&step.now),
                    before.unwrap_or_default()
                )
            });
            format!("location {location} by {}{}", hop.to, there.unwrap_or_default())
        }
    }
}
