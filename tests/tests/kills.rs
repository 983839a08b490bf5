//! A platform killed with -9 at any point of its life leaves nothing behind after the next start. Needs root.

#![allow(clippy::unwrap_used)] // Helpers of tests; clippy spares only functions marked as tests.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyplace_tests::{
    HELLO_ENTRY, Platform, Testbed, Topology, cleanup, leftovers, platform, require_root, write_hello_image,
};

const BED: &str = "tfifty";
/// As promised to users.
const STARTS: u64 = 50;
/// Long enough for containers to run in most lives; the next start's clean-up is at the start of each.
const LONGEST_LIFE: Duration = Duration::from_millis(4_000);

/// Not a test: a start that is killed by the test below. It begins with the clean-up of the one before.
#[test]
#[ignore = "run by fifty_starts_killed_at_random_points_leave_nothing"]
fn start_and_wait() {
    let bed = Testbed::create(BED, &Topology::of_locations(2)).unwrap();
    let rootfs = bed.state_dir().join("image");
    write_hello_image(&rootfs).unwrap();
    let platform = Platform::start(bed, platform::Options::default()).unwrap();
    let folder = rootfs.to_string_lossy().into_owned();
    platform.cli_output(["push", &folder, "hello:v1", "--entrypoint", HELLO_ENTRY]).unwrap();
    let spec = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/hello.yaml");
    platform.cli_output(["apply", "-f", spec, "--wait"]).unwrap();
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn fifty_starts_killed_at_random_points_leave_nothing() {
    if !require_root("kill -9 of the platform") {
        return;
    }
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = std::env::var("ANYPLACE_SEED").map_or(clock.as_nanos() as u64, |text| text.parse().unwrap());
    eprintln!("seed {seed}; the same again: ANYPLACE_SEED={seed}");
    let mut random = seed;
    let mut dirty = 0;
    for start in 0..STARTS {
        // SplitMix64's step and mix.
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let life = Duration::from_micros((mixed ^ (mixed >> 31)) % LONGEST_LIFE.as_micros() as u64);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "start_and_wait", "--ignored"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + life;
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
            if let Some(status) = child.try_wait().unwrap() {
                panic!("start {start} ended by itself ({status}); run start_and_wait alone to see why");
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        dirty += usize::from(!leftovers(BED).is_empty());
    }
    assert!(dirty as u64 > STARTS / 2, "only {dirty} of {STARTS} kills hit a platform that was there");
    cleanup(BED).unwrap();
    assert_eq!(leftovers(BED), Vec::<String>::new(), "seed {seed}");
}
