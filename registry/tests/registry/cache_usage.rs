//! What operators see of what a cache keeps.

use anyplace_images::Digest;
use anyplace_registry::{Cached, CachedRepository, RepositoryPage, TagView, UsageView};
use axum::body::Bytes;
use reqwest::Method;

use crate::fake::Fake;
use crate::support::{Registry, cache_config, code, noise};

const MIB: usize = 1 << 20;

async fn ask<T: serde::de::DeserializeOwned>(registry: &Registry, path: &str) -> T {
    let answer = registry.request(Method::GET, path).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.json().await.unwrap()
}

async fn fetch(cache: &Registry, path: &str, range: Option<&str>) {
    let mut request = cache.request(Method::GET, path);
    if let Some(range) = range {
        request = request.header("range", format!("bytes={range}"));
    }
    let answer = request.send().await.unwrap();
    assert!(answer.status().is_success(), "{path}: {}", answer.status());
    answer.bytes().await.unwrap();
}

/// Bytes that the files below a folder take on disk, and how many files take some.
fn on_disk(folder: &std::path::Path) -> (u64, u64) {
    let mut sum = (0, 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        let (bytes, files) = match meta.is_dir() {
            true => on_disk(&entry.path()),
            false => (std::os::unix::fs::MetadataExt::blocks(&meta) * 512, 1),
        };
        sum = (sum.0 + bytes, sum.1 + if bytes > 0 { files } else { 0 });
    }
    sum
}

#[tokio::test]
async fn operators_see_what_a_cache_keeps_by_repository_and_tag() {
    let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::start().await);
    let layers = [Bytes::from(noise(91, 20 * MIB)), Bytes::from(noise(92, 3 * MIB))];
    fake.put_image("v1", &layers, Some(MIB));
    let small = fake.put_image("v2", &layers[1..], Some(MIB));
    let config = |url: &str| cache_config(&dir.path().join("cache"), &[(url, dir.path())]);
    let cache = Registry::start_with(config(&fake.url)).await;

    let nothing: UsageView = ask(&cache, "/v1/du").await;
    let nothing = nothing.cache.unwrap();
    assert_eq!((nothing.disk_bytes, nothing.blobs, nothing.repositories.len()), (0, 0, 0));
    assert_eq!(ask::<RepositoryPage>(&cache, "/v1/repositories").await.repositories, []);
    let answer = cache.request(Method::GET, "/v1/tags?repository=app").send().await.unwrap();
    assert_eq!(code(answer).await, (404, "NAME_UNKNOWN".into()));

    // Three pieces of a layer, and all of the other one, by another name too; something is pushed beside it.
    fetch(&cache, "/v2/app/manifests/v1", None).await;
    let large = Digest::of(&layers[0]);
    fetch(&cache, &format!("/v2/app/blobs/{large}"), Some("1048576-4194303")).await;
    for repository in ["app", "mirror/other"] {
        fetch(&cache, &format!("/v2/{repository}/manifests/v2"), None).await;
        fetch(&cache, &format!("/v2/{repository}/blobs/{}", Digest::of(&layers[1])), None).await;
    }
    let (own, _) = cache.put_image("app", "own", "pushed").await;

    let whole = 3 * MIB as u64;
    let app = Cached { tags: 2, manifests: 2, blobs: 2, disk_bytes: 2 * whole, blob_bytes: 23 * MIB as u64 };
    let other = Cached { tags: 1, manifests: 1, blobs: 1, disk_bytes: whole, blob_bytes: whole };
    let named = |repository: &str, cached| CachedRepository { repository: repository.into(), cached };
    let usage: UsageView = ask(&cache, "/v1/du").await;
    let kept = usage.cache.clone().unwrap();
    assert_eq!(kept.repositories, [named("app", app), named("mirror/other", other)]);
    assert_eq!((kept.disk_bytes, kept.blobs), on_disk(&cache.dir.join("cache/data")));
    assert_eq!((kept.disk_bytes, kept.blob_bytes), (2 * whole, 23 * MIB as u64), "each counted once");
    assert!(kept.disk_budget_bytes > 3 << 30 && kept.record_bytes > 0, "{kept:?}");
    assert_eq!((usage.contents, usage.repositories.len()), (3, 1), "what was pushed stands by itself");
    let one: UsageView = ask(&cache, "/v1/du?repository=mirror/other").await;
    let one = one.cache.unwrap();
    assert_eq!(one.repositories, [named("mirror/other", other)]);
    assert_eq!((one.disk_bytes, one.blobs), (kept.disk_bytes, kept.blobs));

    let page: RepositoryPage = ask(&cache, "/v1/repositories").await;
    let seen: Vec<_> =
        page.repositories.iter().map(|it| (it.name.as_str(), it.tags, it.manifests, it.cached)).collect();
    assert_eq!(seen, [("app", 1, 1, Some(app)), ("mirror/other", 0, 0, Some(other))]);
    assert!(page.repositories[0].pushed_at.is_some() && page.repositories[1].pushed_at.is_none());
    let first: RepositoryPage = ask(&cache, "/v1/repositories?n=1").await;
    assert_eq!((first.repositories.len(), first.next.as_deref()), (1, Some("app")));

    let tags: Vec<TagView> = ask(&cache, "/v1/tags?repository=app").await;
    let from = fake.url.as_str();
    let seen: Vec<_> = tags
        .iter()
        .map(|it| {
            let cached = it.cached.as_ref().map(|cached| (cached.from.as_str(), cached.disk_bytes));
            (it.tag.as_str(), it.pushed_at.is_some(), cached)
        })
        .collect();
    let manifest = |tag: &str| fake.manifest(tag).len() as u64;
    assert_eq!(
        seen,
        [
            ("own", true, None),
            ("v1", false, Some((from, 2 * whole + manifest("v1")))),
            ("v2", false, Some((from, whole + manifest("v2")))),
        ]
    );
    assert_eq!((&tags[0].digest, &tags[2].digest), (&own, &small));
    assert_eq!(tags[1].size_bytes, 23 * MIB as u64 + 2 + manifest("v1"));

    // It is the same after a restart, with no upstream to ask; and what goes is not shown any more.
    cache.stop().await;
    drop(fake);
    let cache = Registry::start_with(config("http://127.0.0.1:9")).await;
    assert_eq!(ask::<UsageView>(&cache, "/v1/du").await, usage);
    assert_eq!(ask::<Vec<TagView>>(&cache, "/v1/tags?repository=app").await, tags);
    cache.stop().await;
    let mut tight = config("http://127.0.0.1:9");
    tight.cache.disk_budget = Some("4MiB".parse().unwrap());
    let cache = Registry::start_with(tight).await;
    let kept = ask::<UsageView>(&cache, "/v1/du").await.cache.unwrap();
    assert!(kept.disk_bytes <= kept.disk_budget_bytes && kept.disk_budget_bytes < 4 << 20, "{kept:?}");
    assert_eq!((kept.disk_bytes, kept.blobs), on_disk(&cache.dir.join("cache/data")));
    cache.stop().await;
}
