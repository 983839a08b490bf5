//! Measures a fleet as a whole, on loopback, for `cargo xtask bench`: real are the global scheduler (a process of its own) and
//! the location schedulers (in this one), each with its store, its tokens and its HTTP; simulated are the machines, each of
//! which reports its instances and follows what it should have.
//!
//! ```text
//! fleet-bench dissemination ANYPLACE FOLDER          how a change of health reaches the routers of 330 locations
//! fleet-bench placements ANYPLACE FOLDER [ETCD]      how many instances get their machine in a second; ETCD is an endpoint
//! ```
//!
//! ANYPLACE is the binary, FOLDER an empty folder. Each result is a line of JSON: `{"figure": ..., "value": ...}`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench's panic is its report")]

mod dissemination;
mod fleet;
mod machine;
mod placements;
mod router;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::json;

/// Longest that anything may take before the bench gives up.
const PATIENCE: Duration = Duration::from_secs(180);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    anyplace_service::install_crypto_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    match words[..] {
        ["dissemination", anyplace, folder] => {
            runtime.block_on(dissemination::measure(PathBuf::from(anyplace), PathBuf::from(folder)));
        }
        ["placements", anyplace, folder] => {
            runtime.block_on(placements::measure(PathBuf::from(anyplace), PathBuf::from(folder), None));
        }
        ["placements", anyplace, folder, etcd] => {
            runtime.block_on(placements::measure(PathBuf::from(anyplace), PathBuf::from(folder), Some(etcd)));
        }
        _ => panic!("expected a measurement, the binary `anyplace` and an empty folder"),
    }
    runtime.shutdown_timeout(Duration::from_secs(5));
}

/// Prints a result.
fn report(figure: &str, value: f64) {
    println!("{}", json!({ "figure": figure, "value": value }));
}

/// Waits until something is so.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
