//! Kills the pusher with SIGKILL at seeded points, and pushes again until it gets through.

use std::{
    path::Path,
    process::Stdio,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyplace_images::{Digest, Reference};
use anyplace_seed::{Seed, rounds};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::Value;

use crate::{
    bed::{Registry, tree},
    proxy::{Fault, Proxy},
    runner::{Home, ran},
    sources::archive,
};

/// How many pushes are killed, usually and in a whole campaign.
const KILLS: (usize, usize) = (80, 1_000);
/// Every so many images are packed again by each push; the others are sent as they are, which leaves more time to kill.
const PACKED_EVERY: u64 = 6;
/// Size of the file that makes most of each image.
const FILE_BYTES: usize = 6_000_000;
/// The registry acknowledges what it received; a part of what was on the way when the pusher died isn't.
const DEADLINE: Duration = Duration::from_secs(60);

/// How many bytes the registry has of the uploads that the journal knows.
fn acknowledged(registry: &Registry, state: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(state.join("anyplace/uploads")) else { return 0 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut all = 0;
    for entry in entries {
        let Ok(record) = serde_json::from_slice::<Value>(&std::fs::read(entry.unwrap().path()).unwrap())
        else {
            continue;
        };
        let Some(location) = record["location"].as_str() else { continue };
        let path = location.split_once("/v2/").unwrap().1;
        all += runtime.block_on(status(registry, path));
    }
    all
}

/// What the upload has, by a request that shares no code with the client.
async fn status(registry: &Registry, path: &str) -> u64 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut connection = tokio::net::TcpStream::connect(&registry.host).await.unwrap();
    let login = BASE64_STANDARD.encode(registry.login());
    let request = format!(
        "GET /v2/{path} HTTP/1.1\r\nhost: x\r\nauthorization: Basic {login}\r\nconnection: close\r\n\r\n"
    );
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    let range =
        answer.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("range: ").map(str::to_owned));
    range.map_or(0, |range| range.trim().rsplit('-').next().unwrap().parse::<u64>().unwrap() + 1)
}

/// An archive of one layer, as `docker save` writes it.
fn docker_archive(dir: &Path, root: &Path, to: &Path) {
    std::fs::create_dir(dir).unwrap();
    let layer = archive(root);
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer)] },
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("layer.tar"), layer).unwrap();
    std::fs::write(dir.join("manifest.json"), r#"[{"Config":"config.json","Layers":["layer.tar"]}]"#)
        .unwrap();
    std::fs::write(to, archive(dir)).unwrap();
}

#[test]
fn a_killed_push_goes_on_at_the_acknowledged_offset() {
    let mut seed = Seed::from_env();
    let (registry, home) = (Registry::start(), Home::new());
    let temporary = home.path().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let (mut killed, mut image, mut went_on) = (0, 0, 0);
    let kills = rounds(KILLS.0, KILLS.1);
    while killed < kills {
        image += 1;
        let root = home.path().join(format!("tree-{image}"));
        tree(&root, &mut seed, FILE_BYTES);
        let reference = format!("app:v{image}");
        let mut args = vec!["push", "-o", "json", &reference];
        let archive = home.path().join(format!("docker-{image}.tar"));
        if image % PACKED_EVERY == 1 {
            args.insert(1, root.to_str().unwrap());
        } else {
            docker_archive(&home.path().join(format!("docker-{image}")), &root, &archive);
            args.splice(1..1, [archive.to_str().unwrap(), "--keep-layers"]);
        }
        // So slow that there is time to kill it: about 20 MB/s.
        let slow = |_: &mut Seed| Fault::Slow(Duration::from_micros(800));
        let proxy = Proxy::start(&registry.host, seed.clone(), Box::new(slow));
        loop {
            let known = acknowledged(&registry, home.path());
            let mut command = registry.command(&home, &proxy.url, &args);
            command.env("TMPDIR", &temporary).stdout(Stdio::piped()).stderr(Stdio::piped());
            let before = proxy.counts.up.load(Ordering::Relaxed);
            let mut child = command.spawn().unwrap();
            // At any point: before the first byte, in the middle, or after the last. Several kills for most images.
            let point = before + seed.below(FILE_BYTES as u64 / 3);
            let begun = Instant::now();
            let finished = loop {
                if child.try_wait().unwrap().is_some() {
                    break true;
                }
                if killed < kills && proxy.counts.up.load(Ordering::Relaxed) >= point {
                    break false;
                }
                assert!(begun.elapsed() < DEADLINE, "the push neither ends nor sends");
                std::thread::sleep(Duration::from_millis(2));
            };
            if !finished {
                child.kill().unwrap();
                child.wait().unwrap();
                killed += 1;
                // What was on the way still arrives.
                std::thread::sleep(Duration::from_millis(30));
                continue;
            }
            let done = ran(child.wait_with_output().unwrap());
            assert_eq!(done.code, 0, "{done:?}");
            let summary: Value = serde_json::from_str(&done.out).unwrap();
            let number = |name: &str| summary[name].as_u64().unwrap();
            let (sent, packed) = (number("bytes_sent"), number("bytes_packed"));
            assert!(
                sent + known <= packed || sent == 0,
                "{sent} bytes sent of {packed}, although {known} were acknowledged"
            );
            went_on += u64::from(known > 0);
            break;
        }
        let client = registry.client();
        let reference: Reference = reference.parse().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let manifest = client.get_manifest(&reference).await.unwrap();
            let manifest: Value = serde_json::from_slice(&manifest.bytes).unwrap();
            for layer in manifest["layers"].as_array().unwrap() {
                let digest = layer["digest"].as_str().unwrap().parse().unwrap();
                let blob = client.get_blob(&reference, &digest, layer["size"].as_u64()).await.unwrap();
                blob.read(FILE_BYTES * 2).await.unwrap();
            }
        });
        if image > 1 {
            std::fs::remove_dir_all(&root).unwrap();
            let _ = std::fs::remove_dir_all(home.path().join(format!("docker-{image}")));
            let _ = std::fs::remove_file(&archive);
        }
    }
    eprintln!("{killed} killed, {image} images, {went_on} pushes went on where another ended");
    assert!(went_on > 0, "no kill hit an upload");
    assert_eq!(
        std::fs::read_dir(home.path().join("anyplace/uploads")).unwrap().count(),
        0,
        "a journal is left"
    );

    // What the killed ones left in the temporary folder goes with the next push, once it is a minute old.
    let left =
        || std::fs::read_dir(&temporary).unwrap().flatten().map(|entry| entry.path()).collect::<Vec<_>>();
    assert!(!left().is_empty());
    for dir in left() {
        let old = std::time::SystemTime::now() - Duration::from_secs(3_600);
        std::fs::File::open(dir).unwrap().set_modified(old).unwrap();
    }
    let root = home.path().join("tree-1");
    let mut command = registry.command(&home, &registry.url(), &["push", root.to_str().unwrap(), "app:v1"]);
    let done = ran(command.env("TMPDIR", &temporary).output().unwrap());
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(left(), Vec::<std::path::PathBuf>::new());
}
