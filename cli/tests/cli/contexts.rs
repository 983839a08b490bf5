//! Contexts: kept, private, and their secrets sent nowhere else.

use std::os::unix::fs::PermissionsExt as _;

use crate::{fake::Fake, runner::Home};

#[test]
fn a_context_is_kept_for_its_owner_only() {
    let home = Home::new();
    home.run(&[
        "context",
        "set",
        "demo",
        "--url",
        "http://10.0.0.10:7600",
        "--registry",
        "http://10.1.0.10:5000",
    ])
    .ok();
    let saved = home
        .run_with_input(&["context", "set", "prod", "--url", "http://p:1", "--token-stdin"], "ap_secret\n");
    assert!(saved.err.contains("`anyplace context use prod`"), "{saved:?}");
    let mode = std::fs::metadata(home.path().join("anyplace/config.toml")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let list = home.run(&["context", "list"]).ok();
    assert!(list.lines().any(|line| line.starts_with('*') && line.contains("demo")), "{list}");
    home.run(&["context", "use", "prod"]).ok();
    for args in
        [&["context", "show"][..], &["context", "show", "-o", "json"], &["context", "list", "-o", "yaml"]]
    {
        let shown = home.run(args).ok();
        assert!(shown.contains("http://p:1") && !shown.contains("ap_secret"), "{shown}");
    }
    assert!(home.run(&["context", "use", "none"]).failed().contains("known: demo, prod"));
    assert!(home.run(&["--context", "none", "capacity"]).failed().contains("there is no context `none`"));
}

#[test]
fn a_contexts_token_goes_to_its_own_address_only() {
    let (home, fake, other) = (Home::new(), Fake::start(), Fake::start());
    home.run_with_input(&["context", "set", "demo", "--url", &fake.url, "--token-stdin"], "good");
    home.run(&["get", "deployments"]).ok();
    let refused = home.run(&["get", "deployments", "--url", &other.url]).failed();
    assert!(refused.contains("no token was sent: give --token-file"), "{refused}");
    // A flag is stronger than a variable, and a variable stronger than the context.
    let bad = home.file("bad.token", "bad\n");
    assert_ne!(home.run(&["get", "deployments", "--token-file", &bad]).code, 0);
    let output = home.command(&["get", "deployments"]).env("ANYPLACE_TOKEN", "bad").output().unwrap();
    assert!(!output.status.success());
}

#[test]
fn a_broken_file_of_contexts_is_named() {
    let home = Home::new();
    std::fs::create_dir(home.path().join("anyplace")).unwrap();
    home.file("anyplace/config.toml", "contexts = 3\n");
    let message = home.run(&["capacity"]).failed();
    assert!(message.contains("anyplace/config.toml is not a file of contexts"), "{message}");
    // What needs no platform goes on.
    home.run(&["schema"]).ok();
}
