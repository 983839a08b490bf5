//! Collection, retention, trash and scrub of a running registry, by its admin API. Time passes by setting files back.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyplace_images::Digest;
use anyplace_model::{Bytes, DurationMs};
use anyplace_registry::{
    Config, GcConfig, GcPhase, GcReport, GcStatus, RetentionConfig, RuleConfig, ScrubConfig, ScrubOutcome,
    ScrubReport, ScrubStatus, TagView, TrashView, UsageView,
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{LOOPBACK, Registry, cache_config, noise};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// Makes everything in the registry older.
pub(crate) fn age(dir: &Path, time: Duration) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            age(&path, time);
            continue;
        }
        // When the registry looked last: if that were long ago too, it would know nothing of the time between.
        if path.ends_with("gc/clock") {
            continue;
        }
        let file = File::options().append(true).open(&path).unwrap();
        let modified: SystemTime = file.metadata().unwrap().modified().unwrap();
        file.set_modified(modified - time).unwrap();
    }
}

pub(crate) async fn get<T: serde::de::DeserializeOwned>(registry: &Registry, path: &str) -> T {
    let answer = registry.request(Method::GET, path).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK, "{path}: {}", answer.text().await.unwrap());
    answer.json().await.unwrap()
}

pub(crate) async fn post(registry: &Registry, path: &str, body: Value) -> (StatusCode, Value) {
    let answer = registry.request(Method::POST, path).json(&body).send().await.unwrap();
    (answer.status(), answer.json().await.unwrap())
}

pub(crate) async fn collect(registry: &Registry, dry_run: bool) -> GcReport {
    let (status, begun) = post(registry, "/v1/gc", json!({ "dry_run": dry_run })).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{begun}");
    loop {
        let status: GcStatus = get(registry, "/v1/gc").await;
        let ended = if dry_run { status.last_dry_run } else { status.last };
        if let Some(report) = ended.filter(|report| report.run == begun["run"]) {
            assert_eq!(report.phase, GcPhase::Done, "{report:?}");
            return report;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) async fn scrub(registry: &Registry) -> ScrubReport {
    let (status, begun) = post(registry, "/v1/scrub", json!({})).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{begun}");
    loop {
        let status: ScrubStatus = get(registry, "/v1/scrub").await;
        if let (None, Some(report)) = (status.running, status.last) {
            return report;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn exists(registry: &Registry, path: &str) -> bool {
    let status = registry.request(Method::HEAD, path).send().await.unwrap().status();
    assert!(status == StatusCode::OK || status == StatusCode::NOT_FOUND, "{path}: {status}");
    status == StatusCode::OK
}

#[tokio::test]
async fn what_nothing_needs_goes_after_the_grace_and_what_was_deleted_comes_back_before_that() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let (kept, _) = registry.put_image("team/app", "v1", "kept").await;
    let (gone, _) = registry.put_image("team/app", "v2", "gone").await;
    let orphan = registry.put_blob("team/app", b"orphan").await;
    let young = collect(&registry, false).await;
    assert_eq!((young.plan.links.count, young.plan.content.count), (0, 0));
    assert_eq!(young.spared.young, 1);

    let manifest = format!("/v2/team/app/manifests/{gone}");
    assert!(registry.request(Method::DELETE, &manifest).send().await.unwrap().status().is_success());
    assert!(!exists(&registry, "/v2/team/app/manifests/v2").await);
    let trash: Vec<TrashView> = get(&registry, "/v1/trash?repository=team/app").await;
    let trashed: Vec<_> = trash.iter().map(|item| (item.tag.as_deref(), &item.digest)).collect();
    assert!(trashed.contains(&(None, &gone)) && trashed.contains(&(Some("v2"), &gone)), "{trashed:?}");

    age(dir.path(), 25 * HOUR);
    let dry = collect(&registry, true).await;
    assert_eq!((dry.plan.links.count, dry.plan.content.count, dry.plan.bytes), (1, 1, 6));
    assert!(exists(&registry, &format!("/v2/team/app/blobs/{orphan}")).await, "that was only a look");
    // Having been asked for, it is young again.
    assert_eq!(collect(&registry, false).await.plan.links.count, 0);
    age(dir.path(), 25 * HOUR);
    let report = collect(&registry, false).await;
    assert_eq!((report.plan.links.count, report.plan.content.count), (1, 1));
    assert_eq!(report.plan.links.named[0].name, orphan.as_str());
    assert!(!exists(&registry, &format!("/v2/team/app/blobs/{orphan}")).await);

    let (status, body) =
        post(&registry, "/v1/undelete", json!({ "repository": "team/app", "tag": "v2" })).await;
    assert_eq!((status, body["digest"].as_str()), (StatusCode::OK, Some(gone.as_str())), "{body}");
    assert!(exists(&registry, "/v2/team/app/manifests/v2").await);
    let tags: Vec<TagView> = get(&registry, "/v1/tags?repository=team/app").await;
    assert_eq!(
        tags.iter().map(|tag| (tag.tag.as_str(), &tag.digest)).collect::<Vec<_>>(),
        [("v1", &kept), ("v2", &gone)]
    );
    let (status, _) = post(&registry, "/v1/undelete", json!({ "repository": "team/app", "tag": "v2" })).await;
    assert_eq!(status, StatusCode::NOT_FOUND);

    assert!(registry.request(Method::DELETE, &manifest).send().await.unwrap().status().is_success());
    age(dir.path(), 8 * 24 * HOUR);
    let report = collect(&registry, false).await;
    assert_eq!((report.trash_emptied, report.plan.content.count), (2, 3), "{report:?}");
    let usage: UsageView = get(&registry, "/v1/du").await;
    assert_eq!((usage.contents, usage.unneeded_bytes), (3, 0), "{usage:?}");
    assert!(exists(&registry, "/v2/team/app/manifests/v1").await);
    registry.stop().await;
}

#[tokio::test]
async fn a_damaged_deletion_is_told_and_keeps_nothing_from_being_collected() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let trash = dir.path().join("repositories/app/_trash");
    let mut damaged = std::collections::BTreeSet::new();
    let damages: [&dyn Fn(&Path); 2] = [
        &|file| std::fs::write(file, "{\"manifest\":{\"digest\":\"sha2").unwrap(),
        // More than any deletion has, so it isn't even read.
        &|file| File::options().write(true).open(file).unwrap().set_len(17 << 20).unwrap(),
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        let (lost, _) = registry.put_image("app", &format!("lost-{number}"), &format!("lost {number}")).await;
        let path = format!("/v2/app/manifests/{lost}");
        assert!(registry.request(Method::DELETE, &path).send().await.unwrap().status().is_success());
        for file in std::fs::read_dir(&trash).unwrap().map(|file| file.unwrap().path()) {
            if damaged.insert(file.clone()) {
                damage(&file);
            }
        }
    }
    let (kept, _) = registry.put_image("app", "kept", "kept").await;
    let (gone, _) = registry.put_image("app", "gone", "gone").await;
    let path = format!("/v2/app/manifests/{gone}");
    assert!(registry.request(Method::DELETE, &path).send().await.unwrap().status().is_success());
    let orphan = registry.put_blob("app", b"orphan").await;
    age(dir.path(), 25 * HOUR);

    let report = collect(&registry, false).await;
    let told = report.problems.iter().filter(|problem| problem.contains("app/_trash/")).count();
    assert_eq!((told, report.spared.unclear), (4, 0), "{report:?}");
    // The orphan, and two images that can't come back: manifest, configuration and layer each.
    assert_eq!((report.plan.links.count, report.plan.content.count), (7, 7), "{report:?}");
    assert!(!exists(&registry, &format!("/v2/app/blobs/{orphan}")).await);
    assert!(exists(&registry, &format!("/v2/app/manifests/{kept}")).await);
    let undelete = json!({ "repository": "app", "tag": "gone" });
    let (status, body) = post(&registry, "/v1/undelete", undelete).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let layer = registry.request(Method::GET, &format!("/v2/app/blobs/{}", Digest::of(b"gone")));
    assert_eq!(layer.send().await.unwrap().bytes().await.unwrap(), "gone");
    age(dir.path(), 8 * 24 * HOUR);
    let report = collect(&registry, false).await;
    assert_eq!((report.trash_emptied, report.problems.len()), (4, 0), "{report:?}");
    registry.stop().await;
}

#[tokio::test]
async fn rules_let_tags_go_unless_they_are_in_use_and_only_when_that_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let in_use = dir.path().join("in-use.json");
    let rule = RuleConfig {
        repositories: vec!["team/*".parse().unwrap()],
        tags: Some(vec!["pr-*".parse().unwrap()]),
        untagged: false,
        keep_last: Some(1),
        keep_younger_than: None,
    };
    let retention = RetentionConfig {
        rules: vec![rule],
        in_use_file: Some(in_use.clone()),
        ..RetentionConfig::default()
    };
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let registry = Registry::start_with(Config { listen: LOOPBACK, retention, ..Config::new(&data) }).await;
    for tag in ["pr-1", "pr-2", "pr-3", "v1"] {
        registry.put_image("team/app", tag, tag).await;
        age(&data, HOUR);
    }
    age(&data, 25 * HOUR);
    let report = collect(&registry, false).await;
    assert_eq!((report.plan.tags.count, report.plan.manifests.count), (0, 0));
    let skipped = report.retention_skipped.unwrap();
    assert!(skipped.contains("in-use.json"), "{skipped}");

    std::fs::write(&in_use, "[\"registry.example.org/team/app:pr-2\"]").unwrap();
    let report = collect(&registry, false).await;
    let named: Vec<_> = report.plan.tags.named.iter().map(|going| going.name.as_str()).collect();
    assert_eq!((named, report.plan.manifests.count), (vec!["pr-1"], 1), "{report:?}");
    for (tag, there) in [("pr-1", false), ("pr-2", true), ("pr-3", true), ("v1", true)] {
        assert_eq!(exists(&registry, &format!("/v2/team/app/manifests/{tag}")).await, there, "{tag}");
    }
    // The record says who deleted them: not an account.
    let record = registry.request(Method::GET, "/v1/audit?repository=team/app").send().await.unwrap();
    let record: Vec<serde_json::Value> = record.json().await.unwrap();
    let deleted: Vec<_> = record.iter().filter(|event| event["action"] == "delete-manifest").collect();
    assert!(deleted.iter().all(|event| event["account"] == "(retention)"), "{deleted:?}");
    let references: Vec<_> = deleted.iter().map(|event| event["reference"].as_str().unwrap()).collect();
    assert!(references.len() == 2 && references[0] == "pr-1", "{references:?}");
    assert!(references[1].starts_with("sha256:"), "{references:?}");

    let (status, body) =
        post(&registry, "/v1/undelete", json!({ "repository": "team/app", "tag": "pr-1" })).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    // As if it had been pushed now: it is the newest, and another one is past the rule.
    let report = collect(&registry, false).await;
    let named: Vec<_> = report.plan.tags.named.iter().map(|going| going.name.as_str()).collect();
    assert_eq!(named, ["pr-3"]);
    assert!(exists(&registry, "/v2/team/app/manifests/pr-1").await);
    registry.stop().await;
}

#[tokio::test]
async fn damaged_content_is_never_served_again_and_comes_back_from_an_upstream() {
    let (origin_dir, cache_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let origin = Registry::start(origin_dir.path()).await;
    let layer = noise(7, 300_000);
    let both = origin.put_blob("app", &layer).await;
    origin.put_image("app", "v1", "origin").await;
    let config = cache_config(cache_dir.path(), &[(&origin.url(), origin_dir.path())]);
    let scrub_config = ScrubConfig { rate: Bytes(1 << 30), every: DurationMs(0) };
    let cache = Registry::start_with(Config { scrub: scrub_config, ..config }).await;
    cache.put_blob("app", &layer).await;
    let only_here = cache.put_blob("app", b"only here").await;
    let report = scrub(&cache).await;
    assert_eq!((report.wrong.count, report.checked, report.bytes), (0, 2, 300_009), "{report:?}");

    for (digest, at) in [(&both, 150_000), (&only_here, 3)] {
        let path = cache.blob_file(digest);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let report = scrub(&cache).await;
    let outcome = |digest: &Digest| {
        let found = report.wrong.named.iter().find(|finding| finding.digest == digest.as_str());
        found.unwrap_or_else(|| panic!("{digest}: {report:?}"))
    };
    assert_eq!(report.wrong.count, 2);
    assert_eq!(outcome(&both).outcome, ScrubOutcome::Repaired, "{report:?}");
    assert_eq!(outcome(&only_here).outcome, ScrubOutcome::Missing);
    assert_eq!(outcome(&only_here).repositories, ["app"]);
    let moved = cache_dir.path().join(outcome(&only_here).moved_to.as_ref().unwrap());
    assert!(moved.exists(), "{}", moved.display());
    let read = cache.request(Method::GET, &format!("/v2/app/blobs/{both}")).send().await.unwrap();
    assert_eq!(read.bytes().await.unwrap(), layer);
    assert!(!exists(&cache, &format!("/v2/app/blobs/{only_here}")).await);
    cache.put_blob("app", b"only here").await;
    assert_eq!(scrub(&cache).await.wrong.count, 0);
    cache.stop().await;
    origin.stop().await;
}

#[tokio::test]
async fn a_scrub_goes_on_where_it_was_when_the_registry_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let config = |rate| {
        let scrub = ScrubConfig { rate: Bytes(rate), every: DurationMs(0) };
        Config { listen: LOOPBACK, scrub, ..Config::new(dir.path()) }
    };
    let slow = Registry::start_with(config(20_000)).await;
    for seed in 0..20 {
        slow.put_blob("app", &noise(seed, 10_000)).await;
    }
    let (status, begun) = post(&slow, "/v1/scrub", json!({})).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{begun}");
    let (status, _) = post(&slow, "/v1/scrub", json!({})).await;
    assert_eq!(status, StatusCode::CONFLICT);
    loop {
        let status: ScrubStatus = get(&slow, "/v1/scrub").await;
        if status.running.unwrap().checked >= 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    slow.stop().await;
    let position = std::fs::read_to_string(dir.path().join("scrub/position")).unwrap();
    let position: Value = serde_json::from_str(&position).unwrap();
    let before = position["report"]["checked"].as_u64().unwrap();
    assert!((2..20).contains(&before), "{position}");
    let fast = Registry::start_with(config(1 << 30)).await;
    let report = scrub(&fast).await;
    assert_eq!((report.checked, report.bytes, report.wrong.count), (20, 200_000, 0));
    assert_eq!(report.started.to_string(), position["report"]["started"].as_str().unwrap());
    fast.stop().await;
}

#[tokio::test]
async fn only_operators_may_ask_and_one_collection_runs_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start_open(dir.path()).await;
    for (method, path) in [
        (Method::POST, "/v1/gc"),
        (Method::GET, "/v1/gc"),
        (Method::POST, "/v1/scrub"),
        (Method::GET, "/v1/du"),
        (Method::GET, "/v1/repositories"),
        (Method::GET, "/v1/trash"),
        (Method::POST, "/v1/undelete"),
    ] {
        let status = registry.anonymous(method, path).send().await.unwrap().status();
        assert!(status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN, "{path}: {status}");
    }
    // Another process collects, says its lease.
    std::fs::create_dir_all(dir.path().join("gc")).unwrap();
    std::fs::write(dir.path().join("gc/lease"), "{\"run\":\"elsewhere\"}").unwrap();
    let (status, body) = post(&registry, "/v1/gc", json!({})).await;
    assert_eq!(status, StatusCode::CONFLICT, "{body}");
    age(dir.path(), HOUR);
    collect(&registry, false).await;
    registry.stop().await;
    let gc = GcConfig { grace: DurationMs(1_000), ..GcConfig::default() };
    let short =
        anyplace_registry::Server::bind(Config { listen: LOOPBACK, gc, ..Config::new(dir.path()) }).await;
    assert!(short.err().unwrap().to_string().contains("gc.grace is 1s"));
}
