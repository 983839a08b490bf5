//! What `cargo xtask bench images --only prewarm` runs: a live pull, or none, beside prewarming, or none, in one store
//! as a machine has it.
//!
//! `prewarm-bench REGISTRY CREDENTIALS STORE RATE PREWARM LIVE`, with `-` for what there is none of. It writes `ready`
//! when prewarming's first bytes are there, then pulls the live image and prints `{"seconds": ..., "prewarmed": bytes}`.
//! Without a live image it goes on prewarming until its input ends.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyplace_images::{
    Client, Credentials, Item, NoProgress, Options, Progress, PullClass, PullOptions, Reference, Store,
};

/// Counts bytes.
#[derive(Default)]
struct Count(AtomicU64);

impl Progress for Count {
    fn started(&self, _: &Item, _: u64) {}
    fn advanced(&self, _: &Item, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
    fn finished(&self, _: &Item) {}
    fn skipped(&self, _: &Item, _: u64) {}
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [registry, credentials, folder, rate, prewarm, live] = &args[..] else {
        return Err("expected REGISTRY CREDENTIALS STORE RATE PREWARM LIVE".into());
    };
    let named = |text: &str| (text != "-").then(|| text.to_owned());
    let client = Client::new(registry, Some(Credentials::from_file(Path::new(credentials))?))?;
    let prewarm_bytes_per_s = named(rate).map(|rate| rate.parse()).transpose()?;
    let store = Store::open(Path::new(folder), Options { budget_bytes: None, prewarm_bytes_per_s })?;
    let count = Arc::new(Count::default());
    let prewarming = match named(prewarm) {
        None => None,
        Some(image) => {
            let (store, client, image) = (store.clone(), client.clone(), image.parse::<Reference>()?);
            let options = PullOptions { progress: count.clone(), class: PullClass::Prewarm };
            Some(tokio::spawn(async move { store.pull(&image, &client, &options).await }))
        }
    };
    while let Some(task) = prewarming.as_ref().filter(|_| count.0.load(Ordering::Relaxed) == 0) {
        if task.is_finished() {
            return Err("prewarming ended before its first byte".into());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("ready");
    let (before, begun) = (count.0.load(Ordering::Relaxed), Instant::now());
    match named(live) {
        Some(image) => {
            let options = PullOptions { progress: NoProgress::shared(), class: PullClass::Live };
            store.pull(&image.parse()?, &client, &options).await?;
        }
        None => drop(std::io::stdin().read_to_end(&mut Vec::new())?),
    }
    let (seconds, prewarmed) = (begun.elapsed().as_secs_f64(), count.0.load(Ordering::Relaxed) - before);
    if let Some(task) = prewarming {
        // Else the rest of the live pull was alone.
        if task.is_finished() {
            return Err(format!("prewarming ended first: {:?}", task.await?.map(|_| ())).into());
        }
        task.abort();
    }
    println!("{}", serde_json::json!({ "seconds": seconds, "prewarmed": prewarmed }));
    Ok(())
}
