//! `registry ...` against the real registry.

use serde_json::Value;

use crate::{happy::Registry, runner::Home};

fn setup() -> (Home, Registry) {
    let (home, registry) = (Home::new(), Registry::start());
    let credentials = registry.credentials.to_string_lossy();
    let flags = ["--registry", &registry.url, "--registry-credentials-file", &credentials];
    home.run(&[&["context", "set", "test"][..], &flags].concat()).ok();
    registry.push(&home, "team/hello:v1").ok();
    (home, registry)
}

fn json(home: &Home, args: &[&str]) -> Value {
    serde_json::from_str(&home.run(&[args, &["-o", "json"]].concat()).ok()).unwrap()
}

#[test]
fn operators_list_measure_and_bring_back() {
    let (home, _registry) = setup();
    let table = home.run(&["registry", "ls"]).ok();
    assert!(table.lines().nth(1).unwrap().starts_with("team/hello   1"), "{table}");
    let tags = json(&home, &["registry", "tags", "team/hello"]);
    let digest = tags[0]["digest"].as_str().unwrap().to_owned();
    assert_eq!(tags[0]["tag"], "v1");
    assert!(tags[0]["size_bytes"].as_u64().unwrap() > 500, "{tags}");
    let table = home.run(&["registry", "tags", "team/hello"]).ok();
    assert!(table.contains(&digest) && table.contains("PUSHED"), "{table}");
    let usage = json(&home, &["registry", "du"]);
    let usage = (&usage["contents"], &usage["unneeded_bytes"], &usage["repositories"][0]["repository"]);
    assert_eq!(usage, (&3.into(), &0.into(), &"team/hello".into()));
    assert!(home.run(&["registry", "du", "team/hello"]).ok().contains("ITS OWN"));

    assert_eq!(json(&home, &["registry", "trash"]), Value::Array(Vec::new()));
    let ran = home.run(&["registry", "undelete", "team/hello:v1"]);
    assert!(ran.code == 1 && ran.err.contains("has no tag v1; `anyplace registry trash"), "{ran:?}");
    let ran = home.run(&["registry", "tags", "nobody/nothing"]);
    assert!(ran.code == 1 && ran.err.contains("no repository `nobody/nothing`"), "{ran:?}");
}

#[test]
fn collections_and_scrubs_are_followed_to_their_end() {
    let (home, registry) = setup();
    let dry = json(&home, &["registry", "gc", "--dry-run"]);
    assert_eq!((&dry["phase"], &dry["dry_run"]), (&"done".into(), &true.into()));
    let ran = home.run(&["registry", "gc"]);
    assert!(ran.code == 0 && ran.out.contains("done: 0 tags, 0 manifests, 0 links"), "{ran:?}");
    let status = json(&home, &["registry", "gc", "--status"]);
    assert_eq!((&status["running"], &status["last"]["phase"]), (&Value::Null, &"done".into()));
    let ran = home.run(&["registry", "scrub"]);
    assert!(ran.code == 0 && ran.out.contains("done: 3 contents"), "{ran:?}");

    // A flipped byte is found, and the exit code says so.
    let blobs = registry.credentials.parent().unwrap().join("blobs/sha256");
    let folder = std::fs::read_dir(&blobs).unwrap().next().unwrap().unwrap().path();
    let blob = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[0] ^= 1;
    std::fs::write(&blob, bytes).unwrap();
    let ran = home.run(&["registry", "scrub"]);
    assert!(ran.code == 1 && ran.out.contains("missing now; push it again"), "{ran:?}");
    let report = json(&home, &["registry", "scrub", "--status"]);
    assert_eq!(report["last"]["wrong"]["count"], 1);
    assert!(home.run(&["registry", "gc", "--status"]).ok().starts_with("Last: "));
}

#[test]
fn the_role_and_its_commands_are_told_apart() {
    let home = Home::new();
    let ran = home.run(&["registry"]);
    assert!(ran.code == 2 && ran.err.contains("--config"), "{ran:?}");
    let ran = home.run(&["registry", "--config", "x.toml", "gc"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    let ran = home.run(&["registry", "ls", "--registry", "http://127.0.0.1:1"]);
    assert!(ran.code == 1 && ran.err.contains("can't be asked; check that it runs"), "{ran:?}");
    let (_, registry) = setup();
    let ran = home.run(&["registry", "ls", "--registry", &registry.url]);
    assert!(ran.code == 1 && ran.err.contains("give an operator's credentials"), "{ran:?}");
}
