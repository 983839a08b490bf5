//! What `/metrics` counts.

use std::collections::BTreeMap;

use reqwest::Method;

use crate::support::{Registry, cache_config, header, noise};

/// The samples, by name with labels.
pub(crate) async fn samples(registry: &Registry) -> BTreeMap<String, f64> {
    let text = registry.anonymous(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let samples = lines.map(|line| line.rsplit_once(' ').unwrap());
    samples.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_and_bytes_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    registry.put_image("app", "v1", "one").await;
    let bytes = noise(1, 300_000);
    let blob = registry.put_blob("app", &bytes).await;
    for path in
        ["/v2/app/manifests/v1", "/v2/app/manifests/v2", "/v2/app/tags/list", "/v1/repositories", "/x"]
    {
        registry.request(Method::GET, path).send().await.unwrap();
    }
    registry.anonymous(Method::HEAD, &format!("/v2/app/blobs/{blob}")).send().await.unwrap();
    let get = registry.request(Method::GET, &format!("/v2/app/blobs/{blob}")).send().await.unwrap();
    assert_eq!(get.bytes().await.unwrap(), bytes);
    let samples = samples(&registry).await;
    for (kind, method, status, count) in [
        ("upload", "POST", 201, 3.0),
        ("manifest", "PUT", 201, 1.0),
        ("manifest", "GET", 200, 1.0),
        ("manifest", "GET", 404, 1.0),
        ("tags", "GET", 200, 1.0),
        ("manage", "GET", 200, 1.0),
        ("other", "GET", 404, 1.0),
        ("blob", "HEAD", 401, 1.0),
        ("blob", "GET", 200, 1.0),
    ] {
        let labels = format!("kind=\"{kind}\",method=\"{method}\",status=\"{status}\"");
        let found = samples.get(&format!("anyplace_registry_requests_total{{{labels}}}"));
        assert_eq!(found, Some(&count), "{labels}");
    }
    let latency =
        |what: &str, labels: &str| samples[&format!("anyplace_registry_answer_seconds_{what}{{{labels}}}")];
    assert_eq!(latency("count", "kind=\"manifest\""), 3.0);
    assert_eq!(latency("bucket", "kind=\"manifest\",le=\"+Inf\""), 3.0);
    assert!(latency("sum", "kind=\"manifest\"") > 0.0);
    for which in ["received", "sent"] {
        assert!(samples[&format!("anyplace_registry_{which}_bytes_total")] > 300_000.0, "{which}");
    }
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_counted_by_team_without_names_of_repositories() {
    let (dir, cached) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(dir.path()).await;
    let team = serde_json::json!({ "repositories": ["vision/**"] });
    let made = registry.request(Method::PUT, "/v1/teams/vision").json(&team).send().await.unwrap();
    assert_eq!(made.status(), 200, "{}", made.text().await.unwrap());
    // Configuration, layer and manifest each; two repositories of a team share the layer.
    let (_, one) = registry.put_image("vision/app", "v1", "one").await;
    let (_, two) = registry.put_image("vision/other", "v1", "one").await;
    assert_eq!(one, two);
    registry.put_image("plans", "v1", "two").await;
    let open = registry.request(Method::POST, "/v2/vision/app/blobs/uploads/").send().await.unwrap();
    let patched =
        registry.request(Method::PATCH, &header(&open, "location")).body("part").send().await.unwrap();
    assert_eq!(patched.status(), 202);
    let image = (3 + "{\"seed\":\"one\"}".len() + one.len()) as f64;
    let blob = registry.put_blob("plans", &noise(1, 1 << 20)).await;
    // The first count comes soon after the start.
    registry.stop().await;
    let registry = Registry::start(dir.path()).await;
    let cache = Registry::start_with(cache_config(cached.path(), &[(&registry.url(), dir.path())])).await;
    let pulled = cache.request(Method::GET, &format!("/v2/plans/blobs/{blob}")).send().await.unwrap();
    assert_eq!(pulled.bytes().await.unwrap().len(), 1 << 20);

    let counted = loop {
        let samples = samples(&registry).await;
        if samples.contains_key("anyplace_registry_stored_bytes") {
            break samples;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    let value = |name: &str| counted.get(&format!("anyplace_registry_{name}")).copied();
    assert_eq!(value("team_bytes{team=\"vision\"}"), Some(image + 4.0));
    assert_eq!(value("team_contents{team=\"vision\"}"), Some(3.0));
    assert_eq!(value("team_manifests{team=\"vision\"}"), Some(2.0));
    assert_eq!(value("team_uploads{team=\"vision\"}"), Some(1.0));
    let others = value("team_bytes{team=\"(none)\"}").unwrap();
    assert_eq!(value("stored_bytes"), Some(image + 4.0 + others));
    assert_eq!(value("stored_manifests"), Some(3.0));
    assert!(counted.keys().all(|name| !name.contains("plans") && !name.contains("vision/")), "{counted:?}");
    // A cache tells what it takes of its room.
    let room = samples(&cache).await;
    let room = |name: &str| room[&format!("anyplace_registry_cache_{name}")];
    assert!(
        room("memory_bytes") >= f64::from(1 << 20) && room("memory_budget_bytes") >= room("memory_bytes")
    );
    assert!(room("disk_bytes") <= room("disk_budget_bytes") && room("record_bytes") >= 0.0);
    cache.stop().await;
    registry.stop().await;
}
