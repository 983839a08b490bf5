//! What `vip trace` and `vip describe` say, beside where connections of both families really go.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyplace_tests::Location;
use anyplace_tests::platform::Options;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use serde_json::Value;

use super::world::{World, hello, wait_for};

/// Connections of each client in each round, every third one by IPv6; three clients make more than a hundred.
const CONNECTIONS: u16 = 36;
/// Connections of each client that stay open while an instance drains.
const OPEN: u16 = 20;
/// Longer than the whole scenario after the drain begins.
const DRAIN_MS: u64 = 600_000;
/// Looked at so often, the routes don't change any more.
const CALM: u32 = 15;

/// A connection, and the instance that was said to get it.
struct Traced {
    location: Location,
    port: u16,
    instance: String,
}

#[test]
fn connections_go_where_the_trace_says_before_and_after_a_drain() {
    let options = Options { drain_ms: Some(DRAIN_MS), ..Options::default() };
    let Some(world) = World::start_with("tstrace", 3, options) else { return };
    // None in São Paulo: what enters there is served elsewhere.
    let spec = |instances| hello("hello", instances, "placement: {regions: [eu, ap]}\n");
    let vip: Ipv4Addr = world.apply("hello", &spec(5)).parse().unwrap();
    let vip6: Ipv6Addr =
        world.json(&["get", "deployments", "hello"])["vip6"].as_str().unwrap().parse().unwrap();
    calm(&world);
    let first = all_as_traced(&world, vip, vip6, 20_000);
    let serving: BTreeSet<&str> = first.iter().map(|it| it.instance.as_str()).collect();
    assert_eq!(serving.len(), 5, "every instance gets connections: {serving:?}");
    described(&world, 5, 0);

    let open = of_all_clients(&world, |location| {
        let connected = |port| {
            let instance = new_connection(&trace(&world, location, (location.client_address(), port).into()));
            let stream = connect_from(&world, location, port, vip);
            (Traced { location: location.clone(), port, instance }, stream)
        };
        (30_000..30_000 + OPEN).map(connected).collect()
    });
    world.cli_ok(&["apply", "-f", &world.spec("hello", &spec(4)), "--wait", "--timeout", "40s"]);
    let drained = wait_for("an instance that drains", 20, || draining(&world).ok_or("none".into()));
    calm(&world);
    let mut kept = 0;
    for (traced, mut stream) in open {
        assert_eq!(answer(&mut stream), traced.instance, "an open connection is where it was");
        if traced.instance == drained {
            let client = (traced.location.client_address(), traced.port).into();
            let trace = trace(&world, &traced.location, client);
            let before = names(&trace, "before");
            assert!(before.contains(&drained), "the owner before is {drained}: {trace:#}");
            kept += 1;
        }
    }
    assert!(kept > 0, "{drained} had none of the open connections");

    let second = all_as_traced(&world, vip, vip6, 40_000);
    assert!(second.iter().all(|it| it.instance != drained), "{drained} drains and gets new connections");
    described(&world, 4, 1);

    eprintln!(
        "{} connections traced, {kept} of those that stayed open at {drained}",
        first.len() + second.len()
    );
    world.end();
}

fn locations(world: &World) -> Vec<Location> {
    world.platform.bed().topology().locations.clone()
}

/// Waits until no location's routes change any more.
fn calm(world: &World) {
    let (mut last, mut same) = (Value::Null, 0);
    wait_for("routes that stay", 20, || {
        let now = world.json(&["vip", "describe", "hello"]);
        same = if now == last { same + 1 } else { 0 };
        last = now;
        if same >= CALM { Ok(()) } else { Err(format!("the same for {same} looks")) }
    });
}

fn trace(world: &World, location: &Location, client: SocketAddr) -> Value {
    let client = client.to_string();
    let mut trace = world.json(&["vip", "trace", "hello", &client, "--location", &location.name]);
    trace["locations"][0].take()
}

fn new_connection(trace: &Value) -> String {
    trace["instance"]["instance"].as_str().unwrap_or_else(|| panic!("nobody gets it: {trace:#}")).to_owned()
}

/// The instances below a hop of a trace, whatever location they are in.
fn names(trace: &Value, hop: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for table in [trace, &trace["now"]["there"], &trace["before"]["there"]] {
        found.extend(table[hop]["instance"].as_str().map(ToOwned::to_owned));
    }
    found
}

/// The same for each client at once.
fn of_all_clients<T: Send>(world: &World, work: impl Fn(&Location) -> Vec<T> + Sync) -> Vec<T> {
    let locations = locations(world);
    std::thread::scope(|scope| {
        let clients: Vec<_> = locations.iter().map(|location| scope.spawn(|| work(location))).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    })
}

/// Connections of all clients from ports of their own choice: each is answered by the instance that was said before.
fn all_as_traced(world: &World, vip: Ipv4Addr, vip6: Ipv6Addr, from: u16) -> Vec<Traced> {
    of_all_clients(world, |location| as_traced(world, vip, vip6, location, from))
}

fn as_traced(world: &World, vip: Ipv4Addr, vip6: Ipv6Addr, location: &Location, from: u16) -> Vec<Traced> {
    let node = world.platform.bed().node(&location.client()).unwrap();
    let one = |port: u16| {
        let (client, url): (IpAddr, String) = if port.is_multiple_of(3) {
            (location.client_address6().into(), format!("http://[{vip6}]/"))
        } else {
            (location.client_address().into(), format!("http://{vip}/"))
        };
        let trace = trace(world, location, (client, port).into());
        let instance = new_connection(&trace);
        let mut curl = node.command("curl");
        curl.args(["--silent", "--show-error", "--fail", "--globoff", "--max-time", "10", "--local-port"]);
        let output =
            curl.args([&port.to_string(), "--interface", &client.to_string(), &url]).output().unwrap();
        let page = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}: {trace:#}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(instance_of(&page), instance, "{client} from port {port}: {trace:#}");
        Traced { location: location.clone(), port, instance }
    };
    (from..from + CONNECTIONS).map(one).collect()
}

/// The instance that a page names.
fn instance_of(page: &str) -> String {
    page.trim().rsplit(' ').next().unwrap().to_owned()
}

/// A connection that asks nothing yet.
fn connect_from(world: &World, location: &Location, port: u16, vip: Ipv4Addr) -> TcpStream {
    let node = world.platform.bed().node(&location.client()).unwrap();
    let stream = node.inside(|| {
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(location.client_address(), port)))?;
        connect(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(vip, 80)))?;
        Ok(TcpStream::from(socket))
    });
    stream.unwrap()
}

/// Asks for the page; who it is from.
fn answer(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.0 200") || page.starts_with("HTTP/1.1 200"), "{page}");
    instance_of(&page)
}

fn backends(world: &World) -> Vec<(String, Value)> {
    let description = world.json(&["vip", "describe", "hello"]);
    let vips = description["vips"].as_array().unwrap();
    assert_eq!((vips.len(), &vips[0]["locations"]), (2, &vips[1]["locations"]), "the same by both addresses");
    let locations = vips[0]["locations"].as_array().unwrap().clone();
    let of = |location: &Value| {
        let name = location["location"].as_str().unwrap().to_owned();
        let backends = location["backends"].as_array().unwrap().clone();
        backends.into_iter().map(move |backend| (name.clone(), backend)).collect::<Vec<_>>()
    };
    locations.iter().flat_map(of).collect()
}

fn draining(world: &World) -> Option<String> {
    let mut backends = backends(world).into_iter();
    let found = backends.find(|(_, backend)| backend["state"] == "draining");
    found.map(|(_, backend)| backend["instance"].as_str().unwrap().to_owned())
}

/// Looks whether each location's shares add up, and who has them.
fn described(world: &World, ready: usize, draining: usize) {
    let backends = backends(world);
    for location in locations(world) {
        let here: Vec<&Value> =
            backends.iter().filter(|(name, _)| *name == location.name).map(|(_, it)| it).collect();
        let sum = |kind: &str| {
            let of_kind = here.iter().filter(|it| it["kind"] == kind);
            of_kind.map(|it| it["percent"].as_f64().unwrap()).sum::<f64>().round() as u32
        };
        // Who has instances serves what enters; São Paulo's clients are served elsewhere.
        let expected = if location.name == "gru" { (0, 100) } else { (100, 0) };
        assert_eq!((sum("instance"), sum("location")), expected, "{}: {here:#?}", location.name);
    }
    let count = |state: &str| {
        let in_state = backends.iter().filter(|(_, it)| it["kind"] == "instance" && it["state"] == state);
        in_state.count()
    };
    assert_eq!((count("ready"), count("draining")), (ready, draining));
    let idle = backends.iter().find(|(_, it)| it["state"] == "draining");
    assert!(idle.is_none_or(|(_, it)| it["buckets"] == 0 && it["why"].as_str().unwrap().contains("drains")));
}
