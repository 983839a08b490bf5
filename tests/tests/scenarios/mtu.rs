//! Packets that are too big for a link on their way: whoever sent them is told, of both families.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyplace_tests::http_get;
use anyplace_tests::platform::Role;
use serde_json::Value;

use super::udp;
use super::world::{World, hello, in_network_of, wait_for};

/// Serves a file of 1.3 MB.
const SERVE: &str = r#"command: [/bin/busybox, sh, -c, "mkdir -p /www; /bin/busybox seq 1 200000 > /www/numbers; echo hello > /www/index.html; exec httpd -f -p 8080 -h /www"]"#;
/// Of the link to a client; its hosts go on with 1,500.
const NARROW: u32 = 1_300;
/// Of the machines' uplinks; the encapsulation takes 48 bytes of it.
const UPLINK: u32 = 1_400;
const INSIDE: u32 = UPLINK - 48;

#[test]
fn an_answer_that_is_too_big_for_the_way_comes_in_smaller_packets() {
    let Some(world) = World::start("tsptb", 1) else { return };
    world.apply("hello", &hello("hello", 2, &format!("{SERVE}\n")));
    let edge = world.platform.bed().node("ams-edge").unwrap();
    edge.run("ip", &["link", "set", "client", "mtu", &NARROW.to_string()]).unwrap();
    let numbers: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    let location = world.platform.bed().topology().locations[0].clone();
    let clients: [IpAddr; 2] = [location.client_address().into(), location.client_address6().into()];
    for (vip, client) in vips(&world, "hello").into_iter().zip(clients) {
        wait_for("the page", 10, || curl(&world, vip, ""));
        // Both machines take the router's complaints, both instances' connections.
        for _ in 0..10 {
            let got = curl(&world, vip, "numbers").unwrap();
            assert!(got == numbers, "{vip}: {} bytes of {}", got.len(), numbers.len());
        }
        let pids = world.pids("httpd");
        assert_eq!(pids.len(), 2);
        for pid in pids {
            let known = in_network_of(pid, || path_mtu(client));
            assert_eq!(known, Some(NARROW.into()), "what the instance of process {pid} knows of {client}");
        }
    }
    world.end();
}

#[test]
fn a_client_is_told_what_fits_the_fabric() {
    let Some(world) = World::start("tsptc", 1) else { return };
    for machine in world.machines() {
        let node = world.platform.bed().node(&machine).unwrap();
        node.run("ip", &["link", "set", "eth0", "mtu", &UPLINK.to_string()]).unwrap();
        world.platform.restart_role(&Role::Router(machine.clone())).unwrap();
        // It answers once its programs know the new MTU.
        wait_for("the router's metrics", 60, || {
            http_get(node, "http://127.0.0.1:7630/metrics", Duration::from_secs(1))
                .map(drop)
                .map_err(|error| format!("{machine}: {error:#}"))
        });
    }
    udp::apply(&world, 2);
    let client = world.platform.bed().node("ams-client").unwrap();
    for vip in vips(&world, "udp") {
        wait_for("an answer", 10, || ask(&world, vip, "small"));
        // Fits all links, but not with the encapsulation.
        let large = "x".repeat(1_340);
        let lost = ask(&world, vip, &large);
        assert!(lost.is_err(), "{vip}: the first one can't pass: {lost:?}");
        let known = client.inside(|| Ok(path_mtu(vip))).unwrap();
        assert_eq!(known, Some(INSIDE.into()), "what the client knows of {vip}");
        // From now on it sends fragments.
        for _ in 0..10 {
            ask(&world, vip, &large).unwrap();
        }
    }
    world.end();
}

/// Both virtual IPs of a deployment.
fn vips(world: &World, name: &str) -> [IpAddr; 2] {
    let view = world.json(&["get", "deployments", name]);
    ["vip", "vip6"].map(|field| view[field].as_str().unwrap().parse().unwrap())
}

/// The path MTU to an address that the network of the calling thread has learnt.
fn path_mtu(to: IpAddr) -> Option<u64> {
    let output = Command::new("ip").args(["-json", "route", "get", &to.to_string()]).output().unwrap();
    let routes: Value = serde_json::from_slice(&output.stdout).unwrap();
    routes[0]["metrics"][0]["mtu"].as_u64()
}

/// What the client reads, or how it failed.
fn curl(world: &World, vip: IpAddr, path: &str) -> Result<String, String> {
    let url = format!("http://{}/{path}", SocketAddr::from((vip, 80)));
    let node = world.platform.bed().node("ams-client").unwrap();
    let args = ["--silent", "--show-error", "--fail", "--globoff", "--max-time", "20", &url];
    let output = node.command("curl").args(args).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

/// Sends a datagram from a new port, and checks what comes back.
fn ask(world: &World, vip: IpAddr, text: &str) -> Result<(), String> {
    let answer = udp::ask(world, "ams-client", vip, text).map_err(|error| format!("{vip}: {error}"))?;
    match answer.split_once(' ') {
        Some((_, echo)) if echo == text => Ok(()),
        _ => Err(format!("{vip} answered `{answer}`")),
    }
}
