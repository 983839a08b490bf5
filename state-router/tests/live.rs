//! A router's machine with a container and a client, in namespaces: what the router tells of real connections.
//!
//! ```text
//! client --- machine (eth0 10.1.1.1) --- container 10.1.1.65
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]
#![allow(dead_code, reason = "the support module serves other tests too")]

#[path = "../../ebpf/loader/tests/support/namespaces.rs"]
mod namespaces;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    num::NonZeroU32,
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use anyplace_ebpf::{Capacity, DataPlane, FlowEvents, Meters, Options};
use anyplace_model::{GATEWAY6, Route, container_mac, host_interface, instance_address6};
use anyplace_state_router::{Change, FlowLogConfig, Log, Plane, render_metrics, run_flow_log};
use namespaces::{BpfFs, Namespace, object, root_or_skip};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 1);
const INSTANCE: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 65);
const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 1);
/// Of a deployment without instances.
const EMPTY_VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const PORT: u16 = 80;
const CONTAINER_PORT: u16 = 8080;
/// Generous on a busy machine; a lost packet fails the test after it instead of hanging.
const PATIENCE: Duration = Duration::from_secs(10);
/// Below those that the kernel chooses.
static NEXT_PORT: AtomicU16 = AtomicU16::new(20_000);
/// From linux/ethtool.h.
const ETHTOOL_STXCSUM: u32 = 0x17;

struct Bed {
    plane: Plane,
    machine: Namespace,
    client: Namespace,
    _container: Namespace,
    bpffs: BpfFs,
}

impl Bed {
    fn new() -> Self {
        let (machine, client) = (Namespace::new("machine"), Namespace::new("client"));
        let (container, bpffs) = (Namespace::new("container"), BpfFs::new());
        let veth = host_interface(INSTANCE);
        machine.ip(&format!(
            "link add eth0 type veth peer name eth0 netns {client}\n\
             addr add {MACHINE}/31 dev eth0\n\
             addr add fd61:1:1::1/127 dev eth0 nodad\n\
             link set eth0 up\n\
             link add {veth} address 02:61:00:00:00:01 type veth peer name eth0 netns {container}\n\
             addr add 169.254.1.1/32 dev {veth}\n\
             link set {veth} up\n\
             route add {INSTANCE}/32 dev {veth}\n",
            client = client.name,
            container = container.name,
        ));
        client.ip("addr add 10.1.1.0/31 dev eth0\n\
             addr add fd61:1:1::/127 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via 10.1.1.1\n\
             route add default via fd61:1:1::1\n");
        // A veth leaves checksums to hardware that it doesn't have, and XDP passes them on unfinished.
        client.ethtool("eth0", ETHTOOL_STXCSUM, 0);
        let mac: Vec<String> = container_mac(INSTANCE).iter().map(|byte| format!("{byte:02x}")).collect();
        container.ip(&format!(
            "link set eth0 address {mac}\n\
             addr add {INSTANCE}/32 dev eth0\n\
             addr add {six}/128 dev eth0 nodad\n\
             link set eth0 up\n\
             route add 169.254.1.1 dev eth0\n\
             route add default via 169.254.1.1\n\
             neigh add {GATEWAY6} lladdr 02:61:00:00:00:01 dev eth0 nud permanent\n\
             route add default via {GATEWAY6} dev eth0 onlink\n",
            mac = mac.join(":"),
            six = instance_address6(INSTANCE),
        ));
        machine.sysctl("net.ipv4.ip_forward", "1");
        let options = Options {
            uplink: "eth0".into(),
            address: MACHINE,
            address6: None,
            pin_dir: bpffs.path.join("anyplace"),
            object: object(),
        };
        let capacity = Capacity { vips: 16, buckets: 1 << 16 };
        let mut data_plane = machine.enter(|| DataPlane::load_for(options, capacity).unwrap());
        data_plane.set_flow_events(NonZeroU32::new(1)).unwrap();
        let mut plane = Plane::new(data_plane, "ams-1".parse().unwrap());
        let routes = [route(VIP.into(), true), route(VIP6.into(), true), route(EMPTY_VIP.into(), false)];
        machine.enter(|| plane.apply(routes.into_iter().map(Change::Put).collect()));
        assert!(plane.is_settled());
        serve(&container);
        Self { plane, machine, client, _container: container, bpffs }
    }

    /// A connection from the client: a line, and its echo. Returns the client's end.
    fn connection(&self, vip: impl Into<IpAddr>) -> SocketAddr {
        let vip = SocketAddr::new(vip.into(), PORT);
        self.client.enter(|| {
            let mut stream = TcpStream::connect_timeout(&vip, PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(b"a line\n").unwrap();
            let mut echo = String::new();
            BufReader::new(&stream).read_line(&mut echo).unwrap();
            assert_eq!(echo, "a line\n");
            stream.local_addr().unwrap()
        })
    }

    /// Datagrams from one socket of the client, each echoed if somebody is there. Returns the client's end.
    fn datagrams(&self, vip: impl Into<IpAddr>, count: u8, answered: bool) -> SocketAddr {
        let vip = SocketAddr::new(vip.into(), PORT);
        self.client.enter(|| {
            let any: IpAddr =
                if vip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            // A port that no other socket of the test had: its flow is a new one.
            let socket = UdpSocket::bind((any, NEXT_PORT.fetch_add(1, Ordering::Relaxed))).unwrap();
            socket.connect(vip).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            for number in 0..count {
                socket.send(&[number; 10]).unwrap();
                let mut echo = [0; 100];
                if answered {
                    assert_eq!(socket.recv(&mut echo).unwrap(), 10);
                    assert_eq!(echo[..10], [number; 10]);
                }
            }
            socket.local_addr().unwrap()
        })
    }

    fn metrics(&self) -> String {
        let meters = Meters::open(&self.bpffs.path.join("anyplace")).unwrap();
        render_metrics(&meters, &self.plane.names()).unwrap()
    }
}

fn route(vip: IpAddr, served: bool) -> Route {
    let ports: Vec<_> = ["tcp", "udp"]
        .iter()
        .map(|protocol| json!({ "port": PORT, "container_port": CONTAINER_PORT, "protocol": protocol }))
        .collect();
    let instance = json!({
        "instance": "web-1", "machine": "ams-1", "address": INSTANCE, "ready": true, "draining": false
    });
    let local = if served { vec![instance] } else { vec![] };
    serde_json::from_value(json!({ "vip": vip, "ports": ports, "local": local, "remote": [] })).unwrap()
}

/// Echo servers for both families.
fn serve(container: &Namespace) {
    let (ready, started) = std::sync::mpsc::channel();
    let udp_ready = ready.clone();
    container.spawn(move || {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, CONTAINER_PORT)).unwrap();
        ready.send(()).unwrap();
        while let Ok((mut stream, _)) = listener.accept() {
            std::thread::spawn(move || {
                let reader = BufReader::new(stream.try_clone().unwrap());
                for line in reader.lines().map_while(Result::ok) {
                    let _ = stream.write_all(format!("{line}\n").as_bytes());
                }
            });
        }
    });
    container.spawn(move || {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, CONTAINER_PORT)).unwrap();
        udp_ready.send(()).unwrap();
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    for _ in 0..2 {
        started.recv_timeout(PATIENCE).expect("the echo servers start");
    }
}

#[test]
fn metrics_tell_what_each_instance_was_given() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    assert!(!bed.metrics().contains("instance=\""), "nothing yet");
    for _ in 0..3 {
        bed.connection(VIP);
        bed.datagrams(VIP, 2, true);
    }
    bed.datagrams(VIP, 1, true);
    bed.connection(VIP6);
    bed.datagrams(VIP6, 5, true);
    bed.datagrams(EMPTY_VIP, 1, false);
    let metrics = bed.metrics();
    let value = |counter: &str, vip: IpAddr, protocol: &str| -> u64 {
        let labels = format!("vip=\"{vip}\",port=\"80\",protocol=\"{protocol}\",instance=\"web-1\"");
        let start = format!("anyplace_router_instance_{counter}_total{{{labels}}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
        line.unwrap_or_else(|| panic!("no {start}in\n{metrics}")).parse().unwrap()
    };
    // A datagram of 10 bytes has headers of 28 bytes, by IPv6 of 48; the seventh socket sent one only.
    assert_eq!(value("packets", VIP.into(), "udp"), 7);
    assert_eq!(value("bytes", VIP.into(), "udp"), 7 * 38);
    assert_eq!(value("new_flows", VIP.into(), "udp"), 3);
    assert_eq!(value("packets", VIP6.into(), "udp"), 5);
    assert_eq!(value("bytes", VIP6.into(), "udp"), 5 * 58);
    assert_eq!(value("new_flows", VIP6.into(), "udp"), 1);
    assert_eq!(value("new_flows", VIP.into(), "tcp"), 3);
    assert_eq!(value("new_flows", VIP6.into(), "tcp"), 1);
    // SYN, ACK and a line at least.
    assert!(value("packets", VIP.into(), "tcp") >= 9, "{metrics}");
    assert!(!metrics.contains(&format!("vip=\"{EMPTY_VIP}\",port=\"80\",protocol=\"udp\",instance")));
    assert!(metrics.contains("anyplace_router_no_backend_total 1\n"), "{metrics}");
}

/// Outcome, client, VIP port, protocol, instance.
type Told = (String, SocketAddr, SocketAddr, String, Option<String>);

/// What a file of the log says, and how often it says it.
fn read(path: &std::path::Path) -> BTreeMap<Told, usize> {
    let mut told = BTreeMap::new();
    let text = std::fs::read_to_string(path).unwrap_or_default();
    // The log is written meanwhile: its last line may be half there, and is whole at the next look.
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let text = |field: &str| line[field].as_str().map(str::to_owned);
        let address = |field: &str| text(field).unwrap().parse::<SocketAddr>().unwrap();
        let instance = text("instance");
        assert_eq!(text("address"), instance.as_ref().map(|_| INSTANCE.to_string()), "{line}");
        let time: jiff::Timestamp = text("time").unwrap().parse().unwrap();
        let age = jiff::Timestamp::now().duration_since(time).abs();
        assert!(age < jiff::SignedDuration::from_secs(120), "{line} is {age:?} away");
        let flow = (
            text("outcome").unwrap(),
            address("client"),
            address("vip"),
            text("protocol").unwrap(),
            instance,
        );
        *told.entry(flow).or_default() += 1;
    }
    told
}

#[test]
fn the_flow_log_has_what_clients_did() {
    if !root_or_skip() {
        return;
    }
    let bed = Bed::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flows.jsonl");
    let config: FlowLogConfig = serde_json::from_value(json!({ "one_in": 1 })).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let start = |bed: &Bed| {
        let events = FlowEvents::open(&bed.bpffs.path.join("anyplace")).unwrap();
        let (log, shutdown) = (Log::open(&config, folder.path()).unwrap(), CancellationToken::new());
        (runtime.spawn(run_flow_log(events, log, bed.plane.names(), shutdown.clone())), shutdown)
    };
    // What clients do, and what is to be told of it.
    let mut expected: BTreeMap<Told, usize> = BTreeMap::new();
    let mut expect = |outcome: &str, client, vip: IpAddr, protocol: &str, times| {
        let instance = (outcome == "established").then(|| "web-1".to_owned());
        let flow = (outcome.to_owned(), client, SocketAddr::new(vip, PORT), protocol.to_owned(), instance);
        assert_eq!(expected.insert(flow, times), None, "a port of a client was used twice");
    };
    let mut act = |bed: &Bed| {
        for vip in [IpAddr::from(VIP), IpAddr::from(VIP6)] {
            for _ in 0..10 {
                expect("established", bed.connection(vip), vip, "tcp", 1);
                expect("established", bed.datagrams(vip, 3, true), vip, "udp", 1);
                // One datagram establishes nothing.
                bed.datagrams(vip, 1, true);
            }
        }
        expect("no_backend", bed.datagrams(EMPTY_VIP, 4, false), EMPTY_VIP.into(), "udp", 4);
    };
    let (log, shutdown) = start(&bed);
    act(&bed);
    shutdown.cancel();
    runtime.block_on(log).unwrap();
    // And what is told between two runs waits for the next.
    act(&bed);
    let (log, shutdown) = start(&bed);
    let begun = Instant::now();
    while read(&path) != expected && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(read(&path), expected);
    shutdown.cancel();
    runtime.block_on(log).unwrap();
    assert!(bed.metrics().contains("\nanyplace_router_flow_events_lost_total 0\n"), "{}", bed.metrics());
}
