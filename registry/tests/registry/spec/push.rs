//! Rows about pushing blobs.

use anyplace_images::{Algorithm, Digest};
use futures_util::stream;
use reqwest::{Body, Method};

use super::{Bed, digest_of};
use crate::support::noise;

#[tokio::test]
async fn post_then_put() {
    let bed = Bed::start().await;
    for algorithm in Algorithm::ALL {
        let bytes = noise(41, 200_000);
        let digest = digest_of(algorithm, &bytes);
        let location = bed.begin("app", "").await;
        let put = bed.finish(&location, &digest, &bytes).await;
        assert_eq!((put.status, put.header("location")), (201, format!("/v2/app/blobs/{digest}")));
        assert_eq!(put.header("docker-content-digest"), digest.to_string());
        bed.assert_blob("app", &digest, &bytes).await;
    }
    assert_eq!(bed.uploads_left(), 0);
    bed.stop().await;
}

#[tokio::test]
async fn one_post() {
    let bed = Bed::start().await;
    for algorithm in Algorithm::ALL {
        for bytes in [noise(42, 200_000), Vec::new()] {
            let digest = digest_of(algorithm, &bytes);
            let path = format!("/v2/app/blobs/uploads/?digest={digest}");
            let post = bed.ask(Method::POST, &path, &[], bytes.clone()).await;
            assert_eq!((post.status, post.header("location")), (201, format!("/v2/app/blobs/{digest}")));
            bed.assert_blob("app", &digest, &bytes).await;
        }
    }
    assert_eq!(bed.uploads_left(), 0);
    bed.stop().await;
}

#[tokio::test]
async fn chunks_in_order() {
    let bed = Bed::start().await;
    for algorithm in Algorithm::ALL {
        let bytes = noise(43, 300_000);
        let digest = digest_of(algorithm, &bytes);
        for last_by_put in [false, true] {
            let mut location = bed.begin("app", "").await;
            for first in [0, 100_000] {
                let part = bed.patch(&location, first, &bytes[first..first + 100_000]).await;
                assert_eq!((part.status, part.header("range")), (202, format!("0-{}", first + 99_999)));
                location = part.header("location");
            }
            let put = match last_by_put {
                true => {
                    let path = format!("{location}?digest={digest}");
                    let range = [("content-range", "200000-299999")];
                    bed.ask(Method::PUT, &path, &range, bytes[200_000..].to_vec()).await
                }
                false => {
                    let part = bed.patch(&location, 200_000, &bytes[200_000..]).await;
                    bed.finish(&part.header("location"), &digest, b"").await
                }
            };
            assert_eq!((put.status, put.header("location")), (201, format!("/v2/app/blobs/{digest}")));
            bed.assert_blob("app", &digest, &bytes).await;
        }
    }
    bed.stop().await;
}

#[tokio::test]
async fn a_stream() {
    let bed = Bed::start().await;
    let bytes = noise(44, 500_000);
    let digest = Digest::of(&bytes);
    let location = bed.begin("app", "").await;
    // Neither length nor range, as docker sends layers while it packs them.
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = bytes.chunks(7_000).map(|c| Ok(c.to_vec())).collect();
    let patch = bed.ask(Method::PATCH, &location, &[], Body::wrap_stream(stream::iter(pieces))).await;
    assert_eq!((patch.status, patch.header("range")), (202, "0-499999".to_owned()));
    assert_eq!(bed.finish(&patch.header("location"), &digest, b"").await.status, 201);
    bed.assert_blob("app", &digest, &bytes).await;
    bed.stop().await;
}

#[tokio::test]
async fn chunks_out_of_order() {
    let bed = Bed::start().await;
    let bytes = noise(45, 3_000);
    let digest = Digest::of(&bytes);
    let location = bed.begin("app", "").await;
    for (first, at) in [(1_000, 0), (2_000, 1_000), (0, 2_000)] {
        let wrong = bed.patch(&location, first, &bytes[first..first + 1_000]).await;
        assert_eq!(wrong.header("location"), location);
        assert_eq!(wrong.refusal(), (416, "BLOB_UPLOAD_INVALID".to_owned()), "{first}");
        // A PUT that would end it is refused as well, and ends nothing.
        let path = format!("{location}?digest={digest}");
        let range = format!("{first}-{}", first + 999);
        let wrong = bed.ask(Method::PUT, &path, &[("content-range", &range)], vec![0; 1_000]).await;
        assert_eq!(wrong.status, 416);
        let status = bed.get(&location).await;
        assert_eq!((status.status, status.header("range")), (204, format!("0-{}", at.max(1) - 1)));
        assert_eq!(bed.patch(&location, at, &bytes[at..at + 1_000]).await.status, 202);
    }
    assert_eq!(bed.finish(&location, &digest, b"").await.status, 201);
    bed.assert_blob("app", &digest, &bytes).await;
    bed.stop().await;
}

#[tokio::test]
async fn the_status_of_an_upload() {
    let bed = Bed::start().await;
    let location = bed.begin("app", "").await;
    let status = bed.get(&location).await;
    assert_eq!((status.status, status.header("range")), (204, "0-0".to_owned()));
    assert_eq!(status.header("location"), location);
    bed.patch(&location, 0, b"0123456789").await;
    let status = bed.get(&location).await;
    assert_eq!((status.status, status.header("range")), (204, "0-9".to_owned()));
    // Another repository doesn't have it.
    let elsewhere = bed.get(&location.replace("/v2/app/", "/v2/other/")).await;
    assert_eq!(elsewhere.refusal(), (404, "BLOB_UPLOAD_UNKNOWN".to_owned()));
    bed.stop().await;
}

#[tokio::test]
async fn a_cancelled_upload_is_gone() {
    let bed = Bed::start().await;
    let location = bed.begin("app", "").await;
    bed.patch(&location, 0, b"0123456789").await;
    assert_eq!(bed.delete(&location).await.status, 204);
    let digest = Digest::of(b"0123456789");
    for answer in [
        bed.get(&location).await,
        bed.delete(&location).await,
        bed.patch(&location, 0, b"0").await,
        bed.finish(&location, &digest, b"").await,
    ] {
        assert_eq!(answer.refusal(), (404, "BLOB_UPLOAD_UNKNOWN".to_owned()));
    }
    assert_eq!((bed.uploads_left(), bed.head(&format!("/v2/app/blobs/{digest}")).await.status), (0, 404));
    bed.stop().await;
}

#[tokio::test]
async fn lengths_of_chunks() {
    let bed = Bed::start().await;
    let begun = bed.ask(Method::POST, "/v2/app/blobs/uploads/", &[], "").await;
    assert_eq!(begun.header("oci-chunk-min-length"), "1");
    assert_eq!(begun.header("oci-chunk-max-length"), "500000000");
    // Only the declared range counts: the body is refused before it is read.
    let location = begun.header("location");
    let range = [("content-range", "0-500000000")];
    let long = bed.ask(Method::PATCH, &location, &range, "short").await;
    assert_eq!(long.header("oci-chunk-max-length"), "500000000");
    assert_eq!(long.refusal(), (413, "SIZE_INVALID".to_owned()));
    assert_eq!(bed.patch(&location, 0, b"0").await.status, 202);
    bed.stop().await;
}

#[tokio::test]
async fn mounts() {
    let bed = Bed::start().await;
    for algorithm in Algorithm::ALL {
        let digest = digest_of(algorithm, b"content");
        let location = bed.begin("one", "").await;
        bed.finish(&location, &digest, b"content").await;
        let path = format!("/v2/two/{algorithm}/blobs/uploads/?mount={digest}&from=one");
        let mounted = bed.ask(Method::POST, &path, &[], "").await;
        let place = format!("/v2/two/{algorithm}/blobs/{digest}");
        assert_eq!((mounted.status, mounted.header("location")), (201, place));
        assert_eq!(mounted.header("docker-content-digest"), digest.to_string());
        bed.assert_blob(&format!("two/{algorithm}"), &digest, b"content").await;
    }
    bed.stop().await;
}

#[tokio::test]
async fn mounts_without_a_source() {
    let bed = Bed::start().await;
    let digest = bed.registry.put_blob("one", b"content").await;
    let path = format!("/v2/two/blobs/uploads/?mount={digest}");
    assert_eq!(bed.ask(Method::POST, &path, &[], "").await.status, 201);
    bed.assert_blob("two", &digest, b"content").await;
    bed.stop().await;
}

#[tokio::test]
async fn a_mount_of_absent_content_begins_an_upload() {
    let bed = Bed::start().await;
    bed.registry.put_blob("one", b"other").await;
    for from in ["&from=one", "&from=none", ""] {
        let bytes = format!("content{from}").into_bytes();
        let digest = Digest::of(&bytes);
        let location = bed.begin("two", &format!("?mount={digest}{from}")).await;
        assert_eq!(bed.head(&format!("/v2/two/blobs/{digest}")).await.status, 404);
        assert_eq!(bed.finish(&location, &digest, &bytes).await.status, 201, "{from}");
        bed.assert_blob("two", &digest, &bytes).await;
    }
    bed.stop().await;
}

#[tokio::test]
async fn an_upload_names_its_algorithm() {
    let bed = Bed::start().await;
    let bytes = noise(46, 100_000);
    for (query, algorithm) in [
        ("?digest-algorithm=sha512", Algorithm::Sha512),
        ("?digest-algorithm=sha256", Algorithm::Sha256),
        // A client that thinks better of it is taken at its digest.
        ("?digest-algorithm=sha512", Algorithm::Sha256),
    ] {
        let location = bed.begin("app", query).await;
        bed.patch(&location, 0, &bytes[..60_000]).await;
        let digest = digest_of(algorithm, &bytes);
        assert_eq!(bed.finish(&location, &digest, &bytes[60_000..]).await.status, 201, "{query}");
        bed.assert_blob("app", &digest, &bytes).await;
    }
    bed.stop().await;
}

#[tokio::test]
async fn unknown_algorithms_are_refused() {
    let bed = Bed::start().await;
    let md5 = "md5:d41d8cd98f00b204e9800998ecf8427e";
    for query in
        ["?digest-algorithm=md5".to_owned(), format!("?digest={md5}"), format!("?mount={md5}&from=one")]
    {
        let answer = bed.ask(Method::POST, &format!("/v2/app/blobs/uploads/{query}"), &[], "").await;
        assert_eq!(answer.refusal(), (400, "DIGEST_INVALID".to_owned()), "{query}");
    }
    let location = bed.begin("app", "").await;
    let put = bed.ask(Method::PUT, &format!("{location}?digest={md5}"), &[], "x").await;
    assert_eq!(put.refusal(), (400, "DIGEST_INVALID".to_owned()));
    assert_eq!(bed.get(&format!("/v2/app/blobs/{md5}")).await.refusal().0, 400);
    bed.stop().await;
}

#[tokio::test]
async fn wrong_digests_are_refused() {
    let bed = Bed::start().await;
    for algorithm in Algorithm::ALL {
        let (bytes, digest) = (noise(47, 3_000), digest_of(algorithm, b"other"));
        let refused = (400, "DIGEST_INVALID".to_owned());
        let path = format!("/v2/app/blobs/uploads/?digest={digest}");
        assert_eq!(bed.ask(Method::POST, &path, &[], bytes.clone()).await.refusal(), refused);
        let location = bed.begin("app", "").await;
        assert_eq!(bed.finish(&location, &digest, &bytes).await.refusal(), refused);
        let location = bed.begin("app", "").await;
        bed.patch(&location, 0, &bytes[..1_000]).await;
        assert_eq!(bed.finish(&location, &digest, &bytes[1_000..]).await.refusal(), refused);
        let location = bed.begin("app", "").await;
        bed.ask(Method::PATCH, &location, &[], bytes.clone()).await;
        assert_eq!(bed.finish(&location, &digest, b"").await.refusal(), refused);
        for digest in [digest, digest_of(algorithm, &bytes)] {
            assert_eq!(bed.head(&format!("/v2/app/blobs/{digest}")).await.status, 404);
        }
    }
    assert_eq!(bed.uploads_left(), 0);
    bed.stop().await;
}

#[tokio::test]
async fn lengths_that_disagree() {
    let bed = Bed::start().await;
    let location = bed.begin("app", "").await;
    for (range, code) in [
        ("0-9", "SIZE_INVALID"),
        ("0-1", "SIZE_INVALID"),
        ("5-1", "BLOB_UPLOAD_INVALID"),
        ("x-y", "BLOB_UPLOAD_INVALID"),
        ("0-18446744073709551615", "BLOB_UPLOAD_INVALID"),
    ] {
        let answer = bed.ask(Method::PATCH, &location, &[("content-range", range)], "12345").await;
        assert_eq!(answer.refusal(), (400, code.to_owned()), "{range}");
    }
    // Nothing of it stayed.
    assert_eq!(bed.finish(&location, &Digest::of(b""), b"").await.status, 201);
    bed.stop().await;
}
