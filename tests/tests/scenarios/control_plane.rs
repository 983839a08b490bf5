//! What runs goes on without those who started it.

use std::time::Duration;

use anyplace_tests::platform::Role;
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
