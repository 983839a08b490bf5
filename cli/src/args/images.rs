//! Arguments of the commands about images: making them, keeping them on a machine, and warming them.

use std::path::PathBuf;

use anyplace_images::BuildSecret;
use anyplace_model::LocationId;
use clap::{Args, Subcommand, ValueHint, builder::NonEmptyStringValueParser};

use super::{OutputArg, WaitArgs};

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
    /// Value of an ARG of the Dockerfile, or its name for what the environment has; repeat for more
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = build_arg)]
    pub(crate) build_arg: Vec<String>,
    /// Stage to build [default: the last one]
    #[arg(long, value_name = "STAGE", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) target: Option<String>,
    /// Platform to build for, such as `linux/arm64` [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = platform)]
    pub(crate) platform: Option<String>,
    /// Secret for `RUN --mount=type=secret`, which the image does not keep; repeat for more
    #[arg(long, value_name = "id=NAME,src=FILE|env=VARIABLE")]
    pub(crate) secret: Vec<BuildSecret>,
    /// Build all anew, and take nothing from the builder's cache
    #[arg(long)]
    pub(crate) no_cache: bool,
    #[command(flatten)]
    pub(crate) send: SendArgs,
}

fn build_arg(text: &str) -> Result<String, String> {
    let name = text.split_once('=').map_or(text, |(name, _)| name);
    let named = !name.is_empty() && !name.contains(char::is_whitespace);
    named.then(|| text.to_owned()).ok_or_else(|| "expected NAME=VALUE or NAME".to_owned())
}

/// One platform: an image of several is one push for each, under tags of their own.
fn platform(text: &str) -> Result<String, String> {
    let word = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    let parts = text.split('/').count();
    let one = (2..=3).contains(&parts) && text.split('/').all(word);
    one.then(|| text.to_owned()).ok_or_else(|| "expected one platform, such as linux/arm64".to_owned())
}

/// Images on this machine.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Pull an image into a store of its own, and mount it where asked
    ///
    /// For looking into images, and for machines without an agent; the agent pulls what it needs by itself.
    Pull(ImagePullArgs),
    /// Pack an image into a new OCI layout folder, without a registry
    Pack {
        /// As for `push`
        #[arg(value_hint = ValueHint::AnyPath)]
        source: String,
        /// New folder
        #[arg(value_hint = ValueHint::DirPath)]
        layout: PathBuf,
        #[command(flatten)]
        output: OutputArg,
    },
    #[command(flatten)]
    Store(ImageStoreCommand),
}

/// Which store.
#[derive(Debug, Args)]
#[command(next_help_heading = "Store")]
pub(crate) struct ImageStoreArgs {
    /// Configuration of the machine agent, which is asked
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/etc/anyplace/machine-agent.toml",
        value_hint = ValueHint::FilePath
    )]
    pub(crate) config: PathBuf,
    /// Folder of a store that no agent has open
    #[arg(long, global = true, value_name = "FOLDER", conflicts_with = "config", value_hint = ValueHint::DirPath)]
    pub(crate) store: Option<PathBuf>,
}

/// Looking after a store.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageStoreCommand {
    /// List images
    Ls {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show what images take on disk, and what they share
    Du {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show an image's layers and how it runs
    Inspect {
        /// Image reference
        image: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show which files differ between two images, and what they share
    Diff {
        /// Image reference
        first: String,
        /// Image reference
        second: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Remove an image that nothing uses
    Rm {
        /// Image reference
        image: String,
    },
    /// Hash everything again, and drop what is damaged; exit code 1 if anything was
    Verify {
        #[command(flatten)]
        output: OutputArg,
    },
}

/// A pull into a store.
#[derive(Debug, Args)]
pub(crate) struct ImagePullArgs {
    /// Image reference
    pub(crate) image: String,
    /// Mount the image there for reading; `umount` ends it
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub(crate) mount: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// Warm images.
#[derive(Debug, Subcommand)]
pub(crate) enum PrewarmCommand {
    /// Ask for an image on machines, or change what is asked
    Set(PrewarmSetArgs),
    /// List what is asked for, and how far each machine is
    Ls {
        #[command(flatten)]
        output: OutputArg,
    },
    /// No longer ask for an image
    Rm {
        /// As `ls` lists it, or without the digest
        image: String,
    },
}

/// A wish for warm images.
#[derive(Debug, Args)]
pub(crate) struct PrewarmSetArgs {
    /// Image reference
    pub(crate) image: String,
    /// Only in this location; may be given several times [default: all]
    #[arg(long, value_name = "LOCATION")]
    pub(crate) location: Vec<LocationId>,
    /// On so many machines of each location [default: all]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) machines: Option<u32>,
    /// 0 to 100; a higher one is fetched first
    #[arg(long, default_value_t = 50, value_name = "NUMBER")]
    pub(crate) priority: u8,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}
