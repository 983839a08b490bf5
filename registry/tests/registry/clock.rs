//! Clocks that are set by hours and years, ahead and back, while images are pushed and collections run: the store's, and
//! the registry's own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyplace_images::{Client, Credentials, Digest};
use anyplace_registry::{GcPhase, GcReport, GcStatus};
use anyplace_seed::Seed;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::killable::Killable;
use crate::storage_clients::Clients;
use crate::stores;
use crate::support::{OCI_MANIFEST, code, header, manifest};

/// A clock of other processes, that can be set while they run.
pub(crate) struct SetClock {
    library: PathBuf,
    dir: tempfile::TempDir,
}

impl SetClock {
    /// One that is right as yet; none, with the reason printed, where Debian's `faketime` is not installed.
    fn new() -> Option<SetClock> {
        let folders = std::fs::read_dir("/usr/lib").unwrap().map(|entry| entry.unwrap().path());
        let mut libraries = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1"));
        let Some(library) = libraries.find(|library| library.exists()) else {
            assert!(std::env::var_os("CI").is_none(), "this test needs faketime");
            eprintln!("skipped: needs faketime; `cargo xtask setup` installs it");
            return None;
        };
        let clock = SetClock { library, dir: tempfile::tempdir().unwrap() };
        clock.set("+0");
        Some(clock)
    }

    /// Sets it to so much more than the right time, such as `+2h` or `-10y`.
    fn set(&self, offset: &str) {
        let new = self.dir.path().join("new");
        std::fs::write(&new, format!("{offset}\n")).unwrap();
        std::fs::rename(new, self.dir.path().join("offset")).unwrap();
    }

    /// Lets a process see it. Its steady clock stays what it is, as on a machine whose clock is set.
    pub(crate) fn show(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("FAKETIME_TIMESTAMP_FILE", self.dir.path().join("offset"));
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }
}

/// A registry in a process of its own, with an operator at it.
struct Operated {
    running: Killable,
    credentials: Credentials,
    http: reqwest::Client,
}

impl Operated {
    async fn start(dir: &Path, settings: &str, clock: Option<&SetClock>) -> Operated {
        anyplace_service::install_crypto_provider();
        let running = Killable::start_by(clock, dir, settings).await;
        let credentials = Credentials::from_file(&dir.join("credentials")).unwrap();
        Operated { running, credentials, http: reqwest::Client::builder().no_proxy().build().unwrap() }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!("{}{path}", self.running.url);
        self.http.request(method, url).basic_auth(&self.credentials.user, Some(&self.credentials.password))
    }

    async fn put_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let path = format!("/v2/b/blobs/uploads/?digest={digest}");
        let answer = self.request(Method::POST, &path).body(bytes.to_vec()).send().await.unwrap();
        assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
        digest
    }

    async fn put_manifest(&self, tag: &str, blobs: &[(&Digest, usize)]) -> Digest {
        let bytes = manifest(blobs[0].0, blobs[0].1, blobs);
        let put = self.request(Method::PUT, &format!("/v2/b/manifests/{tag}"));
        let put = put.header("content-type", OCI_MANIFEST).body(bytes.clone()).send().await.unwrap();
        assert_eq!(put.status(), 201, "{}", put.text().await.unwrap());
        Digest::of(&bytes)
    }

    async fn status(&self, method: Method, path: &str) -> u16 {
        self.request(method, path).send().await.unwrap().status().as_u16()
    }

    async fn collect(&self) -> GcReport {
        let run = self.begin_collection().await;
        self.ended(&run).await
    }

    /// Begins one, and gives its name.
    async fn begin_collection(&self) -> String {
        let begun = self.request(Method::POST, "/v1/gc").json(&json!({})).send().await.unwrap();
        assert_eq!(begun.status(), 202, "{}", begun.text().await.unwrap());
        begun.json::<GcReport>().await.unwrap().run
    }

    async fn ended(&self, run: &str) -> GcReport {
        loop {
            let status = self.request(Method::GET, "/v1/gc").send().await.unwrap();
            let status: GcStatus = status.json().await.unwrap();
            if let Some(report) = status.last.filter(|report| report.run == run) {
                return report;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Collections beside pushes, while the store says that hours and years have passed, or are yet to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_whose_clock_is_set_loses_nothing_that_was_acknowledged() {
    let Some(clock) = SetClock::new() else { return };
    let Some(store) = stores::moto_with(|command| clock.show(command)).await else { return };
    let dir = tempfile::tempdir().unwrap();
    let settings = format!(
        "[storage]\n{}\n[[retention.rules]]\ntags = ['v*']\nkeep_younger_than = '30d'\n",
        store.settings(store.address, "r")
    );
    let registry = Operated::start(dir.path(), &settings, None).await;
    let mut waiting = Vec::new();
    for (round, offset) in ["+2h", "+10y", "-2h", "-10y", "+0"].into_iter().enumerate() {
        // An upload comes before its manifest, a tag may be deleted and missed, and an image is new.
        let bytes = format!("blob {round}").into_bytes();
        let blob = registry.put_blob(&bytes).await;
        let image = registry.put_manifest(&format!("v{round}"), &[(&blob, bytes.len())]).await;
        registry.put_manifest(&format!("gone-{round}"), &[(&blob, bytes.len()), (&blob, bytes.len())]).await;
        assert_eq!(registry.status(Method::DELETE, &format!("/v2/b/manifests/gone-{round}")).await, 202);
        let alone = registry.put_blob(format!("alone {round}").as_bytes()).await;
        waiting.push(alone);
        clock.set(offset);
        let run = registry.begin_collection().await;
        let beside = format!("beside {round}").into_bytes();
        let beside = (registry.put_blob(&beside).await, beside.len());
        registry.put_manifest(&format!("beside-{round}"), &[(&beside.0, beside.1)]).await;
        let report = registry.ended(&run).await;
        let clock_went_back = report.error.as_deref().is_some_and(|error| error.contains("clock"));
        assert!(report.phase == GcPhase::Done || clock_went_back, "{offset}: {report:?}");
        let taken = &report.plan;
        assert_eq!(
            (taken.tags.count, taken.manifests.count, taken.links.count, taken.content.count),
            (0, 0, 0, 0),
            "{offset}: {report:?}"
        );
        assert_eq!(report.trash_emptied, 0, "{offset}: {report:?}");
        let undelete = json!({ "repository": "b", "tag": format!("gone-{round}") });
        let undeleted = registry.request(Method::POST, "/v1/undelete").json(&undelete).send().await.unwrap();
        assert_eq!(undeleted.status(), 200, "{offset}: {}", undeleted.text().await.unwrap());
        let tags = ["v", "gone-", "beside-"].map(|tag| format!("{tag}{round}"));
        for path in tags.into_iter().chain([image.to_string()]) {
            assert_eq!(
                registry.status(Method::GET, &format!("/v2/b/manifests/{path}")).await,
                200,
                "{offset}"
            );
        }
    }
    // What waited for its manifest all the time is there.
    let sized: Vec<_> = waiting.iter().map(|blob| (blob, "alone 0".len())).collect();
    registry.put_manifest("all", &sized).await;
    let report = registry.collect().await;
    assert_eq!((report.phase, report.plan.content.count), (GcPhase::Done, 0), "{report:?}");
}

/// A machine whose clock is ten years ahead when it starts again: to its files, all was put ten years ago.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_that_wakes_in_another_year_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Operated::start(dir.path(), "", None).await;
    let blob = registry.put_blob(b"blob").await;
    let image = registry.put_manifest("v1", &[(&blob, 4)]).await;
    registry.put_manifest("gone", &[(&blob, 4), (&blob, 4)]).await;
    let alone = registry.put_blob(b"alone").await;
    assert_eq!(registry.status(Method::DELETE, "/v2/b/manifests/gone").await, 202);
    let open = registry.request(Method::POST, "/v2/b/blobs/uploads/").send().await.unwrap();
    let open = header(&open, "location");
    let patch = registry.request(Method::PATCH, &open).body("part").send().await.unwrap();
    assert_eq!(patch.status(), 202);

    for years in [10, -20] {
        registry.running.kill();
        put_back(dir.path(), years);
        registry = Operated::start(dir.path(), "", None).await;
        let report = registry.collect().await;
        assert_eq!((report.phase, report.trash_emptied), (GcPhase::Done, 0), "{report:?}");
        let taken = (report.plan.links.count, report.plan.content.count, report.uploads_abandoned);
        assert_eq!(taken, (0, 0, 0), "{report:?}");
    }
    assert_eq!(registry.status(Method::GET, &format!("/v2/b/manifests/{image}")).await, 200);
    let put = registry.request(Method::PUT, &format!("{open}?digest={}", Digest::of(b"part"))).send().await;
    assert_eq!(put.unwrap().status(), 201);
    registry.put_manifest("late", &[(&alone, 5)]).await;
    let undelete = json!({ "repository": "b", "tag": "gone" });
    let undeleted = registry.request(Method::POST, "/v1/undelete").json(&undelete).send().await.unwrap();
    assert_eq!(undeleted.status(), 200, "{}", undeleted.text().await.unwrap());
}

/// Makes all files older by so many years.
fn put_back(dir: &Path, years: i64) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            put_back(&path, years);
            continue;
        }
        let file = std::fs::File::options().append(true).open(&path).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        let by = Duration::from_secs(years.unsigned_abs() * 365 * 24 * 3_600);
        file.set_modified(if years > 0 { modified - by } else { modified + by }).unwrap();
    }
}

/// Tokens go by the registry's clock: one that it can't have made yet is refused, and the answer says what is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_whose_clock_is_set_says_so_and_goes_on() {
    let Some(clock) = SetClock::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let registry = Operated::start(dir.path(), "", Some(&clock)).await;
    let account = json!({ "grants": ["**:pull,push"] });
    let account = registry.request(Method::PUT, "/v1/accounts/ana").json(&account).send().await.unwrap();
    let secret = account.json::<Value>().await.unwrap()["secret"].as_str().unwrap().to_owned();
    let url = &registry.running.url;
    let token = async || {
        let ask = registry.http.get(format!("{url}/auth/token?scope=repository:b:pull,push"));
        let answer = ask.basic_auth("ana", Some(&secret)).send().await.unwrap();
        answer.json::<Value>().await.unwrap()["token"].as_str().unwrap().to_owned()
    };
    let refusal = async |token: &str| {
        let answer =
            registry.http.get(format!("{url}/v2/b/tags/list")).bearer_auth(token).send().await.unwrap();
        assert!(header(&answer, "www-authenticate").ends_with(",error=\"invalid_token\""));
        assert_eq!(answer.status(), 401);
        answer.json::<Value>().await.unwrap()["errors"][0]["message"].as_str().unwrap().to_owned()
    };
    let mut seed = Seed::from_env();
    let clients = Clients::start(url, &registry.credentials, &mut seed);
    // Ours get their tokens from here, whatever the time is for them.
    let ours = Credentials { user: "ana".into(), password: secret.clone() };
    let ours = Client::new(url, Some(ours)).unwrap();
    let mut before = token().await;
    for (offset, expected) in
        [("+2h", "expired"), ("-2h", "clock"), ("+10y", "expired"), ("+0", "clock"), ("-10y", "clock")]
    {
        clock.set(offset);
        let message = refusal(&before).await;
        assert!(message.contains(expected), "{offset}: {message}");
        before = token().await;
        let answer = registry.http.get(format!("{url}/v2/b/tags/list")).bearer_auth(&before).send().await;
        // There is no such repository yet, at first.
        let allowed = answer.unwrap().status();
        assert!(allowed == 200 || allowed == 404, "{offset}: {allowed}");
        let blob = registry.put_blob(offset.as_bytes()).await;
        let tag = format!("t{}", offset.trim_start_matches(['+', '-']));
        registry.put_manifest(&tag, &[(&blob, offset.len())]).await;
        let reference = format!("b:{tag}").parse().unwrap();
        assert!(ours.head_manifest(&reference).await.is_ok(), "{offset}");
        let report = registry.collect().await;
        assert_eq!((report.phase, report.plan.content.count), (GcPhase::Done, 0), "{offset}: {report:?}");
        clients.check();
    }
    clients.stop().await.verify(url, &registry.credentials).await;
}

/// A bucket refuses requests that are signed for another time: the registry says that its clock is off, not that its
/// password is wrong, and goes on when it is put right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_refuses_a_registry_for_its_clock_is_told_from_others() {
    let Some(clock) = SetClock::new() else { return };
    let (store, dir) = (stores::s3s_that_checks_the_time().await, tempfile::tempdir().unwrap());
    let settings = format!("[storage]\n{}", store.settings(store.address, "r"));
    let registry = Operated::start(dir.path(), &settings, Some(&clock)).await;
    let blob = registry.put_blob(b"blob").await;
    for offset in ["+2h", "-10y"] {
        clock.set(offset);
        let path = format!("/v2/b/blobs/uploads/?digest={}", Digest::of(b"other"));
        let answer = registry.request(Method::POST, &path).body("other").send().await.unwrap();
        assert_eq!(header(&answer, "retry-after"), "1");
        let body: Value = answer.json().await.unwrap();
        let message = body["errors"][0]["message"].as_str().unwrap();
        assert_eq!(body["errors"][0]["code"], "UNAVAILABLE");
        assert!(message.contains("clock"), "{offset}: {message}");
        let read = registry.request(Method::GET, &format!("/v2/b/blobs/{blob}")).send().await.unwrap();
        assert_eq!(code(read).await, (503, "UNAVAILABLE".into()), "{offset}");
        clock.set("+0");
        assert_eq!(registry.put_blob(b"other").await, Digest::of(b"other"));
        let read = registry.request(Method::GET, &format!("/v2/b/blobs/{blob}")).send().await.unwrap();
        assert_eq!(read.bytes().await.unwrap(), "blob");
    }
    drop(registry);
    clock.set("+2h");
    let error = Killable::refused(&clock, dir.path(), &settings);
    assert!(error.contains("clock") && !error.contains("check the credentials"), "{error}");
}
