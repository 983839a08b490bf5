//! Traffic through the virtual IP while what serves it changes, and traffic that isn't TCP.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

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
    let rootfs = world.platform.bed().state_dir().join("udp-image");
    write_udp_image(&rootfs);
    world.cli_ok(&["push", rootfs.to_str().unwrap(), "udp:v1", "--entrypoint", "/server", "--cmd", "9053"]);
    let vip = world.apply(
        "udp",
        "kind: Deployment
name: udp
image: udp:v1
resources: {cpu: 50m, memory: 32Mi}
ports: [{port: 5353, container_port: 9053, protocol: udp}]
instances: {min: 4}
",
    );
    let mut instances = BTreeSet::new();
    for client in world.clients() {
        // There is no readiness check for datagrams, so the first may be early.
        wait_for("an answer", 10, || ask(&world, &client, &vip, "first"));
        for number in 0..FLOWS {
            let text = format!("{client} {number}");
            let answer = ask(&world, &client, &vip, &text).unwrap();
            let (instance, echo) = answer.split_once(' ').unwrap();
            assert_eq!(echo, text);
            instances.insert(instance.to_owned());
        }
    }
    assert_eq!(instances.len(), 4, "every instance gets its share: {instances:?}");
    world.end();
}

/// One datagram and its answer, which a connected socket takes only from the address it asked.
fn ask(world: &World, client: &str, vip: &str, text: &str) -> Result<String, String> {
    let node = world.platform.bed().node(client).unwrap();
    let answer = node.inside(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((vip, 5353))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.send(text.as_bytes())?;
        let mut buffer = [0; 2048];
        let length = socket.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    });
    answer.map_err(|error| format!("{client}, `{text}`: {error:#}"))
}

/// A root file system with the server and the libraries that it loads.
pub(super) fn write_udp_image(rootfs: &Path) {
    let server = env!("CARGO_BIN_EXE_anyplace-udp-server");
    let output = Command::new("ldd").arg(server).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    for library in libraries {
        let inside = rootfs.join(library.trim_start_matches('/'));
        std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
        std::fs::copy(library, inside).unwrap();
    }
    std::fs::copy(server, rootfs.join("server")).unwrap();
}
