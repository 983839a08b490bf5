//! What a container may do, read from the kernel and tried on the wire.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::world::{World, hello, in_network_of, wait_for};

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Capabilities by number, of which any would be a way out: `DAC_READ_SEARCH`, `NET_ADMIN`, `NET_RAW`, `SYS_MODULE`,
/// `SYS_RAWIO`, `SYS_PTRACE`, `SYS_ADMIN`, `SYS_BOOT`, `SYS_TIME`, `MKNOD`, `BPF`.
const WAYS_OUT: [u32; 11] = [2, 12, 13, 16, 17, 19, 21, 22, 25, 27, 39];
/// As the spec of [`hello`] asks.
const MEMORY_LIMIT: &str = "33554432";

#[test]
fn a_container_is_confined() {
    let Some(world) = World::start("tsconfine", 2) else { return };
    let vip = world.apply("hello", &hello("hello", 4, ""));
    let pids = wait_for("four web servers", 10, || match world.pids("httpd") {
        pids if pids.len() == 4 => Ok(pids),
        pids => Err(format!("{pids:?}")),
    });
    let addresses: BTreeMap<i32, String> = pids.iter().map(|pid| (*pid, instance_address(*pid))).collect();
    for pid in &pids {
        rights_are_few(*pid);
        memory_is_limited(*pid);
        namespaces_are_its_own(*pid);
        reaches_no_one(&world, *pid, &addresses);
    }
    for client in world.clients() {
        let page =
            wait_for("an answer", 10, || world.call(&client, &vip).map_err(|error| format!("{error:#}")));
        assert!(page.contains("hello from"), "{page}");
    }
    world.end();
}

/// The address that a container has, by `ip`.
fn instance_address(pid: i32) -> String {
    let args = ["-t", &pid.to_string(), "-n", "ip", "-4", "-oneline", "addr", "show", "dev", "eth0"];
    let output = Command::new("nsenter").args(args).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let address = text.split_whitespace().skip_while(|word| *word != "inet").nth(1);
    address
        .and_then(|address| address.split('/').next())
        .unwrap_or_else(|| panic!("no address: {text}"))
        .to_owned()
}

fn rights_are_few(pid: i32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
    };
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2", "a filter is on");
    for set in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
        let mask = u64::from_str_radix(&field(set), 16).unwrap();
        let found: Vec<u32> = WAYS_OUT.into_iter().filter(|bit| mask >> bit & 1 == 1).collect();
        assert!(found.is_empty(), "{set} {mask:x} holds {found:?}");
        assert!(mask.count_ones() <= 12, "{set} {mask:x}");
    }
}

/// By the kernel's own file, in whichever hierarchy has the memory controller.
fn memory_is_limited(pid: i32) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let limits: Vec<String> = text
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
            let file = if controllers.split(',').any(|one| one == "memory") {
                Path::new("/sys/fs/cgroup/memory").join(path).join("memory.limit_in_bytes")
            } else if controllers.is_empty() {
                Path::new("/sys/fs/cgroup").join(path).join("memory.max")
            } else {
                return None;
            };
            std::fs::read_to_string(file).ok()
        })
        .collect();
    assert!(limits.iter().any(|limit| limit.trim() == MEMORY_LIMIT), "limits {limits:?} of {text}");
}

fn namespaces_are_its_own(pid: i32) {
    for kind in ["net", "mnt", "pid", "ipc", "uts"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "the {kind} namespace is the host's");
    }
}

/// From the container's network, none of the platform's parts and none of the other containers answer, though each
/// does answer elsewhere: a closed port would prove nothing.
fn reaches_no_one(world: &World, pid: i32, addresses: &BTreeMap<i32, String>) {
    let bed = world.platform.bed();
    let mut forbidden = vec![("global scheduler".to_owned(), "10.0.0.10:7600".to_owned(), "global")];
    for location in &bed.topology().locations {
        let control = location.control_address();
        forbidden.push((
            format!("location scheduler {}", location.name),
            format!("{control}:7610"),
            "global",
        ));
        forbidden.push((format!("registry {}", location.name), format!("{control}:5000"), "global"));
    }
    let machines = bed.topology().machines();
    for machine in &machines {
        let address = format!("{}:7620", machine.address());
        forbidden.push((format!("agent {}", machine.name), address, "global"));
    }
    for (other, address) in addresses.iter().filter(|(other, _)| **other != pid) {
        let home = machines.iter().find(|machine| {
            let cidr = machine.instance_cidr();
            address.starts_with(cidr.trim_end_matches("64/26"))
        });
        forbidden.push((format!("container {other}"), format!("{address}:8080"), &home.unwrap().name));
    }
    for (name, address, from) in &forbidden {
        let address: SocketAddr = address.parse().unwrap();
        let node = bed.node(from).unwrap();
        let control = node.inside(|| Ok(TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?));
        assert!(control.is_ok(), "{name} should answer {from} at {address}: {control:?}");
    }
    in_network_of(pid, || {
        let own: SocketAddr = "127.0.0.1:8080".parse().unwrap();
        TcpStream::connect_timeout(&own, CONNECT_TIMEOUT)
            .unwrap_or_else(|error| panic!("a container reaches itself: {error}"));
        // All at once: each takes its whole time-out.
        std::thread::scope(|scope| {
            for (name, address, _) in &forbidden {
                scope.spawn(move || {
                    let tried = TcpStream::connect_timeout(&address.parse().unwrap(), CONNECT_TIMEOUT);
                    assert!(tried.is_err(), "container {pid} reaches {name} at {address}");
                });
            }
            // The machine's end of its own wire, too.
            scope.spawn(|| {
                let gateway: SocketAddr = "169.254.1.1:7620".parse().unwrap();
                assert!(TcpStream::connect_timeout(&gateway, CONNECT_TIMEOUT).is_err());
            });
        });
    });
}
