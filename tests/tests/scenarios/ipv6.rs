//! Clients that come by IPv6: the other virtual IP of the same apps.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn6, bind, setsockopt, socket, sockopt};
use nix::unistd::Pid;

use super::udp;
use super::world::{World, all_answered, hello, in_network_of, wait_for};

/// Serves the page of the hello image, and a file of 1.3 MB whose every byte the test knows.
const SERVE: &str = r#"command: [/bin/busybox, sh, -c, "mkdir -p /www; /bin/busybox seq 1 200000 > /www/numbers; echo hello from $ANYPLACE_LOCATION > /www/index.html; exec httpd -f -p 8080 -h /www"]"#;
const NUMBERS: u32 = 200_000;
/// Requests of which each has to come from where it should.
const REQUESTS: usize = 20;

#[test]
fn clients_come_by_ipv6() {
    let Some(world) = World::start("tsv6", 2) else { return };
    let vip = world.apply("hello", &hello("hello", 4, &format!("{SERVE}\n")));
    let vip6: Ipv6Addr =
        world.json(&["get", "deployments", "hello"])["vip6"].as_str().unwrap().parse().unwrap();
    let before = wait_for("four web servers", 10, || four(world.pids("httpd")));

    // Each client is answered by the location near it, to the last byte.
    let numbers: String = (1..=NUMBERS).map(|number| format!("{number}\n")).collect();
    for location in ["ams", "nrt"] {
        let client = format!("{location}-client");
        answered_by(&world, &client, vip6, location);
        for _ in 0..4 {
            let got = curl(&world, &client, vip6, "numbers").unwrap();
            assert!(got == numbers, "{client} got {} bytes of {}", got.len(), numbers.len());
        }
    }
    // The other family is served by the same instances.
    for client in world.clients() {
        assert!(world.call(&client, &vip).unwrap().contains("hello from"));
    }
    // The address that an instance has inside follows from its other one.
    for pid in &before {
        let shown =
            in_network_of(*pid, || run("ip", &["-6", "-oneline", "addr", "show", "dev", "eth0"]).unwrap());
        assert!(shown.contains("fd5b:27d6:914c::") && !shown.contains("tentative"), "{shown}");
    }

    // A container is killed: the other one of the location goes on, and nobody else's requests fail.
    let far = world.load_from("nrt-client", SocketAddr::from((vip6, 80)));
    let victim = in_location(&world, "ams").into_iter().next().unwrap();
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    answered_by(&world, "ams-client", vip6, "ams");
    let healed = wait_for("the killed container's replacement", 20, || match four(world.pids("httpd")) {
        Ok(pids) if !pids.contains(&victim) => Ok(pids),
        other => Err(format!("{other:?}")),
    });
    assert_eq!(before.intersection(&healed).count(), 3, "{before:?}, then {healed:?}");

    // Amsterdam withdraws: its announcement of this family goes too.
    world.cli_ok(&["location", "withdraw", "ams"]);
    answered_by(&world, "ams-client", vip6, "nrt");
    world.cli_ok(&["location", "announce", "ams"]);
    answered_by(&world, "ams-client", vip6, "ams");
    all_answered(vec![("nrt-client".to_owned(), far)]);
    assert_eq!(curl(&world, "ams-client", vip6, "numbers").unwrap(), numbers);
    // Gone, the app answers nobody.
    world.cli_ok(&["delete", "deployment", "hello"]);
    wait_for("no answer", 20, || match curl(&world, "ams-client", vip6, "") {
        Ok(page) => Err(page),
        Err(_) => Ok(()),
    });
    world.end();
}

#[test]
fn datagrams_come_by_ipv6() {
    let Some(world) = World::start("tsudp6", 2) else { return };
    udp::apply(&world, 4);
    let vip6: Ipv6Addr =
        world.json(&["get", "deployments", "udp"])["vip6"].as_str().unwrap().parse().unwrap();
    let mut instances = BTreeSet::new();
    for client in world.clients() {
        wait_for("an answer", 10, || udp::ask(&world, &client, vip6.into(), "first"));
        for number in 0..40 {
            // Up to what an MTU of 1,500 takes in one packet.
            let text = format!("{client} {number} ").repeat(1 + number * 2);
            let answer = udp::ask(&world, &client, vip6.into(), &text).unwrap();
            let (instance, echo) = answer.split_once(' ').unwrap();
            assert_eq!(echo, text);
            instances.insert(instance.to_owned());
        }
    }
    assert_eq!(instances.len(), 4, "every instance gets its share: {instances:?}");
    world.end();
}

/// What an instance answers by TCP: its name.
const SERVE_NAME: &str = r#"command: [/bin/busybox, sh, -c, "mkdir -p /www; echo $ANYPLACE_INSTANCE > /www/index.html; exec httpd -f -p 8080 -h /www"]"#;
/// Clients inside ask until every instance has answered, at most so often.
const ASKED_AT_MOST: usize = 400;
const PATIENCE: Duration = Duration::from_secs(5);
/// Where something listens on machines and in containers that no container may reach.
const OTHER_PORT: u16 = 7_777;
/// An address that no node has.
const NOBODYS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0xff, 0, 0, 0, 1);

/// From machines and from containers: to an instance elsewhere, to others on the same machine, and to the very container
/// that asks.
#[test]
fn machines_and_containers_reach_ipv6_vips() {
    let Some(world) = World::start("tsin6", 1) else { return };
    world.apply("hello", &hello("hello", 4, &format!("{SERVE_NAME}\n")));
    udp::apply(&world, 4);
    let vip6 = |name| -> Ipv6Addr {
        world.json(&["get", "deployments", name])["vip6"].as_str().unwrap().parse().unwrap()
    };
    let (tcp, udp) = (SocketAddr::from((vip6("hello"), 80)), SocketAddr::from((vip6("udp"), 5353)));
    let four = |part| wait_for("four containers", 20, || self::four(world.pids(part)));
    let containers: Vec<i32> = four("httpd").into_iter().chain(four("9053")).collect();
    wait_for("answers to the client", 20, || curl(&world, "ams-client", vip6("hello"), ""));

    for machine in world.machines() {
        let node = world.platform.bed().node(&machine).unwrap();
        node.inside(|| {
            all_answer(&machine, tcp, ask_tcp);
            all_answer(&machine, udp, ask_udp);
            Ok(())
        })
        .unwrap();
    }
    for pid in &containers {
        in_network_of(*pid, || {
            all_answer(&format!("container {pid}"), tcp, ask_tcp);
            all_answer(&format!("container {pid}"), udp, ask_udp);
        });
    }
    reach_nobody_else(&world, &containers);
    send_as_nobody_else(&world, &containers);
    world.end();
}

/// Asks with a new connection or socket each time; each is answered, and every instance is met.
fn all_answer(client: &str, vip: SocketAddr, ask: fn(SocketAddr) -> std::io::Result<String>) {
    let mut met = BTreeSet::new();
    for number in 0..ASKED_AT_MOST {
        let name = ask(vip).unwrap_or_else(|error| panic!("{client} to {vip}, request {number}: {error}"));
        met.insert(name);
        if met.len() == 4 {
            return;
        }
    }
    panic!("{client} met only {met:?} at {vip}");
}

fn ask_tcp(vip: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&vip, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().last().unwrap_or_default().to_owned())
}

fn ask_udp(vip: SocketAddr) -> std::io::Result<String> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    socket.connect(vip)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"who")?;
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer)?;
    let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
    Ok(answer.split(' ').next().unwrap_or_default().to_owned())
}

/// By IPv6, containers reach neither machines nor each other's own addresses, where somebody does listen.
fn reach_nobody_else(world: &World, containers: &[i32]) {
    let bed = world.platform.bed();
    let machines = bed.topology().machines();
    let mut listeners = Vec::new();
    let mut forbidden: Vec<SocketAddr> = Vec::new();
    for machine in &machines {
        let node = bed.node(&machine.name).unwrap();
        let listener = node.inside(|| Ok(TcpListener::bind((Ipv6Addr::UNSPECIFIED, OTHER_PORT))?));
        listeners.push(listener.unwrap());
        let address = SocketAddr::from((machine.address6(), OTHER_PORT));
        let edge = bed.node("ams-edge").unwrap();
        edge.inside(|| Ok(TcpStream::connect_timeout(&address, PATIENCE)?)).unwrap();
        forbidden.push(address);
        for pid in world.platform.container_processes(&machine.name, "httpd") {
            // No port that it serves: answers from those leave as the virtual IP's.
            let address = SocketAddr::from((own_address6(pid), OTHER_PORT));
            listeners.push(in_network_of(pid, || TcpListener::bind(address)).unwrap());
            node.inside(|| Ok(TcpStream::connect_timeout(&address, PATIENCE)?)).unwrap();
            forbidden.push(address);
        }
    }
    for pid in containers {
        in_network_of(*pid, || {
            let own = IpAddr::from(own_address6(*pid));
            std::thread::scope(|scope| {
                for address in forbidden.iter().filter(|address| address.ip() != own) {
                    scope.spawn(move || {
                        let tried = TcpStream::connect_timeout(address, Duration::from_millis(500));
                        assert!(tried.is_err(), "container {pid} reaches {address}");
                    });
                }
            });
        });
    }
}

/// What containers send says that their machine sent it; what a socket sends from an address that the container hasn't,
/// doesn't leave.
fn send_as_nobody_else(world: &World, containers: &[i32]) {
    let bed = world.platform.bed();
    let location = &bed.topology().locations[0];
    let machines: Vec<Ipv6Addr> =
        bed.topology().machines().iter().map(|machine| machine.address6()).collect();
    let client = bed.node(&location.client()).unwrap();
    let socket = client.inside(|| Ok(UdpSocket::bind((location.client_address6(), OTHER_PORT))?)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    for pid in containers {
        let own = own_address6(*pid);
        in_network_of(*pid, || {
            for (source, text) in [(NOBODYS, "foreign"), (own, "own")] {
                send_from(source, text, socket.local_addr().unwrap());
            }
        });
        let mut buffer = [0; 16];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        let text = str::from_utf8(&buffer[..length]).unwrap();
        assert!(text == "own" && machines.iter().any(|one| from.ip() == *one), "{text} from {from}");
    }
}

/// Sends a datagram from an address that needs not be there.
fn send_from(source: Ipv6Addr, text: &str, to: SocketAddr) {
    let socket = socket(AddressFamily::Inet6, SockType::Datagram, SockFlag::empty(), None).unwrap();
    setsockopt(&socket, sockopt::IpFreebind, &true).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(source, 0, 0, 0))).unwrap();
    UdpSocket::from(socket).send_to(text.as_bytes(), to).unwrap();
}

/// A container's IPv6 address.
fn own_address6(pid: i32) -> Ipv6Addr {
    let shown = in_network_of(pid, || run("ip", &["-6", "-oneline", "addr", "show", "dev", "eth0"]).unwrap());
    let address = shown.split_whitespace().find_map(|word| word.strip_suffix("/128"));
    address.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no address: {shown}"))
}

fn four(pids: BTreeSet<i32>) -> Result<BTreeSet<i32>, String> {
    if pids.len() == 4 { Ok(pids) } else { Err(format!("{pids:?}")) }
}

/// The web servers of a location.
fn in_location(world: &World, location: &str) -> Vec<i32> {
    let machines = world.machines().into_iter().filter(|machine| machine.starts_with(location));
    machines.flat_map(|machine| world.platform.container_processes(&machine, "httpd")).collect()
}

/// Waits until a row of requests, one after the other, is answered by a location.
fn answered_by(world: &World, client: &str, vip6: Ipv6Addr, location: &str) {
    wait_for(&format!("answers from {location} to {client}"), 20, || {
        for _ in 0..REQUESTS {
            let page = curl(world, client, vip6, "")?;
            if page.trim() != format!("hello from {location}") {
                return Err(page);
            }
        }
        Ok(())
    });
}

/// What a client's curl reads, or how it failed.
fn curl(world: &World, client: &str, vip6: Ipv6Addr, path: &str) -> Result<String, String> {
    let url = format!("http://[{vip6}]/{path}");
    let node = world.platform.bed().node(client).unwrap();
    let args = ["-6", "--silent", "--show-error", "--fail", "--globoff", "--max-time", "5", &url];
    let output = node.command("curl").args(args).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(format!("{client}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

fn run(program: &str, args: &[&str]) -> std::io::Result<String> {
    let output = Command::new(program).args(args).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
