//! `registry ...` against the real registry.

use anyplace_images::{Client, Credentials, Reference};
use anyplace_registry::Upstream;
use serde_json::{Value, json};

use crate::{happy::Registry, runner::Home};

#[test]
fn operators_list_measure_and_bring_back() {
    let (home, _registry) = Registry::with_an_image();
    let table = home.run(&["registry", "ls"]).ok();
    assert!(table.lines().nth(1).unwrap().starts_with("team/hello   1"), "{table}");
    let tags = home.json(&["registry", "tags", "team/hello"]);
    let digest = tags[0]["digest"].as_str().unwrap().to_owned();
    assert_eq!(tags[0]["tag"], "v1");
    assert!(tags[0]["size_bytes"].as_u64().unwrap() > 500, "{tags}");
    let table = home.run(&["registry", "tags", "team/hello"]).ok();
    assert!(table.contains(&digest) && table.contains("PUSHED"), "{table}");
    let usage = home.json(&["registry", "du"]);
    let usage = (&usage["contents"], &usage["unneeded_bytes"], &usage["repositories"][0]["repository"]);
    assert_eq!(usage, (&3.into(), &0.into(), &"team/hello".into()));
    assert!(home.run(&["registry", "du", "team/hello"]).ok().contains("ITS OWN"));

    assert_eq!(home.json(&["registry", "trash"]), Value::Array(Vec::new()));
    let ran = home.run(&["registry", "trash", "--empty"]);
    assert!(
        ran.code == 1 && ran.err.contains("0 deletions could not be undone any more; add --yes"),
        "{ran:?}"
    );
    assert_eq!(home.json(&["registry", "trash", "--empty", "--yes"])["deletions"], 0);
    assert_eq!(home.json(&["registry", "uploads"]), Value::Array(Vec::new()));
    let ran = home.run(&["registry", "uploads", "--drop", "--idle", "10m"]);
    assert!(ran.code == 0 && ran.err.contains("none is as old"), "{ran:?}");
    let ran = home.run(&["registry", "undelete", "team/hello:v1"]);
    assert!(ran.code == 1 && ran.err.contains("has no tag v1; `anyplace registry trash"), "{ran:?}");
    let ran = home.run(&["registry", "tags", "nobody/nothing"]);
    assert!(ran.code == 1 && ran.err.contains("no repository `nobody/nothing`"), "{ran:?}");
}

#[test]
fn operators_see_what_a_cache_keeps() {
    let (home, origin) = Registry::with_an_image();
    let (url, credentials_file) = (origin.url.clone(), Some(origin.credentials.clone()));
    let cache = Registry::with_upstreams(vec![Upstream { url, credentials_file, namespace: None }]);
    cache.make_current(&home);
    let credentials = Credentials::from_file(&cache.credentials).unwrap();
    let client = Client::new(&cache.url, Some(credentials)).unwrap();
    let image: Reference = "team/hello:v1".parse().unwrap();
    let layer = cache.runtime.block_on(async {
        let manifest: Value =
            serde_json::from_slice(&client.get_manifest(&image).await.unwrap().bytes).unwrap();
        let digest = manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
        client.get_blob(&image, &digest, None).await.unwrap().read(1 << 20).await.unwrap().len()
    });
    cache.push(&home, "own:v1").ok();

    let ran = home.run(&["registry", "du"]);
    let (pushed, cached) = ran.out.split_once("\n\n").unwrap();
    assert!(pushed.starts_with("REPOSITORY") && pushed.contains("own "), "{ran:?}");
    let row: Vec<&str> = cached.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..4], ["team/hello", "1", "1", "1"], "{ran:?}");
    assert!(ran.err.contains("cached: ") && ran.err.contains("of 1 blobs with"), "{ran:?}");
    let usage = home.json(&["registry", "du", "team/hello"]);
    assert_eq!(usage["cache"]["repositories"][0]["disk_bytes"], layer);
    assert_eq!(usage["repositories"], json!([]));

    let table = home.run(&["registry", "ls"]).ok();
    let row = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(row("team/hello").contains("1 tags, 1 manifests, "), "{table}");
    assert!(row("own").trim_end().ends_with('-'), "{table}");
    let tags = home.run(&["registry", "tags", "team/hello"]).ok();
    let from = origin.url.as_str();
    assert!(tags.contains("CACHED") && tags.contains(&format!("from {from}")), "{tags}");
    let tags = home.json(&["registry", "tags", "team/hello"]);
    assert_eq!(tags[0]["cached"]["from"], from);
    assert_eq!(tags[0].get("pushed_at"), None);
    assert!(!home.run(&["registry", "tags", "own"]).ok().contains("CACHED"));
}

#[test]
fn collections_and_scrubs_are_followed_to_their_end() {
    let (home, registry) = Registry::with_an_image();
    let dry = home.json(&["registry", "gc", "--dry-run"]);
    assert_eq!((&dry["phase"], &dry["dry_run"]), (&"done".into(), &true.into()));
    let ran = home.run(&["registry", "gc"]);
    assert!(ran.code == 0 && ran.out.contains("done: 0 tags, 0 manifests, 0 links"), "{ran:?}");
    let status = home.json(&["registry", "gc", "--status"]);
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
    let report = home.json(&["registry", "scrub", "--status"]);
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
    let (_, registry) = Registry::with_an_image();
    let ran = home.run(&["registry", "ls", "--registry", &registry.url]);
    assert!(ran.code == 1 && ran.err.contains("give an operator's credentials"), "{ran:?}");
}

/// A registry that began a scrub which then stopped, with the report of an earlier one.
fn stopped_scrub() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let report = |hour: u32, phase: &str| {
        json!({"started": format!("2026-11-24T{hour:02}:00:00Z"), "finished": null, "phase": phase,
            "checked": 4, "bytes": 9, "wrong": {"count": 0, "named": []}})
    };
    let routes = axum::Router::new().route(
        "/v1/scrub",
        axum::routing::get(
            move || async move { axum::Json(json!({"running": null, "last": report(1, "done")})) },
        )
        .post(move || async move { axum::Json(report(2, "running")) }),
    );
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            listener.set_nonblocking(true).unwrap();
            axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), routes).await.unwrap();
        });
    });
    format!("http://{address}")
}

#[test]
fn an_earlier_scrubs_report_is_not_taken_for_this_ones() {
    let home = Home::new();
    let file = home.file("credentials", "op:secret\n");
    let url = stopped_scrub();
    let ran = home.run(&["registry", "scrub", "--registry", &url, "--registry-credentials-file", &file]);
    assert!(ran.code == 1 && ran.out.is_empty(), "{ran:?}");
    assert!(ran.err.contains("`anyplace registry scrub` goes on from there"), "{ran:?}");
}

#[test]
fn a_pulled_image_is_kept_and_a_bad_mount_is_refused_before_the_pull() {
    let (home, _registry) = Registry::with_an_image();
    let store = home.path().join("store").to_string_lossy().into_owned();
    let pull = ["image", "pull", "team/hello:v1", "--store", &store];
    let ran = home.run(&[&pull[..], &["--mount", "/no/such/folder"]].concat());
    assert!(
        ran.code == 1 && ran.err.contains("--mount: /no/such/folder is no folder; make it first"),
        "{ran:?}"
    );
    assert!(!std::path::Path::new(&store).exists(), "nothing was pulled");
    home.run(&pull).ok();
    let listed = home.json(&["image", "ls", "--store", &store]);
    assert_eq!(listed[0]["reference"], "team/hello:v1", "{listed}");
    assert!(!std::path::Path::new(&store).join("dirty").exists());
    let again = home.json(&pull);
    assert_eq!((&again["bytes_fetched"], &again["layers_reused"]), (&0.into(), &again["layers"]), "{again}");
}

/// Some file below a folder.
fn a_file(folder: &std::path::Path) -> Option<std::path::PathBuf> {
    let mut found = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    found.find_map(|path| if path.is_dir() { a_file(&path) } else { Some(path) })
}

#[test]
fn damage_in_a_store_and_an_unreachable_registry_are_told() {
    let (home, registry) = Registry::with_an_image();
    let store = home.path().join("store").to_string_lossy().into_owned();
    // Small files are kept with the names.
    std::fs::write(home.path().join("rootfs/data"), vec![7; 100_000]).unwrap();
    registry.push(&home, "team/hello:v1").ok();
    let pull = ["image", "pull", "team/hello:v1", "--store", &store];
    home.run(&pull).ok();
    let verify = ["image", "verify", "--store", &store];
    home.run(&verify).ok();
    let object = a_file(&home.path().join("store/objects")).unwrap();
    let mut bytes = std::fs::read(&object).unwrap();
    bytes[0] ^= 1;
    // What is in the store is for reading only.
    std::fs::remove_file(&object).unwrap();
    std::fs::write(&object, bytes).unwrap();
    let ran = home.run(&verify);
    assert!(ran.code == 1 && ran.out.contains("damaged and removed: objects/"), "{ran:?}");
    home.run(&verify).ok();
    home.run(&pull).ok();

    // Whoever may not push has the right address.
    let wrong = home.file("wrong", "anyplace:wrong\n");
    let rootfs = home.path().join("rootfs").to_string_lossy().into_owned();
    let push = ["push", &rootfs, "team/hello:v2", "--entrypoint", "/bin/serve"];
    let error = home.run(&[&push[..], &["--registry-credentials-file", &wrong]].concat()).failed();
    assert!(error.contains("refused access") && !error.contains("--registry or the context"), "{error}");
    // They go with the registry's data.
    let credentials = home.file("credentials", &std::fs::read_to_string(&registry.credentials).unwrap());
    drop(registry);
    let flags = ["--registry-credentials-file", &credentials];
    let error = home.run(&[&push[..], &flags].concat()).failed();
    assert!(error.contains("--registry or the context says where the registry is"), "{error}");
    let pull = [&pull[..], &flags].concat();
    let ran = home.run(&pull);
    let told = ran.err.contains("this is what the name meant when the registry last answered");
    assert!(ran.code == 0 && told && ran.out.starts_with("team/hello:v1@sha256:"), "{ran:?}");
    assert!(home.json(&pull)["stale"].as_str().unwrap().contains("no answer from the registry"));
}
