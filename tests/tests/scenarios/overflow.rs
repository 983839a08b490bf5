//! More new connections than a location's instances should have: the rest goes to the nearest other location, and comes
//! back when they become fewer. Which is the nearest is measured: by coordinates Tokyo would be, by the links' delays São
//! Paulo is.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyplace_tests::Load;
use anyplace_tests::platform::Options;
use serde_json::Value;

use super::world::{World, hello, wait_for};

/// New connections a second that an instance should have.
const EACH: u32 = 20;
/// Between requests that one instance serves alone, and between those that are too many for it.
const LIGHT: Duration = Duration::from_millis(125);
const HEAVY: Duration = Duration::from_millis(33);
/// Requests of which the locations' parts are counted. From São Paulo an answer takes long enough that they are few a second.
const COUNTED: usize = 200;
/// Between requests that nearly all are answered at once, so that they don't make up a load.
const PAUSE: Duration = Duration::from_millis(250);

/// One instance in Amsterdam, three in each other location: by the GPUs that there are.
fn world(bed: &str) -> Option<World> {
    let gpus = |count: usize| vec![("X1".to_owned(), "16Gi".to_owned()); count];
    let machines = [("ams-1", 1), ("nrt-1", 2), ("nrt-2", 1), ("gru-1", 2), ("gru-2", 1)];
    let gpus = machines.map(|(machine, count)| (machine.to_owned(), gpus(count)));
    World::start_with(bed, 3, Options { gpus: gpus.into(), ..Options::default() })
}

/// What Amsterdam says of new connections.
fn traffic(world: &World) -> Value {
    let described = world.json(&["vip", "describe", "hello", "--location", "ams"]);
    described["vips"][0]["locations"][0]["traffic"].clone()
}

#[test]
fn what_exceeds_a_location_goes_to_the_nearest_other_and_comes_back() {
    let Some(world) = world("tsoverflow") else { return };
    let load = format!("load: {{metric: connections_per_second, target: {EACH}}}\n");
    let spec = hello("hello", 7, &load).replace("memory: 32Mi}", "memory: 32Mi, gpu: {count: 1}}");
    let vip = world.apply("hello", &spec);
    links_are_measured(&world);
    let target: SocketAddr = format!("{vip}:80").parse().unwrap();
    let start =
        |interval| Load::start(world.platform.bed().node("ams-client").unwrap(), target, interval).unwrap();

    let light = start(LIGHT);
    // An instance begins slowly: until it takes all that it should have, others take a part.
    wait_for("the instance to take its whole part", 60, || match traffic(&world) {
        traffic
            if traffic["entering"].as_f64() > Some(4.0)
                && traffic["capacity"].as_f64() >= Some(f64::from(EACH))
                && traffic["away"].is_null() =>
        {
            Ok(())
        }
        traffic => Err(traffic.to_string()),
    });
    assert_eq!(locations(answered(&world, &vip, 20, PAUSE)), ["ams"], "all stay while all fit");

    let heavy = start(HEAVY);
    // Until Amsterdam's instance has no more than it should have, with head-room for a quarter more.
    wait_for("the rest to go elsewhere", 60, || match traffic(&world) {
        traffic if traffic["away"]["gru"].as_u64() > Some(128) => Ok(()),
        traffic => Err(traffic.to_string()),
    });
    let answers = answered(&world, &vip, COUNTED, Duration::ZERO);
    eprintln!("of {COUNTED}: {answers:?}; {}", traffic(&world));
    let percent = |location: &str| answers.get(location).copied().unwrap_or(0) * 100 / COUNTED;
    assert!((20..50).contains(&percent("ams")), "{answers:?}");
    assert_eq!(percent("nrt"), 0, "São Paulo is nearer and has room: {answers:?}");
    let text = world.cli_ok(&["vip", "describe", "hello", "--location", "ams"]);
    assert!(text.contains("granted are ams ") && text.contains("% of what enters here; grants "), "{text}");

    all_served(heavy);
    wait_for("all to come back", 120, || match traffic(&world) {
        traffic if traffic["away"].is_null() => Ok(()),
        traffic => Err(traffic.to_string()),
    });
    assert_eq!(locations(answered(&world, &vip, 20, PAUSE)), ["ams"], "all are back");
    all_served(light);
    world.end();
}

/// The matrix has what the links make of each round trip, and describe shows it.
fn links_are_measured(world: &World) {
    let topology = world.platform.bed().topology();
    let known = |from: &str, to: &str| -> Option<f64> {
        let paths = world.json(&["location", "latency", from]);
        let path = paths.as_array().unwrap().iter().find(|path| path["to"] == to)?.clone();
        path["latency_ms"].as_f64().filter(|_| path["measured"] == true)
    };
    let pairs = [("ams", "gru"), ("ams", "nrt"), ("nrt", "gru")];
    let found = wait_for("all round trips to be measured, in the order of the delays", 60, || {
        let found = pairs.map(|(from, to)| known(from, to));
        if found.iter().all(Option::is_some) && found.is_sorted() {
            Ok(found.map(Option::unwrap))
        } else {
            Err(format!("{found:?}"))
        }
    });
    for ((from, to), measured_ms) in pairs.into_iter().zip(found) {
        let delay_ms = topology.delay(from, to).as_secs_f64() * 2e3;
        eprintln!("{from} to {to} and back: {measured_ms:.1} ms over links of {delay_ms} ms");
        assert!(measured_ms >= delay_ms, "{from} to {to}: nothing is faster than the links");
    }
    let distance = |to: &str| {
        let paths = world.json(&["location", "latency", "ams"]);
        paths.as_array().unwrap().iter().find(|path| path["to"] == to).unwrap()["distance_km"].as_f64()
    };
    assert!(distance("nrt") < distance("gru"), "by coordinates it is the other way");
    // The matrix also has what only the other end has measured; this shows what Amsterdam itself goes by.
    wait_for("Amsterdam's own measurement", 60, || {
        let text = world.cli_ok(&["vip", "describe", "hello", "--location", "ams"]);
        let sao_paulo = text.lines().find(|line| line.contains("location gru")).unwrap();
        if sao_paulo.contains(" ms, ") { Ok(()) } else { Err(text) }
    });
}

/// Who answers new requests, by location.
fn answered(world: &World, vip: &str, requests: usize, pause: Duration) -> BTreeMap<String, usize> {
    let mut answers = BTreeMap::new();
    for _ in 0..requests {
        let body = world.call("ams-client", vip).unwrap();
        std::thread::sleep(pause);
        let location = body.strip_prefix("hello from ").and_then(|rest| rest.split(',').next());
        *answers.entry(location.unwrap_or(&body).to_owned()).or_default() += 1;
    }
    answers
}

fn locations(answers: BTreeMap<String, usize>) -> Vec<String> {
    answers.into_keys().collect()
}

fn all_served(load: Load) {
    let requests = load.stop().unwrap();
    let failed: Vec<&String> = requests.iter().filter_map(|request| request.result.as_ref().err()).collect();
    assert!(requests.len() > 20, "only {} requests", requests.len());
    assert!(failed.is_empty(), "{} of {} failed: {failed:?}", failed.len(), requests.len());
}
