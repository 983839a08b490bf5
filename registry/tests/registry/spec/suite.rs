//! What the public conformance suite of the specification asks for, in the order in which it asks: each way of
//! pushing a blob in both algorithms, then each kind of data through push, list, head, pull, referrers and delete,
//! then errors. Written anew from the suite's cases, with its strictest settings (digest headers, tags by parameter
//! and cancelled uploads included); images with missing layers, which the suite leaves out unless asked, are refused
//! here.

use std::collections::BTreeMap;

use anyplace_images::manifest::{OCI_CONFIG, OCI_INDEX, OCI_LAYER_ZSTD};
use anyplace_images::{Algorithm, Digest};
use reqwest::Method;
use serde_json::{Value, json};

use super::{Bed, digest_of};
use crate::support::{OCI_MANIFEST, noise};

const REPO: &str = "conformance/repo1";
const OTHER: &str = "conformance/repo2";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const KIND: &str = "application/vnd.example.oci.conformance";

/// A kind of data, made as it is described.
struct Data {
    algorithm: Algorithm,
    seed: u64,
    blobs: BTreeMap<Digest, Vec<u8>>,
    /// In the order in which they have to be pushed.
    manifests: Vec<(Digest, String, Vec<u8>)>,
    tags: BTreeMap<String, Digest>,
    /// Descriptors that the referrers of a digest must have.
    referrers: BTreeMap<Digest, Vec<Value>>,
    by_parameter: bool,
}

/// What a manifest has besides its content.
#[derive(Clone, Default)]
struct Extra {
    tag: Option<&'static str>,
    kind: Option<&'static str>,
    subject: Option<Value>,
    annotations: Option<Value>,
    custom: bool,
    inline: bool,
}

impl Data {
    fn new(algorithm: Algorithm, seed: u64) -> Data {
        Data {
            algorithm,
            seed,
            blobs: BTreeMap::new(),
            manifests: Vec::new(),
            tags: BTreeMap::new(),
            referrers: BTreeMap::new(),
            by_parameter: false,
        }
    }

    fn blob(&mut self, media_type: &str, bytes: Vec<u8>, inline: bool) -> Value {
        let digest = self.algorithm.digest(&bytes);
        let mut descriptor = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        if inline {
            use base64::Engine as _;
            descriptor["data"] = base64::prelude::BASE64_STANDARD.encode(&bytes).into();
        }
        self.blobs.insert(digest, bytes);
        descriptor
    }

    fn random(&mut self, media_type: &str, inline: bool) -> Value {
        self.seed += 1;
        let bytes = noise(self.seed, 2_048);
        self.blob(media_type, bytes, inline)
    }

    fn manifest(&mut self, mut body: Value, extra: &Extra) -> Value {
        let media_type = body["mediaType"].as_str().unwrap().to_owned();
        let kind = extra.kind.map(Value::from);
        for (key, value) in
            [("artifactType", &kind), ("subject", &extra.subject), ("annotations", &extra.annotations)]
        {
            if let Some(value) = value {
                body[key] = value.clone();
            }
        }
        if extra.custom {
            body[format!("org.example.{}", self.seed)] = "custom".into();
        }
        let config = body["config"]["mediaType"].as_str().map(Value::from);
        let bytes = body.to_string().into_bytes();
        let digest = self.algorithm.digest(&bytes);
        let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        if let Some(subject) = &extra.subject {
            let mut described = descriptor.clone();
            if let Some(kind) = kind.or(config) {
                described["artifactType"] = kind;
            }
            if let Some(annotations) = &extra.annotations {
                described["annotations"] = annotations.clone();
            }
            let subject: Digest = subject["digest"].as_str().unwrap().parse().unwrap();
            self.referrers.entry(subject).or_default().push(described);
        }
        if let Some(tag) = extra.tag {
            self.tags.insert(tag.to_owned(), digest.clone());
        }
        self.manifests.push((digest, media_type, bytes));
        descriptor
    }

    fn image(&mut self, layers: usize, extra: &Extra) -> Value {
        let layers: Vec<Value> = (0..layers).map(|_| self.random(OCI_LAYER_ZSTD, extra.inline)).collect();
        let config = format!("{{\"architecture\":\"amd64\",\"os\":\"linux\",\"seed\":{}}}", self.seed);
        let config = self.blob(OCI_CONFIG, config.into_bytes(), extra.inline);
        let body =
            json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
        self.manifest(body, extra)
    }

    fn artifact(&mut self, layer: Option<&str>, extra: &Extra) -> Value {
        let config = self.blob(EMPTY, b"{}".to_vec(), false);
        let layer = match layer {
            Some(media_type) => self.random(media_type, false),
            None => config.clone(),
        };
        let body =
            json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer] });
        self.manifest(body, extra)
    }

    fn index(&mut self, children: Vec<Value>, extra: &Extra) -> Value {
        let body = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children });
        self.manifest(body, extra)
    }

    fn platforms(&mut self, extra: &Extra) -> Value {
        let child = Extra { tag: None, subject: None, annotations: None, ..extra.clone() };
        let children = ["amd64", "arm64"].map(|architecture| {
            let mut image = match extra.kind {
                Some(kind) => self.artifact(Some(kind), &child),
                None => self.image(2, &child),
            };
            image["platform"] = json!({ "architecture": architecture, "os": "linux" });
            image
        });
        self.index(children.to_vec(), extra)
    }
}

fn tagged(tag: &'static str) -> Extra {
    Extra { tag: Some(tag), ..Extra::default() }
}

/// The kinds of data that the suite has.
fn kinds() -> Vec<(&'static str, Data)> {
    let (sha256, sha512) = (Algorithm::Sha256, Algorithm::Sha512);
    let kind = |extra: Extra| Extra { kind: Some(KIND), ..extra };
    let mut seed = 1_000;
    let mut made = Vec::new();
    let mut add = |name, algorithm, make: &dyn Fn(&mut Data)| {
        seed += 100;
        let mut data = Data::new(algorithm, seed);
        make(&mut data);
        made.push((name, data));
    };
    add("image", sha256, &|d| drop(d.image(2, &tagged("image"))));
    add("large manifest", sha256, &|d| {
        let annotations: BTreeMap<String, String> =
            (0..390).map(|n| (format!("large-annotation-{n}"), "A".repeat(10_000))).collect();
        d.image(2, &Extra { annotations: Some(json!(annotations)), ..tagged("large-manifest") });
    });
    add("index", sha256, &|d| drop(d.platforms(&tagged("index"))));
    add("nested index", sha256, &|d| {
        let children = vec![d.platforms(&Extra::default()), d.platforms(&Extra::default())];
        d.index(children, &tagged("index-of-index"));
    });
    add("empty index", sha256, &|d| drop(d.index(Vec::new(), &tagged("index"))));
    add("artifact", sha256, &|d| drop(d.artifact(Some(KIND), &kind(tagged("artifact")))));
    add("artifact index", sha256, &|d| drop(d.platforms(&kind(tagged("artifact-index")))));
    add("artifact without layers", sha256, &|d| {
        drop(d.artifact(None, &kind(tagged("artifact-without-layers"))))
    });
    add("artifacts with subject", sha256, &|d| {
        let subject = Some(d.image(2, &tagged("image")));
        d.image(2, &Extra { subject: subject.clone(), ..Extra::default() });
        for (tag, kind) in [("tagged-artifact1", KIND), ("tagged-artifact2", "application/vnd.example.other")]
        {
            let annotations = Some(json!({ "org.opencontainers.conformance": "hello", "unique": tag }));
            let extra = Extra { subject: subject.clone(), annotations, kind: Some(kind), ..tagged(tag) };
            d.artifact(Some(KIND), &extra);
        }
    });
    add("index with subject", sha256, &|d| {
        let subject = Some(d.platforms(&tagged("index")));
        let annotations = Some(json!({ "org.opencontainers.conformance": "hello" }));
        d.platforms(&kind(Extra { subject, annotations, ..tagged("tagged-artifact") }));
    });
    add("missing subject", sha256, &|d| {
        let subject =
            json!({ "mediaType": OCI_MANIFEST, "size": 123, "digest": Digest::of(b"missing content") });
        d.artifact(Some(KIND), &kind(Extra { subject: Some(subject), ..tagged("tagged-artifact") }));
    });
    add("data field", sha256, &|d| drop(d.image(2, &Extra { inline: true, ..tagged("data-field") })));
    add("non-distributable layers", sha256, &|d| {
        let absent = |media_type: &str| {
            let digest = Digest::of(media_type.as_bytes());
            let url = format!("https://store.example.com/blobs/sha256/{}", digest.hex());
            json!({ "mediaType": media_type, "digest": digest, "size": 123_456, "urls": [url] })
        };
        let layers = vec![
            absent("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
            absent("application/vnd.oci.image.layer.nondistributable.v1.tar"),
            d.random(OCI_LAYER_ZSTD, false),
        ];
        let config = d.blob(OCI_CONFIG, b"{\"os\":\"linux\"}".to_vec(), false);
        let body =
            json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
        d.manifest(body, &tagged("non-distributable-image"));
    });
    add("custom fields", sha256, &|d| drop(d.platforms(&Extra { custom: true, ..tagged("custom-fields") })));
    add("no layers", sha256, &|d| drop(d.image(0, &tagged("no-layers"))));
    add("sha512", sha512, &|d| drop(d.platforms(&Extra::default())));
    for (name, algorithm) in [("tag parameter, sha256", sha256), ("tag parameter, sha512", sha512)] {
        add(name, algorithm, &|d| {
            d.platforms(&tagged("tag-param"));
            d.by_parameter = true;
            for (number, (digest, _, _)) in d.manifests.iter().enumerate() {
                d.tags.insert(format!("tag-param-{number}"), digest.clone());
            }
        });
    }
    made
}

#[tokio::test]
async fn blobs_by_every_way() {
    let bed = Bed::start().await;
    for algorithm in Algorithm::ALL {
        let mut seed = 500;
        let mut next = |len| {
            seed += 1;
            let bytes = noise(seed, len);
            (digest_of(algorithm, &bytes), bytes)
        };
        let absent = next(512).0;
        assert_eq!(bed.get(&format!("/v2/{REPO}/blobs/{absent}")).await.status, 404);
        for way in
            ["post", "post+put", "stream", "one chunk", "chunks", "chunks+put", "disorder", "disorder+put"]
        {
            let (digest, bytes) = next(if way.contains('s') { 3_067 } else { 512 });
            let location = push(&bed, REPO, way, &digest, &bytes).await;
            assert_eq!(bed.get(&location).await.body, bytes, "{way}");
            check_and_delete(&bed, REPO, &digest, &bytes).await;
        }
        for bytes in [&b""[..], b"{}"] {
            for way in ["post", "post+put", "stream"] {
                let digest = digest_of(algorithm, bytes);
                push(&bed, REPO, way, &digest, bytes).await;
                check_and_delete(&bed, REPO, &digest, bytes).await;
            }
        }
        for from in [format!("&from={OTHER}"), String::new()] {
            let (digest, bytes) = next(512);
            push(&bed, OTHER, "post", &digest, &bytes).await;
            let path = format!("/v2/{REPO}/blobs/uploads/?mount={digest}{from}");
            let mounted = bed.ask(Method::POST, &path, &[], "").await;
            assert_eq!(mounted.status, 201);
            assert_eq!(bed.get(&mounted.header("location")).await.body, bytes);
            check_and_delete(&bed, REPO, &digest, &bytes).await;
            check_and_delete(&bed, OTHER, &digest, &bytes).await;
        }
        let (digest, bytes) = next(512);
        let location = bed.begin(REPO, &format!("?mount={digest}&from={OTHER}")).await;
        assert_eq!(bed.finish(&location, &digest, &bytes).await.status, 201);
        check_and_delete(&bed, REPO, &digest, &bytes).await;
        let location = bed.begin(REPO, "").await;
        assert_eq!(bed.delete(&location).await.status, 204);
    }
    assert_eq!(bed.uploads_left(), 0);
    bed.stop().await;
}

/// Pushes a blob, and gives the location that the registry answers with.
async fn push(bed: &Bed, name: &str, way: &str, digest: &Digest, bytes: &[u8]) -> String {
    if way == "post" {
        let path = format!("/v2/{name}/blobs/uploads/?digest={digest}");
        let post = bed.ask(Method::POST, &path, &[], bytes.to_vec()).await;
        assert_eq!(post.status, 201, "{way} {post:?}");
        return post.header("location");
    }
    let mut location = bed.begin(name, "").await;
    let mut put = match way {
        "post+put" => bytes,
        _ => b"",
    };
    let mut range = None;
    if way == "stream" {
        let patch = bed.ask(Method::PATCH, &location, &[], bytes.to_vec()).await;
        assert_eq!(patch.status, 202, "{patch:?}");
        location = patch.header("location");
    } else if way != "post+put" {
        let size = if way == "one chunk" { bytes.len() } else { bytes.len() / 3 + 1 };
        for (number, part) in bytes.chunks(size).enumerate() {
            let first = number * size;
            let last = first + part.len() == bytes.len();
            if way.starts_with("disorder") {
                let wrong = if last { 0 } else { first + size };
                let wrong_part = &bytes[wrong..(wrong + size).min(bytes.len())];
                let refused = bed.patch(&location, wrong, wrong_part).await;
                assert_eq!(refused.status, 416, "{way} {number}");
                let status = bed.get(&refused.header("location")).await;
                assert_eq!((status.status, status.header("range")), (204, format!("0-{}", first.max(1) - 1)));
                location = status.header("location");
            }
            if last && way.ends_with("+put") {
                put = part;
                range = Some(format!("{first}-{}", first + part.len() - 1));
            } else {
                let patch = bed.patch(&location, first, part).await;
                assert_eq!(patch.status, 202, "{way} {number} {patch:?}");
                location = patch.header("location");
            }
        }
    }
    let headers: Vec<(&str, &str)> = range.iter().map(|range| ("content-range", range.as_str())).collect();
    let answer = bed.ask(Method::PUT, &format!("{location}?digest={digest}"), &headers, put.to_vec()).await;
    assert_eq!(answer.status, 201, "{way} {answer:?}");
    assert_eq!(answer.header("docker-content-digest"), digest.to_string());
    answer.header("location")
}

async fn check_and_delete(bed: &Bed, name: &str, digest: &Digest, bytes: &[u8]) {
    let path = format!("/v2/{name}/blobs/{digest}");
    for answer in [bed.head(&path).await, bed.get(&path).await] {
        assert_eq!((answer.status, answer.header("content-length")), (200, bytes.len().to_string()));
        assert_eq!(answer.header("docker-content-digest"), digest.to_string());
    }
    bed.assert_blob(name, digest, bytes).await;
    assert_eq!(bed.delete(&path).await.status, 202);
    assert_eq!(bed.head(&path).await.status, 404);
}

#[tokio::test]
async fn every_kind_of_data() {
    let bed = Bed::start().await;
    let ways = ["post+put", "post", "stream", "chunks"];
    for (number, (kind, data)) in kinds().into_iter().enumerate() {
        for (count, (digest, bytes)) in data.blobs.iter().enumerate() {
            push(&bed, REPO, ways[(number + count) % ways.len()], digest, bytes).await;
        }
        push_manifests(&bed, kind, &data).await;
        list_tags(&bed, &data).await;
        let keys = data.manifests.iter().map(|(digest, _, _)| (digest.to_string(), digest));
        let keys = keys.chain(data.tags.iter().map(|(tag, digest)| (tag.clone(), digest)));
        for (key, digest) in keys {
            let (_, media_type, bytes) = data.manifests.iter().find(|(found, _, _)| found == digest).unwrap();
            let path = format!("/v2/{REPO}/manifests/{key}");
            let (head, get) = (bed.head(&path).await, bed.get(&path).await);
            assert!(get.body == *bytes && head.body.is_empty(), "{kind} {key}");
            for answer in [head, get] {
                assert_eq!(
                    (answer.status, &answer.header("content-type")),
                    (200, media_type),
                    "{kind} {key}"
                );
                assert_eq!(answer.header("content-length"), bytes.len().to_string());
                assert_eq!(answer.header("docker-content-digest"), digest.to_string());
            }
        }
        for (digest, bytes) in &data.blobs {
            bed.assert_blob(REPO, digest, bytes).await;
        }
        list_referrers(&bed, kind, &data).await;
        delete(&bed, kind, &data).await;
    }
    bed.stop().await;
}

async fn push_manifests(bed: &Bed, kind: &str, data: &Data) {
    for (digest, media_type, bytes) in &data.manifests {
        let tags: Vec<&str> = data
            .tags
            .iter()
            .filter(|(_, of)| data.by_parameter && *of == digest)
            .map(|(tag, _)| tag.as_str())
            .collect();
        let query: Vec<String> = tags.iter().map(|tag| format!("tag={tag}")).collect();
        let key = format!("{digest}?{}", query.join("&"));
        let put = bed.put_manifest(REPO, &key, media_type, bytes).await;
        assert_eq!(put.status, 201, "{kind} {put:?}");
        assert_eq!(put.header_values("oci-tag"), tags, "{kind}");
        check_put(bed, data, digest, bytes, &put).await;
    }
    for (tag, digest) in data.tags.iter().filter(|_| !data.by_parameter) {
        let (_, media_type, bytes) = data.manifests.iter().find(|(found, _, _)| found == digest).unwrap();
        let put = bed.put_manifest(REPO, tag, media_type, bytes).await;
        assert_eq!(put.status, 201, "{kind} {put:?}");
        check_put(bed, data, digest, bytes, &put).await;
    }
}

async fn check_put(bed: &Bed, data: &Data, digest: &Digest, bytes: &[u8], put: &super::Answer) {
    assert_eq!(put.header("docker-content-digest"), digest.to_string());
    assert!(bed.get(&put.header("location")).await.body == bytes);
    let about = data.referrers.iter().find(|(_, list)| list.iter().any(|d| d["digest"] == digest.as_str()));
    assert_eq!(put.header("oci-subject"), about.map(|(subject, _)| subject.to_string()).unwrap_or_default());
}

async fn list_tags(bed: &Bed, data: &Data) {
    let list = async |query: &str| {
        let answer = bed.get(&format!("/v2/{REPO}/tags/list{query}")).await;
        assert_eq!(answer.status, 200);
        let tags: Vec<String> = serde_json::from_value(answer.json()["tags"].clone()).unwrap();
        tags
    };
    let all = list("").await;
    assert!(all.is_sorted() && data.tags.keys().all(|tag| all.contains(tag)), "{all:?}");
    if all.len() >= 2 {
        let middle = all.len() / 2;
        assert_eq!(list(&format!("?last={}", all[middle - 1])).await, all[middle..]);
    }
}

async fn list_referrers(bed: &Bed, kind: &str, data: &Data) {
    for (subject, expected) in &data.referrers {
        let list = async |query: &str| {
            let answer = bed.get(&format!("/v2/{REPO}/referrers/{subject}{query}")).await;
            assert_eq!((answer.status, answer.header("content-type")), (200, OCI_INDEX.to_owned()), "{kind}");
            assert_eq!(answer.header("oci-filters-applied").is_empty(), query.is_empty());
            answer.json()["manifests"].as_array().unwrap().clone()
        };
        let listed = list("").await;
        assert!(expected.iter().all(|descriptor| listed.contains(descriptor)), "{kind} {listed:?}");
        for descriptor in expected {
            let asked = &descriptor["artifactType"];
            let listed =
                list(&format!("?artifactType={}", asked.as_str().unwrap().replace('+', "%2B"))).await;
            assert!(
                listed.contains(descriptor) && listed.iter().all(|d| d["artifactType"] == *asked),
                "{kind}"
            );
        }
    }
}

async fn delete(bed: &Bed, kind: &str, data: &Data) {
    let manifests = data.manifests.iter().rev().map(|(digest, _, _)| digest.to_string());
    let paths = data.tags.keys().cloned().chain(manifests).map(|key| format!("/v2/{REPO}/manifests/{key}"));
    let blobs = data.blobs.keys().map(|digest| format!("/v2/{REPO}/blobs/{digest}"));
    for path in paths.chain(blobs) {
        assert_eq!(bed.delete(&path).await.status, 202, "{kind} {path}");
        assert_eq!(bed.head(&path).await.status, 404, "{kind} {path}");
    }
    for subject in data.referrers.keys() {
        let answer = bed.get(&format!("/v2/{REPO}/referrers/{subject}")).await;
        assert_eq!(answer.json()["manifests"].as_array().unwrap().len(), 0, "{kind}");
    }
}

#[tokio::test]
async fn errors() {
    let bed = Bed::start().await;
    assert_eq!(bed.get("/v2/").await.status, 200);
    let answer = bed.get(&format!("/v2/{REPO}/tags/list")).await;
    assert!([200, 404].contains(&answer.status));
    let mut data = Data::new(Algorithm::Sha256, 9_000);
    data.image(1, &Extra::default());
    for (digest, bytes) in &data.blobs {
        push(&bed, REPO, "post+put", digest, bytes).await;
    }
    let (digest, media_type, bytes) = &data.manifests[0];
    // Two spaces more, and the digest is another.
    let longer = [bytes, &b"  "[..]].concat();
    assert_eq!(bed.put_manifest(REPO, digest.as_str(), media_type, &longer).await.status, 400);
    assert_eq!(bed.put_manifest(REPO, "sha256:baddigeststring", media_type, bytes).await.status, 400);
    for (key, status) in [("sha256:baddigeststring", 400), (digest.as_str(), 404), ("missing-abc", 404)] {
        assert_eq!(bed.get(&format!("/v2/{REPO}/manifests/{key}")).await.status, status, "{key}");
    }
    bed.stop().await;
}
