//! Accounts, tokens, teams and the audit record, over HTTP and with skopeo.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;

use anyplace_images::{Client, Credentials};
use reqwest::Method;
use serde_json::{Value, json};

use crate::skopeo::{has_skopeo, output};
use crate::support::{OCI_MANIFEST, Registry, code, header, is_root};

/// Makes an account; its secret.
pub(crate) async fn account(registry: &Registry, name: &str, spec: Value) -> String {
    let answer =
        registry.request(Method::PUT, &format!("/v1/accounts/{name}")).json(&spec).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
    answer.json::<Value>().await.unwrap()["secret"].as_str().unwrap().to_owned()
}

pub(crate) async fn team(registry: &Registry, name: &str, spec: Value) {
    let answer =
        registry.request(Method::PUT, &format!("/v1/teams/{name}")).json(&spec).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
}

/// A token for these scopes.
async fn token(registry: &Registry, login: Option<(&str, &str)>, scopes: &[&str]) -> String {
    let query: String = scopes.iter().map(|scope| format!("&scope={scope}")).collect();
    let mut request =
        registry.anonymous(Method::GET, &format!("/auth/token?service=anyplace-registry{query}"));
    if let Some((name, secret)) = login {
        request = request.basic_auth(name, Some(secret));
    }
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["token"], body["access_token"]);
    assert_eq!(body["expires_in"], 300);
    body["token"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_says_where_to_get_which_token() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    registry.put_image("vision/app", "v1", "one").await;
    for (method, path, scope) in [
        (Method::GET, "/v2/vision/app/manifests/v1", ",scope=\"repository:vision/app:pull\""),
        (Method::POST, "/v2/vision/app/blobs/uploads/", ",scope=\"repository:vision/app:pull,push\""),
        (Method::DELETE, "/v2/vision/app/manifests/v1", ",scope=\"repository:vision/app:delete\""),
        (Method::GET, "/v2/", ""),
    ] {
        let answer = registry.anonymous(method, path).send().await.unwrap();
        let realm = format!("Bearer realm=\"{}/auth/token\",service=\"anyplace-registry\"", registry.url());
        assert_eq!(header(&answer, "www-authenticate"), format!("{realm}{scope}"), "{path}");
        assert_eq!(code(answer).await, (401, "UNAUTHORIZED".into()));
    }
    // A token for one thing doesn't do for another, and the answer says what would.
    let secret = account(&registry, "ana", json!({"grants": ["vision/**:pull,push"]})).await;
    let pull = token(&registry, Some(("ana", &secret)), &["repository:vision/app:pull"]).await;
    let get = |path: &str| registry.anonymous(Method::GET, path).bearer_auth(&pull).send();
    assert_eq!(get("/v2/").await.unwrap().status(), 200);
    assert_eq!(get("/v2/vision/app/manifests/v1").await.unwrap().status(), 200);
    let answer = registry.anonymous(Method::POST, "/v2/vision/app/blobs/uploads/").bearer_auth(&pull);
    let answer = answer.send().await.unwrap();
    assert!(header(&answer, "www-authenticate").ends_with(",error=\"insufficient_scope\""));
    assert_eq!(code(answer).await, (401, "UNAUTHORIZED".into()));
    // Nobody gets more than is theirs.
    let wide = token(&registry, Some(("ana", &secret)), &["repository:vision/app:pull,push,delete"]).await;
    let answer = registry.anonymous(Method::DELETE, "/v2/vision/app/manifests/v1").bearer_auth(&wide);
    assert_eq!(answer.send().await.unwrap().status(), 401);
    let nobody = token(&registry, None, &["repository:vision/app:pull"]).await;
    let answer = registry.anonymous(Method::GET, "/v2/vision/app/manifests/v1").bearer_auth(&nobody);
    assert_eq!(answer.send().await.unwrap().status(), 401);
    registry.stop().await;
}

/// Clients keep a token for pushes to a repository, and a mount needs more: they are told once, and nobody who may not
/// read the source is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_mount_by_a_token_needs_one_for_both_repositories() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let blob = registry.put_blob("vision/base", b"base").await;
    let plans = registry.put_blob("secret/plans", b"plans").await;
    let secret = account(&registry, "ana", json!({"grants": ["vision/**:pull,push"]})).await;
    let login = Some(("ana", secret.as_str()));
    let push = "repository:vision/app:pull,push";
    let mount = async |token: &str, digest: &anyplace_images::Digest, from: &str| {
        let path = format!("/v2/vision/app/blobs/uploads/?mount={digest}&from={from}");
        registry.anonymous(Method::POST, &path).bearer_auth(token).send().await.unwrap()
    };
    for (digest, from, status) in [(&blob, "vision/base", 201), (&plans, "secret/plans", 202)] {
        let narrow = token(&registry, login, &[push]).await;
        let answer = mount(&narrow, digest, from).await;
        assert_eq!(answer.status(), 401, "{from}");
        let challenge = header(&answer, "www-authenticate").to_owned();
        let scope = format!("{push} repository:{from}:pull");
        assert!(
            challenge.ends_with(&format!(",scope=\"{scope}\",error=\"insufficient_scope\"")),
            "{challenge}"
        );
        let both = token(&registry, login, &[&scope]).await;
        assert_eq!(mount(&both, digest, from).await.status(), status, "{from}");
    }
    // Without a proof, the first challenge names both; a source that can't be is none.
    for (from, more) in [("vision/base", " repository:vision/base:pull"), ("No%22Name", "")] {
        let path = format!("/v2/vision/app/blobs/uploads/?mount={blob}&from={from}");
        let answer = registry.anonymous(Method::POST, &path).send().await.unwrap();
        assert!(header(&answer, "www-authenticate").ends_with(&format!(",scope=\"{push}{more}\"")), "{from}");
    }
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_do_what_they_were_granted_until_they_end() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    registry.put_image("vision/app", "v1", "one").await;
    registry.put_image("secret/plans", "v1", "two").await;
    let secret = account(&registry, "ana", json!({"grants": ["vision/**:pull,push"]})).await;
    let robot = account(&registry, "ams-1", json!({"grants": ["**:pull"]})).await;
    let send = |login: (&'static str, &str), method: Method, path: &str| {
        registry.anonymous(method, path).basic_auth(login.0, Some(login.1)).send()
    };
    let status = async |login, method, path: &str| send(login, method, path).await.unwrap().status().as_u16();
    assert_eq!(status(("ana", &secret), Method::GET, "/v2/vision/app/manifests/v1").await, 200);
    assert_eq!(status(("ana", &secret), Method::POST, "/v2/vision/new/blobs/uploads/").await, 202);
    let answer = send(("ana", &secret), Method::GET, "/v2/secret/plans/manifests/v1").await.unwrap();
    assert_eq!(code(answer).await, (403, "DENIED".into()));
    assert_eq!(status(("ams-1", &robot), Method::GET, "/v2/secret/plans/manifests/v1").await, 200);
    assert_eq!(status(("ams-1", &robot), Method::POST, "/v2/vision/app/blobs/uploads/").await, 403);
    assert_eq!(status(("ams-1", &robot), Method::GET, "/v1/accounts").await, 403);
    assert_eq!(status(("ana", "wrong"), Method::GET, "/v2/").await, 401);
    // Content that she can't read can't be had by a mount, nor by its digest alone.
    let plans = anyplace_images::Digest::of(b"two");
    for from in ["&from=secret/plans", ""] {
        let path = format!("/v2/vision/app/blobs/uploads/?mount={plans}{from}");
        assert_eq!(status(("ana", &secret), Method::POST, &path).await, 202, "{from}");
        assert_eq!(
            status(("ana", &secret), Method::GET, &format!("/v2/vision/app/blobs/{plans}")).await,
            404
        );
    }
    // Other grants leave the secret as it is.
    let spec = json!({"grants": ["vision/**:pull"]});
    let set = registry.request(Method::PUT, "/v1/accounts/ana").json(&spec).send().await.unwrap();
    assert!(set.json::<serde_json::Value>().await.unwrap().get("secret").is_none());
    assert_eq!(status(("ana", &secret), Method::POST, "/v2/vision/new/blobs/uploads/").await, 403);
    assert_eq!(status(("ana", &secret), Method::GET, "/v2/vision/app/manifests/v1").await, 200);
    // A new secret replaces the old one; a deleted account is nobody; one whose time is over too.
    let newer = account(&registry, "ana", json!({"grants": ["vision/**:pull"], "new_secret": true})).await;
    assert_eq!(status(("ana", &secret), Method::GET, "/v2/").await, 401);
    assert_eq!(status(("ana", &newer), Method::POST, "/v2/vision/new/blobs/uploads/").await, 403);
    let gone = registry.request(Method::DELETE, "/v1/accounts/ana").send().await.unwrap();
    assert_eq!(gone.status(), 204);
    assert_eq!(status(("ana", &newer), Method::GET, "/v2/").await, 401);
    let late = account(&registry, "late", json!({"grants": ["**:pull"], "ttl_s": 0})).await;
    assert_eq!(status(("late", &late), Method::GET, "/v2/").await, 401);
    // What is wrong is refused with its field, and nothing is shown of secrets.
    for (spec, part) in [
        (json!({"grants": []}), "at least one"),
        (json!({"grants": ["x"]}), "found grant `x`"),
        (json!({"grants": ["**:pull"], "team": "none"}), "no team `none`"),
    ] {
        let answer = registry.request(Method::PUT, "/v1/accounts/bob").json(&spec).send().await.unwrap();
        assert_eq!(answer.status(), 400);
        let text = answer.text().await.unwrap();
        assert!(text.contains(part), "{text}");
    }
    let list = registry.request(Method::GET, "/v1/accounts").send().await.unwrap().text().await.unwrap();
    assert!(list.contains("ams-1") && !list.contains("secret"), "{list}");
    registry.stop().await;
    // They are there after a restart, and so is the key of tokens.
    let registry = Registry::start(dir.path()).await;
    let answer =
        registry.anonymous(Method::GET, "/v2/").basic_auth("ams-1", Some(&robot)).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_gets_no_other_token() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let secret = account(&registry, "ana", json!({"grants": ["vision/**:pull,push"]})).await;
    let scope = "repository:vision/app:pull,push";
    let first = token(&registry, Some(("ana", &secret)), &[scope]).await;
    let path = format!("/auth/token?service=anyplace-registry&scope={scope}");
    let renew = || registry.anonymous(Method::GET, &path).bearer_auth(&first).send();
    assert_eq!(code(renew().await.unwrap()).await, (401, "UNAUTHORIZED".into()));
    let gone = registry.request(Method::DELETE, "/v1/accounts/ana").send().await.unwrap();
    assert_eq!(gone.status(), 204);
    assert_eq!(renew().await.unwrap().status(), 401);
    let again = registry.anonymous(Method::GET, &path).basic_auth("ana", Some(&secret)).send().await.unwrap();
    assert_eq!(again.status(), 401);
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_cant_read_the_data_folder_and_a_key_that_they_could_read_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("registry");
    let mode = || std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777;
    let key = || std::fs::read(folder.join("access/token-key")).unwrap();
    let registry = Registry::start(&folder).await;
    assert_eq!(mode(), 0o700);
    let made = key();
    let early = token(&registry, Some(("anyplace", &registry.credentials().password)), &[]).await;
    registry.stop().await;
    let registry = Registry::start(&folder).await;
    assert_eq!(key(), made);
    registry.stop().await;
    // As an earlier version left it.
    std::fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
    let registry = Registry::start(&folder).await;
    assert_eq!(mode(), 0o700);
    assert_ne!(key(), made);
    let forged = registry.anonymous(Method::GET, "/v2/").bearer_auth(&early).send().await.unwrap();
    assert_eq!(forged.status(), 401);
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn teams_have_a_rate_and_a_quota() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    team(&registry, "slow", json!({"requests_per_s": 3})).await;
    team(&registry, "vision", json!({"repositories": ["vision/**"], "quota_bytes": 1_000})).await;
    let slow = account(&registry, "slow-1", json!({"grants": ["**:pull"], "team": "slow"})).await;
    let mut refused = 0;
    for _ in 0..20 {
        let answer =
            registry.anonymous(Method::GET, "/v2/").basic_auth("slow-1", Some(&slow)).send().await.unwrap();
        if answer.status() == 429 {
            assert_eq!(header(&answer, "retry-after"), "1");
            assert_eq!(code(answer).await, (429, "TOOMANYREQUESTS".into()));
            refused += 1;
        }
    }
    assert!(refused > 0);

    registry.put_blob("vision/app", &[1; 600]).await;
    let too_much = anyplace_images::Digest::of(&[2; 600]);
    let path = format!("/v2/vision/app/blobs/uploads/?digest={too_much}");
    let answer = registry.request(Method::POST, &path).body(vec![2; 600]).send().await.unwrap();
    assert_eq!(code(answer).await, (403, "DENIED".into()));
    // Nor by a client that doesn't say how much it sends, in one request or in parts.
    let unsaid = |bytes: Vec<u8>| {
        let chunks =
            bytes.chunks(100).map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec())).collect::<Vec<_>>();
        reqwest::Body::wrap_stream(futures_util::stream::iter(chunks))
    };
    let answer = registry.request(Method::POST, &path).body(unsaid(vec![2; 600])).send().await.unwrap();
    assert_eq!(code(answer).await, (403, "DENIED".into()));
    let begin = registry.request(Method::POST, "/v2/vision/app/blobs/uploads/").send().await.unwrap();
    let mut at = header(&begin, "location");
    for (bytes, expected) in [(300, 202), (300, 403)] {
        let part = registry.request(Method::PATCH, &at).body(unsaid(vec![2; bytes])).send().await.unwrap();
        assert_eq!(part.status(), expected, "{bytes}");
        if expected == 202 {
            at = header(&part, "location");
        }
    }
    // What it has counts until it is finished or cancelled.
    assert_eq!(used(&registry, "vision").await, 1_000);
    assert_eq!(registry.request(Method::DELETE, &at).send().await.unwrap().status(), 204);
    assert_eq!(used(&registry, "vision").await, 600);
    // Elsewhere it is nobody's quota.
    registry.put_blob("audio/app", &[2; 600]).await;
    assert_eq!(used(&registry, "vision").await, 600);
    team(&registry, "vision", json!({"repositories": ["vision/**"], "quota_bytes": 2_000})).await;
    registry.put_blob("vision/app", &[2; 600]).await;
    registry.stop().await;
}

/// Bytes that count for a team.
async fn used(registry: &Registry, team: &str) -> u64 {
    let teams: Value = registry.request(Method::GET, "/v1/teams").send().await.unwrap().json().await.unwrap();
    let found = teams.as_array().unwrap().iter().find(|it| it["name"] == team).unwrap();
    found["used_bytes"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_manifests_and_unfinished_uploads_count() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    team(&registry, "vision", json!({"repositories": ["vision/**"], "quota_bytes": 1_000})).await;
    let mount = async |bytes: &[u8], to: &str, from: &str| {
        let digest = anyplace_images::Digest::of(bytes);
        let path = format!("/v2/{to}/blobs/uploads/?mount={digest}&from={from}");
        registry.request(Method::POST, &path).send().await.unwrap().status().as_u16()
    };
    registry.put_blob("audio/app", &[1; 500]).await;
    registry.put_blob("audio/app", &[2; 501]).await;
    for _ in 0..2 {
        assert_eq!(mount(&[1; 500], "vision/app", "audio/app").await, 201);
    }
    assert_eq!(mount(&[1; 500], "vision/other", "vision/app").await, 201);
    assert_eq!(mount(&[2; 501], "vision/app", "audio/app").await, 403);
    assert_eq!(used(&registry, "vision").await, 500);

    let config = registry.put_blob("vision/app", b"{}").await;
    let put = async |tag: &str, padding: usize| {
        let mut bytes = crate::support::manifest(&config, 2, &[]);
        bytes.resize(padding, b' ');
        let path = format!("/v2/vision/app/manifests/{tag}");
        let request = registry.request(Method::PUT, &path).header("content-type", OCI_MANIFEST);
        request.body(bytes).send().await.unwrap().status().as_u16()
    };
    for tag in ["v1", "v2"] {
        assert_eq!(put(tag, 400).await, 201);
    }
    assert_eq!(put("v3", 401).await, 403);
    assert_eq!(used(&registry, "vision").await, 902);

    let begin = async || {
        let begun = registry.request(Method::POST, "/v2/vision/new/blobs/uploads/").send().await.unwrap();
        header(&begun, "location")
    };
    let patch = async |at: &str, bytes: usize| {
        let patched = registry.request(Method::PATCH, at).body(vec![3; bytes]).send().await.unwrap();
        patched.status().as_u16()
    };
    let (first, second) = (begin().await, begin().await);
    assert_eq!(patch(&first, 60).await, 202);
    assert_eq!(patch(&second, 60).await, 403);
    assert_eq!(patch(&second, 30).await, 202);
    assert_eq!(used(&registry, "vision").await, 992);
    // One whose digest is wrong is discarded, and counts no longer.
    let wrong = anyplace_images::Digest::of(b"wrong");
    let put = registry.request(Method::PUT, &format!("{second}?digest={wrong}")).send().await.unwrap();
    assert_eq!(put.status(), 400);
    assert_eq!(used(&registry, "vision").await, 962);
    registry.stop().await;
    // After a restart it is counted from what is there.
    let registry = Registry::start(dir.path()).await;
    for tries in 0.. {
        match used(&registry, "vision").await {
            962 => break,
            found => assert!(found < 962 && tries < 1_000, "{found}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let digest = anyplace_images::Digest::of(&[3; 60]);
    let put = registry.request(Method::PUT, &format!("{first}?digest={digest}")).send().await.unwrap();
    assert_eq!(put.status(), 201);
    assert_eq!(used(&registry, "vision").await, 962);
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_and_deletes_are_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let (digest, _) = registry.put_image("vision/app", "v1", "one").await;
    let path = format!("/v2/vision/app/manifests/{digest}");
    assert_eq!(registry.request(Method::DELETE, &path).send().await.unwrap().status(), 202);
    let refused = registry.anonymous(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(refused.status(), 401);
    let events: Value =
        registry.request(Method::GET, "/v1/audit?tail=2").send().await.unwrap().json().await.unwrap();
    let told: Vec<_> = events
        .as_array()
        .unwrap()
        .iter()
        .map(|it| {
            (
                it["action"].as_str().unwrap(),
                it["account"].as_str().unwrap(),
                it["reference"].as_str().unwrap(),
            )
        })
        .collect();
    let digest = digest.to_string();
    assert_eq!(told, [("push-manifest", "anyplace", "v1"), ("delete-manifest", "anyplace", digest.as_str())]);
    assert_eq!(events[0]["digest"], digest.as_str());
    // Each tag of one push.
    let manifest = crate::support::manifest(&registry.put_blob("vision/app", b"{}").await, 2, &[]);
    let digest = anyplace_images::Digest::of(&manifest);
    let path = format!("/v2/vision/app/manifests/{digest}?tag=prod&tag=latest");
    let put = registry.request(Method::PUT, &path).header("content-type", OCI_MANIFEST).body(manifest);
    assert_eq!(put.send().await.unwrap().status(), 201);
    let events: Value =
        registry.request(Method::GET, "/v1/audit?tail=3").send().await.unwrap().json().await.unwrap();
    let told: Vec<_> =
        events.as_array().unwrap().iter().map(|it| it["reference"].as_str().unwrap()).collect();
    assert_eq!(told, [digest.as_str(), "prod", "latest"]);
    assert!(events.as_array().unwrap().iter().all(|it| it["digest"] == digest.as_str()));
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn anyone_may_pull_where_that_is_on_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start_open(dir.path()).await;
    registry.put_image("vision/app", "v1", "one").await;
    let get = registry.anonymous(Method::GET, "/v2/vision/app/manifests/v1").send().await.unwrap();
    assert_eq!(get.status(), 200);
    let put =
        registry.anonymous(Method::PUT, "/v2/vision/app/manifests/v2").header("content-type", OCI_MANIFEST);
    assert_eq!(put.body("{}").send().await.unwrap().status(), 401);
    let client = Client::new(&registry.url(), None).unwrap();
    client.get_manifest(&"vision/app:v1".parse().unwrap()).await.unwrap();
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_and_our_client_take_the_token_flow() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    registry.put_image("vision/app", "v1", "one").await;
    let secret = account(&registry, "ana", json!({"grants": ["vision/**:pull,push"]})).await;
    let client =
        Client::new(&registry.url(), Some(Credentials { user: "ana".into(), password: secret.clone() }));
    client.unwrap().get_manifest(&"vision/app:v1".parse().unwrap()).await.unwrap();
    if !is_root() || !has_skopeo() {
        return registry.stop().await;
    }
    let copy = async |login: &str| {
        let at = |name: &str| format!("docker://{}/vision/{name}:v1", registry.address);
        let flags =
            ["copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false", "--src-creds", login];
        let words: Vec<String> = flags
            .into_iter()
            .chain(["--dest-creds", login])
            .map(str::to_owned)
            .chain([at("app"), at("copy")])
            .collect();
        output(dir.path(), &words).await
    };
    let done = copy(&format!("ana:{secret}")).await;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(!copy("ana:wrong").await.status.success());
    registry.stop().await;
}
