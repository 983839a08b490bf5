//! What runs goes on without those who started it; what dies meanwhile gets no new connections.

use std::time::Duration;

use anyplace_tests::{http_get, platform::Role};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::world::{World, all_answered, hello, report, wait_for};

/// Longer than the leases of locations (3 s) and machines (0.6 s).
const PAST_ALL_LEASES: Duration = Duration::from_secs(5);

#[test]
fn everything_goes_on_without_the_control_plane_and_heals_when_it_is_back() {
    let Some(world) = World::start("tscontrol", 2) else { return };
    let vip = world.apply("hello", &hello("hello", 4, ""));
    let before = wait_for("four web servers", 10, || match world.pids("httpd") {
        pids if pids.len() == 4 => Ok(pids),
        pids => Err(format!("{pids:?}")),
    });

    // All schedulers, all agents, and one location's routers: the other location's lose who they listen to.
    let mut lost = vec![Role::Global, Role::Location("ams".into()), Role::Location("nrt".into())];
    lost.extend(world.machines().into_iter().map(Role::Agent));
    lost.extend(["ams-1", "ams-2"].map(|machine| Role::Router(machine.into())));
    let loads = world.load(&vip);
    std::thread::sleep(Duration::from_millis(500));
    for role in &lost {
        world.platform.process(role).unwrap().signal(Signal::SIGKILL).unwrap();
    }
    std::thread::sleep(PAST_ALL_LEASES);
    for role in &lost {
        assert!(world.platform.process(role).unwrap().exited().is_some(), "{} is still there", role.label());
    }
    assert_eq!(world.pids("httpd"), before, "the containers are untouched while nobody watches them");
    all_answered(loads);

    let loads = world.load(&vip);
    for role in &lost {
        world.platform.start_role(role).unwrap();
    }
    for role in lost.iter().filter(|role| !matches!(role, Role::Router(_))) {
        world.platform.wait_healthy(role).unwrap();
    }
    std::thread::sleep(PAST_ALL_LEASES);
    assert_eq!(world.pids("httpd"), before, "the same containers after the control plane's return");
    assert_eq!(world.vip("hello"), vip);
    all_answered(loads);

    let victim = *before.first().unwrap();
    let loads = world.load(&vip);
    std::thread::sleep(Duration::from_millis(500));
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    let after = wait_for("the killed container's replacement", 20, || match world.pids("httpd") {
        pids if pids.len() == 4 && !pids.contains(&victim) => Ok(pids),
        pids => Err(format!("{pids:?}")),
    });
    assert_eq!(before.intersection(&after).count(), 3, "the others stay: {before:?}, then {after:?}");
    std::thread::sleep(Duration::from_secs(1));
    let seen = report(loads);
    // The bound on the gap is checked by `cargo xtask demo --check`.
    eprintln!("one container killed: {seen:?}");
    for client in world.clients() {
        assert!(world.call(&client, &vip).unwrap().contains("hello from"));
    }
    world.end();
}

/// Calls in a row: each goes to one of four instances by chance.
const CALLS: usize = 40;

#[test]
fn what_dies_without_a_scheduler_gets_no_new_connections_until_too_few_are_left() {
    let Some(world) = World::start("tsalone", 1) else { return };
    let vip = world.apply("hello", &hello("hello", 4, ""));
    let mut lost = vec![Role::Global, Role::Location("ams".into())];
    // Who restarts a container that died must not.
    lost.extend(world.machines().into_iter().map(Role::Agent));
    for role in &lost {
        world.platform.process(role).unwrap().signal(Signal::SIGKILL).unwrap();
    }
    let failed = || (0..CALLS).filter(|_| world.call("ams-client", &vip).is_err()).count();
    let gauge = |machine: &str, name: &str| -> Result<u64, String> {
        let node = world.platform.bed().node(machine).unwrap();
        let url = "http://127.0.0.1:7630/metrics";
        let text = http_get(node, url, Duration::from_secs(2)).map_err(|error| error.to_string())?.body;
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("anyplace_router_{name} ")));
        line.and_then(|value| value.parse().ok()).ok_or(text)
    };
    let on_all = |name: &str, wanted: u64| {
        let found: Vec<_> = world.machines().iter().map(|machine| gauge(machine, name)).collect();
        if found.iter().all(|it| *it == Ok(wanted)) { Ok(()) } else { Err(format!("{found:?}")) }
    };
    for dead in 1..=3 {
        let victim = *world.pids("httpd").first().unwrap();
        kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
        wait_for("all routers to leave it out, or all in", 60, || on_all("suspected_instances", dead));
        if dead < 3 {
            assert_eq!(on_all("floored_vips", 0), Ok(()));
            assert_eq!(failed(), 0, "{dead} of 4 are dead, and get nothing");
        }
    }
    // Of IPv4, and of IPv6.
    wait_for("the floor", 10, || on_all("floored_vips", 2));
    assert!(failed() > CALLS / 4, "one of four would have all: connections go to all four again");

    for role in &lost {
        world.platform.start_role(role).unwrap();
    }
    wait_for("all to be well", 60, || match world.pids("httpd").len() {
        4 => on_all("suspected_instances", 0),
        count => Err(format!("{count} web servers")),
    });
    wait_for("all to be answered", 60, || match failed() {
        0 => Ok(()),
        count => Err(format!("{count} of {CALLS} failed")),
    });
    world.end();
}
