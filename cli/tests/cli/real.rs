//! The command against real schedulers, run as roles of the same binary. No machine: containers are for the
//! scenarios in namespaces.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    process::{Child, Stdio},
};

use serde_json::Value;

use crate::{
    happy::{Registry, example},
    runner::Home,
};

/// A role's process; killed with this value unless it was stopped.
struct Role {
    process: Child,
    url: String,
}

impl Role {
    /// Starts a role whose configuration says `listen = "127.0.0.1:0"`, and reads its address from its log.
    fn start(home: &Home, role: &str, config: &str) -> Self {
        let mut command = home.command(&[role, "--config", config]);
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut seen = String::new();
        let url = loop {
            let line = log.next().unwrap_or_else(|| panic!("{role} ended: {seen}")).unwrap();
            if let Some((_, address)) = line.split_once("address=") {
                break format!("http://{}", address.split_whitespace().next().unwrap());
            }
            seen += &format!("{line}\n");
        };
        // The rest of the log must not fill the pipe.
        std::thread::spawn(move || log.map_while(Result::ok).for_each(drop));
        Self { process, url }
    }

    fn stop(mut self) -> i32 {
        let id = self.process.id().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        self.process.wait().unwrap().code().expect("ends by itself")
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn global_scheduler(home: &Home) -> Role {
    global_scheduler_with(home, "['203.0.113.0/24']")
}

fn global_scheduler_with(home: &Home, pools: &str) -> Role {
    let data = home.path().join("global");
    let config =
        format!("data_dir = '{}'\nlisten = '127.0.0.1:0'\nvip_pools = {pools}\n", data.to_string_lossy());
    let role = Role::start(home, "global-scheduler", &home.file("global.toml", &config));
    let token = data.join("admin.token");
    assert_eq!(std::fs::metadata(&token).unwrap().permissions().mode() & 0o777, 0o600);
    let token = token.to_string_lossy();
    home.run(&["context", "set", "real", "--url", &role.url, "--token-file", &token]).ok();
    role
}

fn use_registry(home: &Home) -> Registry {
    let registry = Registry::start();
    let credentials = registry.credentials.to_string_lossy();
    let flags = ["--registry", &registry.url, "--registry-credentials-file", &credentials];
    home.run(&[&["context", "set", "real"][..], &flags].concat()).ok();
    registry.push(home, "hello:v1").ok();
    registry
}

#[test]
fn a_deployment_waits_for_a_location_with_a_reason_and_survives_a_restart() {
    let home = Home::new();
    let role = global_scheduler(&home);
    let _registry = use_registry(&home);
    let ran = home.run(&["apply", "-f", &example("hello.yaml"), "--wait", "--timeout", "500ms"]);
    assert_eq!(ran.code, 4, "{ran:?}");
    assert!(ran.err.contains("still pending after 500ms") && ran.err.contains("no_locations"), "{ran:?}");
    let why: Value = serde_json::from_str(&home.run(&["why", "hello", "-o", "json"]).ok()).unwrap();
    assert_eq!(why["refusals"][0]["reason"], "no_locations", "{why}");
    let table = home.run(&["get", "deployments"]).ok();
    let row = table.lines().nth(1).unwrap();
    assert!(row.starts_with("hello") && row.contains("203.0.113.") && row.contains("pending"), "{table}");
    assert!(home.run(&["describe", "deployment", "hello"]).ok().contains("Events:"));
    assert_eq!(home.run(&["get", "instances", "-o", "json"]).ok(), "[]\n");
    assert_eq!(home.run(&["capacity", "-o", "json"]).ok(), "[]\n");

    assert_eq!(role.stop(), 0);
    let vip = |table: &str| table.lines().nth(1).unwrap().split_whitespace().nth(1).unwrap().to_owned();
    let _role = global_scheduler(&home);
    assert_eq!(vip(&home.run(&["get", "deployments"]).ok()), vip(&table));
    home.run(&["delete", "deployment", "hello"]).ok();
    assert_eq!(home.run(&["get", "deployments", "-o", "json"]).ok(), "[]\n");
    assert!(home.run(&["describe", "deployment", "hello"]).failed().contains("hello"));
}

#[test]
fn a_pool_of_ipv6_addresses_gives_each_deployment_one_the_old_ones_too() {
    let home = Home::new();
    let role = global_scheduler(&home);
    let _registry = use_registry(&home);
    let apply = ["apply", "-f", &example("hello.yaml")];
    assert_eq!(home.run(&apply).ok(), "hello 203.0.113.1\n");
    assert_eq!(role.stop(), 0);
    let role = global_scheduler_with(&home, "['203.0.113.0/24', '2001:db8:a::/64']");
    assert_eq!(home.run(&apply).ok(), "hello 203.0.113.1 2001:db8:a::1\n");
    let table = home.run(&["get", "deployments"]).ok();
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0][..4], ["NAME", "VIP", "VIP6", "READY"]);
    assert_eq!(words[1][..4], ["hello", "203.0.113.1", "2001:db8:a::1", "0"]);
    let text = home.run(&["describe", "deployment", "hello"]).ok();
    assert!(
        text.lines().any(|line| line.contains("Virtual IPv6") && line.ends_with("2001:db8:a::1")),
        "{text}"
    );
    let json = home.run(&["get", "deployments", "hello", "-o", "json"]).ok();
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["vip6"], "2001:db8:a::1");

    // It is kept when the pool goes, and free again when the deployment does.
    assert_eq!(role.stop(), 0);
    let role = global_scheduler(&home);
    assert!(home.run(&["get", "deployments"]).ok().contains("2001:db8:a::1"));
    assert_eq!(role.stop(), 0);
    let _role = global_scheduler_with(&home, "['203.0.113.0/24', '2001:db8:a::/64']");
    home.run(&["delete", "deployment", "hello"]).ok();
    assert_eq!(home.run(&apply).ok(), "hello 203.0.113.1 2001:db8:a::1\n");
}

#[test]
fn pools_that_overlap_are_refused_by_the_fields_name() {
    let home = Home::new();
    let config =
        "data_dir = '/nowhere'\nvip_pools = ['203.0.113.0/24', '2001:db8::/32', '2001:db8:a::/64']\n";
    let ran = home.run(&["global-scheduler", "--config", &home.file("global.toml", config)]);
    let text = ran.failed();
    assert!(text.contains("vip_pools: 2001:db8:a::/64 overlaps 2001:db8::/32"), "{text}");
}

#[test]
fn a_job_waits_is_cancelled_and_is_forgotten() {
    let home = Home::new();
    let _role = global_scheduler(&home);
    let _registry = use_registry(&home);
    home.run(&["jobs", "run", "-f", &example("nightly.yaml")]).ok();
    let taken = home.run(&["jobs", "run", "-f", &example("nightly.yaml")]).failed();
    assert!(taken.contains("nightly"), "{taken}");
    assert!(home.run(&["jobs", "get"]).ok().contains("queued"));
    home.run(&["why", "job", "nightly"]).ok();
    home.run(&["jobs", "cancel", "nightly"]).ok();
    assert!(home.run(&["jobs", "get", "nightly"]).ok().contains("cancelled"));
    home.run(&["jobs", "delete", "nightly"]).ok();
    assert_eq!(home.run(&["jobs", "get", "-o", "json"]).ok(), "[]\n");
}

#[test]
fn tokens_have_roles_and_an_end() {
    let home = Home::new();
    let _role = global_scheduler(&home);
    let create = |args: &[&str]| {
        let token = home.run(&[&["token", "create"][..], args].concat()).ok();
        home.file("new.token", &token)
    };
    let viewer = create(&["--role", "viewer"]);
    home.run(&["get", "deployments", "--token-file", &viewer]).ok();
    let refused = home.run(&["token", "create", "--role", "admin", "--token-file", &viewer]).failed();
    assert!(refused.contains("viewer") || refused.contains("admin"), "{refused}");
    let short = create(&["--role", "viewer", "--ttl", "50ms"]);
    std::thread::sleep(std::time::Duration::from_millis(80));
    let expired = home.run(&["get", "deployments", "--token-file", &short]).failed();
    assert!(expired.contains("expired") && expired.contains("anyplace token create"), "{expired}");
    let unknown = home.file("unknown.token", "ap_unknown\n");
    let refused = home.run(&["get", "deployments", "--token-file", &unknown]).failed();
    assert!(refused.contains("token"), "{refused}");
}

#[test]
fn a_location_joins_and_is_operated() {
    let home = Home::new();
    let global = global_scheduler(&home);
    let _registry = use_registry(&home);
    let token = home.path().join("ams.token");
    let token = token.to_string_lossy();
    home.run(&["token", "create", "--role", "location", "--location", "ams", "--out", &token]).ok();
    let config = format!(
        "data_dir = '{}'\nlisten = '127.0.0.1:0'\nadvertise = 'http://127.0.0.1:1'\nlocation = 'ams'\nregion = 'eu'\n\
         country = 'NL'\nlatitude = 52.31\nlongitude = 4.76\ntimezone = 'UTC'\noff_peak = '22:00-06:00'\n\
         global = '{}'\ntoken_file = '{token}'\nmachine_lease_ms = 600\n",
        home.path().join("location").to_string_lossy(),
        global.url,
    );
    let _location = Role::start(&home, "location-scheduler", &home.file("location.toml", &config));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !home.run(&["capacity"]).ok().contains("ams") {
        assert!(std::time::Instant::now() < deadline, "the location joins");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let capacity: Value = serde_json::from_str(&home.run(&["capacity", "-o", "json"]).ok()).unwrap();
    assert_eq!((&capacity[0]["alive"], &capacity[0]["advert"]["machines"]), (&true.into(), &0.into()));
    home.run(&["apply", "-f", &example("hello.yaml")]).ok();
    assert!(home.run(&["why", "hello"]).ok().contains("no_machines"));

    let settings = || {
        let record = home.run(&["get", "locations", "ams", "-o", "json"]).ok();
        serde_json::from_str::<Value>(&record).unwrap()["settings"].clone()
    };
    home.run(&["location", "set", "ams", "--off-peak", "01:00-02:00"]).ok();
    home.run(&["location", "withdraw", "ams"]).ok();
    assert_eq!(settings()["withdrawn"], true);
    assert_eq!(settings()["off_peak"], "01:00:00-02:00:00");
    assert!(home.run(&["get", "locations"]).ok().contains("alive,withdrawn"));
    home.run(&["location", "announce", "ams"]).ok();
    assert_eq!(settings()["withdrawn"], false);
    assert!(
        home.run(&["describe", "location", "ams"])
            .ok()
            .contains("Override:     off-peak window 01:00:00-02:00:00")
    );
}
