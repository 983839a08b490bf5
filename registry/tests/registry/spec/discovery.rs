//! Rows about tags and referrers.

use anyplace_images::manifest::{OCI_CONFIG, OCI_INDEX};
use anyplace_images::{Algorithm, Digest};
use reqwest::Method;
use serde_json::{Value, json};

use super::{Answer, Bed, digest_of};
use crate::support::OCI_MANIFEST;

fn tags(answer: &Answer) -> Vec<String> {
    let json = answer.json();
    json["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap().to_owned()).collect()
}

/// Puts an artifact about `subject`, and gives its digest.
async fn artifact(bed: &Bed, subject: &Digest, kind: &str, number: usize) -> Digest {
    let config = bed.blob("app", "application/vnd.oci.empty.v1+json", b"{}").await;
    let body = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind, "config": config, "layers": [config],
        "subject": { "mediaType": OCI_MANIFEST, "digest": subject, "size": 1 },
        "annotations": { "number": number.to_string() },
    });
    let body = body.to_string().into_bytes();
    let digest = Digest::of(&body);
    let put = bed.put_manifest("app", digest.as_str(), OCI_MANIFEST, &body).await;
    assert_eq!((put.status, put.header("oci-subject")), (201, subject.to_string()));
    digest
}

/// The descriptors of an answer, which must be an index.
fn manifests(answer: &Answer) -> Vec<Value> {
    assert_eq!((answer.status, answer.header("content-type")), (200, OCI_INDEX.to_owned()));
    let json = answer.json();
    assert_eq!((&json["schemaVersion"], &json["mediaType"]), (&json!(2), &json!(OCI_INDEX)));
    json["manifests"].as_array().unwrap().clone()
}

fn next(answer: &Answer) -> Option<String> {
    let link = answer.header("link");
    link.strip_prefix('<')?.strip_suffix(">; rel=\"next\"").map(str::to_owned)
}

#[tokio::test]
async fn tags_are_sorted() {
    let bed = Bed::start().await;
    for tag in ["b", "a", "_x", "B", "10", "2", "a-b", "a.b", "a_b"] {
        bed.registry.put_image("app", tag, "seed").await;
    }
    let answer = bed.get("/v2/app/tags/list").await;
    assert_eq!(answer.json()["name"], "app");
    assert_eq!(tags(&answer), ["10", "2", "B", "_x", "a", "a-b", "a.b", "a_b", "b"]);
    bed.stop().await;
}

#[tokio::test]
async fn tags_in_pages() {
    let bed = Bed::start().await;
    let all = ["a", "b", "c", "d", "e"];
    for tag in all {
        bed.registry.put_image("team/app", tag, "seed").await;
    }
    let (mut seen, mut path) = (Vec::new(), Some("/v2/team/app/tags/list?n=2".to_owned()));
    while let Some(page) = path {
        let answer = bed.get(&page).await;
        seen.push(tags(&answer).join(""));
        path = next(&answer);
    }
    assert_eq!(seen, ["ab", "cd", "e"]);
    // What `last` names needn't be there.
    for (query, expected) in
        [("?last=b", "cde"), ("?last=bb&n=9", "cde"), ("?n=1&last=d", "e"), ("?last=e", "")]
    {
        let answer = bed.get(&format!("/v2/team/app/tags/list{query}")).await;
        assert_eq!((tags(&answer).join(""), next(&answer)), (expected.to_owned(), None), "{query}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn odd_page_sizes() {
    let bed = Bed::start().await;
    bed.registry.put_image("app", "a", "seed").await;
    let none = bed.get("/v2/app/tags/list?n=0").await;
    assert_eq!((none.status, tags(&none).len(), next(&none)), (200, 0, None));
    assert_eq!(tags(&bed.get("/v2/app/tags/list?n=18446744073709551615").await), ["a"]);
    for query in ["n=-1", "n=x", "n="] {
        let refused = bed.get(&format!("/v2/app/tags/list?{query}")).await;
        assert_eq!(refused.refusal(), (400, "UNSUPPORTED".to_owned()), "{query}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn tags_of_nothing() {
    let bed = Bed::start().await;
    assert_eq!(bed.get("/v2/app/tags/list").await.refusal(), (404, "NAME_UNKNOWN".to_owned()));
    // A repository that has content, and no tag, is known.
    let (digest, bytes) = bed.registry.put_image("app", "a", "seed").await;
    bed.delete("/v2/app/manifests/a").await;
    assert_eq!(bed.put_manifest("app", digest.as_str(), OCI_MANIFEST, &bytes).await.status, 201);
    let answer = bed.get("/v2/app/tags/list").await;
    assert_eq!((answer.status, tags(&answer).len()), (200, 0));
    bed.stop().await;
}

#[tokio::test]
async fn referrers_of_nothing() {
    let bed = Bed::start().await;
    bed.registry.put_image("app", "a", "seed").await;
    for name in ["app", "never/seen"] {
        for algorithm in Algorithm::ALL {
            let subject = digest_of(algorithm, b"absent");
            let answer = bed.get(&format!("/v2/{name}/referrers/{subject}")).await;
            assert_eq!(manifests(&answer).len(), 0);
        }
    }
    bed.stop().await;
}

#[tokio::test]
async fn referrers_are_described() {
    let bed = Bed::start().await;
    let (subject, _) = bed.registry.put_image("app", "a", "seed").await;
    let digest = artifact(&bed, &subject, "application/vnd.signature", 7).await;
    let path = format!("/v2/app/referrers/{subject}");
    let listed = manifests(&bed.get(&path).await);
    let size = bed.get(&format!("/v2/app/manifests/{digest}")).await.body.len();
    let expected = json!({
        "mediaType": OCI_MANIFEST, "digest": digest, "size": size,
        "artifactType": "application/vnd.signature", "annotations": { "number": "7" },
    });
    assert_eq!(listed, [expected]);
    // Pushing it again makes no second one, and another repository doesn't see it.
    artifact(&bed, &subject, "application/vnd.signature", 7).await;
    assert_eq!(manifests(&bed.get(&path).await).len(), 1);
    assert_eq!(manifests(&bed.get(&format!("/v2/other/referrers/{subject}")).await).len(), 0);
    let head = bed.head(&path).await;
    assert_eq!((head.status, head.header("content-type"), head.body.len()), (200, OCI_INDEX.to_owned(), 0));
    bed.stop().await;
}

#[tokio::test]
async fn referrers_of_each_kind() {
    let bed = Bed::start().await;
    let config = bed.blob("app", OCI_CONFIG, b"{}").await;
    let subject = json!({ "mediaType": OCI_MANIFEST, "digest": Digest::of(b"absent"), "size": 6 });
    let image = json!({ "schemaVersion": 2, "config": config, "layers": [], "subject": subject });
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "subject": subject });
    let kind = "application/vnd.sbom";
    let typed = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "subject": subject,
        "artifactType": kind });
    let mut expected = Vec::new();
    for (media_type, body, artifact_type) in [
        (OCI_MANIFEST, image, json!(OCI_CONFIG)),
        (OCI_INDEX, index, Value::Null),
        (OCI_INDEX, typed, json!(kind)),
    ] {
        let body = body.to_string().into_bytes();
        let digest = Digest::of(&body);
        assert_eq!(bed.put_manifest("app", digest.as_str(), media_type, &body).await.status, 201);
        expected.push((json!(digest), json!(media_type), artifact_type));
    }
    let listed = manifests(&bed.get(&format!("/v2/app/referrers/{}", Digest::of(b"absent"))).await);
    let mut found: Vec<_> = listed
        .iter()
        .map(|d| (d["digest"].clone(), d["mediaType"].clone(), d["artifactType"].clone()))
        .collect();
    for list in [&mut found, &mut expected] {
        list.sort_by_key(|(digest, _, _)| digest.to_string());
    }
    assert_eq!(found, expected);
    bed.stop().await;
}

#[tokio::test]
async fn referrers_by_type() {
    let bed = Bed::start().await;
    let subject = Digest::of(b"subject");
    let sbom = artifact(&bed, &subject, "application/vnd.sbom+json", 1).await;
    artifact(&bed, &subject, "application/vnd.signature", 2).await;
    for (asked, expected) in
        [("application%2Fvnd.sbom%2Bjson", vec![json!(sbom)]), ("application/other", vec![])]
    {
        let answer = bed.get(&format!("/v2/app/referrers/{subject}?artifactType={asked}")).await;
        assert_eq!(answer.header("oci-filters-applied"), "artifactType");
        let found: Vec<_> = manifests(&answer).iter().map(|d| d["digest"].clone()).collect();
        assert_eq!(found, expected, "{asked}");
    }
    let all = bed.get(&format!("/v2/app/referrers/{subject}")).await;
    assert_eq!((all.header("oci-filters-applied"), manifests(&all).len()), (String::new(), 2));
    bed.stop().await;
}

#[tokio::test]
async fn referrers_in_pages() {
    let bed = Bed::start().await;
    let subject = Digest::of(b"subject");
    let mut expected = Vec::new();
    for number in 0..7 {
        let kind = if number % 3 == 0 { "a/other" } else { "a/x+y" };
        let digest = artifact(&bed, &subject, kind, number).await;
        expected.extend((kind == "a/x+y").then(|| digest.to_string()));
    }
    expected.sort();
    let (mut found, mut pages) = (Vec::new(), 0);
    let mut path = Some(format!("/v2/app/referrers/{subject}?artifactType=a/x%2By&n=2"));
    while let Some(page) = path {
        let answer = bed.get(&page).await;
        assert_eq!(answer.header("oci-filters-applied"), "artifactType");
        let listed = manifests(&answer);
        assert!(listed.len() <= 2);
        found.extend(listed.iter().map(|d| d["digest"].as_str().unwrap().to_owned()));
        (path, pages) = (next(&answer), pages + 1);
    }
    assert_eq!((found, pages), (expected, 2));
    bed.stop().await;
}

#[tokio::test]
async fn referrers_of_no_digest() {
    let bed = Bed::start().await;
    for none in ["latest", "sha256:12", "md5:d41d8cd98f00b204e9800998ecf8427e"] {
        let answer = bed.get(&format!("/v2/app/referrers/{none}")).await;
        assert_eq!(answer.refusal(), (400, "DIGEST_INVALID".to_owned()), "{none}");
    }
    let path = format!("/v2/app/referrers/{}", Digest::of(b"x"));
    assert_eq!(bed.ask(Method::PUT, &path, &[], "").await.refusal(), (405, "UNSUPPORTED".to_owned()));
    bed.stop().await;
}
