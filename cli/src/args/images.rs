//! Arguments of the commands that make images.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::OutputArg;

/// What to push.
#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// Folder with a root file system, OCI layout folder, OCI or docker archive, or an image elsewhere:
    /// docker-daemon:NAME, podman:NAME, containerd:NAME, registry:[URL/]NAME, docker://NAME
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) source: String,
    /// Name to push it under, such as `hello:v1`
    pub(crate) reference: String,
    /// Word of the command that always runs; repeat for more, or give all as a JSON array
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub(crate) entrypoint: Vec<String>,
    /// Word of the default arguments; repeat for more, or give all as a JSON array
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub(crate) cmd: Vec<String>,
    /// Environment variable; repeat for more
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Folder in which it starts
    #[arg(long, value_name = "PATH")]
    pub(crate) workdir: Option<String>,
    /// User that it runs as
    #[arg(long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Port that it listens on; repeat for more
    #[arg(long, value_name = "PORT[/udp]")]
    pub(crate) port: Vec<String>,
    /// Which image of a layout or archive that holds several
    #[arg(long, value_name = "NAME")]
    pub(crate) image: Option<String>,
    /// All platforms of an image in another registry, not only this machine's
    #[arg(long)]
    pub(crate) all_platforms: bool,
    /// File with one line `user:password` for the registry that the image comes from
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) source_credentials_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) send: SendArgs,
}

/// How to send an image.
#[derive(Debug, Default, Args)]
pub(crate) struct SendArgs {
    /// Leave the layers of an image as they are, and do not pack them as zstd:chunked
    #[arg(long)]
    pub(crate) keep_layers: bool,
    /// Repository of the same registry that may have some of the layers; repeat for more
    #[arg(long, value_name = "REPOSITORY")]
    pub(crate) mount_from: Vec<String>,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// What to build.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Folder that the Dockerfile copies from
    #[arg(value_name = "CONTEXT", value_hint = ValueHint::DirPath)]
    pub(crate) folder: PathBuf,
    /// Dockerfile [default: Dockerfile or Containerfile in the folder]
    #[arg(short = 'f', long = "file", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// Name to push it under, such as `hello:v1`
    #[arg(short = 't', long = "tag", value_name = "REFERENCE")]
    pub(crate) reference: String,
    #[command(flatten)]
    pub(crate) send: SendArgs,
}
