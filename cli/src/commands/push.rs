//! `push`: from a folder, an image on disk, in a daemon or in another registry to the registry.

mod work;

use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use anyplace_images::{
    Client, Credentials, Error, ImageSpec, Journal, PackOptions, Patience, PushOptions, PushSummary,
    Reference, Source,
};
use anyplace_model::Bytes;
use serde::Serialize;

use crate::{
    args::{PushArgs, SendArgs},
    context::Session,
    output::{self, Format},
    progress, wait,
};
use work::Work;

/// What a shell says of a program that SIGINT ended.
const INTERRUPTED: u8 = 130;

/// What is printed of a push.
#[derive(Serialize)]
struct Pushed<'a> {
    /// The reference with its digest.
    reference: Reference,
    #[serde(flatten)]
    summary: &'a PushSummary,
}

pub(super) async fn run(session: &Session, mut args: PushArgs) -> anyhow::Result<ExitCode> {
    let reference: Reference = args.reference.parse()?;
    let send_args = std::mem::take(&mut args.send);
    let source = source(session, args)?;
    send(session, source, &reference, &send_args).await
}

/// Packs a source and pushes it, unless it is interrupted.
pub(super) async fn send(
    session: &Session,
    source: Source,
    reference: &Reference,
    args: &SendArgs,
) -> anyhow::Result<ExitCode> {
    // The folder goes when this function returns, also where Ctrl-C ends it half-way.
    let work = Work::new()?;
    tokio::select! {
        result = push(session, &source, reference, args, work.path()) => result.map(|()| ExitCode::SUCCESS),
        _ = tokio::signal::ctrl_c() => {
            output::note("interrupted; the registry keeps what it has, and the next push goes on from there");
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

async fn push(
    session: &Session,
    source: &Source,
    reference: &Reference,
    args: &SendArgs,
    work: &Path,
) -> anyhow::Result<()> {
    let client = session.registry()?;
    // A wrong address or password is better told before minutes of packing than after.
    let checked = wait::answer(client.registry(), client.check_push(reference), || true).await;
    checked.map_err(not_pushed)?;
    let client = client.with_patience(Patience::LONG);
    let progress = progress::for_stderr();
    let pack = PackOptions { keep_layers: args.keep_layers };
    let image = anyplace_images::pack_with(source, work, &progress, pack).await?;
    let options = PushOptions { mount_from: args.mount_from.clone(), journal: journal() };
    let summary = anyplace_images::push_with(&image, reference, &client, &progress, &options)
        .await
        .map_err(not_pushed)?;
    let pinned = Reference { digest: Some(summary.digest.clone()), ..tagged(reference) };
    let pushed = Pushed { reference: pinned.clone(), summary: &summary };
    if args.output.format == Format::Table {
        if std::io::stderr().is_terminal() {
            output::note(summarise(reference, &summary));
        } else {
            progress::event("summary", &pushed);
        }
    }
    output::data(args.output.format, &pushed, || pinned.to_string())
}

/// Says where the address comes from, where that may be what is wrong.
fn not_pushed(error: Error) -> anyhow::Error {
    match error {
        Error::RegistryUnreachable { .. } | Error::InvalidRegistry { .. } => {
            anyhow::Error::new(error).context("push; --registry or the context says where the registry is")
        }
        error => anyhow::Error::new(error).context("push"),
    }
}

/// Where uploads are remembered, so that a push after a kill goes on; without a home they aren't.
fn journal() -> Option<Journal> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    let dir = state.join("anyplace/uploads");
    Journal::open(&dir)
        .inspect_err(|error| {
            let dir = dir.display();
            output::note(format_args!(
                "uploads can't be remembered in {dir} ({error}): after a kill they begin again"
            ));
        })
        .ok()
}

fn source(session: &Session, args: PushArgs) -> anyhow::Result<Source> {
    let spec = ImageSpec {
        entrypoint: words(args.entrypoint, "--entrypoint")?,
        cmd: words(args.cmd, "--cmd")?,
        env: args.env,
        workdir: args.workdir,
        user: args.user,
        ports: args.port,
        ..ImageSpec::default()
    };
    let settings = spec != ImageSpec::default();
    let path = PathBuf::from(&args.source);
    // A folder of that name wins over a prefix.
    let named = if path.exists() {
        None
    } else {
        let client = from_client(session, &args.source, args.source_credentials_file.as_deref())?;
        Source::named(&args.source, &client, args.all_platforms)?
    };
    if named.is_none() && (args.all_platforms || args.source_credentials_file.is_some()) {
        bail!(
            "`{}` is no image in a registry; leave out --all-platforms and --source-credentials-file",
            args.source
        );
    }
    if let Some(source) = named {
        if settings || args.image.is_some() {
            bail!(
                "`{}` is an image already, which says itself how it runs; leave out --entrypoint, --cmd, --env, \
                 --workdir, --user, --port and --image",
                args.source
            );
        }
        return Ok(source);
    }
    if !path.exists() {
        bail!(
            "there is no `{}` to push; give a folder with a root file system, an OCI layout, an OCI or docker archive, \
             or an image such as podman:NAME or docker://NAME (`anyplace push --help` lists all)",
            path.display()
        );
    }
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

/// A client that reads from other registries, with the login that was given for the one that `source` names.
fn from_client(session: &Session, source: &str, credentials: Option<&Path>) -> anyhow::Result<Client> {
    let client = session.registry()?.with_patience(Patience::LONG);
    let Some(file) = credentials else { return Ok(client) };
    let credentials = Credentials::from_file(file)
        .context("the credentials of the image's registry can't be used; check --source-credentials-file")?;
    let name = source.strip_prefix("registry:").unwrap_or(source);
    let name = name.split_once("://").map_or(name, |(_, rest)| rest);
    let host = match name.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => "docker.io",
    };
    Ok(client.with_login(host, credentials))
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
    let there = match (summary.bytes_deduplicated, summary.skipped) {
        (0, 0) => String::new(),
        (bytes, 0) => format!(", {} of other blobs were there already", size(bytes)),
        (bytes, blobs) => {
            let blobs = if blobs == 1 { "1 blob".to_owned() } else { format!("{blobs} blobs") };
            format!(", {} were there already, with {blobs}", size(bytes))
        }
    };
    format!(
        "pushed {reference}: read {}, packed to {}, sent {}{there}, in {:.1}s",
        size(summary.bytes_read),
        size(summary.bytes_packed),
        size(summary.bytes_sent),
        summary.elapsed.as_secs_f64(),
    )
}
