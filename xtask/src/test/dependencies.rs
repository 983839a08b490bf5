//! Who may depend on whom, as docs and design say: no daemon knows another, cores are pure, and the bottom crates know
//! nothing above them. Architecture that nobody checks is a wish.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Each crate of the workspace, and which others it may use. Tests of a crate may use more, but no daemon another.
const ALLOWED: &[(&str, &[&str])] = &[
    ("anyplace-model", &[]),
    ("anyplace-choice", &[]),
    ("anyplace-ebpf-common", &[]),
    ("anyplace-seed", &[]),
    ("anyplace-store", &[]),
    ("zstd-chunked", &[]),
    ("anyplace-images", &["zstd-chunked"]),
    ("anyplace-api", &["anyplace-model"]),
    ("anyplace-service", &["anyplace-api", "anyplace-model"]),
    ("anyplace-ebpf", &["anyplace-ebpf-common"]),
    ("anyplace-ebpf-model", &["anyplace-ebpf-common"]),
    ("anyplace-global-core", &["anyplace-model"]),
    ("anyplace-location-core", &["anyplace-choice", "anyplace-model"]),
    ("anyplace-registry-core", &["anyplace-model"]),
    ("anyplace-router-core", &["anyplace-model"]),
    (
        "anyplace-global-scheduler",
        &[
            "anyplace-api",
            "anyplace-choice",
            "anyplace-global-core",
            "anyplace-model",
            "anyplace-service",
            "anyplace-store",
        ],
    ),
    (
        "anyplace-location-scheduler",
        &["anyplace-api", "anyplace-location-core", "anyplace-model", "anyplace-service", "anyplace-store"],
    ),
    ("anyplace-machine-agent", &["anyplace-api", "anyplace-images", "anyplace-model", "anyplace-service"]),
    (
        "anyplace-registry",
        &["anyplace-images", "anyplace-model", "anyplace-registry-core", "anyplace-service"],
    ),
    (
        "anyplace-state-router",
        &[
            "anyplace-api",
            "anyplace-ebpf",
            "anyplace-ebpf-common",
            "anyplace-model",
            "anyplace-router-core",
            "anyplace-service",
        ],
    ),
    (
        "anyplace",
        &[
            "anyplace-api",
            "anyplace-global-scheduler",
            "anyplace-images",
            "anyplace-location-scheduler",
            "anyplace-machine-agent",
            "anyplace-model",
            "anyplace-registry",
            "anyplace-service",
            "anyplace-state-router",
        ],
    ),
    ("anyplace-sim", &["anyplace-location-core", "anyplace-model", "anyplace-seed"]),
    ("anyplace-tests", &[]),
    ("xtask", &["anyplace-tests"]),
];

/// Roles that run as processes of their own: none may see another, not even in its tests.
const DAEMONS: &[&str] = &[
    "anyplace-global-scheduler",
    "anyplace-location-scheduler",
    "anyplace-machine-agent",
    "anyplace-registry",
    "anyplace-state-router",
];

/// Crates without I/O, clocks and randomness.
const PURE: &[&str] = &[
    "anyplace-choice",
    "anyplace-ebpf-common",
    "anyplace-global-core",
    "anyplace-location-core",
    "anyplace-model",
    "anyplace-registry-core",
    "anyplace-router-core",
];

/// What a pure crate may reach by no way.
const IMPURE: &[&str] = &[
    "async-std",
    "axum",
    "aya",
    "futures-util",
    "getrandom",
    "hyper",
    "mio",
    "nix",
    "object_store",
    "rand",
    "redb",
    "reqwest",
    "rustls",
    "rustix",
    "socket2",
    "tempfile",
    "tokio",
    "tower",
    "tracing-subscriber",
    "ureq",
];

/// An error that lists every violation.
pub(super) fn check(metadata: &Value) -> Result<()> {
    let found = violations(metadata)?;
    if !found.is_empty() {
        bail!("{}", found.join("; "));
    }
    Ok(())
}

fn violations(metadata: &Value) -> Result<Vec<String>> {
    let workspace = Workspace::read(metadata)?;
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let mut found = Vec::new();
    for (name, uses) in &workspace.direct {
        let Some(may) = allowed.get(name.as_str()) else {
            found.push(format!(
                "`{name}` is new: say in xtask/src/test/dependencies.rs what it may depend on"
            ));
            continue;
        };
        for (used, kind) in uses.iter().filter(|(used, _)| workspace.direct.contains_key(used)) {
            if kind != "dev" && !may.contains(&used.as_str()) {
                found.push(format!("`{name}` depends on `{used}`, which it must not know"));
            }
            if DAEMONS.contains(&name.as_str()) && DAEMONS.contains(&used.as_str()) {
                found.push(format!("daemon `{name}` depends on daemon `{used}`"));
            }
        }
    }
    for pure in PURE.iter().filter(|pure| workspace.direct.contains_key(**pure)) {
        for reached in workspace.reached_from(pure).iter().filter(|name| IMPURE.contains(&name.as_str())) {
            found.push(format!(
                "`{pure}` must be pure and reaches `{reached}` (`cargo tree -p {pure} -i {reached}`)"
            ));
        }
    }
    Ok(found)
}

struct Workspace {
    /// For each member: what it uses, and as what (`normal`, `build`, `dev`).
    direct: BTreeMap<String, Vec<(String, String)>>,
    /// For each package id: its name, and the ids it uses in its normal code.
    graph: BTreeMap<String, (String, Vec<String>)>,
}

impl Workspace {
    fn read(metadata: &Value) -> Result<Self> {
        let members: BTreeSet<&str> =
            array(metadata, "workspace_members")?.iter().filter_map(Value::as_str).collect();
        let mut names = BTreeMap::new();
        let mut direct = BTreeMap::new();
        for package in array(metadata, "packages")? {
            let (id, name) = (text(package, "id")?, text(package, "name")?);
            names.insert(id, name);
            if members.contains(id) {
                let mut uses = Vec::new();
                for dependency in array(package, "dependencies")? {
                    let kind = dependency["kind"].as_str().unwrap_or("normal");
                    uses.push((text(dependency, "name")?.to_owned(), kind.to_owned()));
                }
                direct.insert(name.to_owned(), uses);
            }
        }
        let mut graph = BTreeMap::new();
        for node in array(&metadata["resolve"], "nodes")? {
            let id = text(node, "id")?;
            let mut uses = Vec::new();
            for dependency in array(node, "deps")? {
                // Absent kind: part of the running program.
                if array(dependency, "dep_kinds")?.iter().any(|kind| kind["kind"].is_null()) {
                    uses.push(text(dependency, "pkg")?.to_owned());
                }
            }
            let name = names.get(id).context("a resolved package's name")?;
            graph.insert(id.to_owned(), ((*name).to_owned(), uses));
        }
        Ok(Self { direct, graph })
    }

    /// Names of all packages that a member's code reaches.
    fn reached_from(&self, member: &str) -> BTreeSet<String> {
        let start = self.graph.iter().find(|(_, (name, _))| name == member);
        let mut waiting: Vec<&String> = start.map(|(_, (_, uses))| uses.iter().collect()).unwrap_or_default();
        let mut seen = BTreeSet::new();
        let mut names = BTreeSet::new();
        while let Some(id) = waiting.pop() {
            if seen.insert(id)
                && let Some((name, uses)) = self.graph.get(id)
            {
                names.insert(name.clone());
                waiting.extend(uses);
            }
        }
        names
    }
}

fn array<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key].as_array().with_context(|| format!("`{key}` in what `cargo metadata` printed"))
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("`{key}` in what `cargo metadata` printed"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_daemon_that_uses_another_and_a_core_that_reaches_tokio_are_found() {
        let package = |name: &str, uses: &[&str]| {
            let uses: Vec<_> = uses.iter().map(|used| json!({"name": used, "kind": null})).collect();
            json!({"id": name, "name": name, "dependencies": uses})
        };
        let node = |name: &str, uses: &[&str]| {
            let uses: Vec<_> =
                uses.iter().map(|used| json!({"pkg": used, "dep_kinds": [{"kind": null}]})).collect();
            json!({"id": name, "deps": uses})
        };
        let metadata = json!({
            "workspace_members": ["anyplace-registry", "anyplace-machine-agent", "anyplace-global-core"],
            "packages": [
                package("anyplace-registry", &[]),
                package("anyplace-machine-agent", &["anyplace-registry"]),
                package("anyplace-global-core", &["between"]),
                package("between", &["tokio"]),
                package("tokio", &[]),
            ],
            "resolve": {"nodes": [
                node("anyplace-global-core", &["between"]),
                node("between", &["tokio"]),
                node("tokio", &[]),
            ]},
        });
        let found = violations(&metadata).unwrap().join("\n");
        assert!(
            found.contains("daemon `anyplace-machine-agent` depends on daemon `anyplace-registry`"),
            "{found}"
        );
        assert!(found.contains("`anyplace-global-core` must be pure and reaches `tokio`"), "{found}");
    }
}
