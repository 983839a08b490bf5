//! `image ...`: images on this machine.

mod store;

use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use anyplace_images::{
    ImageSpec, Options, PackOptions, Patience, PullClass, PullOptions, PullStats, PulledImage, Reference,
    Source, Store, pack_with,
};
use anyplace_model::Bytes;
use serde::Serialize;

use crate::{
    args::{ImageCommand, ImagePullArgs, ImageStoreArgs},
    context::Session,
    output::{self, Format, size},
    progress, wait,
};

pub(super) async fn run(
    session: &Session,
    of: &ImageStoreArgs,
    command: ImageCommand,
) -> anyhow::Result<ExitCode> {
    match command {
        ImageCommand::Pull(args) => {
            let folder =
                of.store.as_deref().context("--store: expected the folder of a store to pull into")?;
            pull(session, folder, args).await?;
        }
        ImageCommand::Pack { source, layout, output } => {
            pack(session, &source, &layout, output.format).await?;
        }
        ImageCommand::Store(command) => return store::run(command, of).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// What is printed of a pull.
#[derive(Serialize)]
struct Pulled {
    /// The reference with its digest.
    reference: Reference,
    #[serde(flatten)]
    stats: PullStats,
    /// Why the registry couldn't be asked what the name means now.
    #[serde(skip_serializing_if = "Option::is_none")]
    stale: Option<String>,
    /// Milliseconds of the pull.
    pull_ms: f64,
    /// Milliseconds of the mount.
    mount_ms: Option<f64>,
}

async fn pull(session: &Session, folder: &Path, args: ImagePullArgs) -> anyhow::Result<()> {
    let reference: Reference = args.image.parse()?;
    if let Some(target) = args.mount.as_deref().filter(|target| !target.is_dir()) {
        bail!("--mount: {} is no folder; make it first", target.display());
    }
    let client = session.registry()?.with_patience(Patience::LONG);
    let store = Store::open(folder, Options::default())?;
    let options = PullOptions { progress: progress::for_stderr(), class: PullClass::Live };
    let begun = Instant::now();
    let pulling = store.pull(&reference, &client, &options);
    let image = wait::pulled(&client, &options.progress, pulling).await?;
    // The image can be used now; it is kept once it is on the disk, also where it can't be mounted.
    let shown = show(&image, &reference, &args, millis(begun.elapsed()));
    let settled = store.settle().await.context("the image is here, but can't be kept; pull it again");
    shown.and(settled)
}

/// Mounts the image where asked, and prints what it took.
fn show(
    image: &PulledImage,
    reference: &Reference,
    args: &ImagePullArgs,
    pull_ms: f64,
) -> anyhow::Result<()> {
    let mut mount_ms = None;
    if let Some(target) = &args.mount {
        let begun = Instant::now();
        image.mount_read_only(target)?;
        mount_ms = Some(millis(begun.elapsed()));
    }
    let pulled = Pulled {
        reference: Reference { digest: Some(image.digest.clone()), ..reference.canonical() },
        stats: image.stats,
        stale: image.stale.clone(),
        pull_ms,
        mount_ms,
    };
    if let Some(reason) = &pulled.stale {
        output::note(format_args!("{reason}; this is what the name meant when the registry last answered"));
    }
    if args.output.format == Format::Table {
        output::note(format_args!(
            "{} of {} fetched, {} found here, {} files, in {:.2}s",
            size(Bytes(pulled.stats.bytes_fetched)),
            size(Bytes(pulled.stats.layer_bytes)),
            size(Bytes(pulled.stats.bytes_reused)),
            pulled.stats.files,
            pull_ms / 1e3,
        ));
    }
    output::data(args.output.format, &pulled, || pulled.reference.to_string())
}

/// What is printed of an image that was packed.
#[derive(Serialize)]
struct Packed {
    digest: Option<anyplace_images::Digest>,
    bytes_read: u64,
    bytes_packed: u64,
    pack_ms: f64,
}

async fn pack(session: &Session, source: &str, layout: &Path, format: Format) -> anyhow::Result<()> {
    let source = match Source::named(source, &session.registry()?, false)? {
        Some(source) => source,
        None => Source::detect(Path::new(source), ImageSpec::default())?,
    };
    // Beside the layout: then its layers are moved there.
    let parent = layout.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let work = tempfile::Builder::new()
        .prefix(".anyplace-pack-")
        .tempdir_in(parent)
        .with_context(|| format!("no folder for temporary files in {}", parent.display()))?;
    let image = pack_with(&source, work.path(), &progress::for_stderr(), PackOptions::default()).await?;
    let packed = Packed {
        digest: image.digest().cloned(),
        bytes_read: image.bytes_read,
        bytes_packed: image.bytes_packed,
        pack_ms: millis(image.elapsed),
    };
    let (to, name) = (layout.to_owned(), "latest");
    tokio::task::spawn_blocking(move || image.save(&to, name)).await??;
    output::data(format, &packed, || {
        let read = size(Bytes(packed.bytes_read));
        format!(
            "{}: {read} packed to {} in {:.2}s",
            layout.display(),
            size(Bytes(packed.bytes_packed)),
            packed.pack_ms / 1e3
        )
    })
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
