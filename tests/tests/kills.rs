//! A platform killed with -9 at any point of its life leaves nothing behind after the next start. Needs root.

#![allow(clippy::unwrap_used)] // Helpers of tests; clippy spares only functions marked as tests.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyplace_seed::Seed;
use anyplace_tests::{cleanup, leftovers, require_root};

const BED: &str = "tfifty";
const TO_BE_KILLED: &str = env!("CARGO_BIN_EXE_anyplace-to-be-killed");
const SPEC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/hello.yaml");
/// As promised to users.
const STARTS: u64 = 50;
/// Long enough for containers to run in most lives; the next start's clean-up is at the start of each.
const LONGEST_LIFE: Duration = Duration::from_millis(4_000);

#[test]
fn fifty_starts_killed_at_random_points_leave_nothing() {
    if !require_root("kill -9 of the platform") {
        return;
    }
    let mut seed = Seed::from_env();
    let mut dirty = 0;
    for start in 0..STARTS {
        let life = Duration::from_micros(seed.below(LONGEST_LIFE.as_micros() as u64));
        // It begins with the clean-up of the one before.
        let mut child = Command::new(TO_BE_KILLED)
            .args(["platform", BED, SPEC])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + life;
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
            if let Some(status) = child.try_wait().unwrap() {
                panic!(
                    "start {start} ended by itself ({status}); run `{TO_BE_KILLED} platform {BED} {SPEC}` to see why"
                );
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        dirty += usize::from(!leftovers(BED).is_empty());
    }
    assert!(dirty as u64 > STARTS / 2, "only {dirty} of {STARTS} kills hit a platform that was there");
    cleanup(BED).unwrap();
    assert_eq!(leftovers(BED), Vec::<String>::new());
}
