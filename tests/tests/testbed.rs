//! The testbed itself: its network, its distances, its failures and its clean-up. Needs root.

#![allow(clippy::unwrap_used)] // Helpers of tests; clippy spares only functions marked as tests.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyplace_tests::{Load, Node, Testbed, Topology, VIP_PREFIX, cleanup, http_get, leftovers, require_root};

const VIP: &str = "203.0.113.7";
/// Connections of the bandwidth test.
const FLOWS: usize = 4;

/// Answers HTTP requests on a node with the node's name, until dropped.
struct Server(Arc<AtomicBool>);

impl Server {
    fn start(node: &Node, address: &str, port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (ready_send, ready) = std::sync::mpsc::channel();
        let (node, address, seen) = (node.clone(), address.to_owned(), stop.clone());
        std::thread::spawn(move || {
            node.enter().unwrap();
            let listener = TcpListener::bind((address.as_str(), port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            ready_send.send(()).unwrap();
            while !seen.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                };
                let name = node.name().to_owned();
                std::thread::spawn(move || {
                    stream.set_nonblocking(false).unwrap();
                    let _ = stream.read(&mut [0; 1024]);
                    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n";
                    let _ = write!(stream, "{head}Content-Length: {}\r\n\r\n{name}", name.len());
                });
            }
        });
        ready.recv().unwrap();
        Self(stop)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn connect(node: &Node, address: Ipv4Addr, port: u16) -> Duration {
    node.inside(|| {
        let start = Instant::now();
        TcpStream::connect_timeout(&SocketAddr::from((address, port)), Duration::from_secs(3))?;
        Ok(start.elapsed())
    })
    .unwrap_or_else(|error| panic!("{} to {address}: {error:#}", node.name()))
}

/// Serves the VIP on every machine without any router: an address on loopback, a plain server.
fn serve_vip(bed: &Testbed) -> Vec<Server> {
    let machines = bed.topology().machines();
    let serve = |machine: &anyplace_tests::Machine| {
        let node = bed.node(&machine.name).unwrap();
        node.run("ip", &["addr", "add", &format!("{VIP}/32"), "dev", "lo"]).unwrap();
        bed.announce_prefixes(&machine.name, &[VIP_PREFIX]).unwrap();
        let server = Server::start(node, VIP, 80);
        bed.bird(&machine.name, &["configure"]).unwrap();
        server
    };
    machines.iter().map(serve).collect()
}

fn who_answers(bed: &Testbed, client: &str) -> Option<String> {
    let url = format!("http://{VIP}/");
    http_get(bed.node(client).unwrap(), &url, Duration::from_secs(1)).ok().map(|response| response.body)
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen in 15 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn all_nodes_reach_each_other_at_their_distance_and_nothing_is_left() {
    if !require_root("the testbed") {
        return;
    }
    let bed = Testbed::create("tnet", &Topology::three_locations()).unwrap();
    let topology = bed.topology().clone();
    let mut targets: Vec<(String, String, Ipv4Addr)> = Vec::new();
    for location in &topology.locations {
        targets.push((location.control(), location.name.clone(), location.control_address()));
        for machine in topology.machines_of(location) {
            targets.push((machine.name.clone(), location.name.clone(), machine.address()));
        }
    }
    targets.push(("global".into(), "ams".into(), Ipv4Addr::new(10, 0, 0, 10)));
    let serve =
        |(node, _, _): &(String, String, Ipv4Addr)| Server::start(bed.node(node).unwrap(), "0.0.0.0", 7000);
    let _servers: Vec<_> = targets.iter().map(serve).collect();
    for (from, from_location, _) in &targets {
        for (to, to_location, address) in &targets {
            let elapsed = connect(bed.node(from).unwrap(), *address, 7000);
            let least = topology.delay(from_location, to_location) * 2;
            assert!(elapsed >= least, "{from} to {to} took {elapsed:?}, less than {least:?}");
        }
    }
    // An instance's address leads to its machine, from another location too.
    bed.node("gru-2").unwrap().run("ip", &["addr", "add", "10.3.2.70/32", "dev", "lo"]).unwrap();
    connect(bed.node("ams-1").unwrap(), Ipv4Addr::new(10, 3, 2, 70), 7000);

    bed.destroy().unwrap();
    assert_eq!(leftovers("tnet"), Vec::<String>::new());
}

#[test]
fn clients_are_served_nearby_by_all_machines_and_traffic_moves_on_failures() {
    if !require_root("the testbed") {
        return;
    }
    let bed = Testbed::create("tbgp", &Topology::three_locations()).unwrap();
    let _servers = serve_vip(&bed);
    for location in ["ams", "nrt", "gru"] {
        let client = format!("{location}-client");
        wait_for("the VIP", || who_answers(&bed, &client).is_some());
        let mut seen = BTreeSet::new();
        wait_for("an answer from both machines", || {
            seen.extend(who_answers(&bed, &client));
            seen.len() == 2
        });
        assert!(seen.iter().all(|name| name.starts_with(location)), "{client} was answered by {seen:?}");
    }

    let target = SocketAddr::from((VIP.parse::<Ipv4Addr>().unwrap(), 80));
    let load = Load::start(bed.node("nrt-client").unwrap(), target, Duration::from_millis(20)).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    bed.kill_machine("nrt-1").unwrap();
    assert_eq!(bed.processes_on("nrt-1"), Vec::<i32>::new());
    std::thread::sleep(Duration::from_millis(1500));
    let report = load.report().unwrap();
    assert!(report.requests > 60, "{report:?}");
    assert!(report.longest_gap_ms < 1500, "{report:?}");
    assert_eq!(who_answers(&bed, "nrt-client").as_deref(), Some("nrt-2"));

    // Amsterdam withdraws; São Paulo is nearer to it than Tokyo.
    bed.withdraw_location("ams").unwrap();
    wait_for("another location's answer", || {
        who_answers(&bed, "ams-client").is_some_and(|name| name.starts_with("gru"))
    });
    bed.announce_location("ams").unwrap();
    wait_for("its own answer", || {
        who_answers(&bed, "ams-client").is_some_and(|name| name.starts_with("ams"))
    });

    bed.revive_machine("nrt-1").unwrap();
    bed.announce_prefixes("nrt-1", &[VIP_PREFIX]).unwrap();
    bed.bird("nrt-1", &["configure"]).unwrap();
    wait_for("the revived machine's answer", || who_answers(&bed, "nrt-client").as_deref() == Some("nrt-1"));
    bed.destroy().unwrap();
    assert_eq!(leftovers("tbgp"), Vec::<String>::new());
}

#[test]
fn delayed_links_carry_hundreds_of_megabits() {
    if !require_root("the testbed") {
        return;
    }
    let bed = Testbed::create("tbw", &Topology::of_locations(2)).unwrap();
    let (sink, source) = (bed.node("nrt-1").unwrap().clone(), bed.node("ams-1").unwrap().clone());
    let (ready_send, ready) = std::sync::mpsc::channel();
    let receiver = std::thread::spawn(move || {
        sink.enter().unwrap();
        let listener = TcpListener::bind("10.2.1.1:7001").unwrap();
        ready_send.send(()).unwrap();
        let count = |mut stream: TcpStream| {
            let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
            loop {
                match stream.read(&mut buffer).unwrap() {
                    0 => return bytes,
                    length => bytes += length,
                }
            }
        };
        // One connection alone is held back by its window, not by the link.
        let streams: Vec<_> = (0..FLOWS).map(|_| listener.accept().unwrap().0).collect();
        let counters: Vec<_> =
            streams.into_iter().map(|stream| std::thread::spawn(move || count(stream))).collect();
        counters.into_iter().map(|counter| counter.join().unwrap()).sum::<usize>()
    });
    ready.recv().unwrap();
    let start = Instant::now();
    let send = || {
        let mut stream = TcpStream::connect("10.2.1.1:7001")?;
        let block = vec![0x5a; 1 << 16];
        while start.elapsed() < Duration::from_secs(3) {
            stream.write_all(&block)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..FLOWS).map(|_| scope.spawn(|| source.inside(send))).collect();
        senders.into_iter().for_each(|sender| sender.join().unwrap().unwrap());
    });
    let bytes = receiver.join().unwrap();
    let megabits = bytes as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e6;
    eprintln!("{megabits:.0} Mbit/s over 60 ms");
    // A floor against a broken queue, far below what is measured: machines differ.
    assert!(megabits > 30.0, "{megabits:.0} Mbit/s");
}

#[test]
fn a_testbed_killed_with_9_is_removed_by_the_next_start() {
    if !require_root("the testbed") {
        return;
    }
    cleanup("tkill").unwrap();
    // Killed at several points of its start, the last one after it.
    for wait_ms in [30, 200, 700, 20_000] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_anyplace-to-be-killed"))
            .args(["testbed", "tkill"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = child.stdout.take().unwrap();
        let (built_send, built) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let (mut text, mut buffer) = (String::new(), [0; 256]);
            while let Ok(length) = output.read(&mut buffer) {
                text.push_str(&String::from_utf8_lossy(&buffer[..length]));
                if length == 0 || text.contains("built") {
                    break;
                }
            }
            let _ = built_send.send(text.contains("built"));
        });
        let finished = built.recv_timeout(Duration::from_millis(wait_ms));
        if wait_ms == 20_000 {
            assert_eq!(finished, Ok(true), "the testbed was not built in 20 s");
            let error = cleanup("tkill").unwrap_err();
            assert!(format!("{error:#}").contains("in use by process"), "{error:#}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if wait_ms == 20_000 {
            assert!(leftovers("tkill").len() > 20, "a killed testbed leaves much: {:?}", leftovers("tkill"));
        }
        cleanup("tkill").unwrap();
        assert_eq!(leftovers("tkill"), Vec::<String>::new(), "killed after {wait_ms} ms");
    }
}

#[test]
fn a_bad_name_is_refused() {
    let error = Testbed::create("a-b", &Topology::three_locations()).unwrap_err();
    assert!(error.to_string().contains("expected 1 to 16 of a-z and 0-9"), "{error}");
}
