//! What can't work is said, where and why: at once if the command line can know, else by `why`.

use std::process::Output;
use std::time::Duration;

use anyplace_tests::platform::Role;
use nix::sys::signal::Signal;

use super::world::{World, hello, wait_for};

const NOBODYS: &str = "sha256:00000000000000000000000000000000000000000000000000000000000000aa";

#[test]
fn a_bad_image_a_dead_registry_and_an_expired_token_are_named() {
    let Some(world) = World::start("tsrefuse", 1) else { return };
    apply_refuses_an_image_that_is_not_there(&world);
    an_expired_token_is_refused(&world);
    why_names_what_a_machine_could_not_fetch(&world);
    a_dead_registry_is_named_and_waited_for(&world);
    world.end();
}

fn apply_refuses_an_image_that_is_not_there(world: &World) {
    for (name, image, expected) in [
        ("missing", "nobody:v1", "nobody"),
        ("untagged", "hello:v9", "v9"),
        ("digest", &format!("hello@{NOBODYS}"), NOBODYS),
    ] {
        let path = world.spec(name, &hello(name, 1, "").replace("hello:v1", image));
        let said = fails(&world.cli(&["apply", "-f", &path]));
        assert!(said.contains(expected) && said.contains("anyplace push"), "{said}");
    }
    assert!(!world.cli_ok(&["get", "deployments"]).contains("missing"), "nothing was applied");
}

fn an_expired_token_is_refused(world: &World) {
    let file = world.platform.bed().state_dir().join("short.token");
    let out = file.to_str().unwrap();
    world.cli_ok(&["token", "create", "--role", "viewer", "--ttl", "2s", "--out", out]);
    let with_it = |args: &[&str]| world.cli(&[args, &["--token-file", out]].concat());
    assert!(with_it(&["get", "deployments"]).status.success(), "good as long as it lasts");
    std::thread::sleep(Duration::from_millis(2_500));
    let said = fails(&with_it(&["get", "deployments"]));
    assert!(said.contains("expired") && said.contains("anyplace token create"), "{said}");

    // What any HTTP client sees.
    let bearer = format!("Authorization: Bearer {}", std::fs::read_to_string(&file).unwrap().trim());
    let node = world.platform.bed().node("global").unwrap();
    let url = "http://10.0.0.10:7600/v1/deployments";
    let answer = node.run("curl", &["-sS", "-i", "-H", &bearer, url]).unwrap();
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    assert!(answer.contains("application/problem+json") && answer.contains("token_expired"), "{answer}");
}

/// Without a known registry the command line can't check the image, so the machines find out.
fn why_names_what_a_machine_could_not_fetch(world: &World) {
    for (name, image) in [("unchecked", "hello:v9"), ("wrong", &*format!("hello@{NOBODYS}"))] {
        let said = apply_unchecked(world, name, image);
        assert!(said.contains("is not checked"), "{said}");
        why_says(world, name, "image_not_found");
        world.cli_ok(&["delete", "deployment", name]);
    }
}

fn a_dead_registry_is_named_and_waited_for(world: &World) {
    let registry = Role::Registry("ams".into());
    world.platform.process(&registry).unwrap().signal(Signal::SIGKILL).unwrap();
    let path = world.spec("late", &hello("late", 1, ""));
    let said = fails(&world.cli(&["apply", "-f", &path]));
    assert!(said.contains("its registry is down; start it"), "{said}");

    apply_unchecked(world, "late", "hello:v1");
    why_says(world, "late", "registry_unreachable");
    assert!(world.pids("httpd").is_empty());
    world.platform.start_role(&registry).unwrap();
    let vip = world.vip("late");
    let page =
        wait_for("an answer", 30, || world.call("ams-client", &vip).map_err(|error| format!("{error:#}")));
    assert!(page.contains("hello from ams"), "{page}");
}

/// Applies without a known registry; what it says on standard error.
fn apply_unchecked(world: &World, name: &str, image: &str) -> String {
    let path = world.spec(name, &hello(name, 1, "").replace("hello:v1", image));
    let mut command = world.platform.cli(["apply", "-f", &*path]);
    let output = command.env_remove("ANYPLACE_REGISTRY").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

fn why_says(world: &World, name: &str, reason: &str) {
    wait_for(reason, 15, || {
        let why = world.json(&["why", name]);
        let refusals = why["refusals"].as_array().map(Vec::as_slice).unwrap_or_default();
        let is_named = |one: &serde_json::Value| one["reason"] == reason && one["count"].as_u64() >= Some(1);
        if refusals.iter().any(is_named) { Ok(()) } else { Err(why.to_string()) }
    });
    assert!(world.cli_ok(&["why", name]).contains(reason));
}

/// What a command that exits with 1 says on standard error, and only there.
fn fails(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty(), "data on standard output: {}", String::from_utf8_lossy(&output.stdout));
    said
}
