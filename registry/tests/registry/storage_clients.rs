//! Clients that push to a registry and pull from it while something breaks below it.
//!
//! They know what was acknowledged to them, and nothing else counts: an upload must be at its last acknowledged chunk, or
//! the one after it whose answer was lost; what a 201 was answered for must be there, whole.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyplace_images::{Credentials, Digest};
use anyplace_seed::Seed;
use reqwest::{Method, StatusCode};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::support::{OCI_MANIFEST, header, manifest, noise};

const CLIENTS: u64 = 3;

/// Clients at work.
pub(crate) struct Clients {
    url: watch::Sender<String>,
    done: Arc<Mutex<Vec<Image>>>,
    stop: CancellationToken,
    tasks: Vec<tokio::task::JoinHandle<u64>>,
}

/// What they did.
pub(crate) struct Pushed {
    pub(crate) images: Vec<Image>,
    /// Uploads that went on after an answer was lost.
    pub(crate) resumed: u64,
}

impl Clients {
    pub(crate) fn start(url: &str, credentials: &Credentials, seed: &mut Seed) -> Clients {
        let (url, at) = watch::channel(url.to_owned());
        let (done, stop) = (Arc::new(Mutex::new(Vec::new())), CancellationToken::new());
        let start = |number| {
            let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(120)).build();
            let client = Client {
                http: http.unwrap(),
                url: at.clone(),
                credentials: credentials.clone(),
                seed: seed.fork(),
                number,
                done: done.clone(),
                stop: stop.clone(),
                resumed: 0,
            };
            tokio::spawn(client.run())
        };
        let tasks = (0..CLIENTS).map(start).collect();
        Clients { url, done, stop, tasks }
    }

    /// The registry is somewhere else now.
    pub(crate) fn moved(&self, url: &str) {
        self.url.send(url.to_owned()).unwrap();
    }

    /// Images that were pushed and, each after its push, one that was pulled.
    pub(crate) fn pushed(&self) -> usize {
        self.check();
        self.done.lock().unwrap().len()
    }

    pub(crate) fn check(&self) {
        assert!(self.tasks.iter().all(|client| !client.is_finished()), "a client found something wrong");
    }

    /// Lets them end what they are at.
    pub(crate) async fn stop(self) -> Pushed {
        self.stop.cancel();
        let mut resumed = 0;
        for client in self.tasks {
            resumed += client.await.unwrap();
        }
        let images = self.done.lock().unwrap().clone();
        assert!(!images.is_empty(), "the clients did nothing");
        Pushed { images, resumed }
    }
}

impl Pushed {
    /// All that was acknowledged is there.
    pub(crate) async fn verify(&self, url: &str, credentials: &Credentials) {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        for image in &self.images {
            for (path, expected) in [
                (format!("/v2/a/blobs/{}", image.blob), &image.bytes),
                (format!("/v2/a/manifests/{}", image.tag), &image.manifest),
            ] {
                let get = http.get(format!("{url}{path}"));
                let get = get.basic_auth(&credentials.user, Some(&credentials.password));
                let answer = get.send().await.unwrap();
                assert_eq!(answer.status(), 200, "{path} was acknowledged");
                assert_eq!(answer.bytes().await.unwrap(), **expected, "{path}");
            }
        }
    }
}

#[derive(Clone)]
pub(crate) struct Image {
    bytes: Arc<Vec<u8>>,
    blob: Digest,
    manifest: Arc<Vec<u8>>,
    tag: String,
}

struct Client {
    http: reqwest::Client,
    url: watch::Receiver<String>,
    credentials: Credentials,
    seed: Seed,
    number: u64,
    done: Arc<Mutex<Vec<Image>>>,
    stop: CancellationToken,
    /// Uploads that a kill interrupted.
    resumed: u64,
}

impl Client {
    async fn run(mut self) -> u64 {
        for round in 0.. {
            let bytes = noise(self.seed.next(), 2 + self.seed.below(1_500_000) as usize);
            let blob = Digest::of(&bytes);
            self.push_blob(&bytes, &blob).await;
            let size = bytes.len();
            let manifest = manifest(&blob, size, &[(&blob, size)]);
            let tag = format!("c{}-{round}", self.number);
            self.push_manifest(&manifest, &tag).await;
            let image = Image { bytes: Arc::new(bytes), blob, manifest: Arc::new(manifest), tag };
            self.done.lock().unwrap().push(image);
            self.pull_one().await;
            if self.stop.is_cancelled() {
                break;
            }
        }
        self.resumed
    }

    /// Sends until there is an answer; the registry may be killed in between.
    async fn send(&mut self, method: &Method, path: &str, headers: &[(&str, String)], body: &[u8]) -> Answer {
        for _ in 0..100_000 {
            match self.send_once(method, path, headers, body).await {
                Some(answer) => return answer,
                None => tokio::time::sleep(Duration::from_millis(3)).await,
            }
        }
        panic!("no answer to {method} {path}")
    }

    /// None: no answer, so nobody knows what was done.
    async fn send_once(
        &mut self,
        method: &Method,
        path: &str,
        headers: &[(&str, String)],
        body: &[u8],
    ) -> Option<Answer> {
        let url = format!("{}{path}", self.url.borrow().as_str());
        let mut request = self.http.request(method.clone(), url).body(body.to_vec());
        request = request.basic_auth(&self.credentials.user, Some(&self.credentials.password));
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let answer = request.send().await.ok()?;
        let (location, range) = (header(&answer, "location"), header(&answer, "range"));
        let status = answer.status();
        let body = answer.bytes().await.ok()?;
        // Its bucket may be slow; it says so, and nothing was acknowledged.
        (status != StatusCode::SERVICE_UNAVAILABLE).then(|| Answer {
            status,
            location,
            range,
            body: body.to_vec(),
        })
    }

    async fn push_blob(&mut self, bytes: &[u8], blob: &Digest) {
        let post = self.send(&Method::POST, "/v2/a/blobs/uploads/", &[], b"").await;
        assert_eq!(post.status, 202, "{}", post.text());
        let location = post.location;
        let (mut acknowledged, mut unanswered) = (0, 0);
        loop {
            if unanswered > 0 {
                let status = self.send(&Method::GET, &location, &[], b"").await;
                assert_eq!(status.status, 204, "{acknowledged} bytes were acknowledged: {}", status.text());
                let at = status.offset();
                assert!(
                    at == acknowledged || at == acknowledged + unanswered,
                    "{acknowledged} bytes acknowledged and {unanswered} sent without an answer, but it is at {at}"
                );
                self.resumed += 1;
                (acknowledged, unanswered) = (at, 0);
            }
            let left = bytes.len() as u64 - acknowledged;
            if left == 0 {
                break;
            }
            // At least two bytes: one byte and none look the same in a `Range`.
            let len = if left < 4 { left } else { 2 + self.seed.below(left.min(400_000) - 1) };
            let len = if left - len == 1 { left } else { len };
            let range = [("content-range", format!("{acknowledged}-{}", acknowledged + len - 1))];
            let part = &bytes[acknowledged as usize..(acknowledged + len) as usize];
            match self.send_once(&Method::PATCH, &location, &range, part).await {
                Some(answer) => {
                    assert_eq!(answer.status, 202, "{}", answer.text());
                    acknowledged += len;
                }
                None => {
                    unanswered = len;
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
            }
        }
        for attempt in 0.. {
            let Some(put) =
                self.send_once(&Method::PUT, &format!("{location}?digest={blob}"), &[], b"").await
            else {
                tokio::time::sleep(Duration::from_millis(3)).await;
                continue;
            };
            if put.status == 201 {
                return;
            }
            // One before was done, and its answer lost.
            assert!(attempt > 0 && put.status == 404, "{}", put.text());
            let head = self.send(&Method::HEAD, &format!("/v2/a/blobs/{blob}"), &[], b"").await;
            assert_eq!(head.status, 200, "the upload is over, and its content isn't there");
            return;
        }
    }

    async fn push_manifest(&mut self, manifest: &[u8], tag: &str) {
        let headers = [("content-type", OCI_MANIFEST.to_owned())];
        let put = self.send(&Method::PUT, &format!("/v2/a/manifests/{tag}"), &headers, manifest).await;
        assert_eq!(put.status, 201, "{}", put.text());
    }

    /// Pulls something that was pushed: whatever comes must be right.
    async fn pull_one(&mut self) {
        let image = {
            let done = self.done.lock().unwrap();
            done[self.seed.below(done.len() as u64) as usize].clone()
        };
        let get = self.send(&Method::GET, &format!("/v2/a/blobs/{}", image.blob), &[], b"").await;
        assert_eq!(get.status, 200);
        assert!(get.body == *image.bytes, "other bytes than {}", image.blob);
    }
}

struct Answer {
    status: StatusCode,
    location: String,
    range: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> String {
        format!("{} {}", self.status, String::from_utf8_lossy(&self.body))
    }

    fn offset(&self) -> u64 {
        let last: u64 = self.range.strip_prefix("0-").unwrap().parse().unwrap();
        if last == 0 { 0 } else { last + 1 }
    }
}
