//! The OCI distribution specification, version 1.1 and what its development version adds, row by row: each row is
//! what a registry must or should do, and the test that shows that ours does.
//!
//! | Row | Test |
//! |---|---|
//! | Base: `GET /v2/` is 200, and names the API's version | `pull::the_base_says_that_this_is_a_registry` |
//! | Pull: a manifest by tag and digest, byte-exact, its type, length and digest | `pull::manifests_come_as_they_were_pushed` |
//! | Pull: HEAD of manifests and blobs, as GET without the body | `pull::heads_are_like_gets_without_a_body` |
//! | Pull: absent manifests and blobs are 404, with the code | `pull::what_is_absent_is_404` |
//! | Pull: `Accept` doesn't change what was pushed | `pull::the_type_is_the_pushed_one_whatever_is_accepted` |
//! | Pull: `Range`: 206 with `Content-Range` and length, open and suffix ranges | `pull::ranges_of_blobs` |
//! | Pull: ranges outside, and ranges that end before they begin, are 416 | `pull::ranges_that_cannot_be` |
//! | Pull: `If-Range` of other content gets everything | `pull::a_range_of_other_content_gets_everything` |
//! | Pull: `If-None-Match` of known content is 304 | `pull::known_content_is_not_sent_again` |
//! | Pull: percent-encoded paths | `pull::paths_may_be_percent_encoded` |
//! | Pull: an empty blob | `pull::an_empty_blob` |
//! | Pull: `?ns=` says which registry a mirror is asked for, and `OCI-Namespace` that it was understood | `pull::a_mirror_is_told_which_registry_is_meant` |
//! | Push: POST, then PUT | `push::post_then_put` |
//! | Push: one POST with `?digest=` | `push::one_post` |
//! | Push: chunks by PATCH, the last by PATCH or PUT | `push::chunks_in_order` |
//! | Push: a stream by PATCH without a range | `push::a_stream` |
//! | Push: a chunk out of order is 416, with `Location` and `Range`, and the upload goes on | `push::chunks_out_of_order` |
//! | Push: upload status: 204, `Location`, `Range` | `push::the_status_of_an_upload` |
//! | Push: cancel: 204, and the upload is gone | `push::a_cancelled_upload_is_gone` |
//! | Push: `OCI-Chunk-Min-Length`, `OCI-Chunk-Max-Length`; longer chunks are 413 | `push::lengths_of_chunks` |
//! | Push: mount from a repository: 201 | `push::mounts` |
//! | Push: mount without `from`: 201 where the content is known | `push::mounts_without_a_source` |
//! | Push: a mount that can't be is 202, and the upload begins | `push::a_mount_of_absent_content_begins_an_upload` |
//! | Push: `?digest-algorithm=sha512` | `push::an_upload_names_its_algorithm` |
//! | Push: an algorithm that isn't there is 400 | `push::unknown_algorithms_are_refused` |
//! | Push: a wrong digest is 400 by every way, and leaves nothing | `push::wrong_digests_are_refused` |
//! | Push: lengths and ranges that disagree are 400 | `push::lengths_that_disagree` |
//! | Manifests: `Location` and digest of a push | `manifests::a_push_says_where_it_is` |
//! | Manifests: every type: OCI and docker images and indexes, artifacts, absent and unknown types | `manifests::every_type` |
//! | Manifests: `Content-Type` must be the manifest's own | `manifests::types_that_disagree` |
//! | Manifests: 4 MiB are taken, more is 413 | `manifests::large_ones` |
//! | Manifests: blobs that are missing are 404 `MANIFEST_BLOB_UNKNOWN` | `manifests::missing_blobs` |
//! | Manifests: an index may name manifests that are missing | `manifests::sparse_indexes` |
//! | Manifests: layers that may not be distributed, or have addresses, may be missing | `manifests::layers_that_lie_elsewhere` |
//! | Manifests: the digest in the path must be right, sha256 or sha512 | `manifests::digests_in_the_path` |
//! | Manifests: `?tag=` gives tags, each named by `OCI-Tag` | `manifests::several_tags_in_one_push` |
//! | Manifests: more tags than are taken is 414 | `manifests::too_many_tags` |
//! | Manifests: a subject that is absent is fine; `OCI-Subject` names it | `manifests::subjects_may_be_absent` |
//! | Tags: sorted by bytes | `discovery::tags_are_sorted` |
//! | Tags: `n`, `last` and `Link` | `discovery::tags_in_pages` |
//! | Tags: `n=0` is an empty list; nonsense is 400 | `discovery::odd_page_sizes` |
//! | Tags: an unknown repository is 404 | `discovery::tags_of_nothing` |
//! | Referrers: 200 with an empty index for anything | `discovery::referrers_of_nothing` |
//! | Referrers: descriptors with type, size, artifact type and annotations | `discovery::referrers_are_described` |
//! | Referrers: the artifact type of an image is its configuration's | `discovery::referrers_of_each_kind` |
//! | Referrers: `artifactType` and `OCI-Filters-Applied` | `discovery::referrers_by_type` |
//! | Referrers: pages and `Link` | `discovery::referrers_in_pages` |
//! | Referrers: a digest that is none is 400 | `discovery::referrers_of_no_digest` |
//! | Delete: a tag: 202, then 404; the manifest stays | `management::deleting_a_tag` |
//! | Delete: a manifest: 202, its tags go too, and it leaves the referrers | `management::deleting_a_manifest` |
//! | Delete: a blob: 202, then 404; other repositories keep it | `management::deleting_a_blob` |
//! | Errors: `errors[]` with code, message and detail, for every code | `management::every_error_has_its_code` |
//! | Errors: methods that aren't there are 405 with `Allow` | `management::unknown_methods` |
//! | Errors: names | `management::names` |
//! | Errors: tags | `management::names_of_tags` |
//! | Warnings: `Warning: 299` when a cache can't ask | `management::a_cache_warns_when_it_cannot_ask` |
//! | The public conformance suite: every way of pushing, sha256 and sha512 | `suite::blobs_by_every_way` |
//! | The public conformance suite: every kind of data: push, list, head, pull, referrers, delete | `suite::every_kind_of_data` |
//! | The public conformance suite: errors | `suite::errors` |

mod discovery;
mod management;
mod manifests;
mod pull;
mod push;
mod suite;

use anyplace_images::{Algorithm, Digest};
use axum::http::HeaderMap;
use reqwest::{Body, Method};

use crate::support::Registry;

/// A registry, and its folder.
struct Bed {
    registry: Registry,
    dir: tempfile::TempDir,
}

/// A whole answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Bed {
    async fn start() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::start(dir.path()).await;
        Bed { registry, dir }
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Answer {
        let mut request = self.registry.request(method, path).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Answer { status, headers, body: answer.bytes().await.unwrap().to_vec() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path, &[], "").await
    }

    async fn head(&self, path: &str) -> Answer {
        self.ask(Method::HEAD, path, &[], "").await
    }

    async fn delete(&self, path: &str) -> Answer {
        self.ask(Method::DELETE, path, &[], "").await
    }

    /// Begins an upload, and gives its location.
    async fn begin(&self, name: &str, query: &str) -> String {
        let answer = self.ask(Method::POST, &format!("/v2/{name}/blobs/uploads/{query}"), &[], "").await;
        assert_eq!(answer.status, 202, "{answer:?}");
        answer.header("location")
    }

    async fn patch(&self, location: &str, first: usize, part: &[u8]) -> Answer {
        let range = format!("{first}-{}", first + part.len() - 1);
        self.ask(Method::PATCH, location, &[("content-range", &range)], part.to_vec()).await
    }

    async fn finish(&self, location: &str, digest: &Digest, rest: &[u8]) -> Answer {
        self.ask(Method::PUT, &format!("{location}?digest={digest}"), &[], rest.to_vec()).await
    }

    /// Puts a blob and gives its descriptor.
    async fn blob(&self, name: &str, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let digest = self.registry.put_blob(name, bytes).await;
        serde_json::json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    async fn put_manifest(&self, name: &str, key: &str, media_type: &str, body: &[u8]) -> Answer {
        let path = format!("/v2/{name}/manifests/{key}");
        self.ask(Method::PUT, &path, &[("content-type", media_type)], body.to_vec()).await
    }

    /// That a blob is there, byte by byte.
    async fn assert_blob(&self, name: &str, digest: &Digest, bytes: &[u8]) {
        let answer = self.get(&format!("/v2/{name}/blobs/{digest}")).await;
        assert_eq!((answer.status, answer.header("docker-content-digest")), (200, digest.to_string()));
        assert!(answer.body == bytes, "{digest} has other bytes");
    }

    fn uploads_left(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("uploads")).unwrap().count()
    }

    async fn stop(self) {
        self.registry.stop().await;
    }
}

impl Answer {
    fn header(&self, name: &str) -> String {
        self.headers.get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
    }

    fn header_values(&self, name: &str) -> Vec<&str> {
        self.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| panic!("no JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The status and the code of a refusal, which must be in the specification's form.
    fn refusal(&self) -> (u16, String) {
        let json = self.json();
        let error = &json["errors"][0];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{json}");
        (self.status, error["code"].as_str().unwrap().to_owned())
    }
}

fn digest_of(algorithm: Algorithm, bytes: &[u8]) -> Digest {
    algorithm.digest(bytes)
}

/// Every test that the table names is there, and every test is in the table.
#[test]
fn the_table_is_complete() {
    let sources = [
        ("discovery", include_str!("spec/discovery.rs")),
        ("management", include_str!("spec/management.rs")),
        ("manifests", include_str!("spec/manifests.rs")),
        ("pull", include_str!("spec/pull.rs")),
        ("push", include_str!("spec/push.rs")),
        ("suite", include_str!("spec/suite.rs")),
    ];
    let table = include_str!("spec.rs");
    let mut tests = 0;
    for (module, source) in sources {
        for after in source.split("#[tokio::test]\nasync fn ").skip(1) {
            let name = after.split('(').next().unwrap();
            assert!(table.contains(&format!("`{module}::{name}` |")), "{module}::{name} has no row");
            tests += 1;
        }
    }
    assert_eq!(table.lines().filter(|line| line.starts_with("//! |")).count(), tests + 2);
}
