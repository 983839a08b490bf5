//! Pushes and pulls over a network that drops, resets, slows and lies.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use anyplace_images::{
    BlobFile, Client, Digest, ImageSpec, Item, NoProgress, PackedImage, Patience, PushOptions, RawManifest,
    Reference, Source, Stage, pack, push_with,
};
use anyplace_seed::{Seed, rounds};

use crate::{
    bed::{Registry, runtime, tree},
    proxy::{Fault, Proxy},
    runner::{Home, ran},
};

/// Pushes and pulls through a failing network.
const ROUNDS: u64 = 12;
/// Flipped bytes on the wire, half of them on the way up, usually and in a whole campaign.
const FLIPS: (usize, usize) = (400, 10_000);
/// Size of the blobs in which they are.
const FLIPPED_BYTES: usize = 4_000;
/// A length that grew by the flip makes one side wait for the rest; that it waits is as good as a refusal here.
const PATIENCE: Duration = Duration::from_secs(1);
/// Size of the file that makes most of the image.
const FILE_BYTES: usize = 3_000_000;

fn source(root: &std::path::Path) -> Source {
    Source::Directory { root: root.to_owned(), spec: ImageSpec::default() }
}

/// Everything that the registry has of an image, through `client`, and some of it by range.
async fn pull(client: &Client, reference: &Reference, image: &PackedImage) -> anyplace_images::Result<()> {
    let manifest = client.get_manifest(reference).await?;
    assert_eq!(Some(&manifest.digest), image.digest());
    for blob in &image.blobs {
        let bytes =
            client.get_blob(reference, &blob.digest, Some(blob.size)).await?.read(FILE_BYTES * 2).await?;
        assert_eq!(Digest::of(&bytes), blob.digest);
        let (from, to) = (blob.size / 3, blob.size / 2 + 1);
        let mut range = client.get_blob_range(reference, &blob.digest, from..to).await?;
        let mut part = Vec::new();
        while let Some(chunk) = range.chunk().await? {
            part.extend_from_slice(&chunk);
        }
        let (from, to) = (usize::try_from(from).unwrap(), usize::try_from(to).unwrap());
        assert!(part == bytes[from..to], "a range has other bytes than the whole");
    }
    Ok(())
}

#[test]
fn pushes_and_pulls_survive_a_failing_network() {
    let mut seed = Seed::from_env();
    let dir = tempfile::tempdir().unwrap();
    let (registry, runtime) = (Registry::start(), runtime());
    let (mut faults, mut resumed) = (0, 0);
    for round in 0..ROUNDS {
        let root = dir.path().join(format!("tree-{round}"));
        tree(&root, &mut seed, FILE_BYTES);
        let progress = NoProgress::shared();
        let work = dir.path().join("work");
        let image = runtime.block_on(pack(&source(&root), &work, &progress)).unwrap();
        // A connection that lasts ends a round's faults, so few of them do.
        let decide = |seed: &mut Seed| match seed.below(20) {
            0..=3 => Fault::Status([500, 502, 503, 504, 429][usize::try_from(seed.below(5)).unwrap()]),
            4..=16 => Fault::Cut { after: 1 + seed.below(300_000), reset: seed.below(2) == 0 },
            17..=18 => Fault::Slow(Duration::from_micros(100 + seed.below(900))),
            _ => Fault::Pass,
        };
        let proxy = Proxy::start(&registry.host, Seed::new(seed.next()), Box::new(decide));
        let client = registry.client_at(&proxy.url).with_patience(Patience { retries: 20 });
        let reference: Reference = format!("app:v{round}").parse().unwrap();
        let options = PushOptions::default();
        let summary = runtime.block_on(push_with(&image, &reference, &client, &progress, &options)).unwrap();
        assert!(summary.bytes_sent >= image.bytes_packed, "{summary:?}");
        runtime.block_on(pull(&registry.client(), &reference, &image)).unwrap();
        runtime.block_on(pull(&client, &reference, &image)).unwrap();
        faults += proxy.counts.faults.load(Ordering::Relaxed);
        resumed += client.stats().resumed;
        assert_eq!(client.stats().gave_up, 0);
    }
    eprintln!("{faults} faults, {resumed} resumed");
    assert!(faults > ROUNDS && resumed > ROUNDS, "{faults} faults, {resumed} resumed");
}

/// How long the registry is away: longer than services wait for it, and shorter than commands do.
const AWAY: Duration = Duration::from_secs(6);

#[test]
fn a_pull_bears_a_registry_that_is_away_for_a_while_and_says_so() {
    let (mut seed, home, registry) = (Seed::from_env(), Home::new(), Registry::start());
    let root = home.path().join("tree");
    tree(&root, &mut seed, FILE_BYTES);
    let push = ["push", root.to_str().unwrap(), "app:v1"];
    let pushed = ran(registry.command(&home, &registry.url(), &push).output().unwrap());
    assert_eq!(pushed.code, 0, "{pushed:?}");
    // The first connection breaks in the middle of the layer; then there is nobody for a while.
    let mut broke = None;
    let decide = move |_: &mut Seed| match broke {
        None => {
            broke = Some(Instant::now());
            Fault::Cut { after: 1_000_000, reset: true }
        }
        Some(at) if at.elapsed() < AWAY => Fault::Cut { after: 0, reset: true },
        Some(_) => Fault::Pass,
    };
    let proxy = Proxy::start(&registry.host, seed, Box::new(decide));
    let store = home.path().join("store");
    let pull = ["image", "--store", store.to_str().unwrap(), "pull", "app:v1", "-o", "json"];
    let pulled = ran(registry.command(&home, &proxy.url, &pull).output().unwrap());
    assert_eq!(pulled.code, 0, "{pulled:?}");
    assert!(pulled.err.contains("is away, trying again"), "{pulled:?}");
    let pulled: serde_json::Value = serde_json::from_str(&pulled.out).unwrap();
    assert!(pulled["stale"].is_null() && pulled["bytes_fetched"].as_u64() > Some(1_000_000), "{pulled}");
}

/// A manifest that names one small blob.
fn manifest(blob: &BlobFile) -> RawManifest {
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let descriptor = |kind: &str| {
        serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": blob.digest, "size": blob.size
        })
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type, "config": descriptor("config.v1+json"),
        "layers": [descriptor("layer.v1.tar")],
    });
    let bytes = manifest.to_string().into_bytes();
    RawManifest { digest: Digest::of(&bytes), media_type: media_type.to_owned(), bytes: bytes.into() }
}

#[test]
fn flipped_bytes_on_the_wire_are_caught() {
    let mut seed = Seed::from_env();
    let dir = tempfile::tempdir().unwrap();
    let (registry, runtime) = (Registry::start(), runtime());
    let next = Arc::new(Mutex::new(None));
    let fault = next.clone();
    let decide = move |_: &mut Seed| fault.lock().unwrap().take().unwrap_or(Fault::Pass);
    let proxy = Proxy::start(&registry.host, seed.clone(), Box::new(decide));
    let (direct, progress) = (registry.client(), NoProgress::shared());
    let path = dir.path().join("blob");
    let item = Item { stage: Stage::Send, name: "blob".to_owned() };
    let mut caught = [0, 0];
    let rounds = rounds(FLIPS.0, FLIPS.1) as u64;
    for round in 0..rounds {
        let up = round % 2 == 0;
        let bytes = seed.bytes(FLIPPED_BYTES);
        std::fs::write(&path, &bytes).unwrap();
        let blob =
            BlobFile { digest: Digest::of(&bytes), size: bytes.len() as u64, path: path.clone(), offset: 0 };
        let manifest = manifest(&blob);
        let reference: Reference = "app:v1".parse().unwrap();
        let push = async |client: &Client| {
            client.put_blob(&reference, &blob, &item, &progress).await?;
            client.put_manifest(&reference, &manifest).await
        };
        let pull = async |client: &Client, reference: &Reference| {
            assert_eq!(client.get_manifest(reference).await?.bytes, manifest.bytes);
            let found = client.get_blob(reference, &blob.digest, Some(blob.size)).await?;
            assert!(found.read(FLIPPED_BYTES).await? == bytes);
            anyplace_images::Result::Ok(())
        };
        if !up {
            runtime.block_on(push(&direct)).unwrap();
        }
        // Anywhere in what the first connection carries: heads and bodies.
        *next.lock().unwrap() = Some(Fault::Flip { up, at: seed.below(FLIPPED_BYTES as u64 * 3 / 2) });
        let client = registry.client_at(&proxy.url).with_patience(Patience::NONE);
        let transfer = async { if up { push(&client).await } else { pull(&client, &reference).await } };
        let outcome = runtime.block_on(async { tokio::time::timeout(PATIENCE, transfer).await });
        match outcome {
            // A header that nobody needs, or bytes that came before the flip: but then all must be right. By digest,
            // since a flip in the request's line can turn one tag into another, which only TLS could show.
            Ok(Ok(())) => runtime.block_on(pull(&direct, &reference.at(&manifest.digest))).unwrap(),
            _ => caught[usize::from(up)] += 1,
        }
        // Whatever happened, what the registry has is what its digest says.
        runtime.block_on(async {
            if let Ok(stored) = direct.get_blob(&reference, &blob.digest, None).await {
                stored.read(FLIPPED_BYTES).await.unwrap();
            }
        });
    }
    let flips = proxy.counts.flips.load(Ordering::Relaxed);
    eprintln!("{flips} bytes flipped; refused: {} pulls, {} pushes", caught[0], caught[1]);
    assert!(
        flips > rounds / 2 && caught.iter().all(|caught| *caught > rounds / 5),
        "{flips} flips, {caught:?} caught"
    );
}
