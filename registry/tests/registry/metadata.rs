//! What is kept beside content, damaged: it stops nothing but itself, and a scrub names it.

use std::path::{Path, PathBuf};

use anyplace_registry::TagView;
use reqwest::Method;
use serde_json::{Value, json};

use crate::gc::{collect, get, post, scrub};
use crate::support::Registry;

const GARBAGE: &[u8] = b"{\"name\":\xff";

async fn status(registry: &Registry, method: Method, path: &str) -> u16 {
    registry.request(method, path).send().await.unwrap().status().as_u16()
}

/// Makes an account that pulls everything; its secret.
async fn account(registry: &Registry, name: &str) -> String {
    let spec = json!({"grants": ["**:pull"]});
    let set = registry.request(Method::PUT, &format!("/v1/accounts/{name}")).json(&spec).send().await;
    set.unwrap().json::<Value>().await.unwrap()["secret"].as_str().unwrap().to_owned()
}

async fn knows(registry: &Registry, name: &str, secret: &str) -> bool {
    let answer = registry.anonymous(Method::GET, "/v2/").basic_auth(name, Some(secret)).send().await.unwrap();
    answer.status() == 200
}

/// The only file below a folder.
fn only_file(folder: &Path) -> PathBuf {
    let mut files = std::fs::read_dir(folder).unwrap();
    let file = files.next().unwrap().unwrap().path();
    assert!(files.next().is_none());
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_account_keeps_no_other_in_or_out() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let (ana, bob) = (account(&registry, "ana").await, account(&registry, "bob").await);
    account(&registry, "eve").await;
    let accounts = dir.path().join("access/accounts");
    std::fs::write(accounts.join("bob"), GARBAGE).unwrap();
    std::fs::write(accounts.join("eve"), GARBAGE).unwrap();
    // Another change makes the registry read them all: one that it knows stays what it was.
    let carl = account(&registry, "carl").await;
    assert!(knows(&registry, "ana", &ana).await && knows(&registry, "bob", &bob).await);
    assert_eq!(status(&registry, Method::DELETE, "/v1/accounts/ana").await, 204);
    assert!(!knows(&registry, "ana", &ana).await);
    registry.stop().await;
    let registry = Registry::start(dir.path()).await;
    assert!(knows(&registry, "carl", &carl).await && !knows(&registry, "bob", &bob).await);
    let found = scrub(&registry).await.problems;
    for name in ["bob", "eve"] {
        assert!(
            found.iter().any(|problem| problem.contains(&format!("access/accounts/{name}"))),
            "{found:?}"
        );
    }
    assert_eq!(found.len(), 2, "{found:?}");
    // Set again it gets another secret, and it can be removed.
    let bob = account(&registry, "bob").await;
    assert!(knows(&registry, "bob", &bob).await);
    assert_eq!(status(&registry, Method::DELETE, "/v1/accounts/eve").await, 204);
    assert!(scrub(&registry).await.problems.is_empty());
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_tag_manifest_or_deletion_stops_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let (one, _) = registry.put_image("app", "v1", "one").await;
    let (two, _) = registry.put_image("app", "v2", "two").await;
    let (three, _) = registry.put_image("app", "v3", "three").await;
    registry.put_image("other", "v1", "other").await;
    let at = dir.path().join("repositories/app");
    std::fs::write(at.join("_tags/v2"), GARBAGE).unwrap();
    std::fs::write(at.join("_manifests/sha256").join(three.hex()), GARBAGE).unwrap();
    let found = scrub(&registry).await.problems;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().any(|problem| problem.contains("app/_tags/v2")), "{found:?}");
    let tags: Vec<TagView> = get(&registry, "/v1/tags?repository=other").await;
    assert_eq!(tags.len(), 1);
    // Another tag's manifest goes, with that tag; then the damaged ones.
    for path in [format!("/v2/app/manifests/{one}"), "/v2/app/manifests/v2".to_owned()] {
        assert_eq!(status(&registry, Method::DELETE, &path).await, 202, "{path}");
        assert_eq!(status(&registry, Method::GET, &path).await, 404, "{path}");
    }
    let path = format!("/v2/app/manifests/{three}");
    assert_eq!(status(&registry, Method::DELETE, &path).await, 202);
    assert_eq!(status(&registry, Method::GET, "/v2/app/manifests/v3").await, 404);
    assert_eq!(status(&registry, Method::GET, &format!("/v2/app/manifests/{two}")).await, 200);

    // A deletion: it can't be undone, and collections go on.
    std::fs::remove_dir_all(at.join("_trash")).unwrap();
    assert_eq!(status(&registry, Method::DELETE, &format!("/v2/app/manifests/{two}")).await, 202);
    std::fs::write(only_file(&at.join("_trash")), GARBAGE).unwrap();
    let report = collect(&registry, false).await;
    assert!(report.problems.iter().any(|problem| problem.contains("app/_trash/")), "{:?}", report.problems);
    assert_eq!(report.seen.repositories_read, 2);
    let found = scrub(&registry).await.problems;
    assert!(found.len() == 1 && found[0].contains("app/_trash/"), "{found:?}");
    let (code, _) = post(&registry, "/v1/undelete", json!({"repository": "app", "digest": two})).await;
    assert_eq!(code, 404);
    // What collections note of each other.
    for note in ["gc/last", "gc/lease", "scrub/last", "scrub/position"] {
        std::fs::write(dir.path().join(note), GARBAGE).unwrap();
    }
    collect(&registry, false).await;
    scrub(&registry).await;
    registry.stop().await;
}
