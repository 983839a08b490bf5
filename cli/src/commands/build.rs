//! `build`: from a Dockerfile to the registry, by a builder that is installed.

use std::process::ExitCode;

use anyplace_images::{Build, BuildOptions, Reference, Source};

use crate::{args::BuildArgs, commands::push, context::Session};

pub(super) async fn run(session: &Session, args: BuildArgs) -> anyhow::Result<ExitCode> {
    let reference: Reference = args.reference.parse()?;
    // The builder's own name for it: a digest is none that can be set.
    let name = Reference { digest: None, ..reference.canonical() }.to_string();
    let options = BuildOptions {
        args: args.build_arg,
        target: args.target,
        platform: args.platform,
        secrets: args.secret,
        no_cache: args.no_cache,
    };
    let source = Source::Build(Build { context: args.folder, dockerfile: args.file, name, options });
    push::send(session, source, &reference, &args.send).await
}
