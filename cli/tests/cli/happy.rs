//! What users do when all is well: push, apply, look, delete.

use std::{os::unix::fs::PermissionsExt as _, path::PathBuf};

use anyplace_api::{DeploymentView, Role};
use anyplace_model::TeamSettings;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{
    fake::Fake,
    runner::{Home, Ran},
};

/// The real registry, on loopback.
pub(crate) struct Registry {
    pub(crate) url: String,
    pub(crate) credentials: PathBuf,
    pub(crate) runtime: tokio::runtime::Runtime,
    _data: tempfile::TempDir,
}

impl Registry {
    pub(crate) fn start() -> Self {
        Self::with_upstreams(Vec::new())
    }

    /// One that caches these.
    pub(crate) fn with_upstreams(upstreams: Vec<anyplace_registry::Upstream>) -> Self {
        let data = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let config = anyplace_registry::Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            upstreams,
            ..anyplace_registry::Config::new(data.path())
        };
        anyplace_service::install_crypto_provider();
        let server = runtime.block_on(anyplace_registry::Server::bind(config)).unwrap();
        let url = format!("http://{}", server.local_addr().unwrap());
        runtime.spawn(server.serve(CancellationToken::new()));
        Self { url, credentials: data.path().join("credentials"), runtime, _data: data }
    }

    /// The current context of a home, with `team/hello:v1` in it.
    pub(crate) fn with_an_image() -> (Home, Self) {
        let (home, registry) = (Home::new(), Registry::start());
        registry.make_current(&home);
        registry.push(&home, "team/hello:v1").ok();
        (home, registry)
    }

    /// Makes it the current context of a home.
    pub(crate) fn make_current(&self, home: &Home) {
        let credentials = self.credentials.to_string_lossy();
        let flags = ["--registry", &self.url, "--registry-credentials-file", &credentials];
        home.run(&[&["context", "set", "test"][..], &flags].concat()).ok();
    }

    /// Pushes a small image.
    pub(crate) fn push(&self, home: &Home, reference: &str) -> Ran {
        let rootfs = home.path().join("rootfs");
        std::fs::create_dir_all(rootfs.join("bin")).unwrap();
        std::fs::write(rootfs.join("bin/serve"), "#!/bin/sh\n").unwrap();
        let entry = r#"["/bin/serve", "--port"]"#;
        let source = rootfs.to_string_lossy();
        home.run(&["push", &source, reference, "--entrypoint", entry, "--cmd", "8080", "--port", "8080"])
    }
}

/// Makes the fake and the registry the current context.
pub(crate) fn platform(home: &Home, fake: &Fake, registry: Option<&Registry>) {
    let mut args = vec!["context", "set", "test", "--token-stdin", "--url", &fake.url];
    let credentials = registry.map(|registry| registry.credentials.to_string_lossy());
    if let (Some(registry), Some(credentials)) = (registry, &credentials) {
        args.extend(["--registry", &registry.url, "--registry-credentials-file", credentials]);
    }
    let ran = home.run_with_input(&args, "good\n");
    assert_eq!(ran.code, 0, "{ran:?}");
}

/// A spec of the documentation.
pub(crate) fn example(name: &str) -> String {
    format!("{}/../docs/examples/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn everything() -> (Home, Fake, Registry) {
    let (home, fake, registry) = (Home::new(), Fake::start(), Registry::start());
    platform(&home, &fake, Some(&registry));
    registry.push(&home, "hello:v1").ok();
    (home, fake, registry)
}

#[test]
fn push_prints_the_pinned_reference_and_says_what_it_did() {
    let (home, fake, registry) = (Home::new(), Fake::start(), Registry::start());
    platform(&home, &fake, Some(&registry));
    let ran = registry.push(&home, "team/hello:v1");
    let events: Vec<Value> = ran.err.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let has = |event: &str, stage: &str| events.iter().any(|e| e["event"] == event && e["stage"] == stage);
    for stage in ["pack", "send"] {
        assert!(has("start", stage) && has("finish", stage), "{ran:?}");
    }
    let summary = events.last().unwrap();
    assert!(summary["event"] == "summary" && summary["bytes_sent"] == summary["bytes_packed"], "{ran:?}");
    let pinned = ran.ok();
    assert!(pinned.starts_with("team/hello:v1@sha256:") && pinned.lines().count() == 1, "{pinned}");
    let again = registry.push(&home, "team/hello:v1");
    let summary: Value = serde_json::from_str(again.err.lines().last().unwrap()).unwrap();
    assert!(summary["skipped"] == 2 && summary["bytes_sent"] == 0, "{again:?}");
    assert_eq!(again.ok(), pinned);
    let rootfs = home.path().join("rootfs");
    let json = home.run(&["push", &rootfs.to_string_lossy(), "team/hello:v2", "-o", "json"]).ok();
    let summary: Value = serde_json::from_str(&json).unwrap();
    assert!(summary["reference"].as_str().unwrap().starts_with("team/hello:v2@sha256:"), "{json}");
}

#[test]
fn apply_pins_the_image_and_waits_until_it_is_ready() {
    let (home, _fake, _registry) = everything();
    let ran = home.run(&["apply", "-f", &example("hello.yaml"), "--wait"]);
    assert!(ran.err.contains("deployment hello created"), "{ran:?}");
    assert!(ran.err.contains("hello: progressing, 0 of 6 ready"), "{ran:?}");
    assert!(ran.err.contains("deployment hello is ready: 6 of 6 instances"), "{ran:?}");
    assert_eq!(ran.ok(), "hello 203.0.113.1\n");

    let view: DeploymentView =
        serde_json::from_str(&home.run(&["get", "deployments", "hello", "-o", "json"]).ok()).unwrap();
    assert!(view.spec.image.starts_with("hello:v1@sha256:"), "{}", view.spec.image);
    let again = home.run(&["apply", "-f", &example("hello.yaml"), "-o", "json"]);
    assert!(again.err.contains("deployment hello unchanged"), "{again:?}");
    assert_eq!(serde_json::from_str::<DeploymentView>(&again.ok()).unwrap().spec, view.spec);
}

#[test]
fn what_fits_nowhere_is_pending_at_the_deadline_and_why_says_so() {
    let (home, _fake, _registry) = everything();
    let ran = home.run(&["apply", "-f", &example("gpu.yaml"), "--wait", "--timeout", "400ms"]);
    assert_eq!((ran.code, ran.out.as_str()), (4, "gpu 203.0.113.1\n"), "{ran:?}");
    assert!(
        ran.err.contains("deployment gpu is still pending after 400ms: no location can run it"),
        "{ran:?}"
    );
    assert!(ran.err.contains("no_gpu (3): no location has a GPU"), "{ran:?}");
    assert!(ran.err.contains("`anyplace why deployment gpu`"), "{ran:?}");
    for args in [&["why", "gpu"][..], &["why", "deployment", "gpu"], &["why", "deployment/gpu"]] {
        let text = home.run(args).ok();
        assert!(text.contains("no_gpu (3): no location has a GPU") && text.contains("Nearest fit"), "{text}");
    }
    let why: Value = serde_json::from_str(&home.run(&["why", "gpu", "-o", "json"]).ok()).unwrap();
    assert_eq!(why["refusals"][0]["reason"], "no_gpu");
    assert!(home.run(&["why", "none"]).failed().contains("there is no deployment or job `none`"));
}

#[test]
fn lists_are_one_line_for_each_and_parse_as_json_and_yaml() {
    let (home, _fake, _registry) = everything();
    home.run(&["apply", "-f", &example("hello.yaml"), "--wait"]).ok();
    home.run(&["jobs", "run", "-f", &example("nightly.yaml"), "--wait"]).ok();
    let table = home.run(&["get", "deployments"]).ok();
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    let header = "NAME VIP READY WANTED PHASE LOCATIONS IMAGE AGE REASON";
    assert_eq!(words[0], header.split(' ').collect::<Vec<_>>());
    assert_eq!(words[1][..7], ["hello", "203.0.113.1", "6", "6", "ready", "ams", "hello:v1"]);
    let instances = home.run(&["get", "instances"]).ok();
    assert!(instances.contains("hello-1") && instances.contains("night-1"), "{instances}");
    let mine = home.run(&["get", "instances", "hello"]).ok();
    assert!(mine.contains("hello-1") && !mine.contains("night-1"), "{mine}");

    for args in [
        &["get", "deployments"][..],
        &["get", "jobs"],
        &["jobs", "get", "nightly"],
        &["get", "instances"],
        &["get", "events"],
        &["describe", "deployment", "hello"],
        &["describe", "job", "nightly"],
        &["describe", "location", "ams"],
        &["capacity"],
        &["team", "ls"],
        &["team", "ls", "ants"],
        &["location", "latency"],
        &["events", "hello"],
    ] {
        home.run(args).ok();
        let json: Value = serde_json::from_str(&home.run(&[args, &["-o", "json"]].concat()).ok()).unwrap();
        let yaml: Value = serde_saphyr::from_str(&home.run(&[args, &["-o", "yaml"]].concat()).ok()).unwrap();
        assert_eq!(json.as_array().map(Vec::len), yaml.as_array().map(Vec::len), "{args:?}");
        assert!(json.is_array() || json.is_object(), "{args:?}");
    }
}

#[test]
fn describe_and_capacity_show_what_matters() {
    let (home, _fake, _registry) = everything();
    home.run(&["apply", "-f", &example("hello.yaml"), "--wait"]).ok();
    let text = home.run(&["describe", "deployment", "hello"]).ok();
    for part in
        ["Virtual IP:   203.0.113.1", "80/tcp -> 8080", "6 of 6 ready", "Instances:\n", "hello-1", "Events:"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let text = home.run(&["describe", "location", "ams"]).ok();
    assert!(text.contains("2x H100 (80Gi)") && text.contains("7.85 free of 8"), "{text}");
    let text = home.run(&["capacity"]).ok();
    for part in ["alive,draining", "7.85/8", "15Gi/16Gi", "2x H100 (80Gi)", "Europe/Amsterdam", "no"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn latency_says_what_is_measured() {
    let (home, _fake, _registry) = everything();
    let text = home.run(&["location", "latency"]).ok();
    let rows: Vec<String> =
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let expected = [
        "FROM TO LATENCY BY DISTANCE",
        "ams nrt 120.5 ms measured 9340 km",
        "nrt ams 140.6 ms distance 9340 km",
    ];
    assert_eq!(rows, expected);
    let one = home.run(&["location", "latency", "nrt"]).ok();
    assert!(one.contains("140.6 ms") && !one.contains("120.5 ms"), "{one}");
}

#[test]
fn logs_pass_on_what_the_platform_sends() {
    let (home, _fake, _registry) = everything();
    home.run(&["apply", "-f", &example("hello.yaml")]).ok();
    assert_eq!(
        home.run(&["logs", "hello", "--tail", "5"]).ok(),
        "hello: serving, tail Some(5), follow false\n"
    );
    assert_eq!(home.run(&["logs", "-f", "deployment", "hello"]).ok(), {
        "hello: serving, tail None, follow true\n"
    });
}

#[test]
fn jobs_end_with_an_exit_code_of_their_own() {
    let (home, _fake, _registry) = everything();
    let ran = home.run(&["jobs", "run", "-f", &example("nightly.yaml"), "--wait"]);
    assert!(ran.err.contains("nightly: queued, place 1 in the queue"), "{ran:?}");
    assert!(ran.err.contains("job nightly succeeded with exit code 0 in nrt"), "{ran:?}");
    assert_eq!(ran.ok(), "nightly\n");
    let job = |name: &str| home.file("job.yaml", &format!("kind: Job\nname: {name}\nimage: hello:v1\n"));
    let ran = home.run(&["apply", "-f", &job("fails"), "--wait"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err.contains("error: job fails failed with exit code 7 in nrt; run `anyplace logs job fails`")
    );
    let ran = home.run(&["jobs", "run", "-f", &job("waits"), "--wait", "--timeout", "300ms", "-o", "json"]);
    assert_eq!(ran.code, 4, "{ran:?}");
    assert!(ran.err.contains("outside_off_peak_window"), "{ran:?}");
    assert_eq!(serde_json::from_str::<Value>(&ran.out).unwrap()["phase"], "queued");
}

#[test]
fn an_array_is_one_line_with_counts() {
    let (home, _fake, _registry) = everything();
    let file = home.file("job.yaml", "kind: Job\nname: waits\nimage: hello:v1\narray: 12\n");
    home.run(&["jobs", "run", "-f", &file]).ok();
    let table = home.run(&["jobs", "ls"]).ok();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0][..5], ["NAME", "TEAM", "PHASE", "INDEXES", "ATTEMPT"]);
    assert_eq!(rows[1][..6], ["waits", "default", "queued", "12:", "12", "queued"]);
    assert!(home.run(&["describe", "job", "waits"]).ok().contains("Indexes:      12: 12 queued"));
    home.run(&["jobs", "ls", "waits", "--indexes"]).ok();
    assert_eq!(home.run(&["jobs", "ls", "--indexes"]).code, 2);
}

#[test]
fn settings_of_a_team_change_one_at_a_time() {
    let (home, fake) = (Home::new(), Fake::start());
    platform(&home, &fake, None);
    let ran = home.run(&["team", "set", "ants", "--weight", "3", "--max-cpu", "8", "--max-queued", "100"]);
    assert!(ran.err.contains("team ants: weight 3, cpu 8, memory unbounded, gpus unbounded, queued 100"));
    let ran = home.run(&["team", "set", "ants", "--max-gpus", "0", "--max-queued", "none"]);
    assert!(ran.err.contains("team ants: weight 3, cpu 8, memory unbounded, gpus 0, queued unbounded"));
    let table = home.run(&["team", "ls"]).ok();
    let rows: Vec<String> =
        table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let expected = ["NAME WEIGHT SHARE PLACED QUEUED CPU MEMORY GPUS", "ants 3 12.5% 3 7 1.5/8 2Gi 1/0"];
    assert_eq!(rows, expected);
    home.run(&["team", "reset", "ants"]).ok();
    assert_eq!(*fake.state.team.lock().unwrap(), TeamSettings::default());
    assert_eq!(home.run(&["team", "set", "ants"]).code, 2);
}

#[test]
fn settings_of_a_location_change_one_at_a_time() {
    let (home, fake) = (Home::new(), Fake::start());
    platform(&home, &fake, None);
    home.run(&["location", "set", "ams", "--off-peak", "22:00:30-06:00"]).ok();
    home.run(&["location", "withdraw", "ams"]).ok();
    home.run(&["location", "drain", "ams"]).ok();
    home.run(&["location", "cordon", "ams", "--machine", "ams-1"]).ok();
    home.run(&["location", "drain", "ams", "--machine", "ams-2"]).ok();
    let drained = home.run(&["location", "drain", "ams", "--machine", "ams-1"]);
    assert!(drained.err.contains("machines ams-1 draining, ams-2 draining"), "{drained:?}");
    assert!(home.run(&["describe", "location", "ams"]).ok().contains("ams-1 draining, ams-2 draining"));
    let settings = fake.state.settings.lock().unwrap().clone();
    assert!(settings.withdrawn && settings.draining && settings.off_peak.is_some());
    home.run(&["location", "set", "ams", "--no-off-peak"]).ok();
    home.run(&["location", "announce", "ams"]).ok();
    home.run(&["location", "undrain", "ams", "--machine", "ams-1"]).ok();
    home.run(&["location", "undrain", "ams", "--machine", "ams-2"]).ok();
    home.run(&["location", "undrain", "ams"]).ok();
    assert_eq!(*fake.state.settings.lock().unwrap(), anyplace_model::LocationSettings::default());
}

#[test]
fn a_token_is_printed_or_written_for_its_owner_only() {
    let (home, fake) = (Home::new(), Fake::start());
    platform(&home, &fake, None);
    assert_eq!(home.run(&["token", "create", "--role", "viewer", "--ttl", "1h"]).ok(), "ap_new\n");
    let file = home.path().join("location.token");
    let path = file.to_string_lossy();
    let args = ["token", "create", "--role", "location", "--location", "ams", "--out", &path];
    assert_eq!(home.run(&args).ok(), "");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "ap_new\n");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let asked = fake.state.tokens.lock().unwrap();
    assert_eq!(asked[0].ttl, Some(anyplace_model::DurationMs(3_600_000)));
    assert_eq!((asked[1].role, asked[1].scope.location.as_ref().unwrap().as_str()), (Role::Location, "ams"));
}

#[test]
fn what_is_deleted_is_gone() {
    let (home, _fake, _registry) = everything();
    home.run(&["apply", "-f", &example("hello.yaml")]).ok();
    home.run(&["delete", "deployment", "hello"]).ok();
    let message = home.run(&["delete", "deployment", "hello"]).failed();
    assert_eq!(message, "there is no deployment `hello`");
}
