//! More new connections than a location's instances should have: the rest goes to the nearest other location, and comes
//! back when they become fewer.

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
/// Requests of which the locations' parts are counted. From Tokyo an answer takes long enough that they are few a second.
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
        traffic if traffic["away"]["nrt"].as_u64() > Some(128) => Ok(()),
        traffic => Err(traffic.to_string()),
    });
    let answers = answered(&world, &vip, COUNTED, Duration::ZERO);
    eprintln!("of {COUNTED}: {answers:?}; {}", traffic(&world));
    let percent = |location: &str| answers.get(location).copied().unwrap_or(0) * 100 / COUNTED;
    assert!((20..50).contains(&percent("ams")), "{answers:?}");
    assert_eq!(percent("gru"), 0, "Tokyo is nearer and has room: {answers:?}");
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
