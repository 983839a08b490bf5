//! Images that docker, podman or containerd hold: their own programs write an archive, which is read like any other.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use crate::error::{Error, Result};
use crate::progress::{Item, SharedProgress, Stage};

/// How often the size of a growing archive is told.
const TOLD_EVERY: Duration = Duration::from_millis(200);
/// Most of a program's complaint that is kept: the last lines say what is wrong.
const COMPLAINT_MAX_BYTES: usize = 2_000;

/// Who holds the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// A docker daemon, by `docker save`.
    Docker,
    /// Podman's storage, by `podman save`.
    Podman,
    /// A containerd, by `ctr images export`; its namespace is that of the variable `CONTAINERD_NAMESPACE`.
    Containerd,
}

impl Daemon {
    /// The prefix that names it in a source.
    pub fn prefix(self) -> &'static str {
        match self {
            Daemon::Docker => "docker-daemon",
            Daemon::Podman => "podman",
            Daemon::Containerd => "containerd",
        }
    }

    fn program(self) -> &'static str {
        match self {
            Daemon::Docker => "docker",
            Daemon::Podman => "podman",
            Daemon::Containerd => "ctr",
        }
    }

    /// What writes the image into `to`. Layers are left uncompressed where the program can.
    fn arguments(self, image: &str, to: &str) -> Vec<String> {
        let words: &[&str] = match self {
            Daemon::Docker => &["save", "--output", to, image],
            Daemon::Podman => {
                &["save", "--quiet", "--uncompressed", "--format", "oci-archive", "--output", to, image]
            }
            Daemon::Containerd => &["images", "export", to, image],
        };
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn help(self) -> &'static str {
        match self {
            Daemon::Docker => "check that `docker images` lists the image",
            Daemon::Podman => "check that `podman images` lists the image",
            Daemon::Containerd => {
                "check that `ctr images ls` lists the image, by its full name; CONTAINERD_ADDRESS and \
                 CONTAINERD_NAMESPACE say where it looks"
            }
        }
    }
}

impl fmt::Display for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.prefix())
    }
}

/// Writes the image into an archive in `dir`.
pub(super) async fn export(
    daemon: Daemon,
    image: &str,
    dir: &Path,
    progress: &SharedProgress,
) -> Result<PathBuf> {
    // A name that starts with a dash would be read as an option.
    if image.is_empty() || image.starts_with('-') {
        let reason = "expected the name of an image".to_owned();
        return Err(Error::InvalidReference { text: image.to_owned(), reason });
    }
    let to = dir.join("export.tar");
    let item = Item { stage: Stage::Export, name: image.to_owned() };
    progress.started(&item, 0);
    let watch = async {
        loop {
            tokio::time::sleep(TOLD_EVERY).await;
            if let Ok(metadata) = tokio::fs::metadata(&to).await {
                progress.moved(&item, metadata.len());
            }
        }
    };
    let arguments = daemon.arguments(image, &to.to_string_lossy());
    tokio::select! {
        result = run(daemon.program(), &arguments, daemon.help()) => result?,
        () = watch => {}
    }
    let size = std::fs::metadata(&to).map_err(Error::io("reading", &to))?.len();
    progress.moved(&item, size);
    progress.finished(&item);
    Ok(to)
}

/// Runs a program to its end; it is ended when the future is dropped.
pub(super) async fn run(program: &str, arguments: &[String], help: &str) -> Result<()> {
    let failed = |reason: String| Error::Program {
        program: format!("{program} {}", arguments.first().map_or("", String::as_str)),
        reason,
        help: help.to_owned(),
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => failed(format!("there is no program `{program}` here")),
            _ => failed(format!("it can't be started ({e})")),
        })?;
    let mut complaint = Vec::new();
    if let Some(mut stderr) = child.stderr.take() {
        let mut buffer = [0; 4 << 10];
        while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
            complaint.extend_from_slice(&buffer[..read]);
            complaint.drain(..complaint.len().saturating_sub(COMPLAINT_MAX_BYTES));
        }
    }
    let status = child.wait().await.map_err(|e| failed(e.to_string()))?;
    if status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&complaint).trim().replace('\n', "; ");
    Err(failed(format!("it ended with {status}: {complaint}")))
}
