//! `push`: from a folder, OCI layout or OCI archive to the registry.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use anyplace_images::{ImageSpec, PushSummary, Reference, Source};
use anyplace_model::Bytes;

use crate::{args::PushArgs, context::Session, output, progress};

/// What a shell says of a program that SIGINT ended.
const INTERRUPTED: u8 = 130;

pub(super) async fn run(session: &Session, args: PushArgs) -> anyhow::Result<ExitCode> {
    // The folder goes when this function returns, also where Ctrl-C ends it half-way.
    let work = tempfile::Builder::new()
        .prefix("anyplace-push-")
        .tempdir()
        .context("no folder for temporary files; set TMPDIR to a place with room")?;
    tokio::select! {
        result = push(session, args, work.path()) => result.map(|()| ExitCode::SUCCESS),
        _ = tokio::signal::ctrl_c() => {
            output::note("interrupted; the registry keeps what it has, and the next push goes on from there");
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

async fn push(session: &Session, args: PushArgs, work: &std::path::Path) -> anyhow::Result<()> {
    let reference: Reference = args.reference.parse()?;
    let source = source(args)?;
    let client = session.registry()?;
    let progress = progress::for_stderr();
    let image = anyplace_images::pack(&source, work, &progress).await?;
    let summary = anyplace_images::push(&image, &reference, &client, &progress)
        .await
        .context("push; --registry or the context says where the registry is")?;
    output::note(summarise(&reference, &summary));
    output::line(Reference { digest: Some(summary.digest), ..tagged(&reference) })
}

fn source(args: PushArgs) -> anyhow::Result<Source> {
    let path = args.source;
    let spec = ImageSpec {
        entrypoint: words(args.entrypoint, "--entrypoint")?,
        cmd: words(args.cmd, "--cmd")?,
        env: args.env,
        workdir: args.workdir,
        user: args.user,
        ports: args.port,
        ..ImageSpec::default()
    };
    if !path.exists() {
        bail!(
            "there is no `{}` to push; give a folder with a root file system, an OCI layout, or an OCI archive",
            path.display()
        );
    }
    let settings = spec != ImageSpec::default();
    match Source::detect(&path, spec)? {
        Source::Layout { path, .. } if settings => bail!(
            "`{}` is an image already, which says itself how it runs; leave out --entrypoint, --cmd, --env, --workdir, \
             --user and --port",
            path.display()
        ),
        Source::Layout { path, .. } => Ok(Source::Layout { path, name: args.image }),
        Source::Directory { root, .. } if args.image.is_some() => {
            bail!("`{}` is a folder, which holds one image; leave out --image", root.display())
        }
        directory => Ok(directory),
    }
}

/// Each value is a word; one that is a JSON array stands for all of its words.
fn words(values: Vec<String>, flag: &str) -> anyhow::Result<Vec<String>> {
    let mut words = Vec::new();
    for value in values {
        if value.starts_with('[') {
            let list: Vec<String> = serde_json::from_str(&value).with_context(|| {
                format!(
                    "{flag}: `{value}` is not an array of words; write one such as '[\"/bin/httpd\",\"-f\"]'"
                )
            })?;
            words.extend(list);
        } else {
            words.push(value);
        }
    }
    Ok(words)
}

/// With the tag that the push set.
fn tagged(reference: &Reference) -> Reference {
    match reference.digest {
        Some(_) => reference.clone(),
        None => reference.canonical(),
    }
}

fn summarise(reference: &Reference, summary: &PushSummary) -> String {
    let size = |bytes: u64| output::size(Bytes(bytes));
    let there = match summary.skipped {
        0 => String::new(),
        1 => ", 1 blob was there already".into(),
        skipped => format!(", {skipped} blobs were there already"),
    };
    format!(
        "pushed {reference}: read {}, packed to {}, sent {}{there}, in {:.1}s",
        size(summary.bytes_read),
        size(summary.bytes_packed),
        size(summary.bytes_sent),
        summary.elapsed.as_secs_f64(),
    )
}
