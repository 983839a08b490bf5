//! Kills at any point: what is listed afterwards is whole, and the next pull completes.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyplace_seed::rounds;

use super::super::testing::{Bed, Format, Member, Seed, archive};
use super::*;

/// Processes that are killed in the middle, usually and in a whole campaign.
const KILLS: (usize, usize) = (120, 1_000);
/// Says to the child what to do: folder and registry.
const STORE: &str = "ANYPLACE_TEST_STORE";
const REGISTRY: &str = "ANYPLACE_TEST_REGISTRY";

/// Not a test by itself: the process that is killed.
#[test]
fn child() {
    let (Some(dir), Ok(registry)) = (std::env::var_os(STORE), std::env::var(REGISTRY)) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let client = Client::new(&registry, None).unwrap();
        let store = Store::open(dir.as_ref(), Options::default()).unwrap();
        for round in 0.. {
            for tag in ["a", "b", "c"] {
                let reference = format!("app:{tag}").parse().unwrap();
                store.pull(&reference, &client, &PullOptions::default()).await.unwrap();
                if round % 2 == 0 {
                    store.settle().await.unwrap();
                }
                if round > 0 {
                    let of = store.clone();
                    let _ = tokio::task::spawn_blocking(move || of.remove(&reference)).await.unwrap();
                }
            }
        }
    });
}

#[test]
fn a_killed_process_leaves_nothing_that_is_wrong() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let shared = Member::file("shared", &seed.bytes(1_500_000));
    for (tag, format) in [("a", Format::Chunked), ("b", Format::Gzip), ("c", Format::Chunked)] {
        let mut layer: Vec<_> =
            (0..60).map(|at| Member::file(&format!("f{at}"), &seed.bytes(10_000))).collect();
        layer.push(shared.clone());
        bed.server.put_image(tag, &[(archive(&layer), format)]);
    }
    let (mut listed, kills) = (0, rounds(KILLS.0, KILLS.1));
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::kills::child", "--nocapture"])
            .env(STORE, bed.store_dir())
            .env(REGISTRY, bed.server.url())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(seed.next() % 400_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let store = bed.open();
        let report = store.verify().unwrap();
        assert!(report.damaged.is_empty() && report.dropped.is_empty(), "kill {kill}: {report:?}");
        listed += report.images;
        for image in store.list().unwrap() {
            assert!(store.find(&image.reference).unwrap().is_some(), "kill {kill}");
        }
        if kill % 10 == 9 {
            for tag in ["a", "b", "c"] {
                bed.pull(&store, tag).unwrap();
            }
            store.collect().unwrap();
            bed.assert_tidy(&store);
        }
    }
    eprintln!("{listed} images were listed after {kills} kills");
}
