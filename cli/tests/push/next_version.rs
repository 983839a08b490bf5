//! Kills the pusher with SIGKILL while the registry copies what it has, and pushes again: it goes on where the registry is.

use std::{
    process::Stdio,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyplace_images::Reference;
use anyplace_seed::Seed;
use serde_json::Value;

use crate::{
    bed::{Registry, runtime, tree},
    proxy::{Fault, Proxy},
    runner::{Home, ran},
};

/// Size of the file that makes most of the image, and of what changes in it at three places.
const FILE_BYTES: usize = 12_000_000;
const RUN_BYTES: usize = 1_000;
/// Versions that are pushed at least, and at most until kills have hit what is to be tested; kills of each at most.
const VERSIONS: std::ops::Range<u32> = 4..30;
const KILLS_MAX: u64 = 3;
/// When a push that neither ends nor sends is a failure.
const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn a_killed_push_goes_on_in_the_middle_of_what_is_copied() {
    let mut seed = Seed::from_env();
    let (registry, home) = (Registry::start(), Home::new());
    let root = home.path().join("tree");
    tree(&root, &mut seed, FILE_BYTES);
    let path = root.to_str().unwrap().to_owned();
    let push = |url: &str, name: &str| {
        let mut command = registry.command(&home, url, &["push", &path, name, "-o", "json"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    ran(push(&registry.url(), "app:v0").output().unwrap()).ok();
    let (mut version, mut killed, mut went_on, mut copied) = (0, 0, 0, 0);
    while version < VERSIONS.start || went_on == 0 || copied == 0 {
        version += 1;
        assert!(version < VERSIONS.end, "no kill hit an upload: {killed} {went_on} {copied}");
        let mut large = std::fs::read(root.join("bin/data")).unwrap();
        for third in 0..3 {
            let at = third * FILE_BYTES / 3 + seed.index(FILE_BYTES / 3 - RUN_BYTES);
            large[at..at + RUN_BYTES].copy_from_slice(&seed.bytes(RUN_BYTES));
        }
        std::fs::write(root.join("bin/data"), large).unwrap();
        let name = format!("app:v{version}");
        // About 4 MB/s, so that there is time to kill it.
        let slow = |_: &mut Seed| Fault::Slow(Duration::from_millis(4));
        let proxy = Proxy::start(&registry.host, seed.fork(), Box::new(slow));
        let mut kills = KILLS_MAX;
        let summary: Value = loop {
            let before = proxy.counts.up.load(Ordering::Relaxed);
            let point = before + seed.below(2_000_000);
            let (mut child, begun) = (push(&proxy.url, &name).spawn().unwrap(), Instant::now());
            let finished = loop {
                if child.try_wait().unwrap().is_some() {
                    break true;
                }
                if kills > 0 && proxy.counts.up.load(Ordering::Relaxed) >= point {
                    break false;
                }
                assert!(begun.elapsed() < DEADLINE, "the push neither ends nor sends");
                std::thread::sleep(Duration::from_millis(2));
            };
            if finished {
                let done = ran(child.wait_with_output().unwrap());
                assert_eq!(done.code, 0, "{done:?}");
                break serde_json::from_str(&done.out).unwrap();
            }
            child.kill().unwrap();
            child.wait().unwrap();
            (kills, killed) = (kills - 1, killed + 1);
            // What was on the way still arrives.
            std::thread::sleep(Duration::from_millis(30));
        };
        let number = |name: &str| summary[name].as_u64().unwrap();
        let (sent, there, packed) =
            (number("bytes_sent"), number("bytes_deduplicated"), number("bytes_packed"));
        // What an earlier push had done is neither sent nor copied again.
        went_on += u64::from(sent + there < packed);
        copied += there;
        assert!(sent < packed / 2, "{summary}");
        let (client, reference): (_, Reference) = (registry.client(), name.parse().unwrap());
        runtime().block_on(async {
            let manifest = client.get_manifest(&reference).await.unwrap();
            let manifest: Value = serde_json::from_slice(&manifest.bytes).unwrap();
            let digest = manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
            client.get_blob(&reference, &digest, None).await.unwrap().read(FILE_BYTES * 2).await.unwrap();
        });
    }
    eprintln!("{killed} killed, {went_on} pushes went on where another ended, {copied} bytes copied");
}
