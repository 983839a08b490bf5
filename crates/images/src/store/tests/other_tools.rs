//! What others make and do: a layer that skopeo wrote, and a registry that keeps its blobs elsewhere.

use std::process::{Command, Stdio};

use super::super::testing::{Bed, Format, Member, Seed, Server, archive};
use super::*;
use crate::client::Credentials;
use crate::manifest::Descriptor;
use crate::tree::testing::{View, seen};

/// What is in it says `other_tools.rs` of the crate that it lies in.
const SKOPEO: &[u8] = include_bytes!("../../../../zstd-chunked/tests/fixtures/skopeo-1.18.blob");
const SKOPEO_ANNOTATIONS: &str = include_str!("../../../../zstd-chunked/tests/fixtures/skopeo-1.18.json");
const SKOPEO_DIFF_ID: &str = "sha256:774621357e87f23b0031e76616102124bd33b29d1992a691163e1f935703d01a";
/// Its two large files, one with runs of zeros.
const LARGE_BYTES: u64 = 90_000 + 115_000;

/// Stores skopeo's layer as an image, and returns what zstd and GNU tar make of it.
fn put_skopeo(bed: &Bed) -> View {
    let described = bed.server.put_blob("application/vnd.oci.image.layer.v1.tar+zstd", SKOPEO.to_vec());
    let annotations = Some(serde_json::from_str(SKOPEO_ANNOTATIONS).unwrap());
    let layer = Descriptor { annotations, ..described };
    bed.server.put_manifest("skopeo", vec![layer], vec![SKOPEO_DIFF_ID.parse().unwrap()]);
    let at = bed.dir.path().join("oracle");
    std::fs::create_dir(&at).unwrap();
    let mut tar = Command::new("tar")
        .args(["--extract", "--zstd", "--preserve-permissions", "--same-owner", "--numeric-owner"])
        .args(["--xattrs", "--xattrs-include=*", "--file=-", "--directory"])
        .arg(&at)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(SKOPEO).unwrap();
    assert!(tar.wait().unwrap().success());
    seen(&at)
}

/// An image of ours with skopeo's two large files and one of its own.
fn put_sharing(bed: &Bed, seed: &mut Seed) -> Vec<Member> {
    let mut layer = vec![Member::file("own", &seed.bytes(50_000))];
    for name in ["noise", "zeros.img"] {
        let contents = std::fs::read(bed.dir.path().join("oracle").join(name)).unwrap();
        layer.push(Member::file(&format!("elsewhere-{name}"), &contents));
    }
    bed.server.put_image("ours", &[(archive(&layer), Format::Chunked)]);
    layer
}

#[test]
fn a_layer_that_skopeo_wrote_is_pulled_in_parts_and_shares_its_files() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let expected = put_skopeo(&bed);
    let ours = put_sharing(&bed, &mut seed);
    for order in [["skopeo", "ours"], ["ours", "skopeo"]] {
        let store = bed.open();
        for (nth, tag) in order.into_iter().enumerate() {
            let before = bed.server.sent();
            let image = bed.pull(&store, tag).unwrap();
            let stats = image.stats;
            // The configuration, which is no layer's, takes less than 1,000 bytes.
            let sent = bed.server.sent() - before;
            assert!(
                (stats.bytes_fetched..stats.bytes_fetched + 1_000).contains(&sent),
                "{tag}: {sent}, {stats:?}"
            );
            match (nth, tag) {
                (0, _) => {
                    assert_eq!(stats.bytes_reused, 0, "{tag}: {stats:?}");
                    assert!(stats.bytes_fetched * 10 > stats.layer_bytes * 9, "{tag}: {stats:?}");
                }
                // Tables, and a tool of 1,290 bytes.
                (_, "skopeo") => assert!(stats.bytes_fetched < 5_000, "{stats:?}"),
                (_, _) => assert!(stats.bytes_fetched < 55_000, "{stats:?}"),
            }
            assert!(nth == 0 || stats.bytes_reused == LARGE_BYTES, "{tag}: {stats:?}");
            if tag == "ours" {
                for member in &ours {
                    let found = bed.mounted(&image, |at| std::fs::read(at.join(&member.name)).unwrap());
                    assert_eq!(found, member.contents, "{}", member.name);
                }
                continue;
            }
            let found = bed.mounted(&image, seen);
            for (path, node) in &expected {
                // Folders that the archive doesn't name: tar gives them its own mode, and the time of now.
                let is_named = node.what != "folder" || path == b"bin";
                assert!(!is_named || found.get(path) == Some(node), "{}", String::from_utf8_lossy(path));
            }
            assert_eq!(found.len(), expected.len());
        }
        bed.assert_tidy(&store);
        for tag in order {
            store.remove(&format!("app:{tag}").parse().unwrap()).unwrap();
        }
    }
}

#[test]
fn blobs_may_be_elsewhere_which_learns_no_password() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let elsewhere = Server::start_at("127.0.0.2:0");
    let large = seed.bytes(200_000);
    let mut put = |tag: &str, large: &[u8], format| {
        let files = [Member::file("large", large), Member::file("small", &seed.bytes(3_000))];
        bed.server.put_image(tag, &[(archive(&files), format)]);
    };
    put("v1", &large, Format::Chunked);
    put("v2", &large, Format::Chunked);
    put("whole", &large, Format::Gzip);
    bed.server.redirect_blobs(&elsewhere);
    let credentials = Credentials { user: "machine".to_owned(), password: "secret".to_owned() };
    let client = Client::new(bed.server.url(), Some(credentials)).unwrap();
    let store = bed.open();
    for tag in ["v1", "v2", "whole"] {
        let before = elsewhere.sent();
        let image = bed.pull_with(&store, tag, &client).unwrap();
        assert_eq!(bed.mounted(&image, |at| std::fs::read(at.join("large")).unwrap()), large);
        let sent = elsewhere.sent() - before;
        assert!(sent < image.stats.bytes_fetched + 1_000, "{tag}: {sent}, {:?}", image.stats);
        // Ranges get there too: what is here already is not sent again.
        assert!((sent < 20_000) == (tag == "v2"), "{tag}: {sent} of {:?}", image.stats);
    }
    assert!(elsewhere.requests() > 0 && bed.server.sent() == 0);
    assert!(bed.server.authorized() > 0, "the registry wants to know who asks");
    assert_eq!(elsewhere.authorized(), 0, "the password went to another host");
}

#[test]
fn the_next_registry_is_asked_where_one_is_away_and_only_then() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let (first, last) = (Server::start(), Server::start());
    let layer = [Member::file("a", &seed.bytes(50_000))];
    for server in [&bed.server, &last] {
        server.put_image("v1", &[(archive(&layer), Format::Chunked)]);
    }
    last.put_image("v2", &[(archive(&layer), Format::Gzip)]);
    let url = first.url().to_owned();
    drop(first);
    let client = Client::new(&url, None).unwrap().or(bed.server.client()).or(last.client());
    let client = client.with_patience(crate::client::Patience::NONE);
    let store = bed.open();
    drop(bed.pull_with(&store, "v1", &client).unwrap());
    assert!(bed.server.requests() > 0 && last.requests() == 0);
    // The second answers that it has no such image, which is an answer.
    let error = bed.pull_with(&store, "v2", &client).unwrap_err();
    assert!(error.is_not_found(), "{error:?}");
    // A reference that says where goes there alone.
    let name = format!("{}/app:v2", url.trim_start_matches("http://"));
    let elsewhere =
        bed.runtime.block_on(store.pull(&name.parse().unwrap(), &client, &PullOptions::default()));
    assert!(elsewhere.as_ref().is_err_and(Error::is_unreachable), "{elsewhere:?}");
    drop(last);
    drop(bed.pull_with(&store, "v1", &client).unwrap());
}
