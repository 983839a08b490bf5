//! The token flow of the distribution specification, against a registry that knows nothing else.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use anyplace_images::{
    Client, Credentials, Digest, ImageSpec, NoProgress, Patience, PushOptions, Reference, Source, pack,
    push_with,
};
use axum::{
    Router,
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse as _, Response},
};

use crate::bed::runtime;

/// Requests at once: more than connections, so that some wait.
const PARALLEL: usize = 32;

#[derive(Default)]
struct World {
    url: Mutex<String>,
    /// Tokens of other generations are refused, as if they had expired.
    generation: AtomicU64,
    /// The scopes of each token that was asked for.
    asked: Mutex<Vec<String>>,
    /// Answers 429 to so many requests.
    busy: AtomicU64,
}

async fn answer(State(world): State<Arc<World>>, request: Request) -> Response {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let header = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    if request.uri().path() == "/token" {
        assert_eq!(header("authorization").as_deref(), Some("Basic dTpw"));
        let scopes = query.split('&').filter_map(|pair| pair.strip_prefix("scope="));
        let scopes =
            scopes.collect::<Vec<_>>().join(" ").replace("%3A", ":").replace("%2C", ",").replace("%2F", "/");
        world.asked.lock().unwrap().push(scopes.clone());
        let token = format!("{}|{scopes}", world.generation.load(Ordering::SeqCst));
        return axum::Json(serde_json::json!({ "access_token": token })).into_response();
    }
    let path = request.uri().path().strip_prefix("/v2/").unwrap();
    let (repository, _) = path.split_once("/blobs/").or_else(|| path.split_once("/manifests/")).unwrap();
    let writes = [Method::POST, Method::PUT].contains(request.method());
    let action = if writes { "pull,push" } else { "pull" };
    let current = format!("Bearer {}|", world.generation.load(Ordering::SeqCst));
    let token = header("authorization").unwrap_or_default();
    let allowed = token.strip_prefix(&current).is_some_and(|scopes| {
        scopes.split(' ').any(|scope| scope.starts_with(&format!("repository:{repository}:{action}")))
    });
    if !allowed {
        let realm = world.url.lock().unwrap().clone();
        // As most registries do, it names what the path shows, not what a mount needs beyond it.
        let challenge = format!(
            "Bearer realm=\"{realm}/token\",service=\"test\",scope=\"repository:{repository}:{action}\""
        );
        return (StatusCode::UNAUTHORIZED, [("www-authenticate", challenge)]).into_response();
    }
    let busy = world.busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    if busy.is_ok() {
        return (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")]).into_response();
    }
    match *request.method() {
        Method::HEAD => StatusCode::NOT_FOUND.into_response(),
        Method::POST if query.contains("from=") => {
            let from = "repository:other/app:pull";
            assert!(token.contains(from), "a mount without the right to read its source: {token}");
            StatusCode::CREATED.into_response()
        }
        Method::PUT => StatusCode::CREATED.into_response(),
        _ => StatusCode::IM_A_TEAPOT.into_response(),
    }
}

fn start(runtime: &tokio::runtime::Runtime) -> (Arc<World>, Client) {
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let world = Arc::new(World::default());
    let url = format!("http://{}", listener.local_addr().unwrap());
    world.url.lock().unwrap().clone_from(&url);
    let router = Router::new().fallback(answer).with_state(world.clone());
    runtime.spawn(async move { axum::serve(listener, router).await });
    let client = Client::new(&url, Some(Credentials { user: "u".into(), password: "p".into() })).unwrap();
    (world, client)
}

#[test]
fn many_requests_share_one_token_and_an_expired_one_is_replaced_once() {
    let runtime = runtime();
    let (world, client) = start(&runtime);
    let reference: Reference = "team/app".parse().unwrap();
    let digest = Digest::of(b"x");
    for generation in 1..=3 {
        let asks = (0..PARALLEL).map(|_| {
            let (client, reference, digest) = (client.clone(), reference.clone(), digest.clone());
            async move { client.head_blob(&reference, &digest).await }
        });
        for found in runtime.block_on(futures_util::future::join_all(asks)) {
            assert_eq!(found.unwrap(), None);
        }
        let asked = world.asked.lock().unwrap().clone();
        assert_eq!(asked, vec!["repository:team/app:pull"; generation], "tokens beyond one for all");
        world.generation.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_mount_asks_for_both_repositories() {
    let runtime = runtime();
    let (world, client) = start(&runtime);
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tree");
    std::fs::create_dir(&root).unwrap();
    let (source, progress) = (Source::Directory { root, spec: ImageSpec::default() }, NoProgress::shared());
    let image = runtime.block_on(pack(&source, &dir.path().join("work"), &progress)).unwrap();
    let options = PushOptions { mount_from: vec!["other/app".to_owned()], ..PushOptions::default() };
    let reference: Reference = "team/app:v1".parse().unwrap();
    let summary = runtime.block_on(push_with(&image, &reference, &client, &progress, &options)).unwrap();
    assert_eq!((summary.skipped, summary.bytes_sent), (2, 0));
    let asked = world.asked.lock().unwrap().clone();
    assert!(
        asked.contains(&"repository:team/app:pull,push repository:other/app:pull".to_owned()),
        "{asked:?}"
    );
}

#[test]
fn a_busy_registry_is_asked_again_after_the_time_that_it_says() {
    let runtime = runtime();
    let (world, client) = start(&runtime);
    let (reference, digest): (Reference, _) = ("team/app".parse().unwrap(), Digest::of(b"x"));
    world.busy.store(2, Ordering::SeqCst);
    let begun = std::time::Instant::now();
    assert_eq!(runtime.block_on(client.head_blob(&reference, &digest)).unwrap(), None);
    // Never sooner than it asked for; how much later is a matter of the machine.
    assert!(begun.elapsed() >= std::time::Duration::from_secs(2));
    assert_eq!((client.stats().retries, client.stats().gave_up), (2, 0));

    world.busy.store(u64::MAX, Ordering::SeqCst);
    let impatient = client.with_patience(Patience::NONE);
    let error = runtime.block_on(impatient.head_blob(&reference, &digest)).unwrap_err();
    assert!(error.to_string().contains("429"), "{error}");
    assert_eq!(client.stats().gave_up, 1);

    // Any other refusal is final at once.
    world.busy.store(0, Ordering::SeqCst);
    let error = runtime.block_on(client.get_blob(&reference, &digest, None)).err().unwrap();
    assert!(error.to_string().contains("418"), "{error}");
    assert_eq!(client.stats().retries, 2);
}
