//! Tags through a cache: lists that have all or say what is missing, what was pushed over an upstream's tag, and what a
//! chain of caches does while its end is away.

use anyplace_registry::TagView;
use reqwest::Method;
use serde_json::{Value, json};

use crate::gc::get;
use crate::metrics::samples;
use crate::support::{Registry, cache_config, code, header};

async fn digest_of(registry: &Registry, path: &str) -> (u16, String) {
    let answer = registry.request(Method::HEAD, path).send().await.unwrap();
    (answer.status().as_u16(), header(&answer, "docker-content-digest"))
}

/// The tags that are listed, and whether there is a warning.
async fn listed(registry: &Registry, repository: &str) -> (Value, bool) {
    let path = format!("/v2/{repository}/tags/list");
    let answer = registry.request(Method::GET, &path).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
    let warned = header(&answer, "warning").starts_with("299 ");
    let list: Value = answer.json().await.unwrap();
    (list["tags"].clone(), warned)
}

#[tokio::test]
async fn a_list_has_the_tags_of_all_upstreams_or_says_that_there_may_be_more() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) =
        (Registry::start(&dir.path().join("1")).await, Registry::start(&dir.path().join("2")).await);
    let urls = [first.url(), second.url()];
    let order = [(urls[0].as_str(), first.dir.as_path()), (urls[1].as_str(), second.dir.as_path())];
    let cache = Registry::start_with(cache_config(&dir.path().join("cache"), &order)).await;
    first.put_image("app", "both", "1").await;
    first.put_image("app", "only1", "2").await;
    second.put_image("app", "both", "3").await;
    second.put_image("app", "only2", "4").await;
    second.put_image("app", "unseen2", "5").await;
    cache.put_image("app", "own", "6").await;
    cache.put_image("mine", "own", "7").await;
    assert_eq!(listed(&cache, "app").await, (json!(["both", "only1", "only2", "own", "unseen2"]), false));
    for tag in ["both", "only1", "only2"] {
        assert_eq!(digest_of(&cache, &format!("/v2/app/manifests/{tag}")).await.0, 200, "{tag}");
    }
    let unknown = cache.request(Method::GET, "/v2/never/tags/list").send().await.unwrap();
    assert_eq!(code(unknown).await, (404, "NAME_UNKNOWN".into()));

    // What was seen stands in for the upstream that can't be asked, and for no other.
    let deleted = second.request(Method::DELETE, "/v2/app/manifests/only2").send().await.unwrap();
    assert_eq!(deleted.status(), 202);
    first.stop().await;
    assert_eq!(listed(&cache, "app").await, (json!(["both", "only1", "own", "unseen2"]), true));
    second.stop().await;
    assert_eq!(listed(&cache, "app").await, (json!(["both", "only1", "only2", "own"]), true));
    assert_eq!(listed(&cache, "mine").await, (json!(["own"]), true));
    // An empty list would look like a repository without tags.
    let never = cache.request(Method::GET, "/v2/never/tags/list").send().await.unwrap();
    assert_eq!(header(&never, "retry-after"), "1");
    assert_eq!(code(never).await, (503, "UNAVAILABLE".into()));
    cache.stop().await;
}

#[tokio::test]
async fn what_was_pushed_over_an_upstreams_tag_is_what_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Registry::start(&dir.path().join("origin")).await;
    let cache = Registry::cache(&dir.path().join("cache"), &origin.url(), &origin.dir).await;
    let (theirs, _) = origin.put_image("app", "v1", "theirs").await;
    let path = "/v2/app/manifests/v1";
    assert_eq!(digest_of(&cache, path).await, (200, theirs.to_string()));
    let (own, bytes) = cache.put_image("app", "v1", "own").await;
    for _ in 0..2 {
        let answer = cache.request(Method::GET, path).send().await.unwrap();
        assert_eq!(header(&answer, "docker-content-digest"), own.to_string());
        assert_eq!(answer.bytes().await.unwrap(), bytes);
    }
    let tags: Vec<TagView> = get(&cache, "/v1/tags?repository=app").await;
    assert_eq!(tags.iter().map(|tag| (tag.tag.as_str(), &tag.digest)).collect::<Vec<_>>(), [("v1", &own)]);
    // The upstream may go on, or go away.
    let (newer, _) = origin.put_image("app", "v1", "newer").await;
    assert_eq!(digest_of(&cache, path).await, (200, own.to_string()));
    // Once it is deleted here, the upstream's is the one that is served.
    assert_eq!(cache.request(Method::DELETE, path).send().await.unwrap().status(), 202);
    assert_eq!(digest_of(&cache, path).await, (200, newer.to_string()));
    let (again, _) = cache.put_image("app", "v1", "again").await;
    origin.stop().await;
    assert_eq!(digest_of(&cache, path).await, (200, again.to_string()));
    cache.stop().await;
}

#[tokio::test]
async fn a_tier_whose_upstream_is_away_is_asked_a_few_times_only() {
    let dir = tempfile::tempdir().unwrap();
    let region =
        Registry::start_with(cache_config(&dir.path().join("region"), &[("http://127.0.0.1:9", dir.path())]))
            .await;
    let location = Registry::cache(&dir.path().join("location"), &region.url(), &region.dir).await;
    let answer = location.request(Method::GET, "/v2/app/manifests/v1").send().await.unwrap();
    assert_eq!(header(&answer, "retry-after"), "1");
    assert_eq!(code(answer).await, (503, "UNAVAILABLE".into()));
    let never = anyplace_images::Digest::of(b"never");
    let path = format!("/v2/app/manifests/{never}");
    assert_eq!(location.request(Method::GET, &path).send().await.unwrap().status(), 503);
    // Each asked once, and twice again as the region wished.
    let asked = "anyplace_registry_requests_total{kind=\"manifest\",method=\"GET\",status=\"503\"}";
    assert_eq!(samples(&region).await.get(asked), Some(&6.0));
    location.stop().await;
    region.stop().await;
}
