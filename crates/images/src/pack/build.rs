//! Builds a Dockerfile with a builder that is installed, and takes its result without compression in between.
//!
//! Each builder is asked first whether it works, since a client without its daemon is installed but of no use.

mod options;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::Command;

use super::daemon::{Daemon, export, run};
use crate::error::{Error, Result};
use crate::progress::{Item, SharedProgress, Stage};
pub use options::{BuildOptions, BuildSecret};

/// Lines of a builder's output that an error repeats.
const COMPLAINT_LINES: usize = 20;

/// What to build.
#[derive(Clone, Debug)]
pub struct Build {
    /// The folder that the Dockerfile copies from.
    pub context: PathBuf,
    /// The Dockerfile, where it isn't `Dockerfile` or `Containerfile` in the context.
    pub dockerfile: Option<PathBuf>,
    /// The name that the builder keeps the result under, in its own storage.
    pub name: String,
    /// How to build it.
    pub options: BuildOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Builder {
    Buildah,
    Docker,
    Buildctl,
    Podman,
}

/// In order of preference: without a daemon first, but podman last, whose storage is buildah's.
const BUILDERS: [Builder; 4] = [Builder::Buildah, Builder::Docker, Builder::Buildctl, Builder::Podman];

impl Builder {
    fn program(self) -> &'static str {
        match self {
            Builder::Buildah => "buildah",
            Builder::Docker => "docker",
            Builder::Buildctl => "buildctl",
            Builder::Podman => "podman",
        }
    }

    /// What only succeeds where it can build.
    fn probe(self) -> &'static [&'static str] {
        match self {
            Builder::Buildah | Builder::Podman => &["--version"],
            Builder::Docker => &["version"],
            Builder::Buildctl => &["debug", "workers"],
        }
    }
}

impl fmt::Display for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.program())
    }
}

/// Builds, and gives the layout folder or archive in `dir` that holds the result.
pub(super) async fn build(build: &Build, dir: &Path, progress: &SharedProgress) -> Result<PathBuf> {
    let dockerfile = dockerfile(build)?;
    let builder = choose().await?;
    let more = build.options.arguments(builder)?;
    let item = Item { stage: Stage::Build, name: builder.to_string() };
    progress.started(&item, 0);
    let (file, context) = (text(&dockerfile), text(&build.context));
    let name = build.name.as_str();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let run_builder = async |first: Vec<String>, last: &[&str]| {
        let arguments = [first, more, words(last)].concat();
        watched(builder, &arguments, build.options.variable(builder), &item, progress).await
    };
    let from = ["-t", name, "-f", &file, &context];
    let apart = build.options.stays_apart(builder);
    let layers = if apart { "--layers=false" } else { "--layers" };
    let forget = async |image: &str| {
        if !apart {
            return Ok(());
        }
        let help = "remove it yourself: later builds would take it for one of another platform";
        run(builder.program(), &words(&["rmi", "--force", image]), help).await
    };
    let result = match builder {
        Builder::Buildah => {
            let id_file = dir.join("image-id");
            let args = words(&["build", layers, "--iidfile", &text(&id_file)]);
            run_builder(args, &from).await?;
            let id = std::fs::read_to_string(&id_file).map_err(Error::io("reading", &id_file))?;
            let to = dir.join("built");
            let place = format!("dir:{}", to.display());
            let args = ["push", "--quiet", "--disable-compression", id.trim(), &place];
            run("buildah", &words(&args), "check that `buildah images` lists the image").await?;
            forget(id.trim()).await?;
            to
        }
        Builder::Docker => {
            run_builder(words(&["build"]), &from).await?;
            export(Daemon::Docker, name, dir, progress).await?
        }
        Builder::Podman => {
            run_builder(words(&["build", layers]), &from).await?;
            let to = export(Daemon::Podman, name, dir, progress).await?;
            forget(name).await?;
            to
        }
        Builder::Buildctl => {
            let to = dir.join("built.tar");
            let folder = text(dockerfile.parent().unwrap_or(Path::new(".")));
            let args = vec![
                "build".to_owned(),
                "--frontend=dockerfile.v0".to_owned(),
                format!("--local=context={context}"),
                format!("--local=dockerfile={folder}"),
                format!("--opt=filename={}", dockerfile.file_name().unwrap_or_default().to_string_lossy()),
                format!(
                    "--output=type=oci,compression=uncompressed,force-compression=true,dest={}",
                    to.display()
                ),
            ];
            run_builder(args, &[]).await?;
            to
        }
    };
    progress.finished(&item);
    Ok(result)
}

/// The Dockerfile, known to be there.
fn dockerfile(build: &Build) -> Result<PathBuf> {
    if !build.context.is_dir() {
        let reason = "expected the folder that the Dockerfile copies from".to_owned();
        return Err(Error::InvalidSource { path: build.context.clone(), reason });
    }
    let candidates = match &build.dockerfile {
        Some(file) => vec![file.clone()],
        None => ["Dockerfile", "Containerfile"].map(|name| build.context.join(name)).to_vec(),
    };
    let found = candidates.iter().find(|file| file.is_file());
    // By its whole path: the builders disagree on what a relative one is relative to.
    let found =
        found.map(|file| std::path::absolute(file).map_err(Error::io("reading", file))).transpose()?;
    found.ok_or_else(|| Error::InvalidSource {
        path: build.context.clone(),
        reason: match &build.dockerfile {
            Some(file) => format!("there is no `{}`", file.display()),
            None => "it has no Dockerfile and no Containerfile; name one with --file".to_owned(),
        },
    })
}

/// The first builder that works.
async fn choose() -> Result<Builder> {
    let mut looked = Vec::new();
    for builder in BUILDERS {
        let arguments: Vec<String> = builder.probe().iter().map(|word| (*word).to_owned()).collect();
        match run(builder.program(), &arguments, "").await {
            Ok(()) => return Ok(builder),
            Err(Error::Program { reason, .. }) => looked.push(format!("{builder}: {reason}")),
            Err(error) => return Err(error),
        }
    }
    Err(Error::Unsupported {
        what: format!("building without a builder ({})", looked.join("; ")),
        help: "install one, such as the package buildah".to_owned(),
    })
}

/// Runs a builder, whose output goes to `progress`.
async fn watched(
    builder: Builder,
    arguments: &[String],
    variable: Option<(&str, &str)>,
    item: &Item,
    progress: &SharedProgress,
) -> Result<()> {
    let failed = |reason: String| Error::Program {
        program: format!("{builder} build"),
        reason,
        help: "its output above says where".to_owned(),
    };
    let mut child = Command::new(builder.program())
        .args(arguments)
        .envs(variable)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(format!("it can't be started ({e})")))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (out, err) = tokio::join!(tell(out, item, progress), tell(err, item, progress));
    let status = child.wait().await.map_err(|e| failed(e.to_string()))?;
    if status.success() {
        return Ok(());
    }
    let lines = if err.is_empty() { out } else { err };
    Err(failed(format!("it ended with {status}: {}", lines.join("; "))))
}

/// Passes lines on, and keeps the last ones.
async fn tell(from: Option<impl AsyncRead + Unpin>, item: &Item, progress: &SharedProgress) -> Vec<String> {
    let mut kept = Vec::new();
    let Some(from) = from else { return kept };
    let mut lines = BufReader::new(from).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if line.is_empty() {
            continue;
        }
        progress.said(item, &line);
        if kept.len() == COMPLAINT_LINES {
            kept.remove(0);
        }
        kept.push(line);
    }
    kept
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
