//! What `/metrics` counts.

use std::collections::BTreeMap;

use reqwest::Method;

use crate::support::{Registry, noise};

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
