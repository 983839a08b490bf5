//! Traffic through the virtual IP while what serves it changes, and traffic that isn't TCP.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use super::udp;
use super::world::{World, all_answered, hello, wait_for};

/// The page is the version.
const VERSIONED: &str = r#"command: [/bin/busybox, sh, -c, "mkdir -p /www; echo $VERSION > /www/index.html; exec httpd -f -p 8080 -h /www"]"#;
/// Datagrams of a client, each from a port of its own.
const FLOWS: usize = 40;

#[test]
fn an_update_loses_no_request() {
    let Some(world) = World::start("tsupdate", 2) else { return };
    let versioned = |version: &str| hello("hello", 4, &format!("env: {{VERSION: {version}}}\n{VERSIONED}\n"));
    let vip = world.apply("hello", &versioned("one"));
    for client in world.clients() {
        reads(&world, &client, &vip, "one");
    }
    let before = world.pids("httpd");
    let loads = world.load(&vip);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(world.apply("hello", &versioned("two")), vip);
    for client in world.clients() {
        for _ in 0..20 {
            assert_eq!(
                world.call(&client, &vip).unwrap().trim(),
                "two",
                "{client}, after the update is done"
            );
        }
    }
    std::thread::sleep(Duration::from_millis(500));
    all_answered(loads);
    let after = wait_for("the old containers' end", 20, || match world.pids("httpd") {
        pids if pids.len() == 4 => Ok(pids),
        pids => Err(format!("{pids:?}")),
    });
    assert!(before.is_disjoint(&after), "{before:?}, then {after:?}");
    world.end();
}

fn reads(world: &World, client: &str, vip: &str, page: &str) {
    wait_for(page, 10, || match world.call(client, vip) {
        Ok(body) if body.trim() == page => Ok(()),
        other => Err(format!("{client}: {other:?}")),
    });
}

#[test]
fn datagrams_are_answered_by_the_virtual_ip() {
    let Some(world) = World::start("tsudp", 2) else { return };
    let vip: IpAddr = udp::apply(&world, 4).parse().unwrap();
    let mut instances = BTreeSet::new();
    for client in world.clients() {
        // There is no readiness check for datagrams, so the first may be early.
        wait_for("an answer", 10, || udp::ask(&world, &client, vip, "first"));
        for number in 0..FLOWS {
            let text = format!("{client} {number}");
            let answer = udp::ask(&world, &client, vip, &text).unwrap();
            let (instance, echo) = answer.split_once(' ').unwrap();
            assert_eq!(echo, text);
            instances.insert(instance.to_owned());
        }
    }
    assert_eq!(instances.len(), 4, "every instance gets its share: {instances:?}");
    world.end();
}
