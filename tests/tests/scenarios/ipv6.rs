//! Clients that come by IPv6: the other virtual IP of the same apps.

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddr};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
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
