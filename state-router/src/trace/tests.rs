use std::num::NonZeroU16;

use anyplace_ebpf_model::{Machine, Program, Verdict, instance6, opening};
use anyplace_model::{Away, Endpoint, FULL_WEIGHT, Nearest, PARTS, Port, RemoteLocation, Span};
use anyplace_seed::Seed;

use super::*;

/// Where a packet's destination is, and where its encapsulation says what it is.
const DESTINATION: usize = 14 + 16;
const DESTINATION6: usize = 14 + 24;
/// Of packets with an encapsulation: 6080, as it stands there.
const GUE_PORT: [u8; 2] = 6_080_u16.to_be_bytes();
/// Machines that a packet may come to: a datagram is offered to all hops before the owner takes it.
const PATIENCE: usize = 16;

pub(crate) fn endpoint(name: &str, index: u8) -> Endpoint {
    Endpoint {
        instance: name.parse().unwrap(),
        machine: "ams-1".parse().unwrap(),
        address: Ipv4Addr::new(10, 1, 1, 64 + index),
        ready: true,
        draining: false,
        began_ms: u64::from(index),
        stopped_ms: 0,
        slot: u16::from(index),
        weight: FULL_WEIGHT,
    }
}

pub(crate) fn remote(name: &str, distance_km: f64) -> RemoteLocation {
    let index = name.as_bytes()[0];
    RemoteLocation {
        location: name.parse().unwrap(),
        distance_km,
        ready: 2,
        ingress: vec![Ipv4Addr::new(10, index, 1, 1), Ipv4Addr::new(10, index, 2, 1)],
    }
}

pub(crate) fn route(local: Vec<Endpoint>, remote: Vec<RemoteLocation>) -> Route {
    Route {
        vip: Ipv4Addr::new(203, 0, 113, 1).into(),
        ports: ports(),
        local,
        remote,
        away: Vec::new(),
        nearest: Vec::new(),
    }
}

fn ports() -> Vec<Port> {
    let port = |protocol| Port { port: NonZeroU16::new(80).unwrap(), container_port: None, protocol };
    vec![port(Protocol::Tcp), port(Protocol::Udp)]
}

fn name(location: usize) -> LocationId {
    format!("l{location}").parse().unwrap()
}

fn machine(location: usize, machine: u64) -> Ipv4Addr {
    Ipv4Addr::new(10, location as u8 + 1, machine as u8, 1)
}

/// Some locations with two machines each, their routes as their schedulers would write them at one moment.
fn any_routes(seed: &mut Seed, vip: IpAddr) -> BTreeMap<LocationId, Route> {
    let locations = 1 + seed.below(4) as usize;
    let local: Vec<Vec<Endpoint>> = (0..locations)
        .map(|location| {
            let count = seed.below(5);
            let instance = |index: u64| {
                let on = 1 + seed.below(2);
                let (ready, draining) = (seed.below(4) > 0, seed.below(4) == 0);
                let (began_ms, stopped_ms) = (1 + seed.below(50), 51 + seed.below(50));
                Endpoint {
                    instance: format!("i{location}-{index}").parse().unwrap(),
                    machine: format!("l{location}-{on}").parse().unwrap(),
                    address: Ipv4Addr::new(10, location as u8 + 1, on as u8, 64 + index as u8),
                    ready,
                    draining,
                    began_ms,
                    stopped_ms: if ready && !draining { 0 } else { stopped_ms },
                    slot: index as u16,
                    weight: 1 + seed.below(200) as u16,
                }
            };
            (0..count).map(instance).collect()
        })
        .collect();
    let shared = seed.below(2) == 0;
    let mut route = |here: usize| {
        let there = (0..locations).filter(|there| *there != here);
        let remote = there.filter_map(|there| {
            let ready = local[there].iter().filter(|it| it.ready && !it.draining).count() as u32;
            (ready > 0).then(|| RemoteLocation {
                location: name(there),
                distance_km: 1_000.0 * (here as f64 - there as f64).abs(),
                ready,
                ingress: vec![machine(there, 1), machine(there, 2)],
            })
        });
        let remote = remote.collect();
        let mut away = |since_ms| {
            let span = |_| Span {
                parts: seed.below(u64::from(PARTS) / 4) as u16,
                to: seed.one_in(2).then(|| name(seed.index(locations))),
            };
            Away { since_ms, spans: (0..4).map(span).collect() }
        };
        let away = if shared { vec![away(60), away(40), away(20)] } else { Vec::new() };
        let mut near = |since_ms| Nearest { since_ms, location: name(seed.index(locations)) };
        let nearest = [near(55), near(35), near(15)];
        let nearest = nearest[..seed.index(4)].to_vec();
        Route { vip, ports: ports(), local: local[here].clone(), remote, away, nearest }
    };
    (0..locations).map(|here| (name(here), route(here))).collect()
}

/// The machines of a location with what its routers put into their maps, for the model of the data plane.
fn machines(location: usize, route: &Route) -> Vec<Machine> {
    let tables = tables(route);
    let model = |table: &[Bucket]| {
        table.iter().map(|bucket| (bucket.now, bucket.before.unwrap_or(bucket.now))).collect()
    };
    let machine = |index: u64| {
        let mut machine = Machine::new(machine(location, index), 1_600);
        for protocol in [6, 17] {
            let key = (route.vip, 80, protocol);
            machine.vips.insert(
                key,
                anyplace_ebpf_model::Tables { full: model(&tables.full), local: model(&tables.local) },
            );
            let name = format!("{}-{index}", name(location));
            for it in route.local.iter().filter(|it| it.machine.as_str() == name && (it.ready || it.draining))
            {
                machine.instances.insert(it.address, [2; 6]);
                machine.ports.insert((it.address, key), 8_080);
            }
        }
        machine
    };
    vec![machine(1), machine(2)]
}

/// The instance that the first packet of a flow is delivered to, by packets and maps alone.
fn delivered(machines: &mut [Machine], enters: Ipv4Addr, flow: &Flow) -> Option<Ipv4Addr> {
    let number = if flow.protocol == Protocol::Tcp { 6 } else { 17 };
    let mut frame = opening(&(flow.client.ip(), flow.vip, flow.client.port(), flow.port, number));
    let at = |machines: &[Machine], hop: Ipv4Addr| {
        machines.iter().position(|it| it.address == hop || it.instances.contains_key(&hop))
    };
    let ingress = at(machines, enters).unwrap();
    if machines[ingress].run(Program::Ingress, &mut frame) == Verdict::Drop {
        return None;
    }
    for _ in 0..PATIENCE {
        let hop = Ipv4Addr::from(<[u8; 4]>::try_from(&frame[DESTINATION..DESTINATION + 4]).unwrap());
        let target = at(machines, hop)?;
        match machines[target].run(Program::Target, &mut frame) {
            Verdict::Redirect => {}
            _ => return None,
        }
        // Still encapsulated: on its way to another machine.
        if frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == GUE_PORT {
            continue;
        }
        let mut instances = machines.iter().flat_map(|machine| machine.instances.keys().copied());
        return instances.find(|instance| match flow.vip {
            IpAddr::V4(_) => frame[DESTINATION..DESTINATION + 4] == instance.octets(),
            IpAddr::V6(_) => frame[DESTINATION6..DESTINATION6 + 16] == instance6(*instance).octets(),
        });
    }
    panic!("{flow:?} goes in circles");
}

#[test]
fn a_new_connection_gets_the_instance_that_the_data_plane_gives_it() {
    let mut seed = Seed::from_env();
    let (mut served, mut relayed) = (0, 0);
    for _ in 0..300 {
        let vips: [IpAddr; 2] = [Ipv4Addr::new(203, 0, 113, 1).into(), "2001:db8:cafe::1".parse().unwrap()];
        let vip = vips[seed.below(2) as usize];
        let routes = any_routes(&mut seed, vip);
        let fleet: Vec<Machine> =
            routes.values().enumerate().flat_map(|(index, route)| machines(index, route)).collect();
        for _ in 0..20 {
            let client: IpAddr = match vip {
                IpAddr::V4(_) => Ipv4Addr::from(seed.next() as u32).into(),
                IpAddr::V6(_) => {
                    let low = u128::from(seed.next());
                    std::net::Ipv6Addr::from((0x2001_0db8 << 96) | low).into()
                }
            };
            let client = SocketAddr::new(client, 1 + seed.below(65_535) as u16);
            let protocol = if seed.below(2) == 0 { Protocol::Tcp } else { Protocol::Udp };
            let flow = Flow { client, vip, port: 80, protocol };
            let here = seed.below(routes.len() as u64) as usize;
            let trace = trace(&name(here), &routes, &flow);
            let ours = trace.instance.as_ref().map(|served| served.address);
            // Whatever machine of the location it comes to.
            for index in [1, 2] {
                let theirs = delivered(&mut fleet.clone(), machine(here, index), &flow);
                assert_eq!(ours, theirs, "{flow:?} at {here}: {trace:#?} of {routes:#?}");
            }
            assert_eq!(ours.is_none(), trace.why_not.is_some(), "{trace:?}");
            served += u32::from(ours.is_some());
            relayed += u32::from(trace.instance.is_some_and(|it| it.location != name(here)));
        }
    }
    assert!(served > 1_000 && relayed > 100, "{served} served, {relayed} of them elsewhere");
}

#[test]
fn what_is_not_known_is_said() {
    let flow = Flow {
        client: "198.51.100.10:40000".parse().unwrap(),
        vip: Ipv4Addr::new(203, 0, 113, 1).into(),
        port: 80,
        protocol: Protocol::Tcp,
    };
    let (ams, nrt) = ("ams".parse().unwrap(), "nrt".parse().unwrap());
    let mut routes = BTreeMap::new();
    let unknown = trace(&ams, &routes, &flow);
    assert!(unknown.step.is_none() && unknown.why_not.unwrap().contains("table of ams is not known"));
    routes.insert(ams, route(vec![], vec![remote("nrt", 9_340.0)]));
    let ams: LocationId = "ams".parse().unwrap();
    let elsewhere = trace(&ams, &routes, &flow);
    assert!(elsewhere.why_not.unwrap().contains("nrt gets it, and its table is not known"));
    routes.insert(nrt, route(vec![], vec![]));
    let nowhere = trace(&ams, &routes, &flow);
    assert!(nowhere.why_not.unwrap().contains("nrt has no instance in its own table"));
    routes.insert(ams.clone(), route(vec![], vec![]));
    assert!(trace(&ams, &routes, &flow).why_not.unwrap().contains("nothing is ready anywhere"));
}
